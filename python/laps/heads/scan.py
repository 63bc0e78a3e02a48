"""SCAN: every word attends to the patches, or every patch to the words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from ..attribution import Attribution, attribute_tokens, kept_patches, one_pair
from ..errors import LapsValueError
from ..features import ImageFeatures, TextFeatures
from .base import register_head
from .pairs import PairHead, Pairs, unit

__all__ = ["SCANHead"]

DIRECTIONS = ("t2i", "i2t", "both")
POOLINGS = ("mean", "lse")
# Of the leaky ReLU.
SLOPE = 0.1


@register_head("scan")
class SCANHead(PairHead):
    """Stacked cross attention: S pools the cosines of the words with what each attends to.

    With unit patches v_n, unit words w_j, s_nj = v_n . w_j and a = leaky_relu(s), slope 0.1, ``"t2i"`` is::

        alpha_nj = softmax_n(lambda_softmax a_nj / sqrt(sum_j' a_nj'^2))
        c_j = sum_n alpha_nj v_n,   R_j = cos(w_j, c_j),   S = mean_j R_j

    and ``"i2t"`` the same with patches and words exchanged. No c_j is formed: w_j . c_j is the sum of
    alpha_nj s_nj over n, and |c_j|^2 is alpha_j . G alpha_j with the Gram matrix G of an image's patches.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        direction: ``"t2i"``: words attend to patches; ``"i2t"``: patches attend to words; ``"both"``: the
            mean of the two scores.
        pooling: ``"mean"`` of the R, or ``"lse"``: log sum_j exp(lambda_lse R_j) / lambda_lse, which can be
            above 1: see `max_score`.
        lambda_softmax_t2i, lambda_softmax_i2t: inverse temperatures of the attention, > 0.
        lambda_lse_t2i, lambda_lse_i2t: inverse temperatures of ``"lse"``, > 0. For i2t the authors take 5 on
            Flickr30K and 20 on COCO.
        max_words: of ``"lse"``: the words of the longest caption, as `max_score` reckons.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Lee et al., SCAN (ECCV 2018), section 3.1.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("scan", embed_dim=64, num_patches=49, direction="both")
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    row_wise: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.2}

    def __init__(
        self,
        embed_dim: int,
        num_patches: int,
        *,
        num_prefix_tokens: int = 1,
        direction: str = "t2i",
        pooling: str = "mean",
        lambda_softmax_t2i: float = 9.0,
        lambda_softmax_i2t: float = 4.0,
        lambda_lse_t2i: float = 6.0,
        lambda_lse_i2t: float = 5.0,
        max_words: int = 64,
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.direction = _check.choice("SCANHead", "direction", direction, DIRECTIONS)
        self.pooling = _check.choice("SCANHead", "pooling", pooling, POOLINGS)

        def positive(argument: str, value: float) -> float:
            return _check.number("SCANHead", argument, value, 0.0, open_low=True)

        self.lambda_softmax_t2i = positive("lambda_softmax_t2i", lambda_softmax_t2i)
        self.lambda_softmax_i2t = positive("lambda_softmax_i2t", lambda_softmax_i2t)
        self.lambda_lse_t2i = positive("lambda_lse_t2i", lambda_lse_t2i)
        self.lambda_lse_i2t = positive("lambda_lse_i2t", lambda_lse_i2t)
        self.max_words = _check.count("SCANHead", "max_words", max_words)

    @property
    def max_score(self) -> float:
        """1 of ``"mean"``; of ``"lse"``, with K = max_words (t2i) or N (i2t), 1 + log(K) / lambda_lse.

        That is the score where all R are 1; for ``"both"`` the mean of the two.
        """
        if self.pooling == "mean":
            return 1.0
        t2i = 1 + math.log(self.max_words) / self.lambda_lse_t2i
        i2t = 1 + math.log(self.num_patches) / self.lambda_lse_i2t
        return {"t2i": t2i, "i2t": i2t, "both": (t2i + i2t) / 2}[self.direction]

    def options(self) -> dict[str, Any]:
        return {
            "direction": self.direction,
            "pooling": self.pooling,
            "lambda_softmax_t2i": self.lambda_softmax_t2i,
            "lambda_softmax_i2t": self.lambda_softmax_i2t,
            "lambda_lse_t2i": self.lambda_lse_t2i,
            "lambda_lse_i2t": self.lambda_lse_i2t,
            "max_words": self.max_words,
        }

    def pair_scores(self, pairs: Pairs) -> Tensor:
        patches, words = unit(pairs.patches), unit(pairs.words)
        cosines = pairs.products(patches, words)
        scores = []
        if self.direction != "i2t":
            weights = attention(cosines, self.lambda_softmax_t2i)
            equation = "bnm,bml->bnl" if pairs.paired else "bnm,btml->btnl"
            mixed = torch.einsum(equation, patches @ patches.mT, weights)
            found = (weights * cosines).sum(-2) / norms(weights, mixed)
            scores.append(self._pooled(found, pairs.real, self.lambda_lse_t2i))
        if self.direction != "t2i":
            weights = attention(cosines.mT, self.lambda_softmax_i2t, pairs.real[..., None])
            equation = "blk,bkn->bln" if pairs.paired else "tlk,btkn->btln"
            mixed = torch.einsum(equation, words @ words.mT, weights)
            found = (weights * cosines.mT).sum(-2) / norms(weights, mixed)
            every = torch.ones(found.shape[-1], dtype=torch.bool, device=found.device)
            scores.append(self._pooled(found, every, self.lambda_lse_i2t))
        return torch.stack(scores).mean(0)

    def pair_floats(self, patches: int, words: int) -> int:
        # Measured with the backward pass, which holds most.
        return (14 if self.direction == "both" else 10) * patches * words

    def _pooled(self, found: Tensor, real: Tensor, scale: float) -> Tensor:
        if self.pooling == "mean":
            return found.masked_fill(~real, 0).sum(-1) / real.sum(-1)
        return (scale * found).masked_fill(~real, -torch.inf).logsumexp(-1) / scale

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """The shares of the attention; see :meth:`laps.heads.SimilarityHead.explain`.

        Tokens are, for ``"t2i"``, the attended vector of each word, of which only that word has a share, and
        for ``"i2t"`` the patches; for ``"both"`` those, then these. Maps are the shares of the patches, times
        the number of words, where they are positive.
        """
        if self.pooling != "mean":
            raise LapsValueError(
                _check.message("explain", 'pooling "lse" is no sum over words', 'pooling="mean"')
            )
        patches, words = (x.cpu() for x in one_pair(images, texts))
        kept = kept_patches(len(patches), mask)
        v, w = unit(patches[kept]), unit(words)
        cosines = v @ w.T
        tokens, alignments, shares, pulled = [], [], [], []
        if self.direction != "i2t":
            weights = attention(cosines, self.lambda_softmax_t2i)
            parts = weights * cosines / norms(weights, v @ v.T @ weights) / len(w)
            tokens.append(weights.T)
            alignments.append(unit(weights.T @ v) @ w.T)
            shares.append(parts.sum(0).diag())
            pulled.append(parts)
        if self.direction != "t2i":
            weights = attention(cosines.T, self.lambda_softmax_i2t)
            parts = (weights * cosines.T / norms(weights, w @ w.T @ weights)).T / len(v)
            tokens.append(torch.eye(len(v), dtype=v.dtype))
            alignments.append(cosines)
            shares.append(parts)
            pulled.append(parts)
        to_patches = torch.eye(len(patches), dtype=v.dtype)[kept]
        patch_shares = torch.stack(pulled).mean(0).T @ to_patches
        return attribute_tokens(
            patches,
            kept=kept,
            token_weights=torch.cat(tokens) @ to_patches,
            alignment=torch.cat(alignments),
            shares=torch.cat(shares) / len(shares),
            patch_shares=patch_shares,
            maps=(len(w) * patch_shares).clamp(min=0),
        )


def attention(cosines: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
    """Weights (..., K, Q) over K of every query from the cosines (..., K, Q); `real` tells which K count."""
    logits = scale * unit(F.leaky_relu(cosines, SLOPE))
    if real is not None:
        logits = logits.masked_fill(~real, -torch.inf)
    return logits.softmax(-2)


def norms(weights: Tensor, mixed: Tensor) -> Tensor:
    """|c| (..., Q) from the weights (..., K, Q) and their product with the Gram matrix.

    Less than the rounding of |c|^2 means nothing and has no gradient: vectors that cancel would else have
    cosines of any size.
    """
    return (weights * mixed).sum(-2).clamp_min(torch.finfo(weights.dtype).eps).sqrt()
