"""Which columns or keys are images, captions and splits: the one place that knows what data sets call them.

A name wins over those below it, and its exact spelling over others ("Caption", "image path"). Where several
columns are left that differ in nothing else, no guess is made: an error names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .. import _check
from ..errors import LapsTypeError, LapsValueError

__all__ = [
    "PairColumns",
    "chosen_captions",
    "find_captions",
    "find_encoded_images",
    "find_id",
    "find_pair_columns",
    "find_split",
    "holds_pairs",
    "known_captions",
    "names_files",
    "several_captions",
    "urls_among",
]

Names = tuple[tuple[str, ...], ...]

CAPTION_NAMES: Names = (
    ("caption",),
    ("captions", "text", "txt", "sentences", "sentences_raw", "sentence", "raw"),
    # Of open_clip's csv, of Kaggle's Flickr30K, of tables that were made for something else.
    ("title", "comment", "description"),
)
# Where a cell is the name of a file.
FILE_NAMES: Names = (
    ("image",),
    ("image_path", "img_path", "image_file", "image_name", "img"),
    ("file_name", "filename", "filepath", "file_path", "path"),
)
# Where a cell is the file itself.
ENCODED_NAMES: Names = (("image",), ("jpg", "jpeg", "png", "webp", "img", "picture"))
SPLIT_NAMES: Names = (("split",),)
# Rows of one caption each that are equal here show the same image.
ID_NAMES = ("image_id", "img_id", "imgid", "cocoid")
# caption_0, caption_1, ...; text1, ...
NUMBERED = re.compile(rf"({'|'.join([*CAPTION_NAMES[0], *CAPTION_NAMES[1]])})_?(\d{{1,9}})")


def _folded(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _best(columns: Sequence[str], known: Iterable[Sequence[str]]) -> list[str]:
    """The columns that are called by the first names that any has; several where nothing tells them apart."""
    spellings: tuple[Callable[[str], str], ...] = (str, _folded)
    for names in known:
        for spelling in spellings:
            found = [column for column in columns if spelling(column) in names]
            if found:
                return found
    return []


def find_captions(columns: Sequence[str]) -> list[tuple[str, ...]]:
    """What the captions may be: one entry if that is clear, of one column, or of numbered ones in order."""
    exact, usual, others = CAPTION_NAMES
    found = _best(columns, (exact,))
    if found:
        return [(column,) for column in found]
    found = _best(columns, (usual,))
    if {_folded(column) for column in found} == {"sentences", "sentences_raw"}:
        # Karpathy's sentences made flat: the text of each, and beside it what was made of that.
        found = [column for column in found if _folded(column) == "sentences_raw"]
    groups = [(column,) for column in found] + _numbered(columns)
    return groups or [(column,) for column in _best(columns, (others,))]


def _numbered(columns: Sequence[str]) -> list[tuple[str, ...]]:
    stems: dict[str, list[tuple[int, str]]] = {}
    for column in columns:
        match = NUMBERED.fullmatch(_folded(column))
        if match is not None:
            stems.setdefault(match[1], []).append((int(match[2]), column))
    return [tuple(column for _, column in sorted(group)) for group in stems.values()]


def find_encoded_images(columns: Sequence[str]) -> list[str]:
    """Which of the columns that hold files are called as images are; several where nothing tells."""
    return _best(columns, ENCODED_NAMES)


def find_split(operation: str, place: object, columns: Sequence[str]) -> str | None:
    """The column that tells a row's split. LapsValueError: several may be meant."""
    found = _best(columns, SPLIT_NAMES)
    if len(found) > 1:
        what = f"{place} has several columns that may tell the split"
        raise LapsValueError(
            _check.message(operation, what, "one of them, or one called split", ", ".join(found))
        )
    return found[0] if found else None


def find_id(columns: Iterable[str]) -> str | None:
    """The column in which rows of one image are equal."""
    present = set(columns)
    return next((name for name in ID_NAMES if name in present), None)


