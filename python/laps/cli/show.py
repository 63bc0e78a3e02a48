"""``laps info`` and ``laps heads``."""

from __future__ import annotations

import argparse

__all__ = ["add_heads", "add_info"]


def add_heads(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("list", help="their names").set_defaults(command=_heads_list)


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_info)


def _heads_list(options: argparse.Namespace) -> int:
    from .. import heads

    print("\n".join(heads.head_names()))
    return 0


def _info(options: argparse.Namespace) -> int:
    from .._info import info

    print(info())
    return 0
