"""The command ``laps`` before the package is imported: Ctrl-C ends it without a traceback then, too.

A package of its own, because to import anything of ``laps`` imports torch, which takes a second or more.
"""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def main() -> int:
    """What the console script calls; see :func:`laps.cli.main`."""
    # Where the shell ignores the signal for us (a job in the background), it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from laps.cli import main as run

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _leave(number: int, frame: object) -> None:
    # No exception: libraries turn one that comes while they are imported into others, or lose it.
    os.write(2, b"laps: interrupted\n")
    os._exit(128 + number)
