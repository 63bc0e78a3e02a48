"""SAF, SGR and SGRAF against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laps.heads.sgraf
import pytest
import torch
from _head_equations import CHANNELS, LENGTHS, check_equations, example
from _models import make_batch, tiny_laps
from laps import LapsValueError
from laps.heads import PairHead, build_head
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["saf", "sgr", "sgraf"]
# From the rows (n, C) that are normalised together, to themselves normalised.
Norm = Callable[[Tensor, nn.Module], Tensor]


def l2(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def linear(x: Tensor, layer: Any) -> Tensor:
    product: Tensor = layer.weight @ x
    return product if layer.bias is None else product + layer.bias


def settled(x: Tensor, norm: Any) -> Tensor:
    """BatchNorm at rest."""
    normed: Tensor = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    return normed


def batched(x: Tensor, norm: Any) -> Tensor:
    """BatchNorm over the first axis, in training."""
    mean = x.mean(0)
    normed: Tensor = (x - mean) / (((x - mean) ** 2).mean(0) + 1e-5).sqrt() * norm.weight + norm.bias
    return normed


def pooled(rows: list[Tensor], wholes: list[Tensor], sets: list[Tensor], attention: Any) -> list[Tensor]:
    """The global vector of each set of unit vectors (n, C), from L before the tanh and g before the tanh."""
    found = []
    for local, whole, x in zip(rows, wholes, sets, strict=True):
        energies = [(attention.weigh.weight[0] * y.tanh() * whole.tanh()).sum() for y in local]
        weights = torch.stack(energies).exp()
        found.append(l2((weights[:, None] * x).sum(0) / weights.sum()))
    return found


def global_images(attention: Any, images: list[Tensor], norm: Norm) -> list[Tensor]:
    local = norm(torch.stack([linear(x, attention.local) for v in images for x in v]), attention.local_norm)
    whole = norm(torch.stack([linear(v.mean(0), attention.whole) for v in images]), attention.whole_norm)
    return pooled(list(torch.split(local, len(images[0]))), list(whole), images, attention)


def global_text(attention: Any, w: Tensor) -> Tensor:
    local = torch.stack([linear(x, attention.local) for x in w])
    return pooled([local], [linear(w.mean(0), attention.whole)], [w], attention)[0]


def nodes_of(head: Any, v: Tensor, w: Tensor, of_image: Tensor) -> Tensor:
    """(1 + l, d)."""
    leaky = torch.stack([torch.stack([x @ y if x @ y > 0 else 0.1 * (x @ y) for y in w]) for x in v])
    leaky = torch.stack([l2(row) for row in leaky])
    nodes = [l2(linear((of_image - global_text(head.text_attention, w)) ** 2, head.global_node))]
    for j, y in enumerate(w):
        weights = (9 * leaky[:, j]).exp()
        attended = l2((weights[:, None] * v).sum(0) / weights.sum())
        nodes.append(l2(linear((attended - y) ** 2, head.local_node)))
    return torch.stack(nodes)


def sgr_score(head: Any, nodes: Tensor) -> Tensor:
    for step in head.steps:
        queries = torch.stack([linear(x, step.query) for x in nodes])
        keys = torch.stack([linear(x, step.key) for x in nodes])
        edges = (queries @ keys.T).exp()
        mixed = edges / edges.sum(1, keepdim=True) @ nodes
        nodes = torch.stack([linear(x, step.update).relu() for x in mixed])
    return linear(nodes[0], head.output)[0].sigmoid()


def saf_energies(head: Any, nodes: Tensor) -> Tensor:
    return torch.stack([linear(x, head.filter)[0] for x in nodes])


def saf_score(head: Any, nodes: Tensor, normed: Tensor) -> Tensor:
    r = normed.sigmoid()
    return linear(l2((r[:, None] / (r.sum() + 1e-8) * nodes).sum(0)), head.output)[0].sigmoid()


def plain_at_rest(head: Any, v: Tensor, w: Tensor) -> Tensor:
    if head.name == "sgraf":
        return (plain_at_rest(head.saf, v, w) + plain_at_rest(head.sgr, v, w)) / 2
    v, w = (torch.stack([l2(x) for x in side]) for side in (v, w))
    nodes = nodes_of(head, v, w, global_images(head.image_attention, [v], settled)[0])
    if head.name == "sgr":
        return sgr_score(head, nodes)
    return saf_score(head, nodes, settled(saf_energies(head, nodes), head.norm))


def plain_in_training(head: Any, images: Tensor, words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores, and of SAF the mean and unbiased variance of each caption."""
    units = [torch.stack([l2(x) for x in v]) for v in images]
    wholes = global_images(head.image_attention, units, batched)
    columns, statistics = [], []
    for one in words:
        w = torch.stack([l2(x) for x in one])
        nodes = [nodes_of(head, v, w, whole) for v, whole in zip(units, wholes, strict=True)]
        if head.name == "sgr":
            columns.append(torch.stack([sgr_score(head, x) for x in nodes]))
            continue
        energies = torch.cat([saf_energies(head, x) for x in nodes])
        normed = torch.split(batched(energies, head.norm), 1 + len(w))
        columns.append(torch.stack([saf_score(head, x, y) for x, y in zip(nodes, normed, strict=True)]))
        statistics.append(torch.stack([energies.mean(), energies.var()]).detach())
    return torch.stack(columns, dim=1), torch.stack(statistics or [torch.zeros(2)])


