"""Which split a file or a folder holds, told by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DEV_NAMES", "SPLIT_NAMES", "canonical_split", "in_order", "split_of_name", "split_of_path"]

SPLIT_NAMES = ("train", "val", "dev", "valid", "validation", "test")
# One set, several names.
DEV_NAMES = {"val", "dev", "valid", "validation"}
# In names of files only: Karpathy's rest of COCO's val, and the 5,000 images of COCO's test.
FURTHER_NAMES = ("restval", "testall")


def canonical_split(name: str) -> str:
    """The split's name, where "restval" is training data too."""
    return "train" if name == "restval" else name


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


def in_order(files: Iterable[Path]) -> list[Path]:
    """Files in the order of their numbers: 2.tar before 10.tar."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", str(path))
        return [(i % 2 == 1, int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]

    return sorted(files, key=key)
