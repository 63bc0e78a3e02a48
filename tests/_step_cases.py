"""Models in float64 with every head and loss, and batches for them: for one process and for several."""

from __future__ import annotations

from typing import Any

import laps
import torch
from _models import pixels, tiny_laps, token_ids
from laps.data import Batch
from laps.step import TrainingStep
from torch import Tensor, nn

# Of each head the options with which all its parts take part.
OPTIONS: dict[str, dict[str, Any]] = {
    "laps": {},
    "paper": {"variant": "paper"},
    "paper, top-k": {"variant": "paper", "sampling": "topk"},
    "vse": {},
    "gpo": {},
    "scan": {},
    "chan": {},
    "clip": {},
    "saf": {"sim_dim": 8},
    "sgr": {"sim_dim": 8},
    "sgraf": {"sim_dim": 8},
    "hrem": {"interaction_start": 0},
    "tgdt": {},
    "cpfean": {},
}
HEADS = list(OPTIONS)
OBJECTIVES = ["hinge", "triplet", "info_nce"]
# Two pairs show the same image, and an even number of ranks can share them.
SIZE = 10


def model_with(head: str, objective: str | None = None, *, dropout: float = 0.0) -> laps.LAPS:
    """A tiny model in training mode and float64; the same weights every time."""
    torch.manual_seed(0)
    model = tiny_laps(head="laps" if head.startswith("paper") else head, **OPTIONS[head])
    if objective is not None:
        model.objective = laps.objective.Objective.for_head(model.head, {"name": objective})
    without_dropout(model.double().train(), dropout)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.head.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def without_dropout(model: laps.LAPS, dropout: float = 0.0) -> laps.LAPS:
    """The model with another probability of dropout everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        # Of attention, which calls a function.
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    return model


def joint_batch(*, dense: bool = False) -> Batch:
    """Ten pairs."""
    ids, lengths = token_ids([9, 3, 6, 2, 4, 8, 5, 3, 7, 4])
    image_ids = torch.tensor([0, 1, 2, 1, 3, 4, 5, 6, 7, 8])
    more: dict[str, Any] = {}
    if dense:
        longer, longer_lengths = token_ids([12, 9, 11, 7, 10, 8, 9, 12, 6, 11], seed=1)
        more = {"dense_ids": longer.remainder(40), "dense_lengths": longer_lengths}
    images = pixels(9)[image_ids].double()
    return Batch(images, ids.remainder(40), lengths, image_ids, torch.arange(SIZE), **more)


def gradients(
    step: TrainingStep, batch: Batch, **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, logged values and gradients by the parameters' names; the random numbers are always the same."""
    torch.manual_seed(3)
    step.model.zero_grad()
    loss, values = step(batch, **options)
    return loss, values, {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[Tensor, dict[str, Tensor], dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    """Loss, values and gradients agree to a relative 1e-10.

    Of a gradient that is zero in theory (attention's key bias) what is left of rounding has no meaning: the
    floor is a thousandth of the largest gradient.
    """
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        largest = max(float(tensor.abs().max()) for tensor in theirs.values())
        for name, tensor in theirs.items():
            scale = max(float(tensor.abs().max()), largest / 1000)
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-10 * scale, msg=name)
