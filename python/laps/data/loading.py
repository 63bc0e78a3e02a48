"""Batches of a DataLoader, with the errors of its workers in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import LapsError

__all__ = ["batches_of"]


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, or of its iterator.

    What a worker raised is raised again without the worker's traceback in its message.

    Raises:
        LapsError: as a data set raised it, here or in a worker.
    """
    try:
        yield from loader
    except LapsError as error:
        if "Original Traceback" not in str(error):
            raise
        # The last line of a traceback: the error's full name, and what it said.
        said = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        raise type(error)(said) from None
