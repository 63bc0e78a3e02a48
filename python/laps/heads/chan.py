"""CHAN: every word is matched with its best patch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _check, functional
from .._precision import wide
from ..attribution import Attribution, attribute_patches, one_pair
from ..errors import LapsValueError
from ..features import ImageFeatures, TextFeatures
from .base import register_head
from .pairs import PairHead, Pairs, unit

__all__ = ["CHANHead"]

POOLINGS = ("mean", "lse")


@register_head("chan")
class CHANHead(PairHead):
    """R_j = max_n v_n . w_j of unit vectors; S is the mean of R over the words.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        pooling: ``"mean"`` of the words, as with BERT, or ``"lse"``: log sum_j exp(R_j / temperature), as
            with a GRU.
        temperature: of ``"lse"``, > 0.
        max_words: of ``"lse"``: the words of the longest caption, as `max_score` reckons.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Pan et al., CHAN (CVPR 2023), section 3.2: hard assignment coding.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("chan", embed_dim=64, num_patches=49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    row_wise: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.05}

    def __init__(
        self,
        embed_dim: int,
        num_patches: int,
        *,
        num_prefix_tokens: int = 1,
        pooling: str = "mean",
        temperature: float = 0.1,
        max_words: int = 64,
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.pooling = _check.choice("CHANHead", "pooling", pooling, POOLINGS)
        self.temperature = _check.number("CHANHead", "temperature", temperature, 0.0, open_low=True)
        self.max_words = _check.count("CHANHead", "max_words", max_words)

    @property
    def max_score(self) -> float:
        """1 of ``"mean"``; of ``"lse"`` 1 / temperature + log(max_words), the score where all R are 1."""
        return 1.0 if self.pooling == "mean" else 1 / self.temperature + math.log(self.max_words)

    def options(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "temperature": self.temperature, "max_words": self.max_words}

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        if self.pooling == "lse":
            return super().similarity(images, texts)
        # The sum of maxima is an operation of the Rust core.
        pairs = Pairs(images, texts)
        with torch.autocast(pairs.patches.device.type, enabled=False):
            patches, words = unit(wide(pairs.patches)), unit(wide(pairs.words))
            total: Tensor = functional.max_sim(patches, words, texts.lengths)
            return total / texts.lengths.to(total)

    def pair_scores(self, pairs: Pairs) -> Tensor:
        best = pairs.products(unit(pairs.patches), unit(pairs.words)).amax(-2)
        if self.pooling == "mean":
            return best.masked_fill(~pairs.real, 0).sum(-1) / pairs.lengths
        return (best / self.temperature).masked_fill(~pairs.real, -torch.inf).logsumexp(-1)

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """Each word's share is that of its best patch; see :meth:`laps.heads.SimilarityHead.explain`."""
        if self.pooling != "mean":
            raise LapsValueError(
                _check.message("explain", 'pooling "lse" is no sum over words', 'pooling="mean"')
            )
        return attribute_patches(*one_pair(images, texts), best_of_each_word, mask=mask)


def best_of_each_word(cosines: Tensor) -> Tensor:
    """(N, l) to the part of each (patch, word) in the score."""
    counted = torch.zeros_like(cosines).scatter_(0, cosines.argmax(0, keepdim=True), 1.0)
    return counted * cosines / cosines.shape[1]
