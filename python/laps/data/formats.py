"""Readers of the formats that image-caption data comes in; all of them return a `RetrievalData`.

- Karpathy's JSON: ``{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}``, where "restval"
  is training data too;
- caption files, of SCAN, VSE-infinity, LAPS: ``{split}_caps.txt``, ``{split}_ids.txt``, ``id_mapping.json``;
- pairs: csv, tsv or JSONL with columns ``image``, ``caption`` and perhaps ``split``.

No reader assumes a number of captions per image. An image that is named again is the same image.
"""

from __future__ import annotations

from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from .listing import Listing
from .parsers import (
    CAPTIONS_END,
    PAIR_SUFFIXES,
    SPLIT_NAMES,
    pair_files,
    parse_caption_files,
    parse_karpathy,
    parse_pairs,
)
from .records import RetrievalData
from .regions import ARCHIVE_END, REGIONS_END, is_regions

__all__ = ["load", "read_caption_files", "read_karpathy", "read_pairs"]

KEEP = ("raise", "keep")
# One set, several names.
DEV_NAMES = {"val", "dev", "valid", "validation"}


# ---- public readers


def load(
    path: str | Path,
    split: str,
    *,
    images: str | Path | None = None,
    regions: bool = False,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read one split of a data set, whatever its format.

    Args:
        path: a Karpathy JSON file, a csv, tsv or JSONL file, one of the ``{split}_caps.txt`` files, or a
            folder of these: of pairs one file, or one per split (``train.csv``, ``test.csv``).
        split: for example "train", "dev" or "test"; "dev" and "val" are the same. A file of pairs without a
            split column has one split, named as the file if that is a split's name, else "all".
        images: the folder of the image files, or of ``{split}_ims.npy``; None looks beside the file: in
            ``images/``, in the data set's name, and in the folder itself.
        regions: take the features of a detector for images, see :class:`laps.data.RegionTransform`: beside
            caption files ``{split}_ims.npy``, else for each image an ``.npz`` file of its name in `images`.
        on_missing: "raise" refuses data whose image files are not all there, "keep" leaves that to the reader
            of the images.
        on_empty: "raise" refuses an empty caption (nothing in it is visible), "keep" leaves that to the
            reader of the captions.

    Raises:
        LapsValueError: a missing file or folder (the message lists where it looked), an unknown split (lists
            those present), malformed content or an empty caption (names file and line), ids that do not fit
            their captions, a caption whose image is absent, one image in two splits of a file, a folder of no
            known or of more than one format, regions where images are expected or the reverse.

    Example:
        >>> import tempfile, pathlib, laps.data
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.jpg").write_bytes(b"")
        >>> _ = (folder / "test.csv").write_text("image,caption\\na.jpg,a cat\\na.jpg,a black cat\\n")
        >>> laps.data.load(folder / "test.csv", "test").captions
        ['a cat', 'a black cat']
    """
    kind, place = detect("load", Path(path))
    return _read("load", kind, place, split, images, on_missing, on_empty, regions)


def read_karpathy(
    json_file: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read one split of a Karpathy JSON file; see :func:`load`. "train" includes "restval"."""
    return _read("read_karpathy", "karpathy", Path(json_file), split, images, on_missing, on_empty)


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
    operation, folder = "read_caption_files", Path(folder)
    return _read(operation, "caption_files", folder, split, images, on_missing, on_empty, regions)


def read_pairs(
    file: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    on_missing: str = "raise",
    on_empty: str = "raise",
) -> RetrievalData:
    """Read a csv, tsv or JSONL file with ``image``, ``caption`` and perhaps ``split``; see :func:`load`."""
    return _read("read_pairs", "pairs", Path(file), split, images, on_missing, on_empty)


def _read(
    operation: str,
    kind: str,
    path: Path,
    split: str,
    images: str | Path | None,
    on_missing: str,
    on_empty: str,
    regions: bool = False,
) -> RetrievalData:
    _check.choice(operation, "on_missing", on_missing, KEEP)
    _check.choice(operation, "on_empty", on_empty, KEEP)
    _check.flag(operation, "regions", regions)
    folder = None if images is None else Path(images)
    found = listings(operation, kind, path, split, regions=regions, images=folder)
    if not any(listing.files for listing in found.values()):
        raise LapsValueError(_check.message(operation, f"{path} lists no image", "at least one"))
    if kind != "caption_files":
        _refuse_mixed(operation, found)
    listing = found[_split_name(operation, path, split, list(found))]
    return listing.resolve(operation, folder, on_missing, on_empty)


# ---- which format, which split


def detect(operation: str, path: Path) -> tuple[str, Path]:
    """The format of `path`, and the file or folder to read; LapsValueError if it is none or several."""
    if path.is_file():
        if path.suffix == ".json":
            return "karpathy", path
        if path.suffix in PAIR_SUFFIXES:
            return "pairs", path
        if path.name.endswith(CAPTIONS_END):
            return "caption_files", path.parent
        raise LapsValueError(
            _check.message(
                operation, f"{path} has no known format", f".json, .csv, .tsv, .jsonl or {CAPTIONS_END}"
            )
        )
    if not path.is_dir():
        raise LapsValueError(_check.message(operation, f"{path} is missing", "a file or a folder"))
    found = [("karpathy", file) for file in sorted(path.glob("dataset*.json"))]
    found += [("caption_files", file) for file in sorted(path.glob(f"*{CAPTIONS_END}"))[:1]]
    # Tables that lie beside these are something else: results, for example.
    pairs = [] if found else pair_files(path)
    if len(pairs) > 1 and all(file.stem in SPLIT_NAMES for file in pairs):
        return "pairs", path
    found += [("pairs", file) for file in pairs]
    if len(found) != 1:
        raise LapsValueError(
            _check.message(
                operation,
                f"{path} does not tell which data to read",
                "dataset*.json, *_caps.txt, a csv, tsv or JSONL file, or one of these for each split",
                ", ".join(file.name for _, file in found) or "none of them",
            )
        )
    kind, file = found[0]
    return kind, path if kind == "caption_files" else file


def listings(
    operation: str,
    kind: str,
    path: Path,
    split: str | None = None,
    *,
    regions: bool = False,
    images: Path | None = None,
) -> dict[str, Listing]:
    """The splits of `path` by name; of caption files, which are one per split, `split` alone if given.

    `images` is the folder of files of rows, which have to be read for it; None: that of the captions.

    Raises LapsValueError where it lists regions and images are expected.
    """
    if kind == "karpathy":
        found = parse_karpathy(operation, path)
    elif kind == "pairs":
        found = parse_pairs(operation, path)
    else:
        if not path.is_dir():
            raise LapsValueError(_check.message(operation, f"{path} is missing", "a folder"))
        names = sorted(file.name.removesuffix(CAPTIONS_END) for file in path.glob(f"*{CAPTIONS_END}"))
        wanted = names if split is None else [_split_name(operation, path, split, names)]
        found = {name: _of_caption_files(operation, path, name, regions, images) for name in wanted}
    if regions:
        for listing in found.values():
            _name_regions(operation, listing)
    else:
        _refuse_regions(operation, found)
    return found


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


def _same_split(name: str, other: str) -> bool:
    return name == other or {name, other} <= DEV_NAMES


def _split_name(operation: str, path: Path, split: str, present: list[str]) -> str:
    matching = [name for name in present if name == split] or [
        name for name in present if _same_split(name, split)
    ]
    if not matching:
        raise LapsValueError(
            _check.message(operation, f"{path} has no split {split!r}", f"one of {', '.join(present)}")
        )
    return matching[0]


def _refuse_mixed(operation: str, found: dict[str, Listing]) -> None:
    """A file that puts one image into two splits contradicts itself."""
    split_of: dict[str, str] = {}
    for split, listing in found.items():
        for file in listing.files:
            if split_of.setdefault(file, split) != split:
                raise LapsValueError(
                    _check.message(
                        operation,
                        f"{listing.name} is mixed up with {split_of[file]}: both have {file}",
                        "each image in one split",
                    )
                )
