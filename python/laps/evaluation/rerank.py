"""Two-stage retrieval: global embeddings nominate, the head decides among the nominated."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..features import ImageFeatures
from ..metrics import RECALL_NAMES, summary
from ..ranking import CaptionMap, Rows, caption_ranks, image_positions, row_blocks
from .encode import CaptionStore, RetrievalModel
from .pairs import Floats, Pairs, PairScorer, dot_product

__all__ = ["Reranked", "rerank"]


@dataclass(frozen=True)
class Reranked:
    """Result of two-stage retrieval.

    Attributes:
        shortlist: K, captions nominated per image, and images per caption.
        metrics: names of :func:`laps.metrics.retrieval_metrics`. What is not on the shortlist ranks last, so
            a relevant item that is not nominated is a miss.
        embedding_metrics: the same names for the global embeddings alone.
        recall_loss: for every R@K and ``rsum``: exhaustive minus two-stage, in percent points.
        shortlist_recall: ``i2t`` and ``t2i``: percentage of the queries whose shortlist has a relevant item.
        pairs: pairs that the head scored; a pair nominated from both sides counts once.
        seconds: nominating and scoring, features given.
    """

    shortlist: int
    metrics: dict[str, float]
    embedding_metrics: dict[str, float]
    recall_loss: dict[str, float]
    shortlist_recall: dict[str, float]
    pairs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def rerank(
    model: RetrievalModel,
    images: ImageFeatures,
    captions: CaptionStore,
    caption_map: CaptionMap,
    shortlist: int,
    *,
    scorer: PairScorer,
    exhaustive: dict[str, float],
) -> Reranked:
    """Rank every query's `shortlist` best by global embedding with the model, all else last.

    Raises:
        LapsValueError: a score that is not finite, with its image and caption.
    """
    started = time.perf_counter()
    global_scores = scorer.all_pairs(
        dot_product, ImageFeatures(images.embedding), captions.embeddings_only(), "embeddings"
    )
    pairs, by_image, by_caption = nominate(global_scores, shortlist)
    scores = scorer.some_pairs(model.similarity, images, captions, pairs, f"rerank {shortlist}")
    seconds = time.perf_counter() - started

    # A pair may be on the shortlist of its image and not on its caption's: two rankings, not one matrix.
    i2t = _ranking(global_scores.shape, pairs, scores, by_image)
    t2i = _ranking(global_scores.shape, pairs, scores, by_caption)
    metrics = summary(image_positions(i2t, caption_map), caption_ranks(t2i, caption_map), caption_map)
    alone = global_scores.__getitem__

    relevant = caption_map.image_of[pairs.caption] == pairs.image
    images_with = len(np.unique(pairs.image[relevant & by_image]))
    captions_with = int(np.count_nonzero(relevant & by_caption))
    return Reranked(
        shortlist=shortlist,
        metrics=metrics,
        embedding_metrics=summary(
            image_positions(alone, caption_map), caption_ranks(alone, caption_map), caption_map
        ),
        recall_loss={name: exhaustive[name] - metrics[name] for name in RECALL_NAMES},
        shortlist_recall={
            "i2t": 100.0 * images_with / int(np.count_nonzero(caption_map.counts)),
            "t2i": 100.0 * captions_with / caption_map.num_captions,
        },
        pairs=len(pairs),
        seconds=seconds,
    )


def nominate(global_scores: Floats, shortlist: int) -> tuple[Pairs, NDArray[np.bool_], NDArray[np.bool_]]:
    """Every image's best captions and every caption's best images.

    Returns:
        The pairs, each once, and for each whether its image and whether its caption nominated it.
    """
    num_images, num_captions = global_scores.shape
    by_image = [
        (block.start + row) * num_captions + caption
        for block in row_blocks(num_images, num_captions)
        for row, caption in [np.nonzero(_best(global_scores[block], shortlist))]
    ]
    by_caption = [
        image * num_captions + (block.start + column)
        for block in row_blocks(num_captions, num_images)
        for column, image in [np.nonzero(_best(global_scores[:, block].T, shortlist))]
    ]
    chosen_by_image, chosen_by_caption = np.concatenate(by_image), np.concatenate(by_caption)
    union = np.union1d(chosen_by_image, chosen_by_caption)
    return (
        Pairs(union // num_captions, union % num_captions),
        np.isin(union, chosen_by_image, assume_unique=True),
        np.isin(union, chosen_by_caption, assume_unique=True),
    )


def _best(scores: Floats, k: int) -> NDArray[np.bool_]:
    """The k highest of each row; of equal ones at the border, those with the lower index."""
    if k >= scores.shape[1]:
        return np.ones(scores.shape, dtype=np.bool_)
    lowest = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > lowest, scores == lowest
    free = k - np.count_nonzero(above, axis=1, keepdims=True)
    best: NDArray[np.bool_] = above | (equal & (np.cumsum(equal, axis=1) <= free))
    return best


def _ranking(shape: tuple[int, ...], pairs: Pairs, scores: Floats, chosen: NDArray[np.bool_]) -> Rows:
    """Rows of one matrix that ranks the chosen pairs by `scores`, and all others last, as equals."""
    image, caption = pairs.image[chosen], pairs.caption[chosen]
    starts = Pairs(image, caption).starts(shape[0])
    own_scores = scores[chosen]
    # Ties count as failures, so what is equal and lowest has the last rank of all.
    below = float(own_scores.min()) - 1.0

    def rows(block: slice) -> NDArray[np.float64]:
        result = np.full((block.stop - block.start, shape[1]), below)
        own = slice(starts[block.start], starts[block.stop])
        result[image[own] - block.start, caption[own]] = own_scores[own]
        return result

    return rows
