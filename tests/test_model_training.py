"""Training a model: the loss reaches every parameter, in any precision, checkpointed, compiled or frozen."""

from __future__ import annotations

import laps
import pytest
import torch
from _models import SIZE, VARIANTS, Variant, build, make_batch, text_model, tiny_laps
from laps import LapsTypeError
from laps.encoders import ImageEncoder, TextEncoder
from laps.objective import Objective
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_is_the_objectives_and_reaches_every_parameter(
    variant: Variant,
) -> None:
    model = build(variant)
    batch = make_batch()
    model.freeze_backbones(False)
    loss, values = model(batch, warmup=0.5)
    tokens = model.image_encoder(batch.pixel_values)
    scored = model.head.training_scores(
        tokens, model.text_encoder(batch.input_ids, batch.lengths), batch.lengths
    )
    ratio = getattr(model.head, "selection_ratio", 1.0)
    expected, _ = model.objective(
        scored.scores,
        batch.image_ids,
        warmup=0.5,
        loss_scores=scored.loss_scores,
        penalty=scored.penalty,
        kept_fraction=scored.kept_fraction,
        selection_ratio=ratio,
    )
    loss.backward()

    torch.testing.assert_close(loss, expected)
    assert loss.isfinite()
    assert values.keys() >= {"loss", "positive", "negative", "accuracy"}
    assert all(v.dim() == 0 and not v.requires_grad and v.isfinite() for v in values.values())
    # A parameter without a gradient makes DistributedDataParallel wait for ever.
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []


def test_gradient_checkpointing_gives_the_same_loss_and_gradients() -> None:
    model = tiny_laps()
    results = []
    for enabled in (False, True):
        model.gradient_checkpointing(enabled)
        model.train().zero_grad()
        torch.manual_seed(7)  # dropout is active
        loss, _ = model(make_batch())
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])

    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-6)
    saved: list[int] = []
    for enabled in (False, True):
        model.gradient_checkpointing(enabled)
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_batch())
        saved.append(count)
    assert saved[1] < saved[0] / 2


def test_gradient_checkpointing_of_a_module_that_cannot_is_an_error() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2))
    images = ImageEncoder(backbone, num_prefix_tokens=0, image_size=SIZE)
    texts = TextEncoder(text_model(), embed_dim=16)
    model = laps.LAPS(
        images, texts, laps.heads.build_head("vse", embed_dim=16, num_patches=8, num_prefix_tokens=0)
    )
    with pytest.raises(LapsTypeError, match="backbone Sequential cannot do it"):
        model.gradient_checkpointing()


def test_frozen_backbones_get_no_gradient_and_no_dropout_until_they_are_unfrozen() -> None:
    model = tiny_laps().train()
    model.freeze_backbones()
    backbones = [model.image_encoder.backbone, model.text_encoder.backbone]
    model.train()
    model(make_batch())[0].backward()

    assert all(not module.training for backbone in backbones for module in backbone.modules())
    assert all(p.grad is None for backbone in backbones for p in backbone.parameters())
    assert model.head.training
    assert model.image_encoder.projection.weight.grad is not None
    assert [group["name"] for group in model.parameter_groups(1.0)] == ["head"]

    model.freeze_backbones(False)
    model(make_batch())[0].backward()
    assert all(backbone.training for backbone in backbones)
    assert all(
        p.grad is not None for b in backbones for name, p in b.named_parameters() if "pooler" not in name
    )


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    model = tiny_laps()
    model.objective = Objective("info_nce")
    head, backbones = model.parameter_groups(2e-4, 0.1)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}

    assert (head["lr"], backbones["lr"]) == (2e-4, pytest.approx(2e-5))
    assert sorted(id(p) for p in head["params"] + backbones["params"]) == sorted(names)
    assert all(".backbone." in names[id(p)] for p in backbones["params"])
    assert not any(".backbone." in names[id(p)] for p in head["params"])
    assert any("objective" in names[id(p)] for p in head["params"])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bfloat16_autocast_stays_close_and_scores_in_float32(
    variant: Variant,
) -> None:
    model = build(variant)
    batch = make_batch()
    full, _ = model(batch)

    def score() -> Tensor:
        images = model.encode_image(batch.pixel_values)
        return model.similarity(images, model.encode_text(batch.input_ids, batch.lengths))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(batch)
        scores = score()
    loss.backward()

    assert scores.dtype == loss.dtype == torch.float32
    # bfloat16 has three decimal digits, and an encoder of two layers loses one of them.
    torch.testing.assert_close(scores, score(), rtol=0, atol=0.05)
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]], ids=str)
def test_the_compiled_model_has_the_same_loss_and_gradients(
    variant: Variant,
) -> None:
    model = build(variant)
    plain, _ = model(make_batch())
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # The graph, its derivative and the operators' fake kernels, without the minute that a C++ compiler takes.
    torch.compiler.reset()
    loss, values = torch.compile(model, backend="aot_eager")(make_batch())
    loss.backward()

    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert values.keys() >= {"loss", "accuracy"}
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
