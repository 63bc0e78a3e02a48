"""Ranks of the relevant items, in both directions, in row blocks of the score matrix.

A rank is pessimistic: 1 + the number of non-relevant items whose score is at least as high. A score that is
the same for all items, or shared with another item, thus never passes for a hit; captions of the same image
are no competitors of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEPTH", "CaptionMap", "Integers", "Rows", "caption_ranks", "image_positions", "row_blocks"]

Integers: TypeAlias = NDArray[np.int64]
# Some rows of a finite floating matrix (B_v, B_t).
Rows: TypeAlias = Callable[[slice], NDArray[Any]]

# Recall is reported at 10 at most, so an image's eleventh best caption matters to no figure.
DEPTH = 10
BLOCK_ELEMENTS = 2**22


class CaptionMap:
    """Which caption describes which image, and the captions of each image side by side.

    Attributes:
        image_of: (B_t,) int64, the image of each caption.
        captions: (B_t,) int64, all captions, those of image 0 first.
        starts: (B_v + 1,) int64: the captions of image i are ``captions[starts[i]:starts[i + 1]]``.
        counts: (B_v,) int64, the number of captions of each image.
    """

    def __init__(self, caption_to_image: Integers, num_images: int) -> None:
        self.image_of = caption_to_image
        self.captions = np.argsort(caption_to_image, kind="stable").astype(np.int64)
        self.counts = np.bincount(caption_to_image, minlength=num_images).astype(np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    @property
    def num_images(self) -> int:
        return len(self.counts)

    @property
    def num_captions(self) -> int:
        return len(self.image_of)

    def of_images(self, images: slice) -> tuple[Integers, Integers]:
        """The captions of consecutive images, and for each the image's number within the slice."""
        captions = self.captions[self.starts[images.start] : self.starts[images.stop]]
        return captions, self.image_of[captions] - images.start


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices over all rows, of 16 MiB each in float32."""
    step = max(1, BLOCK_ELEMENTS // num_columns)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def image_positions(rows: Rows, captions: CaptionMap) -> Integers:
    """Where an image's own captions stand in its ranking.

    Returns:
        (B_v, D) int64, D <= 10: column d is the position, from 1, of the (d+1)-th best of the image's own
        captions: 1 + d + #{others' captions with a score >= its own}. 0 where the image has no such caption.
    """
    depth = min(DEPTH, int(captions.counts.max()))
    positions = np.zeros((captions.num_images, depth), dtype=np.int64)
    for images in row_blocks(captions.num_images, captions.num_captions):
        own, row = captions.of_images(images)
        others = rows(images).copy()
        scores = others[row, own]
        others[row, own] = -np.inf
        scores = scores[np.lexsort((-scores, row))]
        place = np.arange(len(own)) - (captions.starts[images] - captions.starts[images.start])[row]
        for d in range(depth):
            threshold = np.full(len(others), np.inf, dtype=others.dtype)
            having = row[place == d]
            threshold[having] = scores[place == d]
            ahead = np.count_nonzero(others >= threshold[:, None], axis=1)
            positions[images][having, d] = 1 + d + ahead[having]
    return positions


def caption_ranks(rows: Rows, captions: CaptionMap) -> Integers:
    """(B_t,) int64, the rank of each caption's image: 1 + #{other images with a score >= its own}."""
    blocks = list(row_blocks(captions.num_images, captions.num_captions))
    scores = np.empty(captions.num_captions, dtype=rows(blocks[0]).dtype)
    for images in blocks:
        own, row = captions.of_images(images)
        scores[own] = rows(images)[row, own]
    ranks = np.zeros(captions.num_captions, dtype=np.int64)
    for images in blocks:
        # The image itself is counted too, which makes it a rank.
        ranks += np.count_nonzero(rows(images) >= scores, axis=0)
    return ranks
