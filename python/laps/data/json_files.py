"""Captions in JSON: Karpathy's splits, COCO's annotations, the lists of ALBEF and BLIP; told by content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsValueError
from .listing import Listing, likely_folders
from .pairs import listed_pairs
from .parsers import field_of, json_of, parse_karpathy, text_of
from .splits import split_of_name

__all__ = ["json_kind", "parse_json"]

# COCO's other annotations, of the same layout. None of them has captions.
NO_CAPTIONS = ("instances_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
CAPTIONS = "captions_"
# What BLIP and LAVIS compare generated captions with: of COCO's layout, but its images have no name.
GROUND_TRUTH = "_gt"
# How much of a file is looked at to tell its kind: the files of COCO's objects have half a gigabyte.
LOOKED_AT = 2**16
# COCO's images lie in a folder for each release, which its files and images are called after.
RELEASE = re.compile(r"(?:train|val|test)20\d\d")


def json_kind(file: Path) -> str | None:
    """ "coco" or "albef" where a file begins like these, else None. What cannot be read is neither."""
    if file.name.startswith(NO_CAPTIONS) or file.stem.endswith(GROUND_TRUTH):
        return None
    try:
        with file.open("rb") as stream:
            start = stream.read(LOOKED_AT).decode("utf-8-sig", errors="replace").lstrip()
            stream.seek(max(stream.tell(), file.stat().st_size - LOOKED_AT))
            end = stream.read(LOOKED_AT).decode("utf-8", errors="replace")
    except OSError:
        return None
    if start.startswith("[") and '"image"' in start and '"caption"' in start:
        return "albef"
    # A file that lists its annotations first has its images last. One that is called as COCO's is to be read,
    # so that what is wrong with it is said.
    has_names = '"file_name"' in start or ('"annotations"' in start and '"file_name"' in end)
    called_so = file.name.startswith(CAPTIONS) and ('"images"' in start or '"annotations"' in start)
    return "coco" if start.startswith("{") and (has_names or called_so) else None


def parse_json(
    operation: str, files: Sequence[Path], chosen: tuple[str, ...] | None = None
) -> dict[str, Listing]:
    """The splits of one file of any of the three, or of several that hold one split each.

    `chosen` are the keys of the captions in a list, where their names are not to tell.
    """
    found: dict[str, Listing] = {}
    for file in files:
        for split, listing in _parse(operation, file, chosen).items():
            if split in found:
                raise LapsValueError(
                    _check.message(
                        operation, f"{file} continues {found[split].name}", "one file for each split"
                    )
                )
            found[split] = listing
    return found


def _parse(operation: str, file: Path, chosen: tuple[str, ...] | None) -> dict[str, Listing]:
    content = json_of(operation, text_of(operation, file), file)
    if isinstance(content, list):
        return _parse_list(operation, file, content, chosen)
    if chosen is not None:
        raise LapsValueError(_check.message(operation, f"caption_column, but {file} is no list", "a list"))
    # Karpathy's splits are the one layout of objects that names them.
    if isinstance(content, dict) and _is_coco(content):
        listing = _parse_coco(operation, file, content)
    else:
        return parse_karpathy(operation, file, content)
    return {split_of_name(file.stem) or "all": listing}


def _is_coco(content: dict[str, Any]) -> bool:
    images = content.get("images")
    first = images[0] if isinstance(images, list) and images else None
    return "annotations" in content or (isinstance(first, dict) and "file_name" in first)


# ---- COCO


def _parse_coco(operation: str, file: Path, content: dict[str, Any]) -> Listing:
    if "annotations" not in content:
        raise _no_captions(operation, f"{file} has no annotations")
    images = field_of(operation, str(file), content, "images", list)
    annotations = field_of(operation, str(file), content, "annotations", list)
    listing = _listing(file, f"{file}: annotations[{{}}]")
    number_of: dict[Any, int] = {}
    for number, entry in enumerate(images):
        place = f"{file}: images[{number}]"
        name, id_ = field_of(operation, place, entry, "file_name"), _id(operation, place, entry, "id")
        image = listing.add_image(name)
        if number_of.setdefault(id_, image) != image:
            raise LapsValueError(
                _check.message(operation, f"{place} has the id {id_!r} of another image", "an id for each")
            )
    for number, entry in enumerate(annotations):
        place = f"{file}: annotations[{number}]"
        if isinstance(entry, dict) and "caption" not in entry:
            raise _no_captions(operation, f"{place} has no caption")
        if not isinstance(entry, dict) or not isinstance(entry["caption"], str):
            field_of(operation, place, entry, "caption")
        id_ = _id(operation, place, entry, "image_id")
        if id_ not in number_of:
            raise LapsValueError(
                _check.message(
                    operation, f"{place} is of the image {id_!r}, which is absent", f"an id of {file}: images"
                )
            )
        listing.add_caption(number_of[id_], entry["caption"], number)
    listing.image_folders = _folders(file, listing.files)
    return listing


def _id(operation: str, place: str, entry: object, key: str) -> int | str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        got = repr(value) if isinstance(entry, dict) else _check.name_of(entry)
        raise LapsValueError(
            _check.message(operation, f"{place} has no usable {key!r}", f"{key!r}: int or str", got)
        )
    return value


def _no_captions(operation: str, what: str) -> LapsValueError:
    return LapsValueError(
        _check.message(
            operation,
            what,
            "captions, as in COCO's captions_*.json; instances_, person_keypoints_ and image_info_ have none",
        )
    )


# ---- ALBEF, BLIP, and any table that pandas has written as a list


def _parse_list(
    operation: str, file: Path, content: list[Any], chosen: tuple[str, ...] | None
) -> dict[str, Listing]:
    found: dict[str, Listing] = {}
    of_file = split_of_name(file.stem) or "all"
    for number, (_, pair) in enumerate(listed_pairs(operation, file, content, chosen)):
        split = pair.split or of_file
        if split not in found:
            found[split] = Listing(f"{file.name}/{split}", f"{file}: entry {{}}", [])
        image = found[split].add_image(pair.image)
        for text in pair.captions:
            found[split].add_caption(image, text, number)
    for listing in found.values():
        listing.image_folders = _folders(file, listing.files)
    # Kept without entries too, so that a check sees it.
    return found or {of_file: _listing(file, f"{file}: entry {{}}")}


# ---- both


def _listing(file: Path, place: str) -> Listing:
    return Listing(f"{file.name}/{split_of_name(file.stem) or 'all'}", place, [])


def _folders(file: Path, images: Sequence[str]) -> list[Path]:
    """Where the images may be: the files tend to lie in a folder beside these, as ``annotations/`` does."""
    releases = RELEASE.findall(file.stem) + RELEASE.findall(images[0] if images else "")
    releases += [split for split in [split_of_name(file.stem)] if split]
    beside = file.parent
    folders = [
        folder / release
        for release in dict.fromkeys(releases)
        for folder in (beside / "images", beside, beside.parent / "images", beside.parent)
    ]
    return [*folders, *likely_folders(beside), beside.parent]
