"""What is wrong with a data set, found before a training run does: `laps data check`."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsValueError
from .containers import content_of
from .detection import detect
from .formats import listings
from .images import open_with_mode
from .listing import Listing, is_blank, missing_files
from .reading import with_each_image
from .regions import OPERATION as REGIONS
from .regions import RegionTransform
from .tokenizer import CaptionTokenizer

__all__ = ["CheckReport", "Leak", "SplitReport", "check"]

# A full list goes to `to_dict`; a person reads the first ones.
SHOWN = 10


@dataclass
class SplitReport:
    """One split: how much there is, and what is wrong with it.

    Attributes:
        images, captions: how many.
        captions_per_image: "min", "median", "max".
        faults: what could not be taken, with its place: captions that are no text, samples of a shard that
            are malformed, damaged shards.
        missing: paths of files that are not there.
        unreadable: path to reason.
        converted: Pillow mode to the number of images that become RGB from it.
        empty_captions: where they stand; nothing in them is visible, or makes a token.
        unlabelled: paths of regions of which none has a label, if labels have names.
        long_captions: where they stand, and their number of tokens; they get truncated.
        duplicate_images: groups of paths with the same content.
        duplicate_captions: where a caption stands that its image has already.
    """

    images: int
    captions: int
    captions_per_image: dict[str, float]
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    converted: dict[str, int] = field(default_factory=dict)
    empty_captions: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    long_captions: list[tuple[str, int]] = field(default_factory=list)
    duplicate_images: list[list[str]] = field(default_factory=list)
    duplicate_captions: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """There are images and captions, all of them usable, no image missing and no caption empty.

        And not all of the images lack labels, if these have names.
        """
        there = self.images > 0 and self.captions > 0 and len(self.unlabelled) < self.images
        return there and not (self.faults or self.missing or self.unreadable or self.empty_captions)


@dataclass
class Leak:
    """What two splits share: images, as pairs of paths, and the captions that these have in both."""

    splits: tuple[str, str]
    images: list[tuple[str, str]]
    captions: list[str]


@dataclass
class CheckReport:
    """What :func:`check` found; ``str(report)`` is for reading.

    Attributes:
        path: what was checked.
        splits: name to report.
        leaks: pairs of splits that share an image.
        max_length: what captions were measured with, or None.
        ok: whether there is a split, and nothing is missing, unreadable, empty or shared. Long captions,
            duplicates inside a split and conversions are reported and do not count: training takes them.
    """

    path: str
    splits: dict[str, SplitReport]
    leaks: list[Leak]
    max_length: int | None

    @property
    def ok(self) -> bool:
        return bool(self.splits) and not self.leaks and all(split.ok for split in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.path}: {'ok' if self.ok else 'problems found'}"]
        if not self.splits:
            lines.append("no images and no captions")
        for name, split in self.splits.items():
            low, middle, high = (f"{split.captions_per_image[key]:g}" for key in ("min", "median", "max"))
            lines.append(
                f"{name}: {split.images} images, {split.captions} captions; "
                f"per image {low} to {high}, median {middle}"
            )
            absent = [what for what in ("images", "captions") if getattr(split, what) == 0]
            if absent:
                lines.append(f"  no {' and no '.join(absent)}")
            lines += _items("what cannot be taken", split.faults)
            lines += _items("missing images", split.missing)
            lines += _items("unreadable images", [f"{path}: {why}" for path, why in split.unreadable.items()])
            lines += _items("images without a label on any region", split.unlabelled)
            lines += _items("empty captions", split.empty_captions)
            lines += _items(
                f"captions above {self.max_length} tokens, which get truncated",
                [f"{place}: {tokens} tokens" for place, tokens in split.long_captions],
            )
            lines += _items("images given more than once", [" = ".join(g) for g in split.duplicate_images])
            lines += _items("captions given more than once for an image", split.duplicate_captions)
            if split.converted:
                modes = ", ".join(
                    f"{count} of mode {mode}" for mode, count in sorted(split.converted.items())
                )
                lines.append(f"  converted to RGB: {modes}")
        for leak in self.leaks:
            first, second = leak.splits
            lines.append(f"{first} and {second} share images:")
            lines += _items("images", [a if a == b else f"{a} = {b}" for a, b in leak.images])
            lines += _items("captions of these", leak.captions)
        if self.max_length is None:
            lines.append("The captions' lengths in tokens were not checked: no tokenizer was given.")
        return "\n".join(lines)


def check(
    path: str | Path,
    *,
    images: str | Path | None = None,
    transform: RegionTransform | None = None,
    splits: Sequence[str] | None = None,
    tokenizer: CaptionTokenizer | None = None,
    max_length: int | None = None,
    caption_column: str | Sequence[str] | None = None,
    threads: int = 8,
    progress: bool = True,
) -> CheckReport:
    """Read every image and caption of a data set, and report what is wrong.

    Images are compared by content, so that a copy under another name counts as shared between splits too.
    So are regions, by what a model sees of them.

    Args:
        path: as for :func:`laps.data.load`.
        images: as for :func:`laps.data.load`.
        transform: None for image files; of regions what a model of them reads them with. Its `num_labels`,
            where given, finds the labels that have no name, and the images without label.
        splits: those to check; None for all.
        tokenizer: with it, captions without tokens count as empty too, and long ones are reported. Without,
            captions count as empty in which nothing is visible.
        max_length: the most tokens of a caption, start and end included; None takes the tokenizer's.
        caption_column: as for :func:`laps.data.load`.
        threads: how many images are read at once.
        progress: whether to show a bar, on a terminal or in a notebook.

    Raises:
        LapsValueError: the annotations cannot be read, no image is found at all, an unknown split, regions
            where images were expected.

    Example:
        >>> import tempfile, pathlib, PIL.Image, laps.data
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> PIL.Image.new("L", (8, 8)).save(folder / "a.png")
        >>> _ = (folder / "test.csv").write_text("image,caption\\na.png,a cat\\nb.png,a dog\\n")
        >>> report = laps.data.check(folder, progress=False)
        >>> report.ok, report.splits["test"].converted, len(report.splits["test"].missing)
        (False, {'L': 1}, 1)
    """
    operation = "check"
    threads = _check.count(operation, "threads", threads)
    if max_length is not None and tokenizer is None:
        raise LapsValueError(_check.message(operation, "max_length needs a tokenizer", "both or none"))
    if max_length is not None:
        max_length = _check.count(operation, "max_length", max_length, 3)
    limit = tokenizer.max_length if tokenizer is not None and max_length is None else max_length
    folder = None if images is None else Path(images)
    source = detect(operation, Path(path))
    found = listings(
        operation, source, regions=transform is not None, images=folder, caption_column=caption_column
    )
    chosen = _chosen(operation, path, found, splits)
    paths = {
        name: listing.paths(operation, folder) if listing.files else [] for name, listing in chosen.items()
    }
    read = _read_image if transform is None else partial(_read_regions, transform)
    contents = _read_all(read, sorted({p for group in paths.values() for p in group}), threads, progress)
    reports = {
        name: _split_report(listing, paths[name], contents, tokenizer, limit)
        for name, listing in chosen.items()
    }
    pairs = [pair for pair in combinations(chosen, 2) if not _nested(*pair)]
    leaks = [_leak(pair, chosen, paths, contents) for pair in pairs]
    return CheckReport(str(path), reports, [leak for leak in leaks if leak.images], limit)


def _chosen(
    operation: str, path: str | Path, found: dict[str, Listing], splits: Sequence[str] | None
) -> dict[str, Listing]:
    unknown = [split for split in splits or () if split not in found]
    if unknown:
        raise LapsValueError(
            _check.message(operation, f"{path} has no split {unknown[0]!r}", f"one of {', '.join(found)}")
        )
    return found if splits is None else {split: found[split] for split in splits}


def _nested(first: str, second: str) -> bool:
    """COCO's "test" is the first part of its "testall" by design."""
    return first == f"{second}all" or second == f"{first}all"