def build(name: str, patches: int, prefix: int = 0, **options: Any) -> Any:
    """A head of this seed in float64 whose biases, BatchNorms and running statistics are not trivial."""
    torch.manual_seed(0)
    head = build_head(
        name,
        embed_dim=CHANNELS,
        num_patches=patches,
        num_prefix_tokens=prefix,
        **({"sim_dim": 6} | options),
    ).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, buffer in head.named_buffers():
            if "running" in key:
                buffer.copy_(torch.rand_like(buffer) + 0.2)
    return head


def without_dropout(head: Any) -> Any:
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return head


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (6, 1), (11, 2)])
def test_scores_and_gradients_are_those_of_the_equations(name: str, patches: int, prefix: int) -> None:
    head = build(name, patches, prefix).eval()
    check_equations(head, lambda v, w: plain_at_rest(head, v[prefix:], w))


@pytest.mark.parametrize("sim_dim", [1, 9])
def test_nodes_have_any_dimension(sim_dim: int) -> None:
    head = build("sgraf", 3, sim_dim=sim_dim).eval()
    assert head.options() == {"sim_dim": sim_dim}
    check_equations(head, lambda v, w: plain_at_rest(head, v, w))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [2**40, 1])
def test_training_takes_the_statistics_of_the_batch(name: str, chunk: int) -> None:
    head = without_dropout(build(name, 5)).train()
    head.chunk = chunk
    images, words, lengths = example(5, 0)
    inputs = [images.requires_grad_(), words.requires_grad_(), *head.parameters()]
    parts = [head.saf, head.sgr] if name == "sgraf" else [head]
    captions = [w[:length] for w, length in zip(words, LENGTHS, strict=True)]
    plain = [plain_in_training(part, images, captions) for part in parts]
    expected = sum(scores for scores, _ in plain) / len(parts)
    assert isinstance(expected, Tensor)

    saf = None if name == "sgr" else parts[0]
    before = None if saf is None else (saf.norm.running_mean.clone(), saf.norm.running_var.clone())
    result = head.training_scores(images, words, lengths)
    torch.testing.assert_close(result.scores, expected, rtol=0, atol=1e-9)
    for found, (wanted, _) in zip(result.loss_scores, plain if name == "sgraf" else [], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)

    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (
        torch.autograd.grad((values * weights).sum(), inputs) for values in (result.scores, expected)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)

    # After the backward pass, which computes the blocks again.
    if saf is not None and before is not None:
        mean, variance = before
        for caption in plain[0][1]:
            mean = 0.9 * mean + 0.1 * caption[0]
            variance = 0.9 * variance + 0.1 * caption[1]
        torch.testing.assert_close(saf.norm.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(saf.norm.running_var, variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["saf", "sgraf"])
def test_pairs_in_training_are_normalised_together_and_leave_no_trace(name: str) -> None:
    head = without_dropout(build(name, 5)).train()
    images, words, lengths = example(5, 0)
    photos, texts = head.encode_image(images), head.encode_text(words[:3], lengths[:3])
    state = {key: value.clone() for key, value in head.state_dict().items()}
    found = head.similarity_pairwise(photos, texts)

    saf = head.saf if name == "sgraf" else head
    v = [torch.stack([l2(x) for x in image]) for image in images]
    w = [torch.stack([l2(x) for x in y[:length]]) for y, length in zip(words, LENGTHS[:3], strict=False)]
    wholes = global_images(saf.image_attention, v, batched)
    nodes = [nodes_of(saf, *pair) for pair in zip(v, w, wholes, strict=True)]
    energies = [saf_energies(saf, x) for x in nodes]
    normed = torch.split(batched(torch.cat(energies), saf.norm), [len(x) for x in nodes])
    expected = torch.stack([saf_score(saf, x, y) for x, y in zip(nodes, normed, strict=True)])
    if name == "sgraf":
        all_sgr = plain_in_training(head.sgr, images, [y[: len(x)] for x, y in zip(w, words, strict=False)])
        expected = (expected + all_sgr[0].diagonal()) / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_one_image_of_one_patch_with_one_word_trains(name: str) -> None:
    head = build(name, 1).train()
    images = torch.randn(1, 1, CHANNELS, dtype=torch.float64, requires_grad=True)
    words = torch.randn(1, 1, CHANNELS, dtype=torch.float64, requires_grad=True)
    scores = head.training_scores(images, words, torch.tensor([1])).scores
    scores.sum().backward()
    assert scores.isfinite().all()
    for tensor in (images, words, *head.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in head.buffers())


def test_one_node_has_no_variance() -> None:
    norm = laps.heads.sgraf._CaptionNorm().double().train()
    x = torch.full((1, 1, 2), 3.0, dtype=torch.float64, requires_grad=True)
    normed, statistics = norm(x, torch.tensor([[[True, False]]]))
    normed.sum().backward()
    assert normed[0, 0, 0] == 0
    assert [float(value) for value in statistics] == [3.0, 0.0]
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_global_vectors_are_unit_and_dropped_out_in_training_only(name: str) -> None:
    head = build(name, 5)
    images, words, lengths = example(5, 0)
    probabilities = {module.p for module in head.modules() if isinstance(module, nn.Dropout)}
    assert probabilities == {0.4}
    for training in (True, False):
        head.train(training)
        photos, again = head.encode_image(images).embedding, head.encode_image(images).embedding
        texts, text_again = (head.encode_text(words, lengths).embedding for _ in range(2))
        assert torch.equal(photos, again) is torch.equal(texts, text_again) is not training
        for embedding in (photos, texts):
            assert embedding.shape[1] == CHANNELS * (2 if name == "sgraf" else 1)
            torch.testing.assert_close(embedding.norm(dim=1), torch.ones_like(embedding[:, 0]))


def test_heads_trained_apart_are_averaged() -> None:
    saf, sgr, both = (build(name, 5).eval() for name in NAMES)
    both.saf.load_state_dict(saf.state_dict())
    both.sgr.load_state_dict(sgr.state_dict())
    images, words, lengths = example(5, 0)
    encoded = [(h.encode_image(images), h.encode_text(words, lengths)) for h in (saf, sgr, both)]
    one, other, mean = (
        h.similarity(*features) for h, features in zip((saf, sgr, both), encoded, strict=True)
    )
    torch.testing.assert_close(mean, (one + other) / 2, rtol=0, atol=1e-12)
    one, other, mean = (photos.embedding @ texts.embedding.T for photos, texts in encoded)
    torch.testing.assert_close(mean, (one + other) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_linear_maps_start_as_published(name: str) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=16, num_patches=4, sim_dim=64)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.7 * bound < float(module.weight.detach().abs().max()) <= bound
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_with_the_authors_loss(name: str) -> None:
    model = tiny_laps(head=name, sim_dim=6).train()
    assert model.objective.options()["margin"] == 0.2
    batch = make_batch()
    loss, _ = model(batch)
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_a_model_is_loaded_with_its_running_statistics(tmp_path: Any) -> None:
    model = tiny_laps(head="sgraf", sim_dim=6).train()
    model(make_batch())
    model.save_pretrained(tmp_path)
    loaded = laps.LAPS.from_pretrained(tmp_path)
    own, theirs = dict(model.head.named_buffers()), dict(loaded.head.named_buffers())
    assert own["saf.norm.running_mean"] != 0
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_a_block_is_claimed_to_hold_what_it_holds() -> None:
    for name in NAMES:
        head = build_head(name, embed_dim=64, num_patches=49, num_prefix_tokens=0, sim_dim=32)
        assert isinstance(head, PairHead)
        photos = head.encode_image(torch.randn(3, 49, 64, requires_grad=True))
        texts = head.encode_text(torch.randn(3, 12, 64, requires_grad=True), torch.full((3,), 12))
        held: dict[int, int] = {}

        def keep(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = head.similarity(photos, texts)
        assert scores.grad_fn is not None
        assert 0.5 < sum(held.values()) / 9 / head.pair_floats(49, 12) < 1.2, name


@pytest.mark.parametrize("name", NAMES)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    with pytest.raises(LapsValueError, match="sim_dim"):
        build(name, 5, sim_dim=0)
    head = build(name, 5).eval()
    images, words, lengths = example(5, 0)
    with pytest.raises(LapsValueError, match=name):
        head.explain(head.encode_image(images[:1]), head.encode_text(words[:1], lengths[:1]))
