"""SIGINT and SIGTERM while images are encoded: the work ends where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..errors import LapsError

__all__ = ["IndexingStoppedError", "stop_signals"]


class IndexingStoppedError(LapsError):
    """A signal ended the work early; what was encoded until then is in the index.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[IndexingStoppedError], tuple[str, int]]:
        # It travels to the other ranks.
        return type(self), (str(self), self.signal_number)

    @classmethod
    def after(cls, number: int, seen: int, images: int) -> IndexingStoppedError:
        """Of a signal that came when so many of a process's images had been encoded."""
        name = signal.Signals(number).name
        kept = "what is done is kept, and the same call goes on from there"
        return cls(f"Index.add: {name} after {seen} of {images} images; {kept}", number)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM, instead of what else they do, put their number into.

    A second signal of a kind has its usual effect: whoever cannot wait need not. Elsewhere than in the main
    thread, where signals do not arrive, the list stays empty.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for each in (signal.SIGTERM, signal.SIGINT):
        before[each] = signal.signal(each, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
