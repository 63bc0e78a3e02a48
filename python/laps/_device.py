"""Where to compute, as a user says it."""

from __future__ import annotations

import torch

from . import _check
from .errors import LapsValueError

__all__ = ["choose_device"]


def choose_device(operation: str, name: str | None) -> torch.device:
    """The device of this name; None: the GPU if there is one, else the CPU.

    Raises:
        LapsValueError: no such device, or not on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # The only way to know of any kind of device whether it is there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LapsValueError(
            _check.message(
                operation, f"device {name} cannot be used", "for example cpu, cuda, cuda:1", reason
            )
        ) from None
    return device
