"""Tables and lists whose rows name an image file and have its captions: csv, tsv, JSONL, a list in JSON."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsValueError
from .columns import PairColumns, find_pair_columns, holds_pairs
from .listing import Listing, likely_folders
from .parsers import field_of, json_of, text_of, unquoted, unrepeated
from .splits import canonical_split, split_of_name, split_of_path

__all__ = ["PAIR_SUFFIXES", "Pair", "listed_pairs", "pair_files", "pair_rows", "parse_pairs", "texts_of"]

PAIR_SUFFIXES = (".csv", ".tsv", ".jsonl")
# What imagefolder of the library `datasets` calls its tables, which lie in a folder called as the split.
METADATA = "metadata"
# open_clip's csv has tabs by default, a spreadsheet's often semicolons, Kaggle's Flickr30K bars.
DELIMITERS = ",\t;|"
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# A cell that is a list of captions, in JSON or as Python prints it.
LIST = re.compile(r"""\[\s*\]|\[\s*["'{].*["'}]\s*,?\s*\]""", re.DOTALL)
STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
PYTHON_LIST = re.compile(rf"\[\s*{STRING}(?:\s*,\s*{STRING})*\s*,?\s*\]", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A row: the image's file, its captions, which may be none, and its split where the row tells it."""

    image: str
    captions: list[str]
    split: str | None


def pair_files(folder: Path) -> list[Path]:
    """The files of a folder that may hold pairs; else imagefolder's, in folders called as splits."""
    here = sorted(file for suffix in PAIR_SUFFIXES for file in folder.glob(f"*{suffix}"))
    below = sorted(file for suffix in PAIR_SUFFIXES for file in folder.glob(f"*/{METADATA}{suffix}"))
    return here or [file for file in below if split_of_name(file.parent.name)]


def split_of_file(file: Path) -> str | None:
    """The split that the name of a file of pairs tells."""
    if file.stem != METADATA:
        return split_of_name(file.stem)
    split = split_of_path(file)
    return None if split == "all" else split


def parse_pairs(
    operation: str, files: Sequence[Path], chosen: tuple[str, ...] | None = None
) -> dict[str, Listing]:
    """The splits of files; `chosen` are the columns of the captions, where their names are not to tell."""
    found: dict[str, Listing] = {}
    for file in files:
        _add_pairs(operation, file, chosen, found)
    return found


def _add_pairs(operation: str, file: Path, chosen: tuple[str, ...] | None, found: dict[str, Listing]) -> None:
    splits: dict[str, Listing] = {}
    of_file = split_of_file(file) or "all"
    for line, pair in pair_rows(operation, file, chosen):
        split = pair.split or of_file
        if split in found and found[split].files:
            raise LapsValueError(
                _check.message(
                    operation, f"{file}:{line} continues {found[split].name}", "one file per split"
                )
            )
        if split not in splits:
            splits[split] = Listing(f"{file.name}/{split}", f"{file}:{{}}", _folders(file))
        image = splits[split].add_image(pair.image)
        for caption in pair.captions:
            splits[split].add_caption(image, caption, line)
    if not splits:
        # Kept, so that a check sees it; a split that another file has is there already.
        found.setdefault(of_file, Listing(f"{file.name}/{of_file}", f"{file}:{{}}", []))
    found.update(splits)


def _folders(file: Path) -> list[Path]:
    """Where the images may be; imagefolder's lie beside their table."""
    beside = file.parent
    folders = likely_folders(beside, file.stem, "flickr30k")
    # Kaggle's Flickr30K and Flickr8K.
    folders += [beside / beside.absolute().name, beside / "Images"]
    return [beside, *folders] if file.stem == METADATA else folders


# ---- rows


def pair_rows(
    operation: str, file: Path, chosen: tuple[str, ...] | None = None
) -> Iterator[tuple[int, Pair]]:
    """Line number and content of every row of a csv, tsv or JSONL file."""
    columns: PairColumns | None = None
    rows = _json_rows(operation, file) if file.suffix == ".jsonl" else _csv_rows(operation, file, chosen)
    for line, row in rows:
        place = f"{file}:{line}"
        if columns is None:
            columns = find_pair_columns(operation, place, list(row), chosen)
        yield line, _pair(operation, place, row, columns)


def listed_pairs(
    operation: str, file: Path, content: list[Any], chosen: tuple[str, ...] | None = None
) -> Iterator[tuple[str, Pair]]:
    """Place and content of every entry of a list that a JSON file holds."""
    columns: PairColumns | None = None
    for number, entry in enumerate(content):
        place = f"{file}: entry {number}"
        if not isinstance(entry, dict):
            raise LapsValueError(
                _check.message(operation, f"{place} is no object", "{...}", _check.name_of(entry))
            )
        if columns is None:
            columns = find_pair_columns(operation, place, list(entry), chosen)
        yield place, _pair(operation, place, entry, columns)


def _pair(operation: str, place: str, row: dict[str, Any], columns: PairColumns) -> Pair:
    image = field_of(operation, place, row, columns.image)
    folder = row.get(columns.folder) if columns.folder is not None else None
    if folder and isinstance(folder, str):
        # The whole path, in tables that have its last part once more.
        image = folder if Path(folder).name == image else f"{folder}/{image}"
    if ADDRESS.match(image):
        raise LapsValueError(
            _check.message(
                operation,
                f"{place} has the address of an image in place of a file",
                "the name of an image file: download them first, by img2dataset for example",
                image,
            )
        )
    split = columns.split or "split"
    captions = [
        text
        for column in columns.captions
        # An image may have fewer captions than there are columns.
        if len(columns.captions) == 1 or row.get(column) not in (None, "")
        for text in texts_of(operation, place, row, column)
    ]
    told = canonical_split(field_of(operation, place, row, split)) if split in row else None
    return Pair(image, captions, told)


def texts_of(operation: str, place: str, row: dict[str, Any], column: str) -> list[str]:
    """The captions in a cell: a string, ``{"raw": ...}`` of Karpathy's, or a list of either.

    Raises LapsValueError: it is none of these.
    """
    cell = row.get(column)
    # A list of objects is an object of lists where the library `datasets` has made it a Sequence.
    cell = cell.get("raw") if isinstance(cell, dict) else cell
    # A list of columns that an image has not all of ends with nothing.
    entries = [entry for entry in cell if entry is not None] if isinstance(cell, list) else [cell]
    found = [entry.get("raw") if isinstance(entry, dict) else entry for entry in entries]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) != len(found):
        got = repr(row[column])[:80] if column in row else f"only {', '.join(map(str, row)) or 'nothing'}"
        expected = f"{column!r}: a string, {{'raw': string}}, or a list of these"
        raise LapsValueError(_check.message(operation, f"{place} has no usable {column!r}", expected, got))
    return texts


# ---- JSONL


def _json_rows(operation: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(text_of(operation, file).split("\n"), 1):
        if text.strip():
            hook = partial(unrepeated, operation, f"{file}:{line}")
            row = json_of(operation, text, file, line, object_pairs_hook=hook)
            if not isinstance(row, dict):
                raise LapsValueError(
                    _check.message(operation, f"{file}:{line} is no object", "{...}", _check.name_of(row))
                )
            yield line, row


# ---- csv, tsv


def _csv_rows(
    operation: str, file: Path, chosen: tuple[str, ...] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    text = text_of(operation, file)
    columns: list[str] = []
    known: PairColumns | None = None
    start = 1
    try:
        delimiter = "\t" if file.suffix == ".tsv" else _delimiter(text, chosen)
        # Few files of tabs quote, and captions begin with quotation marks: only whole cells count.
        plain = delimiter == "\t"
        options: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if plain else {"strict": True}
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **options)
        for row in reader:
            cells = [unquoted(cell) for cell in row] if plain else row
            if not columns:
                columns = [cell.strip() for cell in cells]
                # A table without rows has to have them too.
                known = find_pair_columns(operation, file, columns, chosen) if columns else None
            elif cells:
                if len(cells) != len(columns):
                    raise LapsValueError(
                        _check.message(
                            operation,
                            f"{file}:{start} is malformed",
                            f"{len(columns)} cells: {', '.join(columns)}",
                            len(cells),
                        )
                    )
                entry: dict[str, Any] = dict(zip(columns, cells, strict=True))
                for column in known.captions if known is not None else ():
                    entry[column] = _captions_of_cell(operation, f"{file}:{start}", column, entry[column])
                yield start, entry
            start = reader.line_num + 1
    except csv.Error as error:
        raise LapsValueError(
            _check.message(operation, f"{file}:{start} is malformed", "a row of cells", error)
        ) from error


def _delimiter(text: str, chosen: tuple[str, ...] | None) -> str:
    """What separates the cells of a csv file: that by which its first line names images and captions."""
    first = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter))]
        if holds_pairs(names, chosen):
            return delimiter
    return DELIMITERS[0]


def _captions_of_cell(operation: str, place: str, column: str, cell: str) -> Any:
    """The cell, or what it lists: in JSON, or as Python prints a list of strings."""
    if not LIST.fullmatch(cell.strip()):
        return cell
    try:
        return json_of(operation, cell, Path(place))
    except LapsValueError:
        pass
    if PYTHON_LIST.fullmatch(cell.strip()):
        try:
            return ast.literal_eval(cell.strip())
        # An escape that means nothing, a null character.
        except (ValueError, SyntaxError):
            pass
    # NumPy prints no commas, and Python would make one string of those side by side.
    expected = "a list of strings in JSON"
    raise LapsValueError(
        _check.message(operation, f"{place} has a malformed list in {column!r}", expected, cell[:80])
    )