def urls_among(columns: Iterable[str]) -> list[str]:
    """The columns that are called as addresses are: url, image_url, ..."""
    return [column for column in columns if re.fullmatch("(.*_)?urls?", _folded(column))]


def known_captions() -> str:
    """The names, for messages."""
    return f"{_listed(CAPTION_NAMES)}, or caption_0, caption_1, ..."


def several_captions(operation: str, place: object, found: Iterable[tuple[str, ...]]) -> LapsValueError:
    """The error where it is not clear which columns are meant."""
    names = ", ".join("+".join(group) for group in found)
    return LapsValueError(
        _check.message(
            operation,
            f"{place} has several columns that may be captions",
            "one of them, one called caption, or a choice by caption_column (--caption-column)",
            names,
        )
    )


def _listed(known: Names) -> str:
    return ", ".join(name for names in known for name in names)


# ---- rows that name a file and have captions


def names_files(columns: Sequence[str]) -> bool:
    """Whether one of the columns is called as names of image files are."""
    return bool(_best(columns, FILE_NAMES))


@dataclass(frozen=True)
class PairColumns:
    """Where a row has its image's name, its captions, and its split if it tells one.

    `folder` is that of the image, which Karpathy's tables have apart from its name.
    """

    image: str
    captions: tuple[str, ...]
    split: str | None
    folder: str | None


def holds_pairs(columns: Sequence[str], chosen: tuple[str, ...] | None = None) -> bool:
    """Whether a row of these may name an image, by a file or an address, and have a caption."""
    captions = find_captions(columns) if chosen is None else set(chosen) <= set(columns)
    return bool(captions) and bool(_best(columns, FILE_NAMES) or urls_among(columns))


def find_pair_columns(
    operation: str, place: object, columns: Sequence[str], chosen: tuple[str, ...] | None = None
) -> PairColumns:
    """What the columns of a table, or the keys of an object, are; `chosen` of them are the captions.

    Raises:
        LapsValueError: none of images or of captions, or several that may be meant (names those present).
    """
    seen = ", ".join(columns) or "none"
    images, folder = _best(columns, FILE_NAMES), None
    by_name = {_folded(image): image for image in images}
    if len(images) == 2 and by_name.keys() == {"filename", "filepath"}:
        images, folder = [by_name["filename"]], by_name["filepath"]
    if not images and urls_among(columns):
        expected = "names of image files: download them first, by img2dataset for example"
        raise LapsValueError(
            _check.message(operation, f"{place} has addresses of images in place of files", expected, seen)
        )
    if not images:
        expected = f"one called {_listed(FILE_NAMES)}"
        raise LapsValueError(
            _check.message(operation, f"{place} has no column of image files", expected, seen)
        )
    if len(images) > 1:
        what = f"{place} has several columns that may name images"
        expected = "one of them, or one called image"
        raise LapsValueError(_check.message(operation, what, expected, ", ".join(images)))
    absent = [column for column in chosen or () if column not in columns]
    if absent:
        raise LapsValueError(
            _check.message(operation, f"{place} has no column {absent[0]!r}", "one of", seen)
        )
    captions = find_captions(columns) if chosen is None else [chosen]
    if not captions:
        expected = f"one called {known_captions()} (or caption_column, --caption-column)"
        raise LapsValueError(_check.message(operation, f"{place} has no column of captions", expected, seen))
    if len(captions) > 1:
        raise several_captions(operation, place, captions)
    return PairColumns(images[0], captions[0], find_split(operation, place, columns), folder)


def chosen_captions(operation: str, value: object) -> tuple[str, ...] | None:
    """The argument `caption_column` as names; None where their names are to tell.

    Raises LapsTypeError: neither a string nor a list of these. LapsValueError: an empty list.
    """
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        got = _check.name_of(value)
        raise LapsTypeError(
            _check.message(operation, "caption_column is no name", "a string or a list of these", got)
        )
    if not names:
        raise LapsValueError(_check.message(operation, "caption_column is empty", "at least one name"))
    return tuple(names)
