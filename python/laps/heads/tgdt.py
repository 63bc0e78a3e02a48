"""TGDT: a global and a local score, trained together; search nominates by the one and ranks by both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, functional
from .._precision import wide
from ..attribution import Attribution, attribute_tokens, kept_patches, one_pair
from ..errors import LapsValueError
from ..features import ImageFeatures, Span, TextFeatures
from .base import TrainingScores, register_head
from .pairs import PairHead, Pairs, unit

__all__ = ["TGDTHead"]

# Of the local score.
WEIGHT = 10.0
# Intra-modal cosines of images and of captions may differ by so much.
TOLERANCE = 0.3
# Inner words that `max_score` reckons with: the usual caption of Flickr30K and COCO.
USUAL_WORDS = 10


@register_head("tgdt")
class TGDTHead(PairHead):
    """S = S_l + S_g: what each inner word finds in the image, and what image and caption say as a whole.

    With unit patches v_n and unit words w_j::

        S_l = 10 sum_j max_n v_n . w_j,   S_g = v_0 . t_0

    The sum is over the inner words: not over the first token ([CLS]), the last but one (the last word piece)
    and the last ([SEP]). A caption of fewer than four tokens has none, and S_l = 0. v_0 is the first prefix
    token ([CLS]) of the image or, without prefix tokens, the mean of its patches; t_0 is the first token of
    the caption. Both are made unit vectors and are the `embedding` of the features, by which two-stage search
    nominates.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Liu et al., TGDT (IEEE TIP 2023): token-guided dual transformer, consistent multimodal contrastive
    loss.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("tgdt", embed_dim=64, num_patches=49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.2}

    @property
    def max_score(self) -> float:
        """100, the bound of S_l for ten inner words; there is none for any caption.

        The loss "triplet" takes higher scores for this one, and all global scores as far apart.
        """
        return WEIGHT * USUAL_WORDS

    def options(self) -> dict[str, Any]:
        return {}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        features = super().encode_image(image_tokens)
        if not self.num_prefix_tokens:
            return features
        return replace(features, embedding=unit(wide(image_tokens[:, 0])))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        features = super().encode_text(word_tokens, word_lengths, spans)
        return replace(features, embedding=unit(wide(word_tokens[:, 0])))

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return self._local(images, texts) + self._global(images, texts)

    def pair_scores(self, pairs: Pairs) -> Tensor:
        words, _ = inner_words(pairs.words, pairs.texts.lengths)
        local = pairs.products(unit(pairs.patches), words).amax(-2).sum(-1)
        equation = "bc,bc->b" if pairs.paired else "bc,tc->bt"
        return WEIGHT * local + torch.einsum(equation, pairs.images.embedding, pairs.texts.embedding)

    def training_scores(
        self, image_tokens: Tensor, word_tokens: Tensor, word_lengths: Tensor
    ) -> TrainingScores:
        """S, with a loss of S_l and one of S_g, and a penalty where image i is beside caption i (B_v = B_t).

        The penalty, sum_j [max_i |T_ij - I_ij| - 0.3]+, holds the cosines T of the batch's t_0 to the cosines
        I of its v_0.
        """
        images, texts = self.encode_image(image_tokens), self.encode_text(word_tokens, word_lengths)
        local, whole = self._local(images, texts), self._global(images, texts)
        penalty = None
        if len(images) == len(texts):
            differences = (self._global(texts, texts) - self._global(images, images)).abs()
            penalty = (differences.amax(0) - TOLERANCE).clamp(min=0).sum()
        return TrainingScores(local + whole, loss_scores=(local, whole), penalty=penalty)

    def _local(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """S_l (B_v, B_t)."""
        pairs = Pairs(images, texts)
        with torch.autocast(pairs.patches.device.type, enabled=False):
            words, lengths = inner_words(wide(pairs.words), texts.lengths)
            # The sum of maxima is an operation of the Rust core.
            total: Tensor = functional.max_sim(unit(wide(pairs.patches)), words, lengths)
            return WEIGHT * total

    def _global(self, rows: ImageFeatures | TextFeatures, columns: ImageFeatures | TextFeatures) -> Tensor:
        """Cosines of the embeddings of any two."""
        with torch.autocast(rows.embedding.device.type, enabled=False):
            return wide(rows.embedding) @ wide(columns.embedding).T

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """Each inner word's share is that of its best patch; see :meth:`laps.heads.SimilarityHead.explain`.

        S_g is the share of the first prefix token with the first word; without prefix tokens it is split over
        the patches whose mean v_0 is. The alignment is zero where the score compares nothing.
        """
        patches, words = (x.cpu() for x in one_pair(images, texts))
        whole, first = (x.embedding[0].detach().cpu().double() for x in (images, texts))
        if not bool((whole @ first).isfinite()):
            raise LapsValueError(
                _check.message("explain", "embedding has values that are not finite", "finite")
            )
        kept = kept_patches(len(patches), mask)
        own, length = patches[kept], len(words)
        position = torch.arange(length)
        inner = (position >= 1) & (position < length - 2)
        cosines = unit(own) @ unit(words).T
        best = F.one_hot(cosines.argmax(0), len(own)).T * inner
        shares = WEIGHT * best * cosines
        maps = (best * cosines).clamp(min=0)
        alignment = cosines * inner
        prefix = torch.zeros(self.num_prefix_tokens, length, dtype=own.dtype)
        if self.num_prefix_tokens:
            prefix[0, 0] = whole @ first
        else:
            shares[:, 0] = own @ first / own.sum(0).norm().clamp_min(torch.finfo(own.dtype).tiny)
            maps[:, 0] = shares[:, 0].clamp(min=0)
            alignment[:, 0] = cosines[:, 0]
        to_patches = torch.eye(len(patches), dtype=own.dtype)[kept]
        return attribute_tokens(
            patches,
            kept=kept,
            token_weights=to_patches,
            alignment=torch.cat([prefix, alignment]),
            shares=torch.cat([prefix, shares]),
            patch_shares=shares.T @ to_patches,
            prefix_shares=prefix.T,
            maps=maps.T @ to_patches,
        )


def inner_words(words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Unit inner words (t, L', C) of words (t, L, C), then zeros; and how many, (t,), at least 1.

    Where there is none, that one is a zero vector, which adds nothing.
    """
    outer = torch.arange(words.shape[1]) >= lengths[:, None] - 2
    start = min(1, words.shape[1] - 1)
    inner = words.masked_fill(outer[..., None].to(words.device), 0)[:, start : max(words.shape[1] - 2, 2)]
    return unit(inner), (lengths - 3).clamp(min=1)
