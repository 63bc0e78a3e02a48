"""Losses over a matrix of image x text scores.

`scores` (B_v, B_t) has images as rows and captions as columns. `image_ids` (B_v,) and `caption_image_ids`
(B_t,) are integers (tensors, lists or NumPy arrays) that say which image a row is and which image a column
describes: any map, any number of captions per image. Two captions of one image are never negatives of it. All
losses are differentiable to any order in `scores`, and in their `temperature`; a row or column without
negatives adds nothing (never NaN), while a non-finite score that takes part makes the loss non-finite.

The ids are compared where they lie; that a square matrix has matching ids on its diagonal is checked for ids
on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _check
from ._precision import wide
from .errors import LapsTypeError, LapsValueError

__all__ = ["InfoNCELoss", "distance_weighted_triplet_loss", "hinge_loss", "info_nce_loss", "ratio_loss"]

Ids = Tensor | np.ndarray[Any, Any] | Sequence[int]
REDUCTIONS = ("sum", "mean")
# Of the distance-weighted triplets: how far a negative may be, in HREM on Flickr30K.
CUTOFF = 1.7
MIN_DISTANCE = 0.5


# ---- who belongs to whom


def _check_scores(operation: str, scores: object) -> Tensor:
    if not isinstance(scores, Tensor):
        raise LapsTypeError(
            _check.message(operation, "scores is no tensor", "torch.Tensor", _check.name_of(scores))
        )
    _check.common_dtype(operation, {"scores": scores})
    _check.Sizes(operation).match("scores", scores, "B_v B_t")
    return scores


def _check_ids(operation: str, argument: str, ids: Ids, size: int, axis: str, device: torch.device) -> Tensor:
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.as_tensor(np.array(ids))
    except (TypeError, ValueError):
        raise LapsTypeError(
            _check.message(
                operation, f"{argument} is no list of integers", f"({axis},) integers", _check.name_of(ids)
            )
        ) from None
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise LapsTypeError(
            _check.message(
                operation, f"{argument} has the wrong dtype", "integers", _check.name_of(tensor.dtype)
            )
        )
    if tuple(tensor.shape) != (size,):
        raise LapsValueError(
            _check.message(
                operation,
                f"{argument} does not fit scores",
                f"shape ({size},), one id per {axis}",
                tuple(tensor.shape),
            )
        )
    return tensor.to(device=device, dtype=torch.int64)


def _matches(operation: str, scores: Tensor, image_ids: Ids, caption_image_ids: Ids) -> Tensor:
    """(B_v, B_t) bool: caption t describes image i."""
    rows = _check_ids(operation, "image_ids", image_ids, scores.shape[0], "row", scores.device)
    columns = _check_ids(
        operation, "caption_image_ids", caption_image_ids, scores.shape[1], "column", scores.device
    )
    match = rows[:, None] == columns[None, :]
    if _check.readable(match) and not bool(match.any()):
        raise LapsValueError(
            _check.message(
                operation, "caption_image_ids has no id in common with image_ids", "at least one", "none"
            )
        )
    return match


def _positives(operation: str, match: Tensor) -> Tensor:
    """(B_v, B_t) bool: the pairs to be pulled together, the diagonal of a square matrix, else every match."""
    if match.shape[0] != match.shape[1]:
        return match
    if _check.readable(match) and not bool(match.diagonal().all()):
        index = int((~match.diagonal()).nonzero()[0])
        raise LapsValueError(
            _check.message(
                operation,
                f"caption_image_ids[{index}] differs from image_ids[{index}], but scores is square",
                "equal: the diagonal of square scores is the positive pairs",
            )
        )
    return torch.eye(match.shape[0], dtype=torch.bool, device=match.device)


# ---- hinge


def hinge_loss(
    scores: Tensor,
    image_ids: Ids,
    caption_image_ids: Ids,
    margin: float = 0.2,
    hardest: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """Triplet hinge in both directions, against the hardest negative or all of them.

    With P the positive pairs, Neg(i) the captions of other images, Neg(t) the other images::

        hardest: sum_{(i,t) in P}  [margin + max_{u in Neg(i)} S_iu - S_it]_+
                                 + [margin + max_{j in Neg(t)} S_jt - S_it]_+
        all:     sum_{(i,t) in P}  sum_{u in Neg(i)} [margin + S_iu - S_it]_+
                                 + sum_{j in Neg(t)} [margin + S_jt - S_it]_+

    P is the diagonal of square scores (the usual batch; its ids must agree), else every pair with equal ids,
    each with its own hinge. Pairs with equal ids outside P are neither positive nor negative.

    Args:
        scores: (B_v, B_t), floating, images as rows.
        image_ids: (B_v,) integers, the image of each row.
        caption_image_ids: (B_t,) integers, the image that each column describes.
        margin: >= 0.
        hardest: only the highest negative (VSE++); False for all, as in a first epoch.
        reduction: ``"sum"``, or ``"mean"`` over P.

    Returns:
        The loss, a 0-d tensor of the dtype of `scores`. A collapsed model gives exactly 2 * margin * |P|
        (hardest).

    Raises:
        LapsValueError: wrong shapes, no id in common, square scores whose diagonal ids differ, a bad option.
        LapsTypeError: wrong dtypes.

    Source: laps.md, "Loss and recipe"; Faghri et al., VSE++ (2018), equations 5 and 6.

    Example:
        >>> import laps, torch
        >>> laps.losses.hinge_loss(torch.eye(3) * 2, [0, 1, 2], [0, 1, 2])
        tensor(0.)
    """
    operation = "hinge_loss"
    margin = _check.number(operation, "margin", margin, 0.0)
    hardest = _check.flag(operation, "hardest", hardest)
    _check.choice(operation, "reduction", reduction, REDUCTIONS)
    scores = _check_scores(operation, scores)
    match = _matches(operation, scores, image_ids, caption_image_ids)
    positive = _positives(operation, match)

    if hardest:
        negatives = scores.masked_fill(match, -math.inf)
        # -inf where there is no negative: the hinge is then 0, with gradient 0.
        terms = torch.relu(margin + negatives.amax(1, keepdim=True) - scores)
        terms = terms + torch.relu(margin + negatives.amax(0, keepdim=True) - scores)
        total = terms.masked_fill(~positive, 0).sum()
    else:
        total = _all_negatives(scores, match, positive, margin) + _all_negatives(
            scores.T, match.T, positive.T, margin
        )
    return total if reduction == "sum" else total / positive.sum()


def _all_negatives(scores: Tensor, match: Tensor, positive: Tensor, margin: float) -> Tensor:
    """Sum over positives and over the negatives in their row, without a (B_v, B_t, B_t) tensor."""
    if scores.shape[0] == scores.shape[1]:
        rows = columns = torch.arange(scores.shape[0], device=scores.device)
    else:
        rows, columns = positive.nonzero(as_tuple=True)
    hinges = torch.relu(margin + scores[rows] - scores[rows, columns][:, None])
    return hinges.masked_fill(match[rows], 0).sum()


# ---- distance-weighted triplets


def distance_weighted_triplet_loss(
    scores: Tensor,
    image_ids: Ids,
    caption_image_ids: Ids,
    margin: float = 0.2,
    *,
    max_score: float = 2.0,
    dim: int = 512,
    min_distance: float = MIN_DISTANCE,
    cutoff: float = CUTOFF,
    reduction: str = "sum",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Triplet hinge against one sampled negative per positive, likely ones being those that sphere geometry
    makes rare.

    For every positive pair (i, t) and in both directions one negative n is drawn with probability
    proportional to w::

        cos = clamp(S / max_score, -1, 1),   D = max(sqrt(2 - 2 cos), min_distance)
        log w = (2 - dim) log D - ((dim - 3) / 2) log(1 - D^2 / 4),   w = 0 for D >= cutoff or the same image
        loss = sum [margin + S_in - S_it]_+ + sum [margin + S_nt - S_it]_+

    S / max_score, because sums of both LAPS directions reach 2, where sqrt(2 - 2 S) is NaN and the hardest
    negatives would silently never be drawn. Set 1 for cosines and for the mean of directions. No gradient
    passes through w. A positive without any negative nearer than `cutoff` adds nothing in that direction.
    Positives as in :func:`hinge_loss`.

    Args:
        scores: (B_v, B_t), floating, images as rows.
        image_ids: (B_v,) integers, the image of each row.
        caption_image_ids: (B_t,) integers, the image that each column describes.
        margin: >= 0, on the scale of `scores`.
        max_score: the highest score there can be, > 0.
        dim: dimension of the sphere, >= 4.
        min_distance: the floor of D, in (0, 2): bounds the weights.
        cutoff: negatives at D >= cutoff are never drawn, in (0, 2]; 1.7 for Flickr30K, 1.9 for COCO.
        reduction: ``"sum"``, or ``"mean"`` over the positives.
        generator: source of the draws on the device of `scores`; None for torch's default.

    Returns:
        The loss, a 0-d tensor of the dtype of `scores`.

    Raises:
        LapsValueError, LapsTypeError: as :func:`hinge_loss`.

    Source: Wu et al., Sampling Matters in Deep Embedding Learning (2017), section 4.1; baselines.md, "HREM".

    Example:
        >>> import laps, torch
        >>> laps.losses.distance_weighted_triplet_loss(torch.eye(3) * 2, [0, 1, 2], [0, 1, 2])
        tensor(0.)
    """
    operation = "distance_weighted_triplet_loss"
    margin = _check.number(operation, "margin", margin, 0.0)
    max_score = _check.number(operation, "max_score", max_score, 0.0, open_low=True)
    dim = _check.count(operation, "dim", dim, 4)
    min_distance = _check.number(operation, "min_distance", min_distance, 0.0, 2.0, open_low=True)
    cutoff = _check.number(operation, "cutoff", cutoff, 0.0, 2.0, open_low=True)
    _check.choice(operation, "reduction", reduction, REDUCTIONS)
    scores = _check_scores(operation, scores)
    match = _matches(operation, scores, image_ids, caption_image_ids)
    positive = _positives(operation, match)

    log_weights = _log_weights(scores.detach() / max_score, match, dim, min_distance, cutoff)
    rows, columns = positive.nonzero(as_tuple=True)
    anchors = scores[rows, columns]
    total = _sampled_hinges(scores[rows], log_weights[rows], anchors, margin, generator)
    total = total + _sampled_hinges(scores.T[columns], log_weights.T[columns], anchors, margin, generator)
    return total if reduction == "sum" else total / positive.sum()


