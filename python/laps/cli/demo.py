"""``laps demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_demo"]


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--open", action="store_true", help="show the report in a browser")
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from ..demo import run

    run(options.out, seed=options.seed, open_browser=options.open)
    return 0
