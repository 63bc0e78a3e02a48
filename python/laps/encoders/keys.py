"""One message for weights that do not fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from torch import Tensor

from .. import _check
from ..errors import LapsValueError

__all__ = ["check_keys", "check_weights", "other_shape"]


def check_weights(source: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of the model; see :func:`check_keys`.

    Args:
        source: the file that they come from.
        own: the model's weights, under the names that they have in the file.
        given: the file's.
    """
    check_keys(
        source,
        missing=own.keys() - given.keys(),
        unexpected=given.keys() - own.keys(),
        mismatched=(
            other_shape(name, given[name].shape, own[name].shape)
            for name in own.keys() & given.keys()
            if given[name].shape != own[name].shape
        ),
    )


def other_shape(name: str, given: Iterable[int], own: Iterable[int]) -> str:
    """How :func:`check_keys` is told of a tensor that has another shape in the file than in the model."""
    return f"{name} {tuple(given)}, not {tuple(own)}"


def check_keys(
    source: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> None:
    """Raise a LapsValueError that names the file and lists the keys, if there are any."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    parts = [f"{kind}: {_some(names)}" for kind, keys in found.items() if (names := sorted(keys))]
    if parts:
        raise LapsValueError(
            _check.message("weights", f"{source} does not fit the model", "its keys", "; ".join(parts))
        )


def _some(keys: list[str], most: int = 6) -> str:
    """The first keys of each part of the model, and how many more there are."""
    parts = []
    for _, group in groupby(keys, key=lambda key: key.split(".")[0]):
        names = list(group)
        more = f" and {len(names) - most} more" if len(names) > most else ""
        parts.append(", ".join(names[:most]) + more)
    return ", ".join(parts)
