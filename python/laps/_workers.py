"""Loader workers that leave signals to the main process, whether they are forked, spawned or served.

A scheduler, `timeout` or Ctrl-C ends all processes of a run at once, but the main one still needs a batch to
stop at, and ends its workers itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["end_workers", "leave_signals", "loading", "start_workers"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_signals(worker: int) -> None:
    """The ``worker_init_fn`` of a loader whose iteration starts by :func:`start_workers`.

    Ctrl-C does nothing to the worker, and neither does its first SIGTERM. A worker whose parent is gone ends
    by itself within seconds.
    """

    def ignore(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``; until its workers have come to :func:`leave_signals`, signals to them wait.

    Not with a fork server: whatever is blocked in it stays so in all that is started through it later, the
    caller's own processes too. It may die of SIGTERM, and its workers with it.
    """
    context: Any = loader.multiprocessing_context or multiprocessing
    method = context.get_start_method() if loader.num_workers else "fork"
    if method == "forkserver":
        forkserver.ensure_running()
        return iter(loader)
    if method == "spawn":
        # Started by what a loader makes first, it would take back what is blocked.
        resource_tracker.ensure_running()
    # A process inherits what is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers(iterator: object) -> None:
    """End the processes behind an iterator of :func:`start_workers`, or None, now.

    Else the traceback of what stopped the work keeps them, and they keep the main process: it sends them one
    SIGTERM as it exits, the one that they ignore, and waits.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


@contextlib.contextmanager
def loading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The batches of a pass, with workers that end with the block."""
    batches = start_workers(loader)
    try:
        yield batches
    finally:
        end_workers(batches)
