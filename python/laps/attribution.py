"""Where the score of one image and one caption comes from: exact shares of tokens, words and patches.

``S = mean_j max_m A_mj + mean_m max_j A_mj`` (section SPA) is a sum over words j and tokens m in which only
best partners count, so it splits without rest into one share per (token, word). A token is a weighted sum of
patches, ``u_m = sum_i w_mi v_i / |sum_i w_mi v_i|``, and the leaky ReLU is linear on either side of zero, so
each share splits without rest again, over the patches of its token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from . import _check, torch_backend
from .errors import LapsValueError
from .features import ImageFeatures, TextFeatures

__all__ = ["Attribution", "attribute", "attribute_patches", "attribute_tokens", "kept_patches", "one_pair"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Attribution:
    """The stages of one pair, and the shares of its score. N patches, P prefix tokens, M tokens, l words.

    Tokens are the P prefix tokens, the aggregated ones, then the fused one if the pair has it. A word is a
    token of the caption here, start and end included.

    Attributes:
        self_scores: (N,), a of section LPS: how well a patch agrees with the mean of the image.
        text_scores: (N,), b: how well it agrees with the mean of the caption; None where the text takes no
            part in the selection.
        keep_prob: (N,), p, the score net's opinion (paper variant), or None.
        selection_scores: (N,), s, what patches are selected by.
        kept: (N,) bool.
        token_weights: (M - P, N), how much of each patch is in each token; rows sum to 1.
        alignment: (M, l), A.
        shares: (M, l), what each token with each word adds to the score; they sum to it.
        patch_shares: (l, N) and
        prefix_shares: (l, P): the same for each word with each patch and each prefix token.
        maps: (l, N), each word's gradient-weighted map, >= 0: the weights of its best token that is made of
            patches, times the gradient of that token's product with the word with respect to them.
    """

    self_scores: Floats
    text_scores: Floats | None
    keep_prob: Floats | None
    selection_scores: Floats
    kept: NDArray[np.bool_]
    token_weights: Floats
    alignment: Floats
    shares: Floats
    patch_shares: Floats
    prefix_shares: Floats
    maps: Floats

    @property
    def score(self) -> float:
        """S, the sum of all shares."""
        return float(self.shares.sum())

    @property
    def num_prefix_tokens(self) -> int:
        """P."""
        return int(self.prefix_shares.shape[1])

    @property
    def best_tokens(self) -> NDArray[np.int64]:
        """(l,), the token that each word is matched with."""
        best: NDArray[np.int64] = self.alignment.argmax(0)
        return best

    @property
    def groups(self) -> NDArray[np.int64]:
        """(N,), the aggregated token that a kept patch weighs most in, from 0; -1 for a dropped one."""
        aggregated = self.token_weights[: len(self.token_weights) - self.has_fused_token]
        return np.where(self.kept, aggregated.argmax(0), -1)

    @property
    def has_fused_token(self) -> bool:
        """Whether the last token is that of the dropped patches."""
        return bool(self.token_weights[-1][~self.kept].any()) and not self.token_weights[-1][self.kept].any()


def attribute(
    patches: Tensor,
    words: Tensor,
    logits: Tensor,
    *,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    mask: Tensor | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
    fusion: bool = True,
    **options: Any,
) -> Attribution:
    """Take the score of one image and one caption apart.

    Args:
        patches: (N, C), floating, as all others are.
        words: (l, C), the real ones.
        logits: (N, N_c).
        prefix: (P, C) or None.
        keep_prob: (N,) or None.
        mask: (N,) bool, the patches to keep instead of those that the scores choose; or None.
        directions: ``"both"``, ``"word_to_patch"`` or ``"patch_to_word"``.
        direction_reduction: ``"sum"`` or ``"mean"``.
        negative_slope: of the leaky ReLU.
        fusion: whether the dropped patches form a token.
        **options: of the selection, as in :func:`laps.functional.similarity`.

    Raises:
        LapsValueError: features that are not finite.
    """
    given = {"patches": patches, "words": words, "logits": logits, "prefix": prefix, "keep_prob": keep_prob}
    for name, tensor in given.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise LapsValueError(
                _check.message("explain", f"{name} has values that are not finite", "finite")
            )
    stages = torch_backend.stages(
        _single(patches),
        _single(words),
        torch.tensor([len(words)]),
        _single(logits),
        prefix=None if prefix is None else _single(prefix),
        keep_prob=None if keep_prob is None else _single(keep_prob),
        mask=None if mask is None else mask[None, None],
        fusion=fusion,
        **options,
    )
    decision, weights, tokens = stages.decision[0, 0], stages.weights[0, 0], stages.tokens[0, 0]
    if not fusion or bool(decision.all()):
        weights, tokens = weights[:-1], tokens[:-1]

    p = 0 if prefix is None else len(prefix)
    units = torch_backend._polar(words.detach().double())[0]
    cosines = tokens @ units.T
    alignment = F.leaky_relu(cosines, negative_slope)
    slopes = torch.full_like(cosines, negative_slope).masked_fill(cosines > 0, 1.0)
    counted = _counted(cosines, directions) * (
        0.5 if directions == "both" and direction_reduction == "mean" else 1
    )
    shares = counted * alignment

    # cos_mj = sum_i w_mi (v_i . w_j) / |sum_i w_mi v_i|
    sizes = stages.lengths[0, 0, : len(weights)]
    scaled = weights * torch.where(sizes > 0, 1 / sizes, 0.0)[:, None]
    products = patches.detach().double() @ units.T
    pulled = torch.einsum("ml,mi,il->li", (counted * slopes)[p:], scaled, products)
    best = cosines[p:].argmax(0)
    maps = (scaled[best] * products.T).clamp(min=0)
    return Attribution(
        self_scores=_array(stages.self_scores[0]),
        text_scores=None if stages.text_scores is None else _array(stages.text_scores[0, 0]),
        keep_prob=None if keep_prob is None else _array(keep_prob.double()),
        selection_scores=_array(stages.scores[0, 0]),
        kept=_array(decision),
        token_weights=_array(weights),
        alignment=_array(alignment),
        shares=_array(shares),
        patch_shares=_array(pulled),
        prefix_shares=_array(shares[:p].T),
        maps=_array(maps),
    )


def one_pair(images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor]:
    """Patches (N, C) and real words (l, C) of features of one image and one caption, in float64.

    Raises:
        LapsValueError: features that are not finite.
    """
    assert images.patches is not None
    assert texts.words is not None
    patches, words = images.patches[0], texts.words[0, : int(texts.lengths[0])]
    for name, tensor in (("patches", patches), ("words", words)):
        if not bool(tensor.isfinite().all()):
            raise LapsValueError(
                _check.message("explain", f"{name} has values that are not finite", "finite")
            )
    return patches.detach().double(), words.detach().double()


def kept_patches(count: int, mask: Tensor | None) -> Tensor:
    """Which patches take part, (N,) bool on the CPU.

    Raises:
        LapsValueError: a mask of another number of patches or of none.
    """
    if mask is None:
        return torch.ones(count, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != (count,) or not bool(mask.any()):
        raise LapsValueError(
            _check.message(
                "explain",
                "mask does not fit",
                f"bool ({count},), of at least one patch",
                f"{mask.dtype} {tuple(mask.shape)}, {int(mask.sum())} kept",
            )
        )
    return mask.cpu()


def attribute_patches(
    patches: Tensor,
    words: Tensor,
    parts: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
) -> Attribution:
    """The attribution of a score that patches and words have a part in pair by pair.

    Args:
        patches: (N, C), as the score compares them.
        words: (l, C), the real ones.
        parts: from the cosines (N, l) of the patches that count to what each adds to the score, (N, l).
        mask: (N,) bool, the patches that count; None for all.
    """
    kept = kept_patches(len(patches), mask)
    units = F.normalize(patches, dim=-1)
    cosines = (units @ F.normalize(words, dim=-1).T).cpu()[kept]
    weights = torch.eye(len(patches), dtype=torch.float64)[kept]
    shares = parts(cosines)
    best = F.one_hot(cosines.argmax(0), len(cosines)).double()
    return attribute_tokens(
        patches,
        kept=kept,
        token_weights=weights,
        alignment=cosines,
        shares=shares,
        patch_shares=shares.T @ weights,
        maps=((best * cosines.T) @ weights).clamp(min=0),
    )


def attribute_tokens(
    patches: Tensor,
    *,
    kept: Tensor,
    token_weights: Tensor,
    alignment: Tensor,
    shares: Tensor,
    patch_shares: Tensor,
    maps: Tensor,
    prefix_shares: Tensor | None = None,
) -> Attribution:
    """The attribution of a head that selects no patches by itself; :class:`Attribution` names its parts.

    Args:
        patches: (N, C).
        kept: (N,) bool.
        token_weights: (M - P, N).
        alignment: (M, l).
        shares: (M, l).
        patch_shares: (l, N).
        maps: (l, N).
        prefix_shares: (l, P), or None for P = 0.
    """
    units = F.normalize(patches, dim=-1)
    own = units @ F.normalize(patches.mean(0), dim=-1)
    empty = patch_shares.new_zeros(len(patch_shares), 0)
    return Attribution(
        self_scores=_array(own),
        text_scores=None,
        keep_prob=None,
        selection_scores=_array(own),
        kept=_array(kept),
        token_weights=_array(token_weights),
        alignment=_array(alignment),
        shares=_array(shares),
        patch_shares=_array(patch_shares),
        prefix_shares=_array(empty if prefix_shares is None else prefix_shares),
        maps=_array(maps),
    )


def _single(tensor: Tensor) -> Tensor:
    """A batch of one, as the torch backend takes it."""
    tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float64 else tensor.float())[None]


def _counted(cosines: Tensor, directions: str) -> Tensor:
    """How often, in shares of a mean, each (token, word) counts in the score: (M, l)."""
    count, length = cosines.shape
    counted = torch.zeros_like(cosines)
    if directions in ("both", "word_to_patch"):
        counted += F.one_hot(cosines.argmax(0), count).T.double() / length
    if directions in ("both", "patch_to_word"):
        counted += F.one_hot(cosines.argmax(1), length).double() / count
    return counted


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
