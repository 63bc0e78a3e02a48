"""VSE-infinity: one vector per side, pooled with learned weights of the sorted values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import _check
from .._precision import wide
from ..features import ImageFeatures, Span, TextFeatures
from .base import register_head
from .embedding import EmbeddingHead
from .pairs import unit

__all__ = ["GPOHead", "GeneralizedPooling"]

POSITION_DIM, HIDDEN = 32, 32
TEMPERATURE = 0.1


class GeneralizedPooling(nn.Module):
    """pooled_c = sum_k theta_k * (the k-th largest value of channel c), of sets of any size.

    theta = softmax_k(z_k / 0.1); z is a linear map, without bias, of the mean of both directions of a GRU (32
    hidden units) over the sinusoidal encodings (32 numbers) of the positions k. It depends on the size of
    the set alone.

    Source: Chen et al., VSE-infinity (CVPR 2021), section 3.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(POSITION_DIM, HIDDEN, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(HIDDEN, 1, bias=False)

    def weights(self, sizes: Tensor) -> Tensor:
        """Sizes (B,), int64 on the CPU, to theta (B, K) of the largest size K; zero past each size."""
        # Many sets share a size, and the GRU takes its steps one after the other: once for each size.
        distinct, place = torch.unique(sizes, return_inverse=True)
        # Half precision has no whole numbers above 256 (bfloat16), so only their encodings are rounded.
        positions = _positions(int(distinct[-1]), wide(self.linear.weight)).to(self.linear.weight.dtype)
        # cuDNN differentiates a GRU in training mode only; without dropout both modes are the same.
        self.gru.train()
        packed = pack_padded_sequence(
            positions.expand(len(distinct), -1, -1), distinct, batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        z = wide(self.linear((states[..., :HIDDEN] + states[..., HIDDEN:]) / 2))[..., 0]
        theta: Tensor = (z / TEMPERATURE).masked_fill(~_real(distinct, z), -torch.inf).softmax(-1)
        return theta[place.to(theta.device)]

    def forward(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Values (B, K', C), of which the first sizes (B,) are the set, to (B, C), float32 or float64."""
        with torch.autocast(values.device.type, enabled=False):
            values = wide(values[:, : int(sizes.max())])
            padding = ~_real(sizes, values[..., 0])[..., None]
            ordered = values.masked_fill(padding, -torch.inf).sort(1, descending=True).values
            theta = self.weights(sizes).to(values.dtype)
            return torch.einsum("bk,bkc->bc", theta, ordered.masked_fill(padding, 0))


@register_head("gpo")
class GPOHead(EmbeddingHead):
    """S = v . t of unit vectors, each pooled by an operator of its own, :class:`GeneralizedPooling`.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        use_prefix: whether the prefix tokens belong to the image's set; the patches do in any case.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Chen et al., Learning the Best Pooling Strategy for Visual Semantic Embedding (VSE-infinity, CVPR
    2021), section 3.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("gpo", embed_dim=64, num_patches=49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    row_wise: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.2}

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, use_prefix: bool = True
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.use_prefix = _check.flag("GPOHead", "use_prefix", use_prefix)
        self.image_pooling = GeneralizedPooling()
        self.text_pooling = GeneralizedPooling()

    def options(self) -> dict[str, Any]:
        return {"use_prefix": self.use_prefix}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        tokens = image_tokens if self.use_prefix else image_tokens[:, self.num_prefix_tokens :]
        sizes = torch.full((len(tokens),), tokens.shape[1])
        return ImageFeatures(embedding=unit(self.image_pooling(tokens, sizes)))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        lengths = word_lengths.cpu()
        embedding = unit(self.text_pooling(word_tokens, lengths))
        return TextFeatures(embedding=embedding, lengths=lengths, spans=spans)


def _positions(size: int, like: Tensor) -> Tensor:
    """(K, 32): the sines and cosines of k / 10000^(2i / 32), side by side."""
    k = torch.arange(size, device=like.device, dtype=like.dtype)
    halves = torch.arange(0, POSITION_DIM, 2, device=like.device, dtype=like.dtype)
    angles = k[:, None] / 10000 ** (halves / POSITION_DIM)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _real(sizes: Tensor, like: Tensor) -> Tensor:
    """(B, K) bool for `like` (B, K): what belongs to the sets."""
    return torch.arange(like.shape[1], device=like.device) < sizes.to(like.device)[:, None]
