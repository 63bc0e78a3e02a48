"""Rows of data sets of the library `datasets`: opened once for a process, then image by image.

From a folder of ``save_to_disk``, from a parquet file, or from an object in memory. The library maps its
files into memory, so an image is read when its row is opened. Of a parquet file, in which rows cannot be
found, it makes a copy in its own cache first, once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsImportError, LapsValueError
from .columns import find_encoded_images, names_files, urls_among

__all__ = [
    "PARQUET_END",
    "column_types",
    "find_image_column",
    "image_rows",
    "in_memory",
    "is_saved",
    "keep_in_memory",
    "library",
    "open_rows",
    "row_image",
    "wrong_columns",
]

PARQUET_END = ".parquet"
# What a folder of Dataset.save_to_disk holds.
SAVED = ("state.json", "dataset_info.json")

# By path: when the file was written, the data set, and its image column alone.
_opened: dict[str, tuple[int, Any]] = {}
_images: dict[str, tuple[int, Any]] = {}
_in_memory: dict[str, Any] = {}


def library(operation: str) -> Any:
    """The library `datasets`. Raises LapsImportError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise LapsImportError(
            _check.message(operation, "the library datasets is not installed", "pip install 'laps-rs[data]'")
        ) from error
    return datasets


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` has written this folder."""
    return all((folder / name).is_file() for name in SAVED)


def open_rows(operation: str, kind: str, path: Path) -> Any:
    """The data set of a parquet file ("parquet") or of a folder ("saved"); opened again if it has changed.

    Raises:
        LapsImportError: the library is missing. LapsValueError: the file is, or it is damaged.
    """
    stamp = _stamp(operation, kind, path)
    known = _opened.get(os.path.abspath(path))
    if known is None or known[0] != stamp:
        datasets = library(operation)
        try:
            if kind == "parquet":
                rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=False)
            else:
                rows = datasets.Dataset.load_from_disk(str(path), keep_in_memory=False)
        # Arrow and the library raise almost any error on a damaged file; the library hides the reason.
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split()) or _check.name_of(error)
            expected = "a parquet file" if kind == "parquet" else "a data set of save_to_disk"
            raise LapsValueError(
                _check.message(operation, f"{path} cannot be read", expected, reason)
            ) from error
        known = _opened[os.path.abspath(path)] = (stamp, rows)
    return known[1]


def _stamp(operation: str, kind: str, path: Path) -> int:
    try:
        return (path if kind == "parquet" else path / SAVED[0]).stat().st_mtime_ns
    except OSError as error:
        raise LapsValueError(
            _check.message(operation, f"{path} cannot be read", "a data set", error.strerror)
        ) from error


# ---- columns


def column_types(rows: Any) -> dict[str, Any]:
    """Arrow's types by column."""
    return {field.name: field.type for field in rows.features.arrow_schema}


def find_image_column(operation: str, place: object, rows: Any, chosen: str | None = None) -> str:
    """The column that has the images, by its type and name.

    Raises:
        LapsValueError: none, or several of no usual name; a chosen one that is absent or of another type.
    """
    types = column_types(rows)
    expected = "one of images, called image or of type Image (or from_dataset with image_column=...)"
    if chosen is not None:
        if chosen not in types:
            raise wrong_columns(operation, place, f"no column {chosen!r}", expected, rows)
        if not _is_image(types[chosen]):
            raise wrong_columns(operation, place, f"no images in the column {chosen!r}", expected, rows)
        return chosen
    sound = [name for name in types if type(rows.features[name]).__name__ in ("Audio", "Video")]
    fitting = [name for name, kind in types.items() if _is_image(kind) and name not in sound]
    # Of bytes without a type only the usual names count.
    found = find_encoded_images(fitting) or [name for name in fitting if not _is_bytes(types[name])]
    if len(found) == 1:
        return found[0]
    if found:
        raise wrong_columns(operation, place, "several columns of images", expected, rows)
    if names_files(list(types)):
        expected += "; names of files are read from JSONL, as Dataset.to_json writes it"
    elif urls_among(types):
        expected += "; addresses are not enough: download the images first, by img2dataset for example"
    raise wrong_columns(operation, place, "no column of images", expected, rows)


def wrong_columns(operation: str, place: object, what: str, expected: str, rows: Any) -> LapsValueError:
    """The error that lists the columns that there are."""
    seen = ", ".join(f"{name} ({kind})" for name, kind in column_types(rows).items()) or "none"
    return LapsValueError(_check.message(operation, f"{place} has {what}", expected, seen))


def _is_image(kind: Any) -> bool:
    """Whether a column of this type may hold encoded images: bytes, or the library's bytes and path."""
    import pyarrow.types as of

    if of.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "bytes" in names and names <= {"bytes", "path"} and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as of

    return bool(of.is_binary(kind) or of.is_large_binary(kind))


# ---- images


def image_rows(rows: Any, column: str) -> Any:
    """The rows with their images alone, as they are stored."""
    return rows.select_columns([column]).with_format("arrow")


def keep_in_memory(name: Path, rows: Any) -> None:
    """Let `name` lead to `image_rows` of an object, as long as this process lives."""
    _in_memory[str(name)] = rows


def in_memory(name: Path) -> Any:
    """What `keep_in_memory` has kept, or None."""
    return _in_memory.get(str(name))


def row_image(operation: str, kind: str, container: Path, row: int) -> bytes:
    """The bytes of the image of a row.

    Raises:
        LapsValueError: no such row, a row without an image, a damaged container, or a row that names a file
            which cannot be read; with the row's path.
    """
    rows = in_memory(container) if kind == "memory" else _image_rows(operation, kind, container)
    place = f"{container}/{row}"
    if row >= len(rows):
        raise LapsValueError(_check.message(operation, f"{place} is missing", f"a row below {len(rows)}"))
    try:
        cell = rows[row].column(0)[0].as_py()
    except Exception as error:
        raise LapsValueError(_check.message(operation, f"{place} cannot be read", "a row", error)) from error
    content, file = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if content is not None:
        return bytes(content)
    if file is None:
        raise LapsValueError(_check.message(operation, f"{place} has no image", "bytes or a path"))
    # A data set that was made from files and not saved since names these.
    try:
        return Path(container.parent, file).read_bytes()
    except (OSError, ValueError) as error:
        raise LapsValueError(
            _check.message(operation, f"{place} names {file}, which cannot be read", "an image file", error)
        ) from error


def _image_rows(operation: str, kind: str, container: Path) -> Any:
    key, stamp = os.path.abspath(container), _stamp(operation, kind, container)
    known = _images.get(key)
    if known is None or known[0] != stamp:
        rows = open_rows(operation, kind, container)
        known = _images[key] = (stamp, image_rows(rows, find_image_column(operation, container, rows)))
    return known[1]
