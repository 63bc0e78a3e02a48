"""Recall and ranks of a retrieval score matrix, for any caption-to-image map.

`scores` (B_v, B_t) has images as rows and captions as columns (a floating or integer tensor, on any device,
or a NumPy array); `caption_to_image` (B_t,) are integers in 0..B_v-1: which image caption t describes. No
number of captions per image is assumed and no order.

- "i2t" is image-to-text: every image that has captions is a query, and any of its captions is a hit.
- "t2i" is text-to-image: every caption is a query, and its image is the hit. An image without captions asks
  nothing and is one more image that a caption may wrongly find.

Ranks count from 1 and are pessimistic: 1 + the number of non-relevant items with a score at least as high.
Equal scores are never a hit by luck, captions of the same image do not compete, and a score that is not
finite is an error (a NaN would sort first in the usual code, and a matrix of NaN would have perfect recall).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _check
from .errors import LapsTypeError, LapsValueError
from .ranking import CaptionMap, Integers, Rows, caption_ranks, image_positions, row_blocks

__all__ = ["fold_metrics", "ranks", "retrieval_metrics", "summary"]

Scores: TypeAlias = Tensor | NDArray[Any]
Map: TypeAlias = Tensor | NDArray[Any] | Sequence[int]

RECALLS = (1, 5, 10)
RECALL_NAMES = (*(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALLS), "rsum")


def retrieval_metrics(scores: Scores, caption_to_image: Map) -> dict[str, float]:
    """The figures of the field's tables, in both directions.

    =============================  ==================================================================
    ``i2t_r1 i2t_r5 i2t_r10``      R@K in percent: queries with at least one hit among the first K
    ``i2t_medr i2t_meanr``         median and mean rank of the first hit (the median is not rounded)
    ``t2i_...``                    the same five, text-to-image
    ``rsum``                       the sum of the six R@K
    ``i2t_fraction_r1 ...``        the other meaning of R@K, in percent: the share of an image's
                                   captions among the first K, averaged over images (a caption has one
                                   image, so text-to-image has no such difference)
    =============================  ==================================================================

    Args:
        scores: (B_v, B_t), finite.
        caption_to_image: (B_t,) integers in 0..B_v-1.

    Returns:
        Name to value. Memory beyond `scores` stays below 100 MB for any B_v.

    Raises:
        LapsValueError: a score is not finite (its place is named), shapes that do not fit, an image out of
            range. LapsTypeError: a wrong dtype.

    Source: baselines.md, "Evaluation protocol".

    Example:
        >>> import numpy as np
        >>> from laps.metrics import retrieval_metrics
        >>> found = retrieval_metrics(np.array([[0.9, 0.1, 0.4], [0.3, 0.2, 0.8]]), [0, 0, 1])
        >>> found["i2t_r1"], found["t2i_r5"], found["t2i_medr"], found["i2t_fraction_r1"]
        (100.0, 100.0, 1.0, 75.0)
    """
    rows, captions = _check_arguments("retrieval_metrics", scores, caption_to_image)
    return summary(image_positions(rows, captions), caption_ranks(rows, captions), captions)


def ranks(scores: Scores, caption_to_image: Map) -> tuple[Integers, Integers]:
    """The rank of every query's first hit.

    Args:
        scores: (B_v, B_t), finite.
        caption_to_image: (B_t,) integers in 0..B_v-1.

    Returns:
        Image-to-text ranks (B_v,), 0 for an image without captions, and text-to-image ranks (B_t,), both
        int64 and from 1.

    Raises:
        LapsValueError, LapsTypeError: as :func:`retrieval_metrics`.

    Example:
        >>> import numpy as np
        >>> from laps.metrics import ranks
        >>> ranks(np.array([[0.9, 0.1, 0.4], [0.3, 0.2, 0.8]]), [0, 0, 1])
        (array([1, 1]), array([1, 2, 1]))
    """
    rows, captions = _check_arguments("ranks", scores, caption_to_image)
    return image_positions(rows, captions)[:, 0], caption_ranks(rows, captions)


def fold_metrics(scores: Scores, caption_to_image: Map, folds: int = 5) -> dict[str, float]:
    """The COCO 1K protocol: the images in contiguous disjoint folds, each with its own captions, averaged.

    The folds are diagonal blocks of the one matrix. Their sizes differ by one image at most.

    Args:
        scores: (B_v, B_t), finite (outside the diagonal blocks too).
        caption_to_image: (B_t,) integers in 0..B_v-1.
        folds: number of folds, 1..B_v.

    Returns:
        The names of :func:`retrieval_metrics`, each the mean over the folds.

    Raises:
        LapsValueError: more folds than images, a fold without captions, and all of :func:`retrieval_metrics`.

    Source: baselines.md, "Evaluation protocol".

    Example:
        >>> import numpy as np
        >>> from laps.metrics import fold_metrics
        >>> fold_metrics(np.eye(4), [0, 1, 3, 2], folds=2)["i2t_r1"]
        50.0
    """
    operation = "fold_metrics"
    rows, captions = _check_arguments(operation, scores, caption_to_image)
    parts = []
    for images in fold_slices(operation, captions, folds):
        own, image = captions.of_images(images)
        block, fold_captions = rows(images)[:, own], CaptionMap(image, images.stop - images.start)
        parts.append(
            summary(
                image_positions(block.__getitem__, fold_captions),
                caption_ranks(block.__getitem__, fold_captions),
                fold_captions,
            )
        )
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def fold_slices(operation: str, captions: CaptionMap, folds: int) -> list[slice]:
    """The images of each fold. Raises LapsValueError where `fold_metrics` does for its folds."""
    folds = _check.count(operation, "folds", folds)
    if folds > captions.num_images:
        raise LapsValueError(
            _check.message(
                operation, "folds is out of range", f"1 <= folds <= B_v={captions.num_images}", folds
            )
        )
    bounds = [captions.num_images * fold // folds for fold in range(folds + 1)]
    slices = [slice(first, last) for first, last in pairwise(bounds)]
    for fold, images in enumerate(slices):
        if not len(captions.of_images(images)[0]):
            raise LapsValueError(
                _check.message(
                    operation,
                    f"fold {fold} (images {images.start}..{images.stop - 1}) has no captions",
                    "at least one",
                )
            )
    return slices


def summary(positions: Integers, image_ranks: Integers, captions: CaptionMap) -> dict[str, float]:
    """The figures of :func:`retrieval_metrics` from the ranks behind them.

    Args:
        positions: (B_v, D) int64, of :func:`laps.ranking.image_positions`.
        image_ranks: (B_t,) int64, of :func:`laps.ranking.caption_ranks`.
        captions: the caption map.
    """
    asked = captions.counts > 0
    found = positions[asked]
    result: dict[str, float] = {}
    for direction, first_hit in (("i2t", found[:, 0]), ("t2i", image_ranks)):
        for k in RECALLS:
            result[f"{direction}_r{k}"] = 100.0 * int(np.count_nonzero(first_hit <= k)) / len(first_hit)
        result[f"{direction}_medr"] = float(np.median(first_hit))
        result[f"{direction}_meanr"] = float(np.mean(first_hit))
    result["rsum"] = sum(result[name] for name in RECALL_NAMES[:-1])
    for k in RECALLS:
        hits = ((found >= 1) & (found <= k)).sum(axis=1)
        result[f"i2t_fraction_r{k}"] = 100.0 * float(np.sum(hits / captions.counts[asked])) / len(hits)
    return result


# ---- checks


def _check_arguments(operation: str, scores: Scores, caption_to_image: Map) -> tuple[Rows, CaptionMap]:
    """A reader of row blocks, all of them known to be finite, and the map."""
    if not isinstance(scores, (Tensor, np.ndarray)):
        raise LapsTypeError(
            _check.message(
                operation, "scores is no array", "torch.Tensor or numpy.ndarray", _check.name_of(scores)
            )
        )
    if scores.ndim != 2 or 0 in scores.shape:
        raise LapsValueError(
            _check.message(
                operation, "scores has the wrong shape", "(B_v, B_t), B_v, B_t >= 1", tuple(scores.shape)
            )
        )
    rows = _reader(operation, scores)
    for block in row_blocks(*scores.shape):
        check_finite(operation, rows(block), block.start)
    return rows, CaptionMap(_check_map(operation, caption_to_image, *scores.shape), scores.shape[0])


def _reader(operation: str, scores: Scores) -> Rows:
    """Rows as NumPy arrays of float32 or float64, whichever holds the values of the dtype."""
    is_float = scores.dtype.is_floating_point if isinstance(scores, Tensor) else scores.dtype.kind == "f"
    refused = (
        scores.dtype == torch.bool or scores.dtype.is_complex
        if isinstance(scores, Tensor)
        else scores.dtype.kind not in "fiu"
    )
    if refused:
        raise LapsTypeError(
            _check.message(operation, "scores has the wrong dtype", "floating", _check.name_of(scores.dtype))
        )
    half = is_float and scores.dtype.itemsize < 4
    if isinstance(scores, Tensor):
        detached = scores.detach()
        torch_dtype = torch.float32 if half or scores.dtype == torch.float32 else torch.float64
        return lambda block: detached[block].to("cpu", torch_dtype).numpy()
    array = scores
    dtype = np.float32 if half or scores.dtype == np.float32 else np.float64
    return lambda block: array[block].astype(dtype, copy=False)


def check_finite(operation: str, block: NDArray[Any], first_row: int) -> None:
    """Refuse a block of scores with a NaN or an infinity, and say where it is."""
    finite = np.isfinite(block)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise LapsValueError(
            _check.message(
                operation,
                f"scores[{first_row + row}, {column}] is not finite",
                "finite scores",
                float(block[row, column]),
            )
        )


def _check_map(operation: str, caption_to_image: Map, num_images: int, num_captions: int) -> Integers:
    given = caption_to_image.detach().cpu() if isinstance(caption_to_image, Tensor) else caption_to_image
    try:
        array = np.asarray(given)
    except ValueError:
        raise LapsTypeError(
            _check.message(
                operation, "caption_to_image is no list of integers", "(B_t,) integers", "a ragged list"
            )
        ) from None
    if array.dtype.kind not in "iu":
        raise LapsTypeError(
            _check.message(operation, "caption_to_image has the wrong dtype", "integers", array.dtype)
        )
    if array.shape != (num_captions,):
        raise LapsValueError(
            _check.message(
                operation,
                "caption_to_image does not fit scores",
                f"shape ({num_captions},), one image per column",
                array.shape,
            )
        )
    wrong = (array < 0) | (array >= num_images)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise LapsValueError(
            _check.message(
                operation,
                f"caption_to_image[{index}] is out of range",
                f"0 <= image < B_v={num_images}",
                int(array[index]),
            )
        )
    return array.astype(np.int64)
