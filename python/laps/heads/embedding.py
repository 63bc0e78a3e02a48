"""Heads that make one vector of each side."""

from __future__ import annotations

import torch
from torch import Tensor

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
        self.set_sizes(embed_dim, num_patches, num_prefix_tokens)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        with torch.autocast(images.embedding.device.type, enabled=False):
            return wide(images.embedding) @ wide(texts.embedding).T

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return (wide(images.embedding) * wide(texts.embedding)).sum(-1)
