"""Do the maps of words point at what the words name? Pointing game and overlap with boxes.

The pointing game (Zhang et al., 2018) asks whether a map's highest place lies in a box; the overlap (IoU) is
that of the boxes with the places where the map reaches a share of its maximum. Chance is the share of the
image that the boxes cover: how often a map that knows nothing would point right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from . import _check
from .data.images import open_image
from .data.phrases import Box, Phrase, by_pair
from .errors import LapsTypeError, LapsValueError
from .explanation import Explanation, explain

if TYPE_CHECKING:
    from .model import LAPS

__all__ = ["GroundingResult", "evaluate_grounding", "is_within", "overlap", "phrase_map", "pointed_at"]

KINDS = ("shares", "gradient")
# Of a patch: how finely areas are counted.
STEPS = 8
RESAMPLES = 2000


def _covered(grid: tuple[int, int], boxes: Sequence[Box], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Which of (rows x STEPS, columns x STEPS) points of an image of `size` (width, height) lie in a box."""
    rows, columns = grid
    y = (np.arange(rows * STEPS) + 0.5) * size[1] / (rows * STEPS)
    x = (np.arange(columns * STEPS) + 0.5) * size[0] / (columns * STEPS)
    inside = np.zeros((len(y), len(x)), dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None]
    return inside


