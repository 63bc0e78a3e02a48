"""HREM against its equations, and the interaction of its training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _head_equations import CHANNELS, check_equations, example
from _models import make_batch, tiny_laps
from laps import LapsValueError
from laps.heads import TrainingScores, build_head
from laps.heads.hrem import HREMHead
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("one_thread")


def make(patches: int = 6, prefix: int = 1, **options: Any) -> HREMHead:
    """Without dropout, float64; no parameter is zero or one."""
    torch.manual_seed(0)
    head = HREMHead(CHANNELS, patches, num_prefix_tokens=prefix, **{"num_heads": 2, **options}).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return head


def plain_layer(x: Tensor, layer: nn.TransformerEncoderLayer, mask: Tensor | None = None) -> Tensor:
    """A transformer layer with the norms after the sums, head by head."""
    attention, heads = layer.self_attn, []
    size = x.shape[1] // attention.num_heads
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, 1)
    for one in (slice(i * size, (i + 1) * size) for i in range(attention.num_heads)):
        logits = q[:, one] @ k[:, one].T / math.sqrt(size)
        heads.append((logits if mask is None else logits + mask).softmax(1) @ v[:, one])
    x = plain_norm(
        x + torch.cat(heads, 1) @ attention.out_proj.weight.T + attention.out_proj.bias, layer.norm1
    )
    hidden = (x @ layer.linear1.weight.T + layer.linear1.bias).relu()
    return plain_norm(x + hidden @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)


def plain_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_embedding(f: Tensor, layer: nn.TransformerEncoderLayer) -> Tensor:
    largest = torch.stack([channel.sort(descending=True).values[:2].mean() for channel in f.T])
    e = 0.8 * largest + 0.2 * plain_layer(f, layer).mean(0)
    return e / e.norm()


def plain_relation(matches: list[Tensor], mlp: nn.Sequential) -> Tensor:
    ordered = sorted(matches, key=float, reverse=True)
    top = torch.stack((ordered + [torch.zeros(()).double()] * 10)[:10])
    first, _, second = mlp
    learned = (first.weight @ top + first.bias).relu()
    return sum(matches) / len(matches) + second.weight[0] @ learned + second.bias[0]


def plain_training_scores(
    head: HREMHead, images: Tensor, words: Tensor, lengths: list[int]
) -> tuple[list[Tensor], Tensor]:
    """The four score matrices and the penalty, entry by entry."""
    regions = [x[head.num_prefix_tokens :] for x in images]
    texts = [w[:length] for w, length in zip(words, lengths, strict=True)]
    b, inside = len(regions), head.interaction
    v = torch.stack([plain_embedding(x, head.image_pooling.layer) for x in regions])
    t = torch.stack([plain_embedding(w, head.text_pooling.layer) for w in texts])
    i2t, t2i = (torch.empty(b, b, dtype=torch.float64) for _ in range(2))
    for i, x in enumerate(regions):
        for j, w in enumerate(texts):
            a = torch.stack([torch.stack([torch.cosine_similarity(p, q, dim=0) for q in w]) for p in x])
            a = torch.where(a > 0, a, 0.1 * a).detach()
            best_of_words = [max(a[n, m] / a[n].norm() for n in range(len(x))) for m in range(len(w))]
            best_of_regions = [max(a[n, m] / a[:, m].norm() for m in range(len(w))) for n in range(len(x))]
            i2t[i, j] = plain_relation(best_of_regions, inside.image_to_text)
            t2i[i, j] = plain_relation(best_of_words, inside.text_to_image)

    nodes = torch.cat([v, t])
    mask = torch.full((2 * b, 2 * b), -math.inf, dtype=torch.float64)
    for row in range(2 * b):
        relation = []
        for column in range(2 * b):
            i, j = row % b, column % b
            if (row < b) == (column < b):
                gap = nodes[row] - nodes[column]
                relation.append((-(gap.norm() if row != column else 0 * gap.sum())).exp())
            else:
                relation.append(i2t[i, j] if row < b else t2i[j, i])
        for column in sorted(range(2 * b), key=lambda c: -float(relation[c].detach()))[:b]:
            mask[row, column] = head.relation_weight * relation[column]
    mixed = plain_layer(nodes, inside.layer, mask)
    mixed = mixed / mixed.norm(dim=1, keepdim=True)
    v_hat, t_hat = mixed[:b], mixed[b:]

    penalty = torch.zeros(()).double()
    q = torch.stack([torch.stack([(-(x - y).norm()).exp() for y in t]) for x in v]).detach()
    for one in range(b):
        for target, relation_of_one in ((q[one], i2t[one]), (q[:, one], t2i[:, one])):
            target = target / target.sum()
            predicted = relation_of_one.exp() / relation_of_one.exp().sum()
            penalty = penalty + (target * (target / predicted).log()).sum() / b
    return [v @ t.T, v @ t_hat.T, v_hat @ t.T, v_hat @ t_hat.T], 10 * penalty


@pytest.mark.parametrize("options", [{}, {"num_heads": 8}, {"num_heads": 1}])
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (2, 1), (11, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    head = make(patches, prefix, **options)
    check_equations(
        head,
        lambda v, w: (
            plain_embedding(v[prefix:], head.image_pooling.layer)
            @ plain_embedding(w, head.text_pooling.layer)
        ),
    )


@pytest.mark.parametrize(
    ("patches", "pairs", "options"),
    [
        (2, 3, {}),
        (6, 3, {"relation_weight": 1.5}),
        (13, 3, {"num_heads": 4}),
        (1, 1, {"relation_weight": 0.0}),
    ],
)
def test_the_interaction_and_its_gradients_are_those_of_the_equations(
    patches: int, pairs: int, options: dict[str, Any]
) -> None:
    head = make(patches, interaction_start=0, **options)
    images, words, _ = (x[:pairs] for x in example(patches, 1))
    # One word or one patch alone matches all alike, and which of equal relations is kept is not defined.
    lengths = torch.tensor([5, 3, 11][:pairs])
    words = torch.randn(pairs, 12, CHANNELS, dtype=torch.float64)
    words[torch.arange(12) >= lengths[:, None]] = torch.nan
    inputs = [images.requires_grad_(), words.requires_grad_(), *head.parameters()]
    found = head.training_scores(images, words, lengths)
    expected, penalty = plain_training_scores(head, images, words, lengths.tolist())

    assert found.loss_scores[0] is found.scores
    assert found.penalty is not None
    torch.testing.assert_close(list(found.loss_scores), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.penalty, penalty, rtol=0, atol=1e-9)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    gradients = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(scores, weights, strict=True)) + extra,
            inputs,
            allow_unused=True,
            materialize_grads=True,
        )
        for scores, extra in ((found.loss_scores, found.penalty), (expected, penalty))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    if pairs > 1:
        assert all(gradient.any() for gradient in gradients[0][2:])


def step(head: HREMHead) -> TrainingScores:
    images, words, lengths = example(6, 1)
    return head.training_scores(images, words[:3], lengths[:3])


def test_the_interaction_begins_after_so_many_training_steps_also_of_a_resumed_run() -> None:
    head = make(interaction_start=2)
    head.eval()
    step(head)
    head.train()
    first, second = step(head), step(head)
    resumed = make(interaction_start=2)
    resumed.load_state_dict(head.state_dict())

    assert [len(first.loss_scores), len(second.loss_scores), len(step(head).loss_scores)] == [0, 0, 4]
    assert float(first.penalty or 0) == 0
    third = step(resumed)
    assert len(third.loss_scores) == 4
    torch.testing.assert_close(third.scores, first.scores)
    assert len(step(resumed.eval()).loss_scores) == 0
    assert int(resumed.steps) == 3


class Reads(TorchDispatchMode):
    """Counts how often a number of `tensor` is taken to the CPU, for which the CPU waits."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].data_ptr() == self.tensor.data_ptr()
        return func(*args, **(kwargs or {}))


