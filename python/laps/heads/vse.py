"""One vector per image and per caption: the global-embedding baseline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _check
from .._precision import wide
from ..features import ImageFeatures, Span, TextFeatures
from .base import mean_of_words, register_head
from .embedding import EmbeddingHead

__all__ = ["GlobalHead"]

POOLINGS = ("mean", "first")


@register_head("vse")
class GlobalHead(EmbeddingHead):
    """Cosine of two vectors, S = l2(pool(tokens)) . l2(pool(words)): VSE++ on transformer tokens.

    The linear maps of VSE++ are the projections of the encoders.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        pooling: ``"mean"`` of the patches and of the words, or the ``"first"`` token of each ([CLS]).

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Faghri et al., VSE++ (BMVC 2018), as the LAPS paper's tables use it.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.GlobalHead(64, 49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    row_wise: ClassVar[bool] = True

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, pooling: str = "mean"
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.pooling = _check.choice("GlobalHead", "pooling", pooling, POOLINGS)

    def options(self) -> dict[str, Any]:
        return {"pooling": self.pooling}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        if self.pooling == "first":
            pooled = image_tokens[:, 0]
        else:
            pooled = image_tokens[:, self.num_prefix_tokens :].mean(1)
        return ImageFeatures(embedding=torch.nn.functional.normalize(wide(pooled), dim=-1))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        pooled = word_tokens[:, 0] if self.pooling == "first" else mean_of_words(word_tokens, word_lengths)
        embedding = torch.nn.functional.normalize(wide(pooled), dim=-1)
        return TextFeatures(embedding=embedding, lengths=word_lengths, spans=spans)
