"""The copy of the model that an index holds: loaded only if it is the model that the index was made with."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _check
from .._files import atomic_folder
from ..errors import LapsError
from ..model import LAPS
from .fingerprint import folder_fingerprint
from .manifest import MODEL

__all__ = ["copy_damage", "load_copy", "restore_copy"]

EXPECTED = (
    "the model that the index was made with; laps encode DIR -o INDEX --model M, or Index.open(model=...) "
    "and add, with M the same model, puts it back"
)


def load_copy(folder: Path, expected: str) -> LAPS:
    """The copy, on the CPU, in eval mode. To compare it takes about a second a gigabyte.

    Args:
        folder: of the index.
        expected: the fingerprint of the model that the index was made with.

    Raises:
        LapsError: it is missing, damaged, or another model; how to mend that is said.
    """
    damage = copy_damage(folder, expected)
    if damage is not None:
        raise LapsError(damage)
    place = _place(folder)
    try:
        return LAPS.from_pretrained(place)
    # An encoder of the user's own, for example, which no file describes.
    except LapsError as error:
        raise LapsError(_not_loaded(place, error)) from error


def copy_damage(folder: Path, expected: str) -> str | None:
    """What is wrong with the copy, in words; None if it is whole. Reads all of it."""
    try:
        place = _place(folder)
    except LapsError as error:
        return str(error)
    try:
        found = folder_fingerprint(place)
    # What a damaged file makes of the libraries that read it is not to be foreseen.
    except Exception as error:
        return _not_loaded(place, error)
    return None if found == expected else _not_the_model(place)


def restore_copy(folder: Path, model: LAPS, expected: str) -> None:
    """Put `model`, whose fingerprint is the expected one, in the place of a copy that is missing or damaged.

    The caller holds the folder's lock.

    Raises:
        OSError: no space; what was there stays.
    """
    if copy_damage(folder, expected) is not None:
        with atomic_folder(folder / MODEL) as temporary:
            model.save_pretrained(temporary)


def _place(folder: Path) -> Path:
    # Absolute: a relative name that is not there would be looked for on the hub.
    place = Path(os.path.abspath(folder / MODEL))
    if not place.is_dir():
        raise LapsError(_check.message("Index", f"{place} is missing", EXPECTED))
    return place


def _not_loaded(place: Path, error: Exception) -> str:
    what = f"{place}, the index's copy of the model, cannot be loaded"
    return _check.message("Index", what, EXPECTED, error)


def _not_the_model(place: Path) -> str:
    what = f"{place}, the index's copy of the model, is damaged or of another index"
    return _check.message("Index", what, EXPECTED)
