"""Readers of the formats that image-caption data comes in; all of them return a `RetrievalData`.

- Karpathy's JSON: ``{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}``, where "restval"
  is training data too;
- COCO's annotations, ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``, and the
  lists of ALBEF and BLIP, ``[{"image", "caption"}, ...]``, a file for each split;
- caption files, of SCAN, VSE-infinity, LAPS: ``{split}_caps.txt``, ``{split}_ids.txt``, ``id_mapping.json``;
- CLIP_benchmark's text files of lines ``NAME.jpg,CAPTION``, a file for each split;
- pairs: csv, tsv, JSONL or a list in JSON with columns of names, captions and perhaps splits;
- data sets of the library `datasets`: folders of ``save_to_disk``, and parquet files;
- shards: tar files of webdataset, img2dataset and CLIP_benchmark.

No reader assumes a number of captions per image. An image that is named again is the same image; in data sets
and shards every row or sample is an image of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from .columns import chosen_captions
from .detection import CONTAINERS, Source, detect
from .hub import parse_rows
from .json_files import parse_json
from .listing import Listing
from .pairs import parse_pairs
from .parsers import (
    CAPTIONS_END,
    json_of,
    parse_caption_files,
    parse_karpathy,
    parse_name_lists,
    text_of,
)
from .records import RetrievalData
from .regions import ARCHIVE_END, REGIONS_END, is_regions
from .shards import parse_shards
from .splits import choose_split

__all__ = ["load", "read_caption_files", "read_karpathy", "read_pairs"]

KEEP = ("raise", "keep")
ON_ERROR = ("raise", "skip")
# Formats that have columns; "json" may be one.
TABLES = ("pairs", "parquet", "saved", "json")


# ---- public readers


def load(
    path: str | Path,
    split: str,
    *,
    images: str | Path | None = None,
    regions: bool = False,
    on_missing: str = "raise",
    on_empty: str = "raise",
    on_error: str = "raise",
    caption_column: str | Sequence[str] | None = None,
) -> RetrievalData:
    """Read one split of a data set, whatever its format.

    Args:
        path: a file, or a folder that holds one data set: see docs/data.md for each format. Shards may be
            given with braces too: ``shards/{00000..00009}.tar``.
        split: for example "train", "dev" or "test"; "dev" and "val" are the same. Where neither the content
            nor the names of files tell, the one split is called "all". Pairs without a split column have the
            split that the file is called, if that is a split's name.
        images: the folder of the image files, or of ``{split}_ims.npy``; None looks beside the file: in
            ``images/``, in the data set's name, and in the folder itself. Data sets and shards hold theirs.
        regions: take the features of a detector for images, see :class:`laps.data.RegionTransform`: beside
            caption files ``{split}_ims.npy``, else for each image an ``.npz`` file of its name in `images`.
        on_missing: "raise" refuses data whose image files are not all there, "keep" leaves that to the reader
            of the images.
        on_empty: "raise" refuses an empty caption (nothing in it is visible), "keep" leaves that to the
            reader of the captions.
        on_error: "raise" refuses what cannot be taken: a caption that is no text (half of a surrogate pair),
            a malformed sample of a shard, a damaged shard. "skip" leaves it out, and warns once.
        caption_column: of tables, the column of the captions, or several; None: the one that is called so,
            see docs/data.md for the names.

    Raises:
        LapsValueError: a missing file or folder (the message lists where it looked), an unknown split (lists
            those present), malformed content or an empty caption (names file and line), ids that do not fit
            their captions, a caption whose image is absent, one image in two splits of a file, a damaged
            shard, a folder of no known or of more than one format (lists what it holds), regions where images
            are expected or the reverse, a table of which several columns may be the captions, or may name the
            images (names them). LapsImportError: the library `datasets` is needed and not installed.

    Example:
        >>> import tempfile, pathlib, laps.data
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.jpg").write_bytes(b"")
        >>> _ = (folder / "test.csv").write_text("image,caption\\na.jpg,a cat\\na.jpg,a black cat\\n")
        >>> laps.data.load(folder / "test.csv", "test").captions
        ['a cat', 'a black cat']
    """
    source = detect("load", Path(path))
    return _read("load", source, split, images, on_missing, on_empty, regions, on_error, caption_column)


def read_karpathy(
    json_file: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read one split of a Karpathy JSON file; see :func:`load`. "train" includes "restval"."""
    source = Source("karpathy", Path(json_file), (Path(json_file),))
    return _read("read_karpathy", source, split, images, on_missing, on_empty)