def _log_weights(cosines: Tensor, match: Tensor, dim: int, min_distance: float, cutoff: float) -> Tensor:
    """Log w (B_v, B_t), -inf where a pair must not be drawn, NaN where its score is NaN."""
    distance = (2 - 2 * cosines.double().clamp(-1, 1)).sqrt().clamp_min(min_distance)
    # At D = 2 the second logarithm is infinite; such pairs are cut off unless cutoff is 2, hence the floor.
    log_weights = (2 - dim) * distance.log() - (dim - 3) / 2 * (1 - distance.square() / 4).clamp_min(
        1e-12
    ).log()
    return log_weights.masked_fill(match | (distance >= cutoff), -math.inf)


def _sampled_hinges(
    scores: Tensor, log_weights: Tensor, anchors: Tensor, margin: float, generator: torch.Generator | None
) -> Tensor:
    """Sum of one hinge per row of `scores`, against an entry drawn by `log_weights`."""
    # NaN cannot be drawn from, and must not vanish either: such a row's loss is NaN.
    poisoned = log_weights.isnan().any(1)
    drawable = (log_weights > -math.inf).any(1) & ~poisoned
    weights = log_weights.masked_fill(~drawable[:, None], 0.0).softmax(1)
    drawn = torch.multinomial(weights, 1, generator=generator)
    hinges = torch.relu(margin + scores.gather(1, drawn)[:, 0] - anchors)
    return hinges.masked_fill(~drawable, 0).masked_fill(poisoned, math.nan).sum()


