"""VSE-infinity's pooling against its equations."""

from __future__ import annotations

import math
from typing import Any

import laps.heads.gpo
import pytest
import torch
from _head_equations import CHANNELS, LENGTHS, check_equations, example
from _models import make_batch, tiny_laps
from laps import LapsTypeError, LapsValueError
from laps.heads import build_head
from laps.heads.gpo import GeneralizedPooling, GPOHead
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def gru_step(x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    """One step of a GRU (Cho et al., 2014), with the bias of the candidate inside the reset gate."""
    input_weight, hidden_weight, input_bias, hidden_bias = weights
    reset_x, update_x, new_x = (input_weight @ x + input_bias).chunk(3)
    reset_h, update_h, new_h = (hidden_weight @ h + hidden_bias).chunk(3)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (1 - update) * new + update * h


def plain_weights(pooling: GeneralizedPooling, size: int) -> Tensor:
    angle = [[k / 10000 ** (2 * i / 32) for i in range(16)] for k in range(size)]
    positions = torch.tensor(
        [[f(a) for a in row for f in (math.sin, math.cos)] for row in angle], dtype=torch.float64
    )
    weights: list[list[Tensor]] = [list(direction) for direction in pooling.gru.all_weights]
    states = []
    for direction, order in enumerate((range(size), reversed(range(size)))):
        h = torch.zeros(32, dtype=torch.float64)
        found: dict[int, Tensor] = {}
        for k in order:
            h = found[k] = gru_step(positions[k], h, weights[direction])
        states.append(found)
    z = [pooling.linear.weight[0] @ ((states[0][k] + states[1][k]) / 2) for k in range(size)]
    return (torch.stack(z) / 0.1).softmax(0)


def plain_pool(values: Tensor, pooling: GeneralizedPooling) -> Tensor:
    theta = plain_weights(pooling, len(values))
    pooled = torch.stack([(theta * channel.sort(descending=True).values).sum() for channel in values.T])
    return pooled / pooled.norm()


@pytest.mark.parametrize("options", [{}, {"use_prefix": False}])
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (1, 1), (6, 1), (11, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    torch.manual_seed(0)
    head = GPOHead(CHANNELS, patches, num_prefix_tokens=prefix, **options)
    first = 0 if head.use_prefix else prefix
    check_equations(
        head,
        lambda v, w: plain_pool(v[first:], head.image_pooling) @ plain_pool(w, head.text_pooling),
    )


def test_equal_weights_make_the_mean() -> None:
    pooling = GeneralizedPooling()
    torch.nn.init.zeros_(pooling.linear.weight)
    _, words, lengths = example(3, 1)
    found = pooling.double()(words, lengths)
    for row, values, length in zip(found, words, LENGTHS, strict=True):
        torch.testing.assert_close(row, values[:length].mean(0))


def test_the_gru_runs_once_for_each_length() -> None:
    head = build_head("gpo", embed_dim=CHANNELS, num_patches=6)
    assert isinstance(head, GPOHead)
    rows: list[int] = []
    for pooling in (head.image_pooling, head.text_pooling):
        pooling.gru.register_forward_hook(lambda _, given, __: rows.append(int(given[0].batch_sizes[0])))
    head.encode_image(torch.randn(5, 7, CHANNELS))
    head.encode_text(torch.randn(6, 9, CHANNELS), torch.tensor([4, 2, 4, 9, 2, 2]))
    assert rows == [1, 3]


def test_autocast_and_half_tokens_leave_the_pooling_in_float32() -> None:
    head = GPOHead(CHANNELS, 6)
    images, words, lengths = example(6, 1)
    images, words = images.bfloat16(), words.bfloat16()
    photos, texts = head.encode_image(images.float()), head.encode_text(words.float(), lengths)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = head.encode_image(images).embedding, head.encode_text(words, lengths).embedding
        torch.testing.assert_close(found, (photos.embedding, texts.embedding))


def test_the_loss_is_the_authors_and_reaches_every_parameter() -> None:
    model = tiny_laps(head="gpo")
    assert model.objective.options()["name"] == "hinge"
    assert model.objective.options()["margin"] == 0.2
    model(make_batch())[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_what_is_no_flag_is_refused_and_nothing_is_explained() -> None:
    with pytest.raises(LapsTypeError, match="use_prefix"):
        build_head("gpo", embed_dim=CHANNELS, num_patches=6, use_prefix=1)
    head = laps.heads.gpo.GPOHead(CHANNELS, 6)
    images, words, lengths = (x[:1] for x in example(6, 1))
    with pytest.raises(LapsValueError, match='"gpo" tells nothing'):
        head.explain(head.encode_image(images.float()), head.encode_text(words.float(), lengths))


def test_half_weights_tell_many_positions_apart() -> None:
    torch.manual_seed(0)
    half = GeneralizedPooling().bfloat16()
    full = GeneralizedPooling()
    full.load_state_dict(half.state_dict())
    sizes = torch.tensor([600])
    found, expected = half.weights(sizes), full.weights(sizes)
    assert found.dtype == torch.float32
    # Two digits: the GRU itself is in bfloat16.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
