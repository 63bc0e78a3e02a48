"""One process at a time in a folder: the system holds the lock, and drops it when its owner dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from . import _check
from .errors import LapsValueError

__all__ = ["locked_folder"]

LOCK = ".lock"
_held: set[int] = set()


@contextlib.contextmanager
def locked_folder(operation: str, folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if missing, to the end of the block.

    The lock is one of the system on a file ``.lock``, which is removed at the end; one that a killed process
    left is taken over at once. Like :mod:`laps._files` this is for Linux and its kin, where fcntl is.

    Raises:
        LapsValueError: another process, or another part of this one, holds the folder (it is named).
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _take(operation, folder)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        # First the name, then the lock: whoever opened the file meanwhile sees that it is no longer there.
        (folder / LOCK).unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _take(operation: str, folder: Path) -> int:
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise LapsValueError(
                _check.message(operation, f"{folder} is in use", "one run at a time in a folder", owner)
            ) from None
        except OSError:
            # A file system without locks (some network ones): the run goes on without the protection.
            return descriptor
        # Else its last owner has removed it between the two calls above.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        os.close(descriptor)


def _let_go() -> None:
    """A forked process (a loader's worker) would hold the lock for as long as it outlives its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