# ---- InfoNCE


def info_nce_loss(
    scores: Tensor,
    image_ids: Ids,
    caption_image_ids: Ids,
    temperature: float | Tensor = 0.07,
) -> Tensor:
    """Symmetric contrastive loss; a row or column may have several positives.

    With P(i) the captions of image i, P(t) the images of caption t (equal ids), tau the temperature::

        L = 1/2 mean_i ( -1/|P(i)| sum_{t in P(i)} log softmax_t(S_it / tau) )
          + 1/2 mean_t ( -1/|P(t)| sum_{i in P(t)} log softmax_i(S_it / tau) )

    Rows and columns without a positive are left out of the means; they still serve as negatives.

    Args:
        scores: (B_v, B_t), floating, images as rows.
        image_ids: (B_v,) integers, the image of each row.
        caption_image_ids: (B_t,) integers, the image that each column describes.
        temperature: tau > 0, a number or a 0-d tensor, with gradient if it requires one.

    Returns:
        The loss, a 0-d tensor: float32 for half types, else of the dtype of `scores`.

    Raises:
        LapsValueError, LapsTypeError: wrong shapes or dtypes, no id in common, a bad temperature.

    Source: van den Oord et al. (2018); several positives as in Khosla et al., Supervised Contrastive Learning
    (2020), equation 2.

    Example:
        >>> import laps, torch
        >>> laps.losses.info_nce_loss(torch.zeros(4, 4), [0, 1, 2, 3], [0, 1, 2, 3]).exp()
        tensor(4.)
    """
    operation = "info_nce_loss"
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise LapsValueError(
                _check.message(
                    operation,
                    "temperature has the wrong rank",
                    "0",
                    f"{temperature.dim()}: {tuple(temperature.shape)}",
                )
            )
        if _check.readable(temperature) and not bool(temperature > 0):
            raise LapsValueError(
                _check.message(
                    operation, "temperature is out of range", "0 < temperature", float(temperature.detach())
                )
            )
    else:
        temperature = _check.number(operation, "temperature", temperature, 0.0, open_low=True)
    scores = _check_scores(operation, scores)
    match = _matches(operation, scores, image_ids, caption_image_ids)
    logits = wide(scores) / temperature
    return (_cross_entropy(logits, match) + _cross_entropy(logits.T, match.T)) / 2