def pointed_at(values: NDArray[Any], size: tuple[int, int]) -> tuple[float, float]:
    """The centre (x, y) of the map's highest patch, in pixels.

    Args:
        values: (rows, columns); among equals the first counts.
        size: width and height of the image in pixels.
    """
    rows, columns = values.shape
    row, column = divmod(int(values.argmax()), columns)
    return (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows


def is_within(point: tuple[float, float], boxes: Sequence[Box]) -> bool:
    """Whether a point (x, y) lies in a box."""
    return any(x0 <= point[0] < x1 and y0 <= point[1] < y1 for x0, y0, x1, y1 in boxes)


def overlap(
    values: NDArray[Any], boxes: Sequence[Box], size: tuple[int, int], *, threshold: float = 0.5
) -> float:
    """Intersection over union, in [0, 1], of the boxes and the patches that reach `threshold` of the maximum.

    0 for a map that is nowhere above zero. Areas are counted on 8 x 8 points per patch.

    Args:
        values: (rows, columns).
        boxes: in pixels.
        size: width and height of the image in pixels.
        threshold: in (0, 1].
    """
    highest = float(values.max())
    if highest <= 0:
        return 0.0
    reached = np.kron(values >= threshold * highest, np.ones((STEPS, STEPS), dtype=np.bool_))
    inside = _covered((values.shape[0], values.shape[1]), boxes, size)
    return int((reached & inside).sum()) / max(int((reached | inside).sum()), 1)


def phrase_map(why: Explanation, start: int, end: int, *, kind: str = "shares") -> NDArray[Any] | None:
    """The map (rows, columns) of the words of ``caption[start:end]``; None where the model saw none of them.

    Args:
        why: of a caption that is known.
        start: this and
        end: in characters of the caption.
        kind: ``"shares"``, what each patch adds to the score with these words, or ``"gradient"``.
    """
    _check.choice("phrase_map", "kind", kind, KINDS)
    chosen = [word for word, first, past in why.places() if first < end and past > start]
    if not chosen:
        return None
    maps = [word.patch_shares if kind == "shares" else word.map for word in chosen]
    return why.on_grid(np.sum(maps, axis=0))


@dataclass(frozen=True)
class GroundingResult:
    """What maps point at, over all phrases.

    Attributes:
        phrases: the n that the model saw a word of, pair by pair, in the order of each pair's first.
        points: (n, 2), the centre (x, y) in pixels of the highest patch of each phrase's map.
        hits: (n,) bool, whether that is right.
        overlaps: (n,), IoU of each.
        chances: (n,), the share of the image that is right.
        skipped: phrases that the model saw no word of: they were cut off.
    """

    phrases: tuple[Phrase, ...]
    points: NDArray[np.float64]
    hits: NDArray[np.bool_]
    overlaps: NDArray[np.float64]
    chances: NDArray[np.float64]
    skipped: int = 0

    @property
    def images(self) -> NDArray[np.int64]:
        """(n,), the number of each phrase's image, in the order of their first phrases."""
        numbers: dict[Path, int] = {}
        return np.array([numbers.setdefault(phrase.image, len(numbers)) for phrase in self.phrases])

    @property
    def categories(self) -> NDArray[np.str_]:
        """(n,), of each phrase."""
        return np.array([phrase.category for phrase in self.phrases])

    def summary(self, category: str | None = None) -> dict[str, float]:
        """Percentages of all phrases, or of one category, with 95 % intervals.

        The interval is a bootstrap over images, for phrases of one image are not independent; NaN of a
        single image.

        Raises:
            LapsValueError: no such category.
        """
        chosen = np.ones(len(self.hits), dtype=np.bool_) if category is None else self.categories == category
        if not chosen.any():
            known = ", ".join(sorted(set(self.categories)))
            raise LapsValueError(_check.message("summary", f"no phrase is of {category!r}", known))
        low, high = bootstrap_interval(self.hits[chosen], self.images[chosen])
        return {
            "phrases": int(chosen.sum()),
            "pointing": 100 * float(self.hits[chosen].mean()),
            "pointing_low": 100 * low,
            "pointing_high": 100 * high,
            "iou": 100 * float(self.overlaps[chosen].mean()),
            "chance": 100 * float(self.chances[chosen].mean()),
        }

    def table(self) -> str:
        """One line for each category, and one for all."""
        names = sorted({str(c) for c in self.categories if c})
        lines = [f"{'':12} {'phrases':>8} {'pointing':>9} {'95 %':>15} {'IoU':>6} {'chance':>7}"]
        for name in [*names, None]:
            at = self.summary(name)
            low, high = at["pointing_low"], at["pointing_high"]
            interval = "-" if math.isnan(low) else f"{low:.1f} - {high:.1f}"
            lines.append(
                f"{name or 'all':12} {at['phrases']:8} {at['pointing']:9.1f} {interval:>15} {at['iou']:6.1f} "
                f"{at['chance']:7.1f}"
            )
        if self.skipped:
            lines.append(f"{self.skipped} phrases were cut off with the end of their captions.")
        return "\n".join(lines)


def bootstrap_interval(values: NDArray[Any], images: NDArray[np.int64]) -> tuple[float, float]:
    """The middle 95 % of the mean of values over images that are drawn anew; the same draws in every call.

    NaN of a single image.
    """
    if len(np.unique(images)) < 2:
        return math.nan, math.nan
    _, group = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def evaluate_grounding(
    model: LAPS,
    phrases: Sequence[Phrase],
    *,
    kind: str = "shares",
    threshold: float = 0.5,
    progress: bool = True,
) -> GroundingResult:
    """How well the maps of words find what the words name.

    Args:
        model: with a head that can explain.
        phrases: of a reader in :mod:`laps.data.phrases`, or your own.
        kind: ``"shares"``, what each patch adds to the score with the words of the phrase, or ``"gradient"``.
        threshold: of the overlap, in (0, 1].
        progress: show a progress bar in a terminal or a notebook.

    Raises:
        LapsValueError: no phrase, an image that cannot be read, or one that all words were cut off of.
    """
    operation = "evaluate_grounding"
    _check.choice(operation, "kind", kind, KINDS)
    threshold = _check.number(operation, "threshold", threshold, 0.0, 1.0, open_low=True)
    for phrase in phrases:
        if not isinstance(phrase, Phrase):
            raise LapsTypeError(
                _check.message(operation, "phrases has something else", "Phrase", _check.name_of(phrase))
            )
    if not phrases:
        raise LapsValueError(_check.message(operation, "phrases is empty", "at least one", 0))
    rows: list[tuple[Phrase, tuple[float, float], bool, float, float]] = []
    skipped, pictures = 0, {}
    pairs = list(by_pair(phrases))
    for image, caption, own in tqdm(pairs, desc="grounding", disable=None if progress else True):
        if image not in pictures:
            pictures = {image: open_image(image)}
        why = explain(model, pictures[image], caption)
        size = pictures[image].size
        for phrase in own:
            values = phrase_map(why, phrase.start, phrase.end, kind=kind)
            if values is None:
                skipped += 1
                continue
            chance = float(_covered(why.grid, phrase.boxes, size).mean())
            point = pointed_at(values, size)
            iou = overlap(values, phrase.boxes, size, threshold=threshold)
            rows.append((phrase, point, is_within(point, phrase.boxes), iou, chance))
    if not rows:
        raise LapsValueError(
            _check.message(operation, "the model saw no phrase", "captions that fit", skipped)
        )
    seen, points, hits, overlaps, chances = zip(*rows, strict=True)
    return GroundingResult(
        seen, np.array(points), np.array(hits), np.array(overlaps), np.array(chances), skipped
    )
