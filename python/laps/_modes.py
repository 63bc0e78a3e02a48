"""Modules in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

__all__ = ["eval_mode"]


class HasModes(Protocol):
    """A torch module, or what behaves as one."""

    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


@contextmanager
def eval_mode(module: HasModes) -> Iterator[None]:
    """The module in eval mode; then each of its parts as it was.

    Per part, for a frozen backbone is in eval mode while the rest trains.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
