"""Data sets of the library `datasets` as images and captions: which columns have them, which rows a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .columns import (
    chosen_captions,
    find_captions,
    find_id,
    find_split,
    known_captions,
    several_captions,
)
from .hub_rows import (
    column_types,
    find_image_column,
    image_rows,
    keep_in_memory,
    library,
    open_rows,
    wrong_columns,
)
from .listing import Listing
from .pairs import texts_of
from .parsers import field_of, json_of, text_of
from .records import RetrievalData
from .splits import canonical_split

__all__ = ["SAVED_DICT", "from_dataset", "parse_rows", "saved_splits"]

# What DatasetDict.save_to_disk writes beside the folders of its splits.
SAVED_DICT = "dataset_dict.json"
EXPECTED = f"strings or lists of strings in {known_captions()} (or caption_column, --caption-column)"
# How many rows' texts are in memory at once: Karpathy's sentences come with their words.
BATCH = 10_000


def from_dataset(
    dataset: Any,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    on_empty: str = "raise",
) -> RetrievalData:
    """A data set of Hugging Face's library `datasets` as images and captions.

    Nothing is copied: an image is read from the data set when it is opened, in loader workers too. The data
    set is kept for that, as long as the process lives.

    Args:
        dataset: one split, a ``datasets.Dataset``.
        image_column: of encoded images; None: the one of type ``Image``, or called image, jpg, png, webp.
        caption_column: of strings, of Karpathy's ``{"raw": string, ...}``, or of lists of either; or several
            of these; None: the one that is called so, see docs/data.md for the names. Rows of one string each
            with an equal image_id (or img_id, imgid, cocoid) are captions of one image.
        on_empty: "raise" refuses an empty caption, "keep" leaves that to the reader of the captions.

    Raises:
        LapsImportError: the library is not installed.
        LapsTypeError: not a Dataset, for example a DatasetDict, or one that is streamed.
        LapsValueError: no such column, none that fits (lists those present), several that may be meant (names
            them), no row, an empty caption.

    Example:
        >>> import datasets, io, PIL.Image, laps.data
        >>> stream = io.BytesIO()
        >>> PIL.Image.new("RGB", (8, 8)).save(stream, "PNG")
        >>> rows = {"image": [{"bytes": stream.getvalue(), "path": None}], "caption": [["a cat", "cats"]]}
        >>> features = datasets.Features(
        ...     image=datasets.Image(), caption=datasets.List(datasets.Value("string")))
        >>> data = laps.data.from_dataset(datasets.Dataset.from_dict(rows, features=features))
        >>> data.captions, laps.data.open_image(data.image_paths[0]).size
        (['a cat', 'cats'], (8, 8))
    """
    operation = "from_dataset"
    datasets = library(operation)
    _check.choice(operation, "on_empty", on_empty, ("raise", "keep"))
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        expected = f"one of its splits, such as dataset[{next(iter(dataset), 'train')!r}]"
        raise LapsTypeError(
            _check.message(operation, "dataset has several splits", expected, ", ".join(map(str, dataset)))
        )
    if not isinstance(dataset, datasets.Dataset):
        got = _check.name_of(dataset)
        raise LapsTypeError(_check.message(operation, "dataset is wrong", "datasets.Dataset", got))
    rows = image_rows(dataset, find_image_column(operation, "dataset", dataset, image_column))
    columns = _caption_columns(operation, "dataset", dataset, chosen_captions(operation, caption_column))
    container = Path(f"dataset-{rows._fingerprint}")
    split = "all" if dataset.split is None else str(dataset.split)
    listing = Listing(f"dataset/{split}", "{}", [Path()])
    _Reader(operation, lambda _: listing).add(container, dataset, columns)
    keep_in_memory(container, rows)
    listing.accept_faults(operation, "raise")
    return listing.resolve(operation, None, "keep", on_empty)


def saved_splits(operation: str, folder: Path) -> dict[str, Path]:
    """The splits that ``DatasetDict.save_to_disk`` has written, and the folder of each."""
    file = folder / SAVED_DICT
    names = field_of(operation, str(file), json_of(operation, text_of(operation, file), file), "splits", list)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LapsValueError(
                _check.message(operation, f"{file} has the split {name!r}", "a folder's name")
            )
    return {name: folder / name for name in names}


def parse_rows(
    operation: str,
    kind: str,
    path: Path,
    groups: Mapping[str, Sequence[Path]],
    split: str | None,
    chosen: tuple[str, ...] | None = None,
) -> dict[str, Listing]:
    """The splits of parquet files ("parquet") or saved folders ("saved"), grouped by what their names tell.

    Of several groups each is a split (of which only `split` is read, if given); of a single one a column
    ``split`` tells, where there is one. `chosen` are the columns of the captions, where their names are not
    to tell.
    """
    found: dict[str, Listing] = {}

    def listing_of(name: str) -> Listing:
        if name not in found:
            found[name] = Listing(f"{path.name}/{name}", "{}", [Path()])
        return found[name]

    for group, containers in groups.items():
        if split is not None and len(groups) > 1 and group != split:
            continue
        reader = _Reader(operation, listing_of)
        for container in containers:
            rows = open_rows(operation, kind, container)
            # The column is looked for now, so that a wrong file is named before any image is opened.
            find_image_column(operation, container, rows)
            columns = _caption_columns(operation, container, rows, chosen)
            texts = [name for name, kind_ in column_types(rows).items() if _is_text(kind_)]
            own = find_split(operation, container, texts) if len(groups) == 1 else None
            reader.add(container, rows, columns, split=group, split_column=own)
    return found


# ---- captions


def _caption_columns(
    operation: str, place: object, rows: Any, chosen: tuple[str, ...] | None
) -> tuple[str, ...]:
    types = column_types(rows)
    for column in chosen or ():
        if column not in types:
            raise wrong_columns(operation, place, f"no column {column!r}", EXPECTED, rows)
        if not _is_captions(types[column]):
            raise wrong_columns(operation, place, f"no captions in the column {column!r}", EXPECTED, rows)
    if chosen is not None:
        return chosen
    found = find_captions([name for name, kind in types.items() if _is_captions(kind)])
    if not found:
        raise wrong_columns(operation, place, "no column of captions", EXPECTED, rows)
    if len(found) > 1:
        raise several_captions(operation, place, found)
    return found[0]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as of

    return bool(of.is_string(kind) or of.is_large_string(kind))


def _is_caption(kind: Any) -> bool:
    """One string, or Karpathy's {"raw": string, ...}."""
    return _is_text(_raw(kind))


