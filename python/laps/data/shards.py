"""Shards of images and captions, tar files as webdataset, img2dataset and CLIP_benchmark write them.

As finite data with random access; :class:`laps.data.CaptionStream` reads them front to back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .listing import Listing
from .splits import in_order
from .tar_files import TAR_END, TarIndex, members_of, remember
from .tar_samples import Sample

__all__ = ["expand_braces", "parse_shards", "shard_files"]

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Of a name in braces: a slip of the keyboard must not fill the memory.
MOST_SHARDS = 1_000_000


def expand_braces(operation: str, text: str) -> list[str]:
    """The names that a name with braces stands for: ``{000..007}`` or ``{a,b}``; without braces itself.

    Raises:
        LapsValueError: braces that hold neither, or more names than a million.

    Example:
        >>> from laps.data.shards import expand_braces
        >>> expand_braces("load", "train-{08..10}.tar")
        ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    pieces = BRACES.split(text)
    choices = [[piece] if i % 2 == 0 else _choices(operation, text, piece) for i, piece in enumerate(pieces)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MOST_SHARDS:
        raise LapsValueError(
            _check.message(operation, f"{text} names {total} files", f"at most {MOST_SHARDS}")
        )
    return ["".join(names) for names in product(*choices)]


def _choices(operation: str, text: str, inside: str) -> list[str]:
    bounds = RANGE.fullmatch(inside)
    if bounds:
        first, last = bounds.groups()
        if (
            len(first) > 18
            or len(last) > 18
            or int(last) - int(first) >= MOST_SHARDS
            or int(first) > int(last)
        ):
            raise LapsValueError(
                _check.message(operation, f"{text} has {{{inside}}}", "{first..last}, first <= last")
            )
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise LapsValueError(_check.message(operation, f"{text} has {{{inside}}}", "{000..007} or {a,b}"))


def shard_files(operation: str, shards: object) -> list[Path]:
    """The tar files that are meant: a folder of them, a name, one with braces, or a list of such.

    Raises:
        LapsValueError: none, or one that is missing. LapsTypeError: no path.
    """
    if isinstance(shards, (list, tuple)):
        return [file for one in shards for file in shard_files(operation, one)]
    if not isinstance(shards, (str, os.PathLike)):
        expected = "a path, a name with braces, or a list of these"
        raise LapsTypeError(_check.message(operation, "shards are wrong", expected, _check.name_of(shards)))
    path = Path(shards)
    if path.is_dir():
        files = in_order(path.glob(f"*{TAR_END}"))
        if not files:
            seen = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise LapsValueError(_check.message(operation, f"{path} has no shard", f"*{TAR_END}", seen))
        return files
    files = [path] if path.exists() else [Path(name) for name in expand_braces(operation, str(path))]
    missing = [file for file in files if not file.exists()]
    if missing:
        of_all = f"{len(missing)} of {len(files)} missing" if len(files) > 1 else None
        raise LapsValueError(_check.message(operation, f"{missing[0]} is missing", "every shard", of_all))
    return files


def parse_shards(operation: str, files: Sequence[Path], split: str) -> Listing:
    """One split, of these shards: their headers and texts are read, their images are not."""
    listing = Listing(f"{files[0].absolute().parent.name}/{split}", "{}", [Path()])
    for file in files:
        status = file.stat()
        samples: dict[str, Sample] = {}
        images: dict[str, tuple[int, int]] = {}
        for member in members_of(operation, file):
            samples.setdefault(member.key, Sample(file, member.key)).add(member, with_content=False)
            if member.kind == "image":
                images[member.name] = (member.offset, member.size)
        remember(file, TarIndex((status.st_mtime_ns, status.st_size), images))
        for sample in samples.values():
            place, captions = sample.captions(operation)
            # JSON alone, without captions, is about something else, such as the shard.
            if sample.image is not None:
                image = listing.add_member(file / sample.image)
                for text in captions:
                    listing.add_caption(image, text, place)
    return listing
