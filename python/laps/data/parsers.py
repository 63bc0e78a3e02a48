"""The syntax of each format: files to a `Listing` per split, or an error that names file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check
from ..errors import LapsValueError
from .listing import Listing, likely_folders
from .splits import canonical_split, split_of_name

CAPTIONS_END = "_caps.txt"
# A line of a file of image names and captions: of the name all up to its first such ending.
NAME_AND_CAPTION = re.compile(r"(.+?\.(?:jpe?g|png|webp|bmp|gif|tiff?)),(.*)", re.IGNORECASE)


def text_of(operation: str, file: Path) -> str:
    """The text of a file, of UTF-8 with or without a byte order mark."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LapsValueError(
            _check.message(operation, f"{file} cannot be read", "a text file", error.strerror)
        ) from error
    except UnicodeDecodeError as error:
        raise LapsValueError(
            _check.message(operation, f"{file} is not UTF-8", "UTF-8", f"byte {error.start}: {error.reason}")
        ) from error


def json_of(operation: str, text: str, file: Path, line: int = 1, **options: Any) -> Any:
    """What a text says in JSON; the options are those of `json.loads`."""
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise LapsValueError(
            _check.message(operation, f"{file}:{line + error.lineno - 1} is malformed", "JSON", error.msg)
        ) from error
    except LapsValueError:
        raise
    # Nested too deep, or a number of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise LapsValueError(_check.message(operation, f"{file} cannot be read", "JSON", error)) from error


