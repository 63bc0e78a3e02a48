"""Commands that torchrun may start, once for each rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..distributed import Ranks

__all__ = ["on_ranks"]


def on_ranks(function: Callable[[Ranks, argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command that calls the function with the ranks that torchrun started, or with this process alone.

    Its parser has the option ``--device``.
    """

    def command(options: argparse.Namespace) -> int:
        from .._launch import started_ranks

        # Of `laps train`, an option that is not given is not set.
        with started_ranks(getattr(options, "device", None)) as ranks:
            return function(ranks, options)

    return command
