"""Heads whose scores need both sides at once: all pairs in blocks, so that memory has a bound."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _check
from .._precision import wide
from ..errors import LapsValueError
from ..features import ImageFeatures, Span, TextFeatures
from .base import SimilarityHead, mean_of_words

__all__ = ["PairHead", "Pairs", "unit"]

# Bytes that the pairs of a block may take, unless a head is told otherwise.
CHUNK = 256 * 2**20
# A vector shorter than this counts as zero: its direction is noise, and the gradient of it would be huge.
EPS = 1e-8


def unit(x: Tensor) -> Tensor:
    """l2-normalised over the last axis; zero stays zero, with zero gradient."""
    squares = x.square().sum(-1, keepdim=True)
    zero = squares <= EPS**2
    return x * squares.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)


@dataclass(frozen=True)
class Pairs:
    """Some images beside some captions; what is made of both has leading axes (b, t), or (b,) if paired.

    Attributes:
        images: of b images.
        texts: of t captions, padded to the longest of them; padding is zero.
        paired: whether image i is beside caption i only (t = b).
    """

    images: ImageFeatures
    texts: TextFeatures
    paired: bool = False

    @property
    def patches(self) -> Tensor:
        """(b, N, C)."""
        assert self.images.patches is not None
        return self.images.patches

    @property
    def words(self) -> Tensor:
        """(t, L, C)."""
        assert self.texts.words is not None
        return self.texts.words

    def of_images(self, x: Tensor) -> Tensor:
        """(b, ...) to (b, 1, ...), or as it is if paired: it broadcasts with what belongs to captions."""
        return x if self.paired else x[:, None]

    def of_texts(self, x: Tensor) -> Tensor:
        """(t, ...) to (1, t, ...), or as it is if paired."""
        return x if self.paired else x[None]

    @property
    def real(self) -> Tensor:
        """(1, t, L) or (b, L) bool, False at padding."""
        words = self.words
        lengths = self.texts.lengths.to(words.device)
        return self.of_texts(torch.arange(words.shape[1], device=words.device) < lengths[:, None])

    @property
    def lengths(self) -> Tensor:
        """(1, t) or (b,), the number of words, in the words' dtype."""
        return self.of_texts(self.texts.lengths.to(self.words))

    def products(self, patches: Tensor, words: Tensor) -> Tensor:
        """(b, N, C) and (t, L, C) to all inner products, (b, t, N, L) or (b, N, L)."""
        return torch.einsum("bnc,blc->bnl" if self.paired else "bnc,tlc->btnl", patches, words)


class PairHead(SimilarityHead):
    """A head that is written as one function of images beside captions, :meth:`pair_scores`.

    All pairs are scored block by block. In training the blocks are computed again in the backward pass where
    there are several, so that what they hold is bounded too. `pair_scores` therefore must not keep anything:
    batch norm belongs in `encode_image` and `encode_text`. What it draws from torch's default generators
    (dropout), it draws again; from any other generator it must not draw.

    Its parameters may be of half precision, what `pair_scores` is given never is: make linear maps there of
    :class:`laps.heads.layers.Linear`.

    Args:
        embed_dim: C.
        num_patches: N, any number.
        num_prefix_tokens: P, tokens that are left out of the patches.

    Attributes:
        chunk: bytes that a block may take; set it for another bound.
    """

    chunk: int = CHUNK

    def __init__(self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.set_sizes(embed_dim, num_patches, num_prefix_tokens)

    @abstractmethod
    def pair_scores(self, pairs: Pairs) -> Tensor:
        """Scores (b, t), or (b,) if paired, in float32 or float64; autocast is off here."""

    def pair_floats(self, patches: int, words: int) -> int:
        """How many numbers `pair_scores` holds at once for a pair of so many patches and words."""
        return 4 * patches * words

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        patches = image_tokens[:, self.num_prefix_tokens :]
        return ImageFeatures(embedding=unit(wide(patches).mean(1)), patches=patches)

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        # What stands at padding may be anything, and NaN times zero is NaN.
        real = torch.arange(word_tokens.shape[1]) < word_lengths.cpu()[:, None]
        words = word_tokens.masked_fill(~real[..., None].to(word_tokens.device), 0)
        embedding = unit(mean_of_words(wide(words), word_lengths))
        return TextFeatures(embedding=embedding, lengths=word_lengths.cpu(), words=words, spans=spans)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t) of every image with every caption, `chunk` bytes at a time."""
        assert images.patches is not None
        # Captions of like length share a block, and hardly any padding.
        order = texts.lengths.argsort(descending=True, stable=True)
        image_step, text_step = self._steps(images, texts)
        blocks = [
            (image, order[t : t + text_step])
            for t in range(0, len(texts), text_step)
            for image in range(0, len(images), image_step)
        ]
        recompute = torch.is_grad_enabled() and len(blocks) > 1
        columns: dict[int, list[Tensor]] = {}
        for number, (image, captions) in enumerate(blocks):
            pairs = Pairs(images[image : image + image_step], texts[captions])
            scored = self._recomputed(pairs) if recompute else self._block(pairs)
            columns.setdefault(number // -(-len(images) // image_step), []).append(scored)
        scores = torch.cat([torch.cat(column) for column in columns.values()], dim=1)
        return scores[:, order.argsort().to(scores.device)]

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B,) of image i with caption i; without gradient `chunk` bytes at a time."""
        if torch.is_grad_enabled() or not len(images):
            return self._block(Pairs(images, texts, paired=True))
        step = max(1, self._fitting(images, texts))
        parts = [slice(first, first + step) for first in range(0, len(images), step)]
        return torch.cat([self._block(Pairs(images[part], texts[part], paired=True)) for part in parts])

    def _recomputed(self, pairs: Pairs) -> Tensor:
        """The same as `_block`, computed again in the backward pass."""

        def block(_: Tensor) -> Tensor:
            return self._block(pairs)

        # The devices whose random state torch keeps are those of the tensors that it is given: it does not
        # look into `pairs`.
        scored: Tensor = checkpoint(block, pairs.patches, use_reentrant=False)
        return scored

    def _block(self, pairs: Pairs) -> Tensor:
        with torch.autocast(pairs.patches.device.type, enabled=False):
            images = pairs.images.to(dtype=wide(pairs.patches).dtype)
            texts = pairs.texts.to(dtype=wide(pairs.words).dtype)
            return self.pair_scores(Pairs(images, texts, pairs.paired))

    def _fitting(self, images: ImageFeatures, texts: TextFeatures) -> int:
        """How many pairs `chunk` bytes are enough for; at least one."""
        assert images.patches is not None
        assert texts.words is not None
        size = wide(images.embedding[:0]).element_size()
        one = size * self.pair_floats(images.patches.shape[1], texts.words.shape[1])
        return max(1, self.chunk // max(one, 1))

    def _steps(self, images: ImageFeatures, texts: TextFeatures) -> tuple[int, int]:
        """Images and captions of a block."""
        for name, features in (("images", images), ("texts", texts)):
            if not len(features):
                raise LapsValueError(
                    _check.message(type(self).__name__, f"{name} is empty", "at least one", 0)
                )
        fitting = self._fitting(images, texts)
        # Square blocks read least of either side.
        captions = min(len(texts), max(1, fitting // max(1, min(len(images), int(fitting**0.5)))))
        return max(1, min(len(images), fitting // captions)), captions