def unrepeated(operation: str, place: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python's own reader would keep the last of two equal names."""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise LapsValueError(_check.message(operation, f"{place} names {name!r} twice", "once each"))
        entries[name] = value
    return entries


def field_of(operation: str, place: str, entry: object, key: str, kind: type = str) -> Any:
    """The value of a key, which has to be there and of the right type."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or value == "":
        if not isinstance(entry, dict):
            got = _check.name_of(entry)
        else:
            got = repr(value) if key in entry else f"only {', '.join(map(str, entry)) or 'nothing'}"
        raise LapsValueError(
            _check.message(operation, f"{place} has no usable {key!r}", f"{key!r}: {kind.__name__}", got)
        )
    return value


def parse_karpathy(operation: str, file: Path, content: Any) -> dict[str, Listing]:
    """Every split of what a JSON file says."""
    entries = field_of(operation, str(file), content, "images", list)
    names = [content["dataset"]] if isinstance(content.get("dataset"), str) else []
    folders = likely_folders(file.parent, *names)
    found: dict[str, Listing] = {}
    for number, entry in enumerate(entries):
        place = f"{file}: images[{number}]"
        split = canonical_split(field_of(operation, place, entry, "split"))
        listing = found.setdefault(split, Listing(f"{file.name}/{split}", f"{file}: images[{{}}]", folders))
        folder, name = entry.get("filepath") or "", field_of(operation, place, entry, "filename")
        image = listing.add_image(f"{folder}/{name}" if folder else name)
        for sentence in field_of(operation, place, entry, "sentences", list):
            if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
                raise LapsValueError(
                    _check.message(operation, f"{place} has a sentence without 'raw'", "'raw': str", sentence)
                )
            listing.add_caption(image, sentence["raw"], number)
    return found


def parse_caption_files(operation: str, folder: Path, split: str, *, regions: Path | None = None) -> Listing:
    """One split; `regions` is the file whose rows are its images, None where its ids lead to them."""
    captions_file, ids_file = folder / f"{split}{CAPTIONS_END}", folder / f"{split}_ids.txt"
    # Lines end at a line feed only: captions may hold Unicode's other separators.
    text = text_of(operation, captions_file)
    captions = text.removesuffix("\n").split("\n") if text else []
    if regions is not None:
        return _parse_regions(operation, captions_file, captions, regions)
    ids = text_of(operation, ids_file).split()
    if bool(ids) != bool(captions) or (ids and len(captions) % len(ids)):
        raise LapsValueError(
            _check.message(
                operation,
                f"{ids_file} does not fit {captions_file.name}",
                "one id per caption, or one id per image with equally many captions each",
                f"{len(ids)} ids and {_counted(captions)}",
            )
        )
    _refuse_repeated(operation, ids_file, ids, captions_file, len(captions))
    mapping_file, mapping = _id_mapping(operation, folder)
    listing = Listing(
        f"{folder.name}/{split}",
        f"{captions_file}:{{}}",
        # VSE-infinity keeps the annotations in a folder of the data set's.
        likely_folders(folder.parent, folder.name) + likely_folders(folder, folder.name),
    )
    for line, id_ in enumerate(ids, 1):
        # The ids were integers once: "0042" and "42" are the same.
        name = mapping.get(id_) or mapping.get(_number(id_))
        if not isinstance(name, str):
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{ids_file}:{line} has the id {id_}, which has no image",
                    f"an id of {mapping_file}",
                )
            )
        each = len(captions) // len(ids)
        for caption in range((line - 1) * each, line * each):
            listing.add_caption(listing.add_image(name), captions[caption], caption + 1)
    return listing


def _parse_regions(operation: str, captions_file: Path, captions: list[str], regions: Path) -> Listing:
    """Captions whose images are rows of a file of detector features: a row each, or some captions a row.

    Files of a row for each caption repeat the rows of an image, one after the other; it is one image then.
    """
    try:
        features = np.load(regions, mmap_mode="r", allow_pickle=False)
        rows = len(features)
    # NumPy raises almost any error on a damaged file.
    except Exception as error:
        raise LapsValueError(
            _check.message(operation, f"{regions} cannot be read", "an array (images, K, D)", error)
        ) from error
    if not rows or len(captions) % rows:
        raise LapsValueError(
            _check.message(
                operation,
                f"{regions} does not fit {captions_file.name}",
                "equally many captions for each row",
                f"{rows} rows and {_counted(captions)}",
            )
        )
    listing = Listing(
        f"{captions_file.parent.name}/{regions.name}", f"{captions_file}:{{}}", [regions.parent]
    )
    each = len(captions) // rows
    row = 0
    for caption, text in enumerate(captions):
        if each > 1 or caption == 0 or not _same_row(features, caption - 1, caption):
            row = caption // each
        listing.add_caption(listing.add_image(f"{regions.name}/{row}"), text, caption + 1)
    return listing


def _counted(captions: list[str]) -> str:
    """How many there are, for messages: a blank line at the end of their file is easily overlooked."""
    blank = " with the blank line at the end" if captions and not captions[-1].strip() else ""
    return f"{len(captions)} captions{blank}"


def _same_row(features: Any, one: int, other: int) -> bool:
    """Whether two rows of (images, K, D) show the same image."""
    if features.ndim != 3 or not features.shape[1]:
        return False
    # The ends first, for they tell most images apart, and the rows of a split are gigabytes. They do not tell
    # all: where a detector found less than K regions, zeros follow.
    return all(np.array_equal(features[one][k], features[other][k]) for k in ([0, -1], slice(None)))


def _number(id_: str) -> str:
    return id_.lstrip("0") or "0"


def _refuse_repeated(operation: str, ids_file: Path, ids: list[str], captions_file: Path, total: int) -> None:
    """Ids that repeat are one per caption: fewer of them belong to the captions of another split."""
    if len(ids) == total:
        return
    first: dict[str, int] = {}
    for line, id_ in enumerate(ids, 1):
        if first.setdefault(_number(id_), line) != line:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{ids_file} does not fit {captions_file.name}: line {line} repeats the id {id_}",
                    f"each id once, or one id for each of {total} captions",
                    f"{len(ids)} ids",
                )
            )


def _id_mapping(operation: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    candidates = [folder / "id_mapping.json", folder.parent / "id_mapping.json"]
    for file in candidates:
        if file.is_file():
            mapping = json_of(operation, text_of(operation, file), file)
            if not isinstance(mapping, dict):
                raise LapsValueError(
                    _check.message(
                        operation,
                        f"{file} maps no ids",
                        "an object, id to file name",
                        _check.name_of(mapping),
                    )
                )
            return file, mapping
    raise LapsValueError(
        _check.message(operation, "id_mapping.json is missing", " or ".join(map(str, candidates)))
    )


def is_name_list(file: Path) -> bool:
    """Whether one of the first two lines, of which one is a header, has an image's name and a caption."""
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            return any(NAME_AND_CAPTION.fullmatch(stream.readline(2**16).rstrip("\r\n")) for _ in range(2))
    except OSError:
        return False


def parse_name_lists(operation: str, files: Sequence[Path]) -> dict[str, Listing]:
    """Splits of lines NAME.jpg,CAPTION, a file each: quoted as csv has it, or with commas as they are.

    The first line is a header, unless it is such a line itself.
    """
    found: dict[str, Listing] = {}
    for file in files:
        split = split_of_name(file.stem) or "all"
        if split in found:
            raise LapsValueError(
                _check.message(operation, f"{file} continues {found[split].name}", "one file for each split")
            )
        # CLIP_benchmark has them in the folder of the images.
        folders = [file.parent, *likely_folders(file.parent, "flickr30k", "flickr8k"), file.parent / "Images"]
        listing = found[split] = Listing(f"{file.name}/{split}", f"{file}:{{}}", folders)
        for line, text in enumerate(text_of(operation, file).split("\n"), 1):
            entry = NAME_AND_CAPTION.fullmatch(text.rstrip("\r"))
            if entry is not None:
                listing.add_caption(listing.add_image(entry[1]), unquoted(entry[2].strip()), line)
            elif line > 1 and text.strip():
                raise LapsValueError(
                    _check.message(operation, f"{file}:{line} is malformed", "NAME.jpg,CAPTION", text[:80])
                )
    return found


def unquoted(cell: str) -> str:
    """A cell without its quotation marks, if they enclose it and those within are doubled."""
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell
