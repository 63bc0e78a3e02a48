"""CLIP's own score: no weights, so a pretrained CLIP needs no training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _check
from .._precision import wide
from ..errors import LapsValueError
from ..features import ImageFeatures, Span, TextFeatures
from .base import register_head
from .embedding import EmbeddingHead
from .pairs import unit

__all__ = ["CLIPHead"]


@register_head("clip")
class CLIPHead(EmbeddingHead):
    """S = l2([CLS] of the image) . l2(last token of the caption): the zero-shot rows of Table 2.

    Those are CLIP's own embeddings where the encoders are CLIP's, with its projections and none of ours
    (the presets ``clip-vit-*``).

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P, at least 1.

    Raises:
        LapsValueError: an image encoder without prefix token. LapsTypeError: an argument of the wrong type.

    Source: Radford et al., CLIP (ICML 2021), section 2.4.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("clip", embed_dim=64, num_patches=49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    row_wise: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = {"name": "info_nce"}

    def __init__(self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        if self.num_prefix_tokens < 1:
            raise LapsValueError(
                _check.message("CLIPHead", "the image encoder has no [CLS] token", "one of ViT or CLIP", 0)
            )

    def options(self) -> dict[str, Any]:
        return {}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        return ImageFeatures(embedding=unit(wide(image_tokens[:, 0])))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        last = (word_lengths.to(word_tokens.device) - 1)[:, None, None].expand(-1, 1, self.embed_dim)
        embedding = unit(wide(torch.gather(word_tokens, 1, last)[:, 0]))
        return TextFeatures(embedding=embedding, lengths=word_lengths.cpu(), spans=spans)