def read_caption_files(
    folder: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    regions: bool = False,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read ``{split}_caps.txt`` and ``{split}_ids.txt`` with ``id_mapping.json``; see :func:`load`.

    Line t of ``{split}_caps.txt`` is caption t. ``{split}_ids.txt`` has the image id of each caption, or one
    id per image, where every image has the same number of captions, in order. ``id_mapping.json``, here or
    one folder up, gives each id's image file. With `regions` the images are the rows of ``{split}_ims.npy``
    if that is there, each with equally many captions, in order, and neither ids nor mapping are needed; of a
    row for each caption, equal rows that follow each other are one image.
    """
    source = Source("caption_files", Path(folder), (Path(folder),))
    return _read("read_caption_files", source, split, images, on_missing, on_empty, regions)


def read_pairs(
    file: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read a csv, tsv or JSONL file of names, captions and perhaps splits; see :func:`load`."""
    source = Source("pairs", Path(file), (Path(file),))
    return _read("read_pairs", source, split, images, on_missing, on_empty)


def _read(
    operation: str,
    source: Source,
    split: str,
    images: str | Path | None,
    on_missing: str,
    on_empty: str,
    regions: bool = False,
    on_error: str = "raise",
    caption_column: object = None,
) -> RetrievalData:
    _check.choice(operation, "on_error", on_error, ON_ERROR)
    _check.choice(operation, "on_missing", on_missing, KEEP)
    _check.choice(operation, "on_empty", on_empty, KEEP)
    _check.flag(operation, "regions", regions)
    folder = None if images is None else Path(images)
    found = listings(operation, source, split, regions=regions, images=folder, caption_column=caption_column)
    if not any(listing.files or listing.faults for listing in found.values()):
        raise LapsValueError(_check.message(operation, f"{source.path} lists no image", "at least one"))
    listing = found[choose_split(operation, source.path, split, list(found))]
    listing.accept_faults(operation, on_error)
    # Caption files are one for each split, and containers have images of their own.
    if source.kind != "caption_files" and source.kind not in CONTAINERS:
        _refuse_mixed(operation, found, folder)
    return listing.resolve(operation, folder, on_missing, on_empty)


# ---- the splits of a source


def listings(
    operation: str,
    source: Source,
    split: str | None = None,
    *,
    regions: bool = False,
    images: Path | None = None,
    caption_column: object = None,
) -> dict[str, Listing]:
    """The splits of a source by name; of files that are one per split by format, `split` alone if given.

    `images` is the folder of files of rows, which have to be read for it; None: that of the captions.

    Raises LapsValueError where it lists regions and images are expected, or the reverse; or where it has no
    columns, and `caption_column` is given.
    """
    path = source.path
    chosen = chosen_captions(operation, caption_column)
    if chosen is not None and source.kind not in TABLES:
        expected = "a table: csv, tsv, JSONL, parquet, a list in JSON, a data set of save_to_disk"
        raise LapsValueError(_check.message(operation, f"caption_column, but {path} has none", expected))
    if source.kind == "karpathy":
        found = parse_karpathy(operation, path, json_of(operation, text_of(operation, path), path))
    elif source.kind == "json":
        found = parse_json(operation, source.files, chosen)
    elif source.kind == "name_lists":
        found = parse_name_lists(operation, source.files)
    elif source.kind == "pairs":
        found = parse_pairs(operation, source.files, chosen)
    elif source.kind in CONTAINERS:
        return _of_containers(operation, source, split, regions, images, chosen)
    else:
        if not path.is_dir():
            raise LapsValueError(_check.message(operation, f"{path} is missing", "a folder"))
        names = sorted(file.name.removesuffix(CAPTIONS_END) for file in path.glob(f"*{CAPTIONS_END}"))
        wanted = names if split is None else [choose_split(operation, path, split, names)]
        found = {name: _of_caption_files(operation, path, name, regions, images) for name in wanted}
    if regions:
        for listing in found.values():
            _name_regions(operation, listing)
    else:
        _refuse_regions(operation, found)
    return found


def _of_containers(
    operation: str,
    source: Source,
    split: str | None,
    regions: bool,
    images: Path | None,
    chosen: tuple[str, ...] | None,
) -> dict[str, Listing]:
    """Files that hold their images, so that nothing else is looked for."""
    groups = source.groups or {}
    if regions:
        expected = "regions of a detector: captions beside .npz files or *_ims.npy"
        raise LapsValueError(_check.message(operation, f"{source.path} has images", expected))
    if images is not None:
        expected = "no images=... (--images)"
        raise LapsValueError(
            _check.message(operation, f"{source.path} holds its images itself", expected, images)
        )
    wanted_split = None
    if split is not None and (source.kind == "shards" or len(groups) > 1):
        wanted_split = choose_split(operation, source.path, split, list(groups))
    if source.kind == "shards":
        wanted = groups if wanted_split is None else [wanted_split]
        return {name: parse_shards(operation, groups[name], name) for name in wanted}
    return parse_rows(operation, source.kind, source.path, groups, wanted_split, chosen)


def _of_caption_files(
    operation: str, folder: Path, split: str, regions: bool, images: Path | None
) -> Listing:
    """One split; of its regions the rows of one file where they are, else those that its ids lead to."""
    rows, ids = (images or folder) / f"{split}{REGIONS_END}", folder / f"{split}_ids.txt"
    if not regions and not ids.is_file():
        for place in {rows, folder / rows.name}:
            if place.is_file():
                raise _has_regions(operation, place)
    of_rows = regions and (rows.is_file() or not ids.is_file())
    return parse_caption_files(operation, folder, split, regions=rows if of_rows else None)


def _name_regions(operation: str, listing: Listing) -> None:
    """The files of regions in place of the images that they were found in."""
    files = [_region_file(operation, listing, image) for image in range(len(listing.files))]
    first: dict[str, str] = {}
    for image, file in zip(listing.files, files, strict=True):
        if first.setdefault(file, image) != image:
            expected = "images of different names, for regions are found by them"
            raise LapsValueError(
                _check.message(operation, f"{listing.name} has {first[file]} and {image}", expected)
            )
    listing.files = files
    listing.content = "region"


def _region_file(operation: str, listing: Listing, image: int) -> str:
    file = Path(listing.files[image])
    if is_regions(file):
        return str(file)
    if file.name in ("", ".."):
        # A folder, such as ".", whose name takes no other ending.
        place = next((listing.place_of(t) for t, i in enumerate(listing.caption_to_image) if i == image), "")
        raise LapsValueError(
            _check.message(operation, f"{place or listing.name} names {file}", "the name of a file")
        )
    return str(file.with_suffix(ARCHIVE_END))


def _refuse_regions(operation: str, found: dict[str, Listing]) -> None:
    for listing in found.values():
        for file in listing.files:
            if is_regions(Path(file)):
                raise _has_regions(operation, f"{listing.name}: {file}")


def _has_regions(operation: str, place: object) -> LapsValueError:
    expected = "images; for regions regions=True (laps data check: --regions) and a model of them, such as "
    return LapsValueError(
        _check.message(operation, f"{place} has regions of a detector", f"{expected}the preset region-36")
    )


def _refuse_mixed(operation: str, found: dict[str, Listing], images: Path | None) -> None:
    """A file that puts one image into two splits contradicts itself.

    An equal name is another image where each split has a folder of its own, as COCO's have.
    """
    split_of: dict[str, str] = {}
    folder_of = cache(lambda split: _folder(found[split], images))
    for split, listing in found.items():
        for file in listing.files:
            first = split_of.setdefault(file, split)
            if first != split and folder_of(first) == folder_of(split):
                raise LapsValueError(
                    _check.message(
                        operation,
                        f"{listing.name} is mixed up with {first}: both have {file}",
                        "each image in one split",
                    )
                )


def _folder(listing: Listing, images: Path | None) -> str:
    """Where the images of a split are; where none of them is, the likeliest place."""
    return os.path.realpath(listing.folder(images) or images or next(iter(listing.image_folders), Path()))
