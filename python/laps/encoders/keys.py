"""One message for weights that do not fit a model."""

from __future__ import annotations

from .. import _check
from ..errors import LapsValueError


def check_keys(source: str, missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
    """Raise a LapsValueError that lists the keys, if there are any."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    parts = [f"{kind}: {_some(keys)}" for kind, keys in found.items() if keys]
    if parts:
        raise LapsValueError(
            _check.message("weights", f"{source} does not fit the model", "its keys", "; ".join(parts))
        )


def _some(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
