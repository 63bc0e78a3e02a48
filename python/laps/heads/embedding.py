"""Heads that make one vector of each side."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._precision import wide
from ..features import ImageFeatures, TextFeatures
from .base import SimilarityHead

__all__ = ["EmbeddingHead"]


class EmbeddingHead(SimilarityHead):
    """A head that makes one unit vector of each image and of each caption; the score is their product.

    Args:
        embed_dim: C.
        num_patches: N, any number.
        num_prefix_tokens: P.
    """

    def __init__(self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        self.embed_dim = _check.count(name, "embed_dim", embed_dim)
        self.num_patches = _check.count(name, "num_patches", num_patches)
        self.num_prefix_tokens = _check.count(name, "num_prefix_tokens", num_prefix_tokens, 0)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        with torch.autocast(images.embedding.device.type, enabled=False):
            return wide(images.embedding) @ wide(texts.embedding).T

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return (wide(images.embedding) * wide(texts.embedding)).sum(-1)
