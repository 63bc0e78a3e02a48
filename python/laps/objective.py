"""What a model is trained for: one of the losses, chosen by name, with the published warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _check, losses
from .errors import LapsTypeError, LapsValueError

if TYPE_CHECKING:
    from .heads import SimilarityHead

__all__ = ["Objective"]

NAMES = ("hinge", "triplet", "info_nce")
MARGIN, TEMPERATURE = 0.2, 0.07


class Objective(nn.Module):
    """Loss of a batch's scores, plus the ratio loss where the head samples its patches.

    Args:
        name: ``"hinge"`` (hardest negatives; all of them in a warm-up), ``"triplet"`` (distance-weighted
            sampling) or ``"info_nce"`` (learnable temperature).
        margin: of hinge and triplet, >= 0; None for 0.2. InfoNCE has none.
        temperature: the initial one of InfoNCE, > 0; None for 0.07. The others have none.
        cutoff: of triplet: negatives so far away are never drawn, in (0.5, 2]; None for 1.7, which HREM takes
            for Flickr30K (1.9 for COCO). The others have none.
        ratio_weight: weight of the ratio loss (paper variant), >= 0.
        max_score: the bound of the scores, which "triplet" turns into distances: 2 for LAPS (the sum of two
            directions), 1 for cosines.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range, or one that the loss does not have.

    Source: section "Loss and recipe"; paper: the ratio loss with weight 1.

    Example:
        >>> import laps, torch
        >>> objective = laps.objective.Objective("hinge", margin=0.2)
        >>> loss, values = objective(torch.zeros(4, 4), torch.arange(4))
        >>> round(float(loss), 3)
        1.6
    """

    def __init__(
        self,
        name: str = "hinge",
        *,
        margin: float | None = None,
        temperature: float | None = None,
        cutoff: float | None = None,
        ratio_weight: float = 1.0,
        max_score: float = 2.0,
    ) -> None:
        super().__init__()
        self.name = _check.choice("Objective", "name", name, NAMES)
        contrastive = name == "info_nce"
        for argument, value, known in (
            ("margin", margin, not contrastive),
            ("temperature", temperature, contrastive),
            ("cutoff", cutoff, name == "triplet"),
        ):
            if value is not None and not known:
                raise LapsValueError(
                    _check.message(
                        "Objective", f'"{name}" has no {argument}', f"another loss, or no {argument}", value
                    )
                )
        self.margin = _check.number("Objective", "margin", MARGIN if margin is None else margin, 0.0)
        self.initial_temperature = _check.number(
            "Objective",
            "temperature",
            TEMPERATURE if temperature is None else temperature,
            0.0,
            open_low=True,
        )
        # Distances have a floor, at which all weights would end.
        self.cutoff = _check.number(
            "Objective",
            "cutoff",
            losses.CUTOFF if cutoff is None else cutoff,
            losses.MIN_DISTANCE,
            2.0,
            open_low=True,
        )
        self.ratio_weight = _check.number("Objective", "ratio_weight", ratio_weight, 0.0)
        self.max_score = _check.number("Objective", "max_score", max_score, 0.0, open_low=True)
        self.info_nce = losses.InfoNCELoss(self.initial_temperature) if contrastive else None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Objective:
        """The objective of these keyword arguments. Raises LapsTypeError: an unknown one."""
        try:
            return cls(**options)
        except TypeError as error:
            if isinstance(error, LapsTypeError):
                raise
            raise LapsTypeError(
                _check.message("Objective", "the loss has an unknown option", "those of Objective", error)
            ) from None

    @classmethod
    def for_head(cls, head: SimilarityHead, options: Mapping[str, Any] | None = None) -> Objective:
        """The head's own loss where the options name no other, and its own settings unless they are given."""
        given, own = dict(options or {}), dict(head.default_loss)
        if given.get("name", own.get("name", NAMES[0])) != own.get("name", NAMES[0]):
            own = {}
        return cls.from_options({"max_score": head.max_score, **own, **given})

    def options(self) -> dict[str, Any]:
        """The keyword arguments that would build this objective again."""
        own = {"temperature": self.initial_temperature} if self.info_nce else {"margin": self.margin}
        if self.name == "triplet":
            own["cutoff"] = self.cutoff
        return {
            "name": self.name,
            **own,
            "ratio_weight": self.ratio_weight,
            "max_score": self.max_score,
        }

    def forward(
        self,
        scores: Tensor,
        image_ids: Tensor,
        *,
        warmup: float | None = None,
        loss_scores: Sequence[Tensor] = (),
        penalty: Tensor | None = None,
        kept_fraction: Tensor | None = None,
        selection_ratio: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a 0-d tensor, and what a log should show, detached.

        Args:
            scores: (B, B), the pairs of the batch on the diagonal.
            image_ids: (B,) integers; pairs of the same image are never negatives.
            warmup: in the first epoch the share of its steps that are done, in [0, 1]: the hinge then sums
                over all negatives and is scaled by this. None afterwards.
            loss_scores: matrices (B, B) to sum the loss over; empty: `scores`.
            penalty: 0-d, what the head adds to the loss; or None.
            kept_fraction: (B, B), share of kept patches, for the ratio loss; None for none.
            selection_ratio: rho, what the kept fraction is held to.
        """
        if warmup is not None:
            _check.number("Objective", "warmup", warmup, 0.0, 1.0)
        first, *others = loss_scores or [scores]
        loss = self._loss(first, image_ids, hardest=warmup is None)
        for each in others:
            loss = loss + self._loss(each, image_ids, hardest=warmup is None)
        if warmup is not None:
            loss = loss * warmup
        values = self._values(scores.detach(), image_ids)
        if kept_fraction is not None:
            ratio = losses.ratio_loss(kept_fraction, selection_ratio)
            loss = loss + self.ratio_weight * ratio
            values |= {"ratio_loss": ratio.detach(), "kept_fraction": kept_fraction.detach().mean()}
        if penalty is not None:
            loss = loss + penalty
            values["penalty"] = penalty.detach()
        if self.info_nce is not None:
            values["temperature"] = (-self.info_nce.log_scale.detach()).exp()
        return loss, {"loss": loss.detach()} | values

    def _loss(self, scores: Tensor, image_ids: Tensor, *, hardest: bool) -> Tensor:
        if self.name == "hinge":
            return losses.hinge_loss(scores, image_ids, image_ids, self.margin, hardest=hardest)
        if self.name == "triplet":
            return losses.distance_weighted_triplet_loss(
                scores, image_ids, image_ids, self.margin, max_score=self.max_score, cutoff=self.cutoff
            )
        assert self.info_nce is not None
        loss: Tensor = self.info_nce(scores, image_ids, image_ids)
        return loss

    def _values(self, scores: Tensor, image_ids: Tensor) -> dict[str, Tensor]:
        ids = image_ids.to(scores.device)
        same = ids[:, None] == ids[None, :]
        positive = scores.diagonal()
        hardest = scores.masked_fill(same, -torch.inf).amax(1)
        return {
            "positive": positive.mean(),
            "negative": hardest.masked_fill(hardest.isinf(), 0).mean(),
            "accuracy": (positive > hardest).float().mean(),
        }
