"""The shapes that are measured, their inputs, and the arithmetic that the head needs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One encoder's token grid with the ratios that the paper uses for it."""

    title: str
    num_patches: int
    channels: int
    selection_ratio: float = 0.5
    aggregation_ratio: float = 0.4
    num_prefix_tokens: int = 1

    @property
    def kept(self) -> int:
        """k, the patches that a caption keeps."""
        return math.ceil(self.num_patches * self.selection_ratio)

    @property
    def aggregated(self) -> int:
        """N_c, the tokens that the kept patches are aggregated into."""
        return int(self.num_patches * self.aggregation_ratio * self.selection_ratio)

    @property
    def hidden(self) -> int:
        """The hidden width of the aggregation network."""
        return int(0.2 * self.channels)


SHAPES = {
    "vit-224": Shape("ViT-224", num_patches=196, channels=512),
    "vit-384": Shape("ViT-384", num_patches=576, channels=512),
    "swin-224": Shape(
        "Swin-224",
        num_patches=49,
        channels=512,
        selection_ratio=0.8,
        aggregation_ratio=0.6,
        num_prefix_tokens=0,
    ),
    "clip-l": Shape("CLIP-L", num_patches=256, channels=768),
}


@dataclass(frozen=True)
class Batch:
    """Random features of one shape; values do not matter to the time, but they are alike for every form."""

    images: Tensor
    words: Tensor
    lengths: Tensor
    grad: Tensor

    @property
    def total_words(self) -> int:
        """The real words of all captions."""
        return int(self.lengths.sum())


def make_batch(
    shape: Shape, images: int, captions: int, words: tuple[int, int] = (8, 30), seed: int = 0
) -> Batch:
    """`images` token grids, `captions` of words[0] to words[1] words (uniform), a gradient for the scores."""
    generator = torch.Generator().manual_seed(seed)
    tokens = shape.num_prefix_tokens + shape.num_patches
    lengths = torch.randint(words[0], words[1] + 1, (captions,), generator=generator)
    return Batch(
        images=torch.randn(images, tokens, shape.channels, generator=generator),
        words=torch.randn(captions, int(lengths.max()), shape.channels, generator=generator),
        lengths=lengths,
        grad=torch.randn(images, captions, generator=generator),
    )


def similarity_flops(shape: Shape, images: int, captions: int, total_words: int) -> dict[str, int]:
    """The floating-point operations of `laps.functional.similarity`, forward, variant "released", by stage.

    A multiply-add is two operations. Only the arithmetic that the method needs is counted, and only for the
    rows that a pair keeps: an implementation that computes more (the full product, both halves of a symmetric
    matrix) gets no credit for it. Not counted at all: norms of inputs, selection (top-k), exponentials,
    maxima and means, and any token that is recomputed for its digits.

    With N patches, P prefix tokens, k kept patches, N_c aggregated tokens, C channels:

    - text_scores: every patch with every caption's mean word, 2 N C a pair;
    - products: words with kept patches, prefix tokens and fused token, 2 (k + P + 1) C a word and image;
    - numerators: N_c weighted sums over the k kept rows, 2 N_c k a word and image;
    - fused_token: the weighted sum of the dropped patches and its squared norm, 2 (N - k) C + 2 C a pair;
    - gram: V V^T, its symmetric half, N (N + 1) C an image;
    - norms: e^T G e for N_c tokens over the kept patches, the symmetric half, N_c k (k + 1) a pair.
    """
    n, p, k, n_c, c = (
        shape.num_patches,
        shape.num_prefix_tokens,
        shape.kept,
        shape.aggregated,
        shape.channels,
    )
    pairs, word_rows = images * captions, images * total_words
    fused = 1 if k < n else 0
    return {
        "text_scores": pairs * 2 * n * c,
        "products": word_rows * 2 * (k + p + fused) * c,
        "numerators": word_rows * 2 * n_c * k,
        "fused_token": pairs * fused * (2 * (n - k) * c + 2 * c),
        "gram": images * n * (n + 1) * c,
        "norms": pairs * n_c * k * (k + 1),
    }


def network_flops(shape: Shape, images: int) -> int:
    """The two linear layers of the aggregation network, once an image (they do not depend on the caption)."""
    return images * 2 * shape.num_patches * shape.hidden * (shape.channels + shape.aggregated)