def _is_captions(kind: Any) -> bool:
    """One or many; the library has a list of objects also as an object of lists."""
    import pyarrow.types as of

    kind = _raw(kind)
    lists = of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind)
    return _is_caption(kind.value_type if lists else kind)


def _raw(kind: Any) -> Any:
    """The type of the key "raw" of objects; other types as they are."""
    import pyarrow.types as of

    there = of.is_struct(kind) and kind.get_field_index("raw") >= 0
    return kind.field("raw").type if there else kind


def _is_id(kind: Any) -> bool:
    import pyarrow.types as of

    return _is_text(kind) or bool(of.is_integer(kind))


class _Reader:
    """Adds rows to the listings of their splits; an image may go on from one container to the next."""

    def __init__(self, operation: str, listing_of: Callable[[str], Listing]) -> None:
        self.operation, self.listing_of = operation, listing_of
        self._images: dict[tuple[str, int | str], int] = {}

    def add(
        self,
        container: Path,
        rows: Any,
        columns: Sequence[str],
        *,
        split: str = "all",
        split_column: str | None = None,
    ) -> None:
        """Take all rows of a container, as images of `split`, or of what a column says."""
        types = column_types(rows)
        # A list of captions is all that an image has; strings may go on in other rows.
        in_pairs = len(columns) == 1 and _is_caption(types[columns[0]])
        ids = find_id(name for name, kind in types.items() if in_pairs and _is_id(kind))
        wanted = [*columns, *([split_column] if split_column else []), *([ids] if ids else [])]
        cells = rows.select_columns(list(dict.fromkeys(wanted))).with_format(None)
        for row, entry in enumerate(_entries(cells)):
            place = f"{container}/{row}"
            name = split
            if split_column is not None:
                name = canonical_split(field_of(self.operation, place, entry, split_column))
            listing = self.listing_of(name)
            key = (name, entry[ids]) if ids else None
            if key is None or key[1] is None or key not in self._images:
                image = listing.add_member(container / str(row))
                if key is not None:
                    self._images[key] = image
            else:
                image = self._images[key]
            for column in columns:
                # An image may have fewer captions than there are columns.
                if entry[column] is not None:
                    for text in texts_of(self.operation, place, entry, column):
                        listing.add_caption(image, text, place)


def _entries(rows: Any) -> Iterator[dict[str, Any]]:
    for batch in rows.iter(BATCH):
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(batch, cells, strict=True))