# ---- images


@dataclass(frozen=True)
class _Content:
    """An image file: a digest of its bytes (of the path where there are none), its mode, what is wrong.

    And whether its regions lack the labels that they are to have.
    """

    key: str
    mode: str = "RGB"
    error: str = ""
    unlabelled: bool = False


def _read_image(path: Path) -> _Content:
    try:
        mode = open_with_mode(path)[1]
        content = content_of(path)
    except LapsValueError as error:
        return _Content(str(path), error=str(error).removeprefix(f"open_image: {path} "))
    content = path.read_bytes() if content is None else content
    return _Content(hashlib.blake2b(content, digest_size=16).hexdigest(), mode)


def _read_regions(transform: RegionTransform, path: Path) -> _Content:
    try:
        rows = transform.open(path).numpy()
    except LapsValueError as error:
        return _Content(str(path), error=str(error).removeprefix(f"{REGIONS}: {path} "))
    unlabelled = transform.num_labels is not None and bool(rows[:, -1].max() < 0)
    return _Content(hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest(), unlabelled=unlabelled)


def _read_all(
    read: Callable[[Path], _Content], paths: Sequence[Path], threads: int, progress: bool
) -> dict[Path, _Content]:
    absent = set(missing_files(list(paths)))
    contents = {path: _Content(str(path), error="missing") for i, path in enumerate(paths) if i in absent}
    present = [path for i, path in enumerate(paths) if i not in absent]
    found = with_each_image(read, present, threads=threads, progress=progress)
    return contents | dict(zip(present, found, strict=True))