def test_the_count_of_steps_is_read_from_the_device_once_not_at_each_step() -> None:
    head = make(interaction_start=3)
    with Reads(head.steps) as reads:
        kinds = [len(step(head).loss_scores) for _ in range(5)]
    assert kinds == [0, 0, 0, 4, 4]
    assert reads.count <= 1
    assert int(head.steps) == 5


def test_a_state_that_is_loaded_between_steps_sets_the_count() -> None:
    head, later = make(interaction_start=3), make(interaction_start=3)
    for _ in range(3):
        step(later)
    assert len(step(head).loss_scores) == 0
    # As a part of a module, as in a model.
    nn.ModuleList([head]).load_state_dict(nn.ModuleList([later]).state_dict())
    assert len(step(head).loss_scores) == 4
    assert int(head.steps) == 4
    head.load_state_dict(make(interaction_start=3).state_dict())
    assert len(step(head).loss_scores) == 0


@pytest.mark.parametrize("start", [0, 8000])
def test_the_loss_reaches_every_parameter_before_and_after(start: int) -> None:
    model = tiny_laps(head="hrem", interaction_start=start).train()
    loss, values = model(make_batch())
    loss.backward()

    assert loss.isfinite()
    assert (float(values["penalty"]) > 0) is (start == 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    assert isinstance(model.head, HREMHead)
    moved = [p.grad.any() for p in model.head.interaction.parameters() if p.grad is not None]
    assert all(moved) if start == 0 else not any(moved)


def test_the_loss_is_the_authors() -> None:
    options = tiny_laps(head="hrem").objective.options()
    assert (options["name"], options["margin"], options["max_score"]) == ("triplet", 0.2, 1.0)
    assert options["cutoff"] == 1.7


def test_autocast_and_half_tokens_score_in_float32() -> None:
    head = make(interaction_start=0).float()
    images, words, lengths = example(6, 1)
    images, words, lengths = images.bfloat16(), words[:3].bfloat16(), lengths[:3]
    full = head.training_scores(images.float(), words.float(), lengths)
    for enabled in (False, True):
        for grad in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.set_grad_enabled(grad):
                scored = head.training_scores(images, words, lengths)
            assert {x.dtype for x in scored.loss_scores} == {torch.float32}
            # The transformer layers are in bfloat16, which has three digits.
            torch.testing.assert_close(scored.scores, full.scores, rtol=0, atol=0.02 if enabled else 1e-6)


def test_equal_embeddings_have_finite_gradients() -> None:
    head = make(interaction_start=0)
    images, words, lengths = example(6, 1)
    images, words = images[:1].repeat(3, 1, 1).requires_grad_(), words[:1].repeat(3, 1, 1).requires_grad_()
    scored = head.training_scores(images, words, lengths[:1].repeat(3))
    assert scored.penalty is not None
    (sum(x.square().sum() for x in scored.loss_scores) + scored.penalty).backward()
    for x in (images, words, *head.parameters()):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_the_cross_relation_never_holds_the_products_of_all_pairs() -> None:
    head, b, patches, longest = make(), 24, 30, 12
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    images, words = torch.randn(b, patches, CHANNELS).double(), torch.randn(b, longest, CHANNELS).double()
    with Sizes():
        head.interaction.cross_relations(images, words, torch.full((b,), longest))
    assert max(sizes) == b * patches * longest


def test_wrong_heads_and_unequal_sides_are_refused_and_nothing_is_explained() -> None:
    with pytest.raises(LapsValueError, match="num_heads does not divide embed_dim"):
        build_head("hrem", embed_dim=CHANNELS, num_patches=6)
    with pytest.raises(LapsValueError, match="relation_weight"):
        build_head("hrem", embed_dim=CHANNELS, num_patches=6, num_heads=2, relation_weight=-1.0)
    head = make(interaction_start=1)
    images, words, lengths = example(6, 1)
    assert head.training_scores(images, words, lengths).scores.shape == (3, 4)
    with pytest.raises(LapsValueError, match="3 images and 4 captions"):
        head.training_scores(images, words, lengths)
    with pytest.raises(LapsValueError, match='"hrem" tells nothing'):
        head.explain(head.encode_image(images[:1]), head.encode_text(words[:1], lengths[:1]))
