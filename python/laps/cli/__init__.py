"""The command ``laps``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import __version__, _check
from .._launch import WAIT
from ..errors import LapsError
from .compare import add_compare
from .convert import add_convert
from .data import add_data_commands
from .demo import add_demo
from .evaluate import add_eval
from .explain import add_explain
from .index import add_encode, add_index, add_search
from .show import add_heads, add_info
from .train import add_train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 1 where a check found faults; 2 for an error, of which standard error has one line; 128 + n where
    signal n ended the work: 130 for Ctrl-C, 143 for SIGTERM, 141 for a reader that went away.
    """
    # A terminal that cannot show a letter shows another; it does not end the work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        command: Callable[[argparse.Namespace], int] | None = getattr(options, "command", None)
        if command is None:
            parser.print_help()
            return 2
        status = command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads on (`laps info | head -1`); Python would complain once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (LapsError, OSError) as error:
        if not getattr(error, "told_by_rank_0", False):
            print(f"laps: {_check.printable(str(error))}", file=sys.stderr)
        number: int | None = getattr(error, "signal_number", None)
        return 2 if number is None else 128 + number
    except KeyboardInterrupt:
        print("laps: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once for all ranks: the usage of `laps train` fills a screen."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            # All were started with the same words. The first rank that ends has torchrun end the others,
            # which is not to happen before rank 0 has spoken.
            time.sleep(WAIT)
            self.exit(2)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="laps", description="Fine-grained image-text retrieval (LAPS, CVPR 2024).")
    parser.add_argument("--version", action="version", version=f"laps {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    for name, add, text in (
        ("demo", add_demo, "draw scenes, train on them, evaluate, search; writes a report"),
        ("train", add_train, "train a model on a data set"),
        ("eval", add_eval, "recall of a trained model on a split"),
        ("compare", add_compare, "train and evaluate several heads alike; writes their table"),
        ("convert", add_convert, "a checkpoint of the published code as a model of laps"),
        ("explain", add_explain, "why an image and a caption have their score"),
        ("data", add_data_commands, "look at data sets, or make one"),
        ("encode", add_encode, "make a folder of images an index, or bring it up to date"),
        ("search", add_search, "find images of an index by a sentence"),
        ("index", add_index, "check, compact or delete from an index"),
        ("heads", add_heads, "similarity heads"),
        ("info", add_info, "versions and backends"),
    ):
        add(commands.add_parser(name, help=text))
    return parser