def _cross_entropy(logits: Tensor, match: Tensor) -> Tensor:
    """Mean cross-entropy against equal shares of a row's positives, over the rows that have any."""
    log_probabilities = logits.log_softmax(1).masked_fill(~match, 0)
    positives = match.sum(1)
    per_row = -log_probabilities.sum(1) / positives.clamp_min(1)
    return per_row.sum() / (positives > 0).sum()


class InfoNCELoss(nn.Module):
    """:func:`info_nce_loss` with a learnable temperature tau = exp(-log_scale), as CLIP has.

    The scale exp(log_scale) = 1 / tau is kept within [1, max_scale] by clamping the parameter itself before
    use (a clamp inside the graph would stop its gradient for good once it went too far).

    Args:
        temperature: the initial tau, in [1 / max_scale, 1].
        max_scale: the highest 1 / tau, >= 1.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Radford et al., CLIP (2021), section 2.5.

    Example:
        >>> import laps, torch
        >>> laps.losses.InfoNCELoss()(torch.zeros(4, 4), [0, 1, 2, 3], [0, 1, 2, 3]).exp().detach()
        tensor(4.)
    """

    def __init__(self, temperature: float = 0.07, *, max_scale: float = 100.0) -> None:
        super().__init__()
        self.max_scale = _check.number("InfoNCELoss", "max_scale", max_scale, 1.0)
        temperature = _check.number("InfoNCELoss", "temperature", temperature, 1 / self.max_scale, 1.0)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def temperature(self) -> float:
        """The present tau."""
        return math.exp(-float(self.log_scale.detach().clamp(0, math.log(self.max_scale))))

    def forward(self, scores: Tensor, image_ids: Ids, caption_image_ids: Ids) -> Tensor:
        """Scores (B_v, B_t), ids (B_v,) and (B_t,) to the loss, 0-d; see :func:`info_nce_loss`."""
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(self.max_scale))
        return info_nce_loss(scores, image_ids, caption_image_ids, torch.exp(-self.log_scale))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.4g}, max_scale={self.max_scale:g}"


# ---- ratio


def ratio_loss(kept_fraction: Tensor, ratio: float) -> Tensor:
    """Keeps sampled selection near its budget: mean over pairs of (ratio - kept_fraction)^2.

    Constant for the released variant, whose top-k has a fixed budget. The paper's weight is 1.

    Args:
        kept_fraction: any shape, not empty, floating; of ``similarity(..., return_kept_fraction=True)``.
        ratio: rho, in (0, 1].

    Returns:
        The loss, a 0-d tensor of the dtype of `kept_fraction`.

    Raises:
        LapsValueError, LapsTypeError: an empty or non-floating tensor, a ratio out of range.

    Source: section LPS, equation of the ratio loss.

    Example:
        >>> import laps, torch
        >>> laps.losses.ratio_loss(torch.tensor([[0.25, 0.5]]), 0.5)
        tensor(0.0312)
    """
    operation = "ratio_loss"
    ratio = _check.number(operation, "ratio", ratio, 0.0, 1.0, open_low=True)
    if not isinstance(kept_fraction, Tensor):
        raise LapsTypeError(
            _check.message(
                operation, "kept_fraction is no tensor", "torch.Tensor", _check.name_of(kept_fraction)
            )
        )
    _check.common_dtype(operation, {"kept_fraction": kept_fraction})
    if kept_fraction.numel() == 0:
        raise LapsValueError(
            _check.message(
                operation, "kept_fraction is empty", "at least one pair", tuple(kept_fraction.shape)
            )
        )
    return (ratio - kept_fraction).square().mean()
