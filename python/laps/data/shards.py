"""Shards of images and captions, tar files as webdataset, img2dataset and CLIP_benchmark write them.

As finite data with random access; :class:`laps.data.CaptionStream` reads them front to back.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .listing import Listing
from .splits import choose_split, files_of_splits, grouped
from .tar_files import TAR_END, TarIndex, is_compressed_tar, members_of, remember
from .tar_samples import Sample, SampleNames

__all__ = ["expand_braces", "holds", "parse_shards", "shard_files", "shards_of_split"]

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Of a name in braces: a slip of the keyboard must not fill the memory.
MOST_SHARDS = 1_000_000
# For a message: how many members of a shard are counted, and how many endings and keys it has.
LOOKED_AT, SHOWN = 1000, 8


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
    """The tar files that are meant: a folder of them or of folders called as splits, a name, one with braces,
    or a list of such.

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
        files = files_of_splits(path, TAR_END)
        if not files:
            names = sorted(path.iterdir())
            compressed = any(map(is_compressed_tar, names))
            expected = f"*{TAR_END}" + ("; compressed files have to be named" if compressed else "")
            seen = ", ".join(file.name for file in names[:5]) or "nothing"
            raise LapsValueError(_check.message(operation, f"{path} has no shard", expected, seen))
        return files
    files = [path] if path.exists() else [Path(name) for name in expand_braces(operation, str(path))]
    missing = [file for file in files if not file.exists()]
    if missing:
        of_all = f"{len(missing)} of {len(files)} missing" if len(files) > 1 else None
        raise LapsValueError(_check.message(operation, f"{missing[0]} is missing", "every shard", of_all))
    return files


def shards_of_split(operation: str, files: Sequence[Path], split: str | None) -> list[Path]:
    """Those of the shards that are of a split, as the names of the files or of their folders tell.

    Args:
        operation: for messages.
        files: the shards.
        split: whose; None for all, which then have to be of one. Where no name tells, all are "train".

    Raises:
        LapsValueError: no shard is of that split, or None is given and they are of several.
    """
    groups = grouped(files)
    if set(groups) == {"all"} and split in (None, "train", "all"):
        return list(files)
    if split is not None:
        place = files[0].absolute().parent if len(files) > 1 else files[0]
        return list(groups[choose_split(operation, place, split, groups)])
    named = [name for name in groups if name != "all"]
    if len(named) > 1:
        raise LapsValueError(
            _check.message(
                operation,
                "shards are of several splits",
                f"one of them, such as split={named[0]!r}",
                "; ".join(f"{groups[name][0]} of {name}" for name in named),
            )
        )
    return list(files)


def parse_shards(operation: str, files: Sequence[Path], split: str) -> Listing:
    """One split, of these shards: their headers and texts are read, their images are not.

    What cannot be taken is among the faults of the listing.
    """
    listing = Listing(f"{files[0].absolute().parent.name}/{split}", "{}", [Path()])

    def fault(error: LapsValueError) -> None:
        listing.faults.append(str(error).removeprefix(f"{operation}: "))

    for file in files:
        names = SampleNames()
        samples = _samples(operation, file, fault)
        for sample in samples:
            if sample.image is not None:
                names.add(sample.key)
        for sample in samples:
            try:
                place, captions = sample.captions(operation, names)
            except LapsValueError as error:
                fault(error)
                continue
            if sample.image is not None:
                image = listing.add_member(file / sample.image)
                for text in captions:
                    listing.add_caption(image, text, place)
    if not listing.captions and not listing.faults:
        what = "captions" if listing.files else "images"
        place = f"{files[0]}, ..." if len(files) > 1 else str(files[0])
        expected = "KEY.jpg, .png or .webp with KEY.txt or a caption in KEY.json"
        listing.faults.append(_check.message(place, f"lists no {what}", expected, holds(files[0])))
    return listing


def _samples(operation: str, file: Path, fault: Callable[[LapsValueError], None]) -> list[Sample]:
    """The samples of a shard, up to where it is damaged; where its images are is remembered."""
    samples: dict[str, Sample] = {}
    images: dict[str, tuple[int, int]] = {}
    status = file.stat()
    try:
        for member in members_of(operation, file, on_fault=fault):
            samples.setdefault(member.key, Sample(file, member.key)).add(member, with_content=False)
            if member.kind == "image":
                images[member.name] = (member.offset, member.size)
    except LapsValueError as error:
        fault(error)
    remember(file, TarIndex((status.st_mtime_ns, status.st_size), images))
    return list(samples.values())


def holds(file: Path) -> str:
    """What endings a shard without samples has, how often, and the keys of its JSON, for messages."""
    if not file.is_file():
        return "none"
    endings: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    try:
        with tarfile.open(file) as archive:
            for header in islice(archive, LOOKED_AT):
                if header.isreg():
                    ending = header.name.rpartition("/")[2].partition(".")[2]
                    endings[f".{ending}" if ending else "no ending"] += 1
                    if ending == "json" and header.size < 2**16:
                        entry = json.loads((archive.extractfile(header) or io.BytesIO()).read())
                        keys.update(map(str, entry if isinstance(entry, dict) else ()))
    # What is wrong with the file is not what is asked here.
    except Exception:
        pass
    seen = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(SHOWN)) or "no file"
    of_json = ", ".join(f"{key} {count}x" for key, count in keys.most_common(SHOWN))
    return f"{seen}{f'; in the .json {of_json}' if of_json else ''}"
