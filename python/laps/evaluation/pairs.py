"""Scores of images with captions, in blocks of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .. import _check
from ..data import RetrievalData
from ..errors import LapsValueError
from ..features import ImageFeatures, TextFeatures
from .encode import CaptionStore

__all__ = ["PairScorer", "Pairs", "dot_product"]

Score: TypeAlias = Callable[[ImageFeatures, TextFeatures], Tensor]
Floats: TypeAlias = NDArray[np.float32]


def dot_product(images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """Scores by the global embeddings alone."""
    return images.embedding @ texts.embedding.T


@dataclass(frozen=True)
class Pairs:
    """Some image-caption pairs, ascending by image and then by caption; both (n,) int64."""

    image: NDArray[np.int64]
    caption: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image)

    def starts(self, num_images: int) -> NDArray[np.int64]:
        """(B_v + 1,): the pairs of image i are ``starts[i]:starts[i + 1]``."""
        return np.searchsorted(self.image, np.arange(num_images + 1)).astype(np.int64)


@dataclass(frozen=True)
class PairScorer:
    """Scores features that lie on the CPU: a block at a time goes to `device`, its scores come back.

    Attributes:
        data: for messages.
        device: where to score.
        pair_chunk: pairs per block at most.
        progress: whether to show bars.
        first_image: of the data, where the images to score are a part of its images.
    """

    data: RetrievalData
    device: torch.device
    pair_chunk: int
    progress: bool
    first_image: int = 0

    @property
    def block(self) -> tuple[int, int]:
        """Images and captions of a block: more captions, as a head prepares each image anew per block."""
        images = max(1, math.isqrt(self.pair_chunk // 32))
        return images, self.pair_chunk // images

    def all_pairs(self, score: Score, images: ImageFeatures, captions: CaptionStore, name: str) -> Floats:
        """(B_v, B_t) float32.

        Raises:
            LapsValueError: a score that is not finite, with the image's path and the caption's text.
        """
        scores = np.empty((len(images), len(captions)), dtype=np.float32)
        most_images, most_captions = self.block
        with self._bar(scores.size, name) as bar:
            # Captions outside: each is unpacked and moved once, while a slice of the images costs no copy.
            for columns in captions.blocks(torch.arange(len(captions)), most_captions):
                texts = captions.take(columns, self.device)
                for first in range(0, len(images), most_images):
                    block = score(self._on_device(images[first : first + most_images]), texts)
                    scores[first : first + most_images, columns.numpy()] = self._checked(
                        block, first, columns
                    )
                    bar.update(block.numel())
        return scores

    def some_pairs(
        self, score: Score, images: ImageFeatures, captions: CaptionStore, pairs: Pairs, name: str
    ) -> Floats:
        """(n,) float32: one call of `score` per image, with all its captions of `pairs` (up to a block's).

        Raises:
            LapsValueError: as `all_pairs`.
        """
        scores = np.empty(len(pairs), dtype=np.float32)
        starts = pairs.starts(len(images))
        with self._bar(len(pairs), name) as bar:
            for i in np.flatnonzero(np.diff(starts)).tolist():
                own = slice(int(starts[i]), int(starts[i + 1]))
                chosen = torch.from_numpy(pairs.caption[own])
                image = self._on_device(images[i : i + 1])
                for part in captions.blocks(chosen, self.block[1]):
                    block = score(image, captions.take(chosen[part], self.device))
                    scores[own][part.numpy()] = self._checked(block, i, chosen[part])[0]
                    bar.update(block.numel())
        return scores

    def _on_device(self, images: ImageFeatures) -> ImageFeatures:
        # Moved as stored, which may be half the bytes, and widened there.
        wide_dtype = torch.promote_types(images.embedding.dtype, torch.float32)
        return images.to(self.device).to(dtype=wide_dtype)

    def _checked(self, block: Tensor, first_image: int, captions: Tensor) -> Floats:
        scores = block.float().cpu().numpy()
        finite = np.isfinite(scores)
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            image, caption = self.first_image + first_image + row, int(captions[column])
            raise LapsValueError(
                _check.message(
                    "evaluate",
                    f"the score of image {image} ({self.data.image_paths[image]}) with caption {caption} "
                    f"({self.data.captions[caption]!r}) is not finite",
                    "finite scores",
                    float(scores[row, column]),
                )
            )
        return scores

    def _bar(self, pairs: int, name: str) -> tqdm[Any]:
        return tqdm(
            total=pairs,
            desc=name,
            unit="pair",
            unit_scale=True,
            disable=None if self.progress else True,
        )