# ---- reports


def _split_report(
    listing: Listing,
    paths: Sequence[Path],
    contents: Mapping[Path, _Content],
    tokenizer: CaptionTokenizer | None,
    limit: int | None,
) -> SplitReport:
    counts = Counter(listing.caption_to_image)
    per_image = [counts[i] for i in range(len(paths))] or [0]
    report = SplitReport(
        len(paths),
        len(listing.captions),
        {"min": min(per_image), "median": statistics.median(per_image), "max": max(per_image)},
        faults=listing.faults,
    )
    same: dict[str, list[str]] = {}
    for path in paths:
        content = contents[path]
        if content.error == "missing":
            report.missing.append(str(path))
        elif content.error:
            report.unreadable[str(path)] = content.error
        else:
            same.setdefault(content.key, []).append(str(path))
            if content.unlabelled:
                report.unlabelled.append(str(path))
            if content.mode != "RGB":
                report.converted[content.mode] = report.converted.get(content.mode, 0) + 1
    report.duplicate_images = [group for group in same.values() if len(group) > 1]
    _check_captions(report, listing, tokenizer, limit)
    return report


def _check_captions(
    report: SplitReport, listing: Listing, tokenizer: CaptionTokenizer | None, limit: int | None
) -> None:
    seen: set[tuple[int, str]] = set()
    for t, caption in enumerate(listing.captions):
        place = listing.place_of(t)
        pair = (listing.caption_to_image[t], caption)
        tokens = None if tokenizer is None else tokenizer.count(caption)
        # Two tokens: the start and the end.
        if is_blank(caption) or tokens == 2:
            report.empty_captions.append(place)
        elif pair in seen:
            report.duplicate_captions.append(place)
        if tokens is not None and limit is not None and tokens > limit:
            report.long_captions.append((place, tokens))
        seen.add(pair)


def _leak(
    splits: tuple[str, str],
    chosen: Mapping[str, Listing],
    paths: Mapping[str, Sequence[Path]],
    contents: Mapping[Path, _Content],
) -> Leak:
    first, second = splits
    own = {contents[path].key: path for path in paths[first]}
    shared = [(own[contents[path].key], path) for path in paths[second] if contents[path].key in own]
    keys = {contents[path].key for _, path in shared}
    captions = [_keyed_captions(chosen[name], paths[name], contents, keys) for name in splits]
    return Leak(
        (first, second),
        [(str(a), str(b)) for a, b in shared],
        sorted({text for _, text in captions[0] & captions[1]}),
    )


def _keyed_captions(
    listing: Listing, paths: Sequence[Path], contents: Mapping[Path, _Content], keys: set[str]
) -> set[tuple[str, str]]:
    """The captions of the images with these contents, each with its image's key."""
    pairs = zip(listing.caption_to_image, listing.captions, strict=True)
    return {(contents[paths[i]].key, text) for i, text in pairs if contents[paths[i]].key in keys}


def _items(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"    ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"  {title}: {len(items)}", *(f"    {_line(item)}" for item in items[:SHOWN]), *more]


def _line(item: str) -> str:
    """An item, which has names of files, as one line."""
    return _check.printable(item).replace("\n", "\\n")
