"""Files of ``torch.save`` by strangers: tensors and plain values come out, and nothing in them runs."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from .. import _check
from ..errors import LapsValueError
from .file_kinds import refuse_other_kinds

__all__ = ["load_pickled"]

# Floats, integers and booleans, by kind and bytes.
NUMBER = re.compile(r"[fiu][1248]|b1")


class _NumberType:
    """In place of ``numpy.dtype``, which would take any state that a file gives it."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        if not isinstance(code, str) or NUMBER.fullmatch(code) is None:
            raise ValueError(f"a NumPy value of type {code!r}, which is no number")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.code = ">" + self.code


def _number(dtype: Any, data: Any) -> int | float | bool:
    """In place of ``numpy.core.multiarray.scalar``: a best rSum, for example, may be a ``numpy.float64``."""
    if not isinstance(dtype, _NumberType):
        raise ValueError("a NumPy value without a type")
    value: int | float | bool = np.frombuffer(data, dtype.code, count=1)[0].item()
    return value


# Beside tensors and containers, which torch allows; under the names that they have in a pickle. NumPy 2 moved
# its module.
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def load_pickled(operation: str, path: Path) -> Any:
    """What `torch.save` put into a file, in its zip form or the older one, on the CPU.

    Tensors, containers, numbers, strings and `argparse.Namespace` are made; a file that asks for anything
    else is refused before it gets it.

    Args:
        operation: for messages.
        path: of the file.

    Raises:
        LapsValueError: naming the file: it is damaged, another kind of file (which is named), or asks for
            another global, which is named.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from laps.conversion.unpickling import load_pickled
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.pth")
        ...     torch.save({"epoch": 3}, path)
        ...     load_pickled("example", path)
        {'epoch': 3}
    """
    refuse_other_kinds(operation, path)
    try:
        # Its warnings are of what is refused anyway, and of what its older form did.
        with _only_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    # Its unpickler runs into whatever a damaged file leads to: KeyError, TypeError, struct.error, ...
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
            # Where torch advises to switch its protection off, it has nothing to say of the file.
            if "weights_only" in reason or "Weights only" in reason:
                reason = "something else"
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{path} cannot be read",
                    "a file of torch.save",
                    reason or _check.name_of(error),
                )
            ) from None
        # torch leaves this module's name away.
        wanted = ascii(name[1] if "." in name[1] else f"builtins.{name[1]}").strip("'")
        raise LapsValueError(
            _check.message(
                operation,
                f"{path} asks for {wanted}",
                "tensors and plain values: what else a pickle asks for may run code of its maker",
            )
        ) from None


@contextmanager
def _only_allowed() -> Iterator[None]:
    """Neither what others allowed in this process is allowed here, nor is it forgotten afterwards."""
    theirs = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(ALLOWED)
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(theirs)
