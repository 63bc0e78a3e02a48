"""Tensors in safetensors files, with errors that name the file and, where the system refused, say why."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import _check
from .errors import LapsValueError

__all__ = ["load_tensors", "save_tensors", "system_errors"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, not atomically. Raises OSError, without a file name, when the disk is full."""
    # Copies: safetensors refuses tensors that share their memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with system_errors():
        save_file(copies, path, {"format": "pt"})


def load_tensors(operation: str, path: Path) -> dict[str, Tensor]:
    """Read a file, onto the CPU. Raises LapsValueError with its name when it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise LapsValueError(
            _check.message(operation, f"{path} does not exist", "a safetensors file")
        ) from None
    except (SafetensorError, OSError) as error:
        raise LapsValueError(
            _check.message(operation, f"{path} cannot be read", "a safetensors file", error)
        ) from None


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the system refused to safetensors as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
