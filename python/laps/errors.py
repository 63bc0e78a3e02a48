"""The exceptions of laps.

Every message reads ``operation: argument rule-broken (expected X, got Y)``, for example
``similarity: words has C=768, but patches has C=512 (expected equal)``. The Rust core raises the same
classes.
"""

from __future__ import annotations

__all__ = ["LapsError", "LapsImportError", "LapsTypeError", "LapsValueError"]


class LapsError(Exception):
    """Base of everything that laps raises on purpose.

    Attributes:
        told_by_rank_0: of several ranks, whether the first one raised the same and will say so.
    """

    told_by_rank_0: bool = False


class LapsValueError(LapsError, ValueError):
    """An argument has the right type but a shape, a device or a value that the operation cannot take."""


class LapsTypeError(LapsError, TypeError):
    """An argument has the wrong type or dtype."""


class LapsImportError(LapsError, ImportError):
    """A library that is needed here and not for the rest of laps is not installed; the message names it."""
