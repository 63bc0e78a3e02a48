"""GradCache: the loss and the gradients of the batch at once, from parts of it."""

from __future__ import annotations

from typing import Any

import laps
import pytest
import torch
from _models import tiny_laps
from _step_cases import HEADS, OBJECTIVES, assert_same, gradients, joint_batch, model_with
from hypothesis import given, settings
from hypothesis import strategies as st
from laps.data import Batch
from laps.step import TrainingStep
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("head", HEADS)
def test_parts_give_the_gradient_of_the_whole_batch(head: str) -> None:
    batch = joint_batch(dense=True)
    model = model_with(head)
    whole = gradients(TrainingStep(model), batch)
    assert any(float(gradient.abs().max()) > 0 for gradient in whole[2].values())
    assert_same(gradients(TrainingStep(model_with(head), mini_batch_size=3), batch), whole)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_give_the_gradient_of_every_loss(objective: str) -> None:
    batch = joint_batch()
    whole = gradients(TrainingStep(model_with("laps", objective)), batch)
    assert_same(gradients(TrainingStep(model_with("laps", objective), mini_batch_size=4), batch), whole)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(2, 9), mini=st.integers(1, 10), scale=st.sampled_from([1.0, 0.25]))
def test_parts_of_any_size_do(size: int, mini: int, scale: float) -> None:
    batch = joint_batch().part(0, size)
    whole = gradients(TrainingStep(model_with("laps")), batch, scale=scale)
    assert_same(gradients(TrainingStep(model_with("laps"), mini_batch_size=mini), batch, scale=scale), whole)


def test_gradients_add_up() -> None:
    batch = joint_batch()
    model = model_with("laps")
    step = TrainingStep(model, mini_batch_size=2)
    once = gradients(step, batch)[2]
    model.zero_grad()
    step(batch)
    step(batch)
    twice = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient)


def test_dropout_draws_the_same_numbers_in_both_passes() -> None:
    """Else the gradient would not be that of the loss: with the same numbers its slope is compared."""
    batch = joint_batch()
    # The gradient of LAPS is not its slope: selection has none.
    model = model_with("vse", dropout=0.3)
    step = TrainingStep(model, mini_batch_size=3)
    parameter = model.image_encoder.projection.weight

    def loss_at(shift: Tensor) -> float:
        kept = parameter.data.clone()
        parameter.data += shift
        loss = float(gradients(step, batch)[0])
        parameter.data.copy_(kept)
        return loss

    found = gradients(step, batch)[2]
    direction = found["image_encoder.projection.weight"]
    direction = direction / direction.norm()
    slope = (loss_at(1e-6 * direction) - loss_at(-1e-6 * direction)) / 2e-6
    expected = float((found["image_encoder.projection.weight"] * direction).sum())
    assert slope == pytest.approx(expected, rel=1e-5)


def test_the_generator_goes_on_after_it() -> None:
    model = model_with("laps", dropout=0.3)
    step = TrainingStep(model, mini_batch_size=3)
    torch.manual_seed(0)
    first, second = float(step(joint_batch())[0]), float(step(joint_batch())[0])
    assert first != second


def test_frozen_backbones_have_no_gradient() -> None:
    model = model_with("laps")
    model.freeze_backbones()
    _, _, found = gradients(TrainingStep(model, mini_batch_size=4), joint_batch())
    assert not any(".backbone." in name for name in found)
    assert any(name.startswith("head.") for name in found)


def test_the_memory_of_activations_is_that_of_a_part() -> None:
    """Counted by what autograd keeps for the backward pass of the encoders."""

    def kept(mini: int | None) -> int:
        model = model_with("laps")
        most, now = 0, 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal most, now
            now += tensor.numel()
            most = max(most, now)
            return tensor

        original = torch.autograd.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            nonlocal now
            original(*args, **kwargs)
            now = 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "backward", backward)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                TrainingStep(model, mini_batch_size=mini)(joint_batch())
        return most

    assert kept(3) < 0.6 * kept(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size"),
        ({"mini_batch_size": 2.5}, "mini_batch_size"),
        ({"amp": 1}, "amp"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(laps.LapsError, match=message):
        TrainingStep(tiny_laps(), **options)
    with pytest.raises(laps.LapsTypeError, match="model"):
        TrainingStep(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_part_of_a_batch_has_its_rows() -> None:
    batch = joint_batch(dense=True)
    part = batch.part(2, 5)
    assert isinstance(part, Batch)
    assert len(part) == 3
    assert torch.equal(part.pixel_values, batch.pixel_values[2:5])
    assert part.dense_lengths is not None
    assert batch.dense_lengths is not None
    assert torch.equal(part.dense_lengths, batch.dense_lengths[2:5])
