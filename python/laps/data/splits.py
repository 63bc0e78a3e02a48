"""Which split a file or a folder holds, told by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .. import _check
from ..errors import LapsValueError

__all__ = [
    "canonical_split",
    "choose_split",
    "files_of_splits",
    "folded_split",
    "grouped",
    "in_order",
    "split_of_name",
    "split_of_path",
]

SPLIT_NAMES = ("train", "val", "dev", "valid", "validation", "test")
# One set, several names.
DEV_NAMES = {"val", "dev", "valid", "validation"}
# In names of files only: Karpathy's rest of COCO's val, and the 5,000 images of COCO's test.
FURTHER_NAMES = ("restval", "testall")


def folded_split(name: str) -> str:
    """The split's usual name, where a table has "Train" or "TEST"; other names are left as they are."""
    folded = name.strip().lower()
    return folded if folded in SPLIT_NAMES + FURTHER_NAMES else name


def canonical_split(name: str) -> str:
    """The split's usual name, where "restval" is training data too."""
    folded = folded_split(name)
    return "train" if folded == "restval" else folded


def choose_split(operation: str, place: object, split: str, present: Iterable[str]) -> str:
    """The name that `split` has among those present, for "dev" and "val" are one.

    Raises:
        LapsValueError: it is not among them; with them.
    """
    present = list(present)
    same = DEV_NAMES if split in DEV_NAMES else {split}
    matching = [name for name in present if name == split] or [name for name in present if name in same]
    if not matching:
        raise LapsValueError(
            _check.message(operation, f"{place} has no split {split!r}", f"one of {', '.join(present)}")
        )
    return matching[0]


def split_of_name(name: str) -> str | None:
    """The split that a name speaks of, or None where it names none or several.

    Example:
        >>> from laps.data.splits import split_of_name
        >>> [split_of_name(name) for name in ("captions_val2014", "flickr30k_test_karpathy", "coco")]
        ['val', 'test', None]
    """
    words = re.findall("[a-z]+", name.lower())
    named = {canonical_split(word) for word in words if word in SPLIT_NAMES + FURTHER_NAMES}
    return named.pop() if len(named) == 1 else None


def split_of_path(path: Path) -> str:
    """The split that a file's name tells, else that of its folder's, else "all"."""
    return split_of_name(path.stem) or split_of_name(path.absolute().parent.name) or "all"


def grouped(files: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Files by the split that `split_of_path` tells of each."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(split_of_path(file), []).append(file)
    return {split: tuple(group) for split, group in groups.items()}


def files_of_splits(folder: Path, end: str) -> list[Path]:
    """The files with this ending in a folder, or else in folders in it that are called as splits."""
    here = in_order(file for file in folder.glob(f"*{end}") if file.is_file())
    below = (file for file in folder.glob(f"*/*{end}") if file.is_file() and split_of_name(file.parent.name))
    return here or in_order(below)


def in_order(files: Iterable[Path]) -> list[Path]:
    """Files in the order of their numbers: 2.tar before 10.tar."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", str(path))
        return [(i % 2 == 1, int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]

    return sorted(files, key=key)
