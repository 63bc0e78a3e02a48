"""CPFEAN, our reading, against its equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import laps.heads.cpfean
import pytest
import torch
from _head_equations import CHANNELS, LENGTHS, check_equations, example
from _models import make_batch, tiny_laps
from laps import LapsValueError
from laps.heads import PairHead, build_head
from laps.heads.cpfean import CPFEANHead
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def made(patches: int, prefix: int = 0, **options: Any) -> CPFEANHead:
    """A head whose parameters are none of them where training starts."""
    torch.manual_seed(patches)
    head = build_head("cpfean", embed_dim=CHANNELS, num_patches=patches, num_prefix_tokens=prefix, **options)
    assert isinstance(head, CPFEANHead)
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return head.double().eval()


# ---- the equations, one at a time


def length_one(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def iou(one: list[float], other: list[float]) -> float:
    across = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    down = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return across * down / (sum(areas) - across * down)


def plain_regions(v: Tensor, head: CPFEANHead, boxes: Tensor | None = None) -> list[Tensor]:
    v = layer_norm(v, v.shape[1:], head.norm.weight, head.norm.bias)
    rows, size = list(v), v.shape[1] // head.num_heads
    places = None if boxes is None else boxes.tolist()
    for layer in head.region_layers:
        normed = [layer_norm(x, x.shape, layer.norm1.weight, layer.norm1.bias) for x in rows]
        q, k, u = zip(*[(layer.qkv.weight @ x + layer.qkv.bias).chunk(3) for x in normed], strict=True)
        for i in range(len(rows)):
            seen = [
                n for n in range(len(rows)) if places is None or n == i or iou(places[i], places[n]) > 0.2
            ]
            heads = []
            for h in range(head.num_heads):
                part = slice(h * size, (h + 1) * size)
                weights = torch.stack([q[i][part] @ k[n][part] / size**0.5 for n in seen]).softmax(0)
                heads.append(sum(weight * u[n][part] for weight, n in zip(weights, seen, strict=True)))
            x = rows[i] + layer.proj.weight @ torch.cat(heads) + layer.proj.bias
            first, _, second = layer.mlp
            hidden = gelu(
                first.weight @ layer_norm(x, x.shape, layer.norm2.weight, layer.norm2.bias) + first.bias
            )
            rows[i] = x + second.weight @ hidden + second.bias
    return [length_one(x) for x in rows]


def plain_words(w: Tensor, head: CPFEANHead) -> list[Tensor]:
    words = list(w)
    if head.word_graph is not None:
        graph = head.word_graph
        queries, keys = [graph.query.weight @ t for t in w], [graph.key.weight @ t for t in w]
        words = []
        for t, query in zip(w, queries, strict=True):
            edges = torch.stack([query @ key / w.shape[1] ** 0.5 for key in keys]).softmax(0)
            mixed = sum(edge * other for edge, other in zip(edges, w, strict=True))
            words.append(t + torch.relu(graph.weight.weight @ mixed))
    return [length_one(t) for t in words]


def plain_gates(v: list[Tensor], w: list[Tensor], head: CPFEANHead) -> list[tuple[Tensor, int]]:
    gates = []
    for x in v:
        cosines = torch.stack([x @ t for t in w])
        j = int(cosines.argmax())
        gates.append((torch.sigmoid(head.gate_scale * cosines[j] + head.gate_bias), j))
    return gates


def plain(tokens: Tensor, w: Tensor, head: CPFEANHead) -> Tensor:
    v, words = plain_regions(tokens[head.num_prefix_tokens :], head), plain_words(w, head)
    fused = v
    if head.gated:
        gates = plain_gates(v, words, head)
    if head.fusion:
        fused = [
            length_one(x + head.fuse.weight @ (g * torch.cat([x, words[j]])) + head.fuse.bias)
            for x, (g, j) in zip(v, gates, strict=True)
        ]
    if head.alignment == "region":
        total = sum(g * (x @ words[j]) for x, (g, j) in zip(fused, gates, strict=True))
        return total / (sum(g for g, _ in gates) + 1e-8)
    if head.alignment == "attention":
        agreements = []
        for t in words:
            weights = torch.stack([9 * (x @ t) for x in fused]).softmax(0)
            context = sum(weight * x for weight, x in zip(weights, fused, strict=True))
            agreements.append(torch.cosine_similarity(context, t, dim=0))
        return torch.stack(agreements).mean()
    gamma = head.gamma if head.alignment == "prominent" else 0
    weights = [1 + gamma * sum(g for g, k in gates if k == j) if gamma else 1 for j in range(len(words))]
    best = [torch.stack([x @ t for x in fused]).max() for t in words]
    return sum(weight * each for weight, each in zip(weights, best, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region_layers": 1, "num_heads": 2, "gamma": 0.4},
        {"region_layers": 0, "gamma": 3.0},
        {"word_graph": False, "alignment": "region"},
        {"region_layers": 0, "alignment": "max_mean"},
        {"region_layers": 0, "alignment": "attention"},
        {"region_layers": 0, "fusion": False},
        {"region_layers": 0, "fusion": False, "alignment": "region"},
        {"region_layers": 0, "fusion": False, "alignment": "max_mean", "word_graph": False},
        {"region_layers": 0, "fusion": False, "alignment": "attention"},
    ],
)
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (4, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    head = made(patches, prefix, **options)
    check_equations(head, lambda v, w: plain(v, w, head))


def test_pairs_score_what_all_of_them_do() -> None:
    images, words, lengths = example(5, 0)
    for alignment in ("prominent", "region", "max_mean", "attention"):
        head = made(5, alignment=alignment)
        photos, texts = head.encode_image(images), head.encode_text(words[:3], lengths[:3])
        torch.testing.assert_close(
            head.similarity_pairwise(photos, texts), head.similarity(photos, texts).diagonal()
        )


def test_regions_see_those_that_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 6, 2, 2, dtype=torch.float64, generator=generator).sort(dim=2).values.flatten(2)
    # Nearly the same box twice, one without area, and one that touches another.
    boxes[0, 1] = boxes[0, 0] * 0.99
    boxes[1, :2] = torch.tensor([[0.2, 0.2, 0.2, 0.6], [0.0, 0.0, 0.5, 0.5]])
    boxes[2, :2] = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    images = example(6, 1)[0]
    head, open_head = made(6, 1), made(6, 1, iou_mask=False)
    open_head.load_state_dict(head.state_dict())

    patches = head.encode_image(images, boxes.float()).patches
    assert patches is not None
    for found, tokens, places in zip(patches, images, boxes, strict=True):
        expected = torch.stack(plain_regions(tokens[1:], head, places))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    unmasked = head.encode_image(images).patches
    assert unmasked is not None
    assert not torch.allclose(patches, unmasked, atol=1e-3)
    assert torch.equal(unmasked, open_head.encode_image(images, boxes).patches)


def test_boxes_reach_the_training_scores() -> None:
    images, words, lengths = example(5, 0)
    apart = torch.tensor([[i / 5, 0.0, (i + 1) / 5, 1.0] for i in range(5)]).expand(3, 5, 4)
    head = made(5)
    texts = head.encode_text(words, lengths)
    found = head.training_scores(images, words, lengths, apart).scores
    torch.testing.assert_close(found, head.similarity(head.encode_image(images, apart), texts))
    assert not torch.allclose(found, head.training_scores(images, words, lengths).scores, atol=1e-6)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.rand(3, 4, 4), r"boxes does not fit.*\(3, 5, 4\), got \(3, 4, 4\)"),
        (torch.rand(3, 6, 4), r"boxes does not fit"),
        (torch.full((3, 5, 4), 224.0), r"boxes has a value out of range.*\[0, 1\], got 224"),
        (torch.full((3, 5, 4), torch.nan), r"boxes has a value out of range.*got nan"),
    ],
)
def test_boxes_of_another_kind_are_refused(boxes: Tensor, message: str) -> None:
    with pytest.raises(LapsValueError, match=message):
        made(5, 1).encode_image(torch.zeros(3, 6, CHANNELS), boxes)


# ---- special cases


def test_either_side_as_one_vector_has_length_one() -> None:
    images, words, lengths = example(6, 1)
    head = made(6, 1)
    photos, texts = head.encode_image(images), head.encode_text(words, lengths)
    for embedding in (photos.embedding, texts.embedding):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(embedding)).double())
    alone = torch.stack(plain_words(words[0, : LENGTHS[0]], head)).mean(0)
    torch.testing.assert_close(texts.embedding[0], length_one(alone))


def test_with_nothing_left_it_is_chan() -> None:
    images, words, lengths = example(6, 1)
    bare = made(6, 1, region_layers=0, word_graph=False, fusion=False, alignment="max_mean")
    chan = build_head("chan", embed_dim=CHANNELS, num_patches=6)
    bare.norm = torch.nn.Identity()
    assert not list(bare.parameters())
    torch.testing.assert_close(
        bare.training_scores(images, words, lengths).scores,
        chan.training_scores(images, words, lengths).scores,
    )


def test_without_gamma_no_word_is_prominent() -> None:
    images, words, lengths = example(6, 0)
    even, max_mean, prominent = made(6, gamma=0.0), made(6, alignment="max_mean"), made(6)
    scores = even.training_scores(images, words, lengths).scores
    torch.testing.assert_close(scores, max_mean.training_scores(images, words, lengths).scores)
    assert not torch.allclose(scores, prominent.training_scores(images, words, lengths).scores, atol=1e-3)


def test_the_word_that_regions_choose_weighs_more() -> None:
    # Three regions, all like word 0, one also a little like word 1; gates of one half.
    head = build_head(
        "cpfean",
        embed_dim=8,
        num_patches=3,
        num_prefix_tokens=0,
        region_layers=0,
        word_graph=False,
        fusion=False,
    )
    assert isinstance(head, CPFEANHead)
    head.norm = torch.nn.Identity()
    head.gate_scale.data.zero_()
    head.gate_bias.data.zero_()
    words = torch.eye(8)[None, :2]
    images = torch.eye(8)[[0, 0, 0]][None].clone()
    images[0, 2, 1] = 0.75
    scores = head.training_scores(images, words, torch.tensor([2])).scores.detach()
    # n = (1.5, 0), alpha = (2.5, 1) / 3.5, best cosines 1 and 0.6.
    assert float(scores) == pytest.approx((2.5 * 1 + 1 * 0.6) / 3.5)


def test_of_equal_words_the_first_is_chosen() -> None:
    head = made(2)
    cosines = torch.tensor([[0.1, 0.7, 0.7, 0.9], [0.5, 0.5, 0.5, 0.9]], dtype=torch.float64)
    _, chosen = head._gate(cosines, torch.tensor([True, True, True, False]))
    assert chosen.argmax(-1).tolist() == [1, 0]
    assert chosen.sum() == 2


@pytest.mark.parametrize("alignment", ["prominent", "region", "attention"])
def test_float32_has_the_scores_of_float64(alignment: str) -> None:
    torch.manual_seed(0)
    head = build_head("cpfean", embed_dim=256, num_patches=49, num_prefix_tokens=0, alignment=alignment)
    assert isinstance(head, CPFEANHead)
    # Half of a region taken away again by its own gate, and as much of the word put in.
    head.fuse.weight.data += 0.5 * torch.cat([-torch.eye(256), torch.eye(256)], 1)
    head.gate_bias.data.zero_()
    images = torch.randn(4, 49, 256)
    words, lengths = images[:, :12] + torch.randn(4, 12, 256), torch.tensor([12, 9, 5, 1])
    short = head.training_scores(images, words, lengths).scores
    long = head.double().training_scores(images.double(), words.double(), lengths).scores
    assert (short.dtype, long.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(short.double(), long, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate_bias", [5.0, 8.0, 12.0, 100.0])
@pytest.mark.parametrize("alignment", ["prominent", "region", "attention"])
def test_regions_that_fusion_cancels_keep_cosines_and_gradients_in_bounds(
    alignment: str, gate_bias: float
) -> None:
    torch.manual_seed(0)
    head = build_head(
        "cpfean", embed_dim=64, num_patches=9, num_prefix_tokens=0, alignment=alignment, region_layers=0
    )
    assert isinstance(head, CPFEANHead)
    head.fuse.weight.data = torch.cat([-torch.eye(64), torch.zeros(64, 64)], 1)
    head.gate_scale.data.zero_()
    head.gate_bias.data.fill_(gate_bias)
    images, words = torch.randn(3, 9, 64), torch.randn(3, 5, 64)
    images[0], words[1] = 0, 0
    images.requires_grad_()
    words.requires_grad_()
    scores = head.training_scores(images, words, torch.tensor([5, 2, 1])).scores
    scores.sum().backward()
    assert scores.detach().abs().max() <= 1.001
    for tensor in (images, words, *head.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_autocast_leaves_pairs_in_float32() -> None:
    torch.manual_seed(0)
    head = build_head("cpfean", embed_dim=64, num_patches=9, num_prefix_tokens=0)
    images, words, lengths = torch.randn(3, 9, 64), torch.randn(3, 5, 64), torch.tensor([5, 2, 1])
    exact = head.training_scores(images, words, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        result = head.training_scores(images.bfloat16(), words.bfloat16(), lengths)
    assert result.scores.dtype == torch.float32
    torch.testing.assert_close(result.scores, exact.scores, rtol=0, atol=0.02)
    assert {value.dtype for value in result.log.values()} == {torch.float32}


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("alignment", ["prominent", "region", "attention"])
def test_a_block_holds_no_more_than_it_says(fusion: bool, alignment: str) -> None:
    head = build_head(
        "cpfean", embed_dim=32, num_patches=40, num_prefix_tokens=0, fusion=fusion, alignment=alignment
    )
    assert isinstance(head, PairHead)
    images = head.encode_image(torch.randn(12, 40, 32)).detach()
    texts = head.encode_text(torch.randn(12, 10, 32), torch.full((12,), 10)).detach()
    for tensor in (images.patches, texts.words):
        assert tensor is not None
        tensor.requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = head.similarity(images, texts)
    assert scores.requires_grad
    assert 0.2 < sum(saved.values()) / (144 * 4 * head.pair_floats(40, 10)) < 1


# ---- what training logs


def test_the_log_has_the_gates_of_matching_pairs_and_of_the_hardest_others() -> None:
    head = made(5, 1)
    images, words, lengths = example(5, 1)
    result = head.training_scores(images.requires_grad_(), words, lengths)
    regions = [plain_regions(v[1:], head) for v in images]
    texts = [plain_words(w[:length], head) for w, length in zip(words, LENGTHS, strict=True)]

    def mean(i: int, t: int) -> Tensor:
        return torch.stack([g for g, _ in plain_gates(regions[i], texts[t], head)]).mean()

    scores = result.scores.detach()
    hardest = [max((t for t in range(4) if t != i), key=lambda t: float(scores[i, t])) for i in range(3)]
    expected = {
        "gate_positive": torch.stack([mean(i, i) for i in range(3)]).mean(),
        "gate_negative": torch.stack([mean(i, t) for i, t in enumerate(hardest)]).mean(),
    }
    assert result.log.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result.log[name], value.detach())
        assert result.log[name].dim() == 0
        assert not result.log[name].requires_grad


def mean_gate(head: CPFEANHead, image: Tensor, caption: Tensor) -> Tensor:
    regions = plain_regions(image[head.num_prefix_tokens :], head)
    return torch.stack([g for g, _ in plain_gates(regions, plain_words(caption, head), head)]).mean().detach()


def test_no_caption_of_the_same_image_is_a_negative() -> None:
    head = made(5)
    images, words, lengths = (x[:3] for x in example(5, 0))
    blind = head.training_scores(images, words, lengths)
    scores = blind.scores.detach()
    # The caption that image 0 likes best beside its own shows image 0 as well.
    sibling = 1 + int(scores[0, 1:].argmax())
    other = 3 - sibling
    ids = torch.full((3,), 7)
    ids[other] = 4
    result = head.training_scores(images, words, lengths, image_ids=ids)

    hardest = [other, other, other]
    hardest[other] = 0 if scores[other, 0] > scores[other, sibling] else sibling
    expected = [mean_gate(head, images[i], words[t, : LENGTHS[t]]) for i, t in enumerate(hardest)]
    torch.testing.assert_close(result.log["gate_negative"], torch.stack(expected).mean())
    assert not torch.allclose(blind.log["gate_negative"], result.log["gate_negative"], atol=1e-4)
    assert torch.equal(blind.log["gate_positive"], result.log["gate_positive"])
    assert torch.equal(blind.scores, result.scores)


def test_a_model_tells_the_head_which_images_its_rows_show() -> None:
    model, batch = tiny_laps(head="cpfean"), make_batch()
    values = model(replace(batch, image_ids=torch.full((4,), 3)))[1]
    assert values["gate_negative"] == 0
    assert model(batch)[1]["gate_negative"] > 0


def test_an_image_without_negatives_is_left_out_of_the_mean_gate() -> None:
    head = made(5)
    images, words, lengths = example(5, 0)

    def log(captions: int, **ids: Any) -> Any:
        return head.training_scores(images, words[:captions], lengths[:captions], **ids).log

    alone = log(3, image_ids=torch.tensor([4, 4, 4]))
    assert alone["gate_negative"] == 0
    torch.testing.assert_close(alone["gate_positive"], log(3)["gate_positive"])
    # Of one caption image 0 has no other.
    expected = torch.stack([mean_gate(head, images[i], words[0, : LENGTHS[0]]) for i in (1, 2)]).mean()
    torch.testing.assert_close(log(1)["gate_negative"], expected)


@pytest.mark.parametrize(("captions", "ids"), [(3, [1, 2]), (4, [1, 2, 3]), (4, [1, 2, 3, 4])])
def test_ids_of_other_numbers_of_images_or_captions_are_refused(captions: int, ids: list[int]) -> None:
    images, words, lengths = example(5, 0)
    with pytest.raises(LapsValueError, match=r"image_ids does not fit .expected shape .[34],"):
        made(5).training_scores(images, words[:captions], lengths[:captions], image_ids=torch.tensor(ids))


def test_without_fusion_no_gates_are_logged() -> None:
    images, words, lengths = example(5, 0)
    assert not made(5, fusion=False).training_scores(images, words, lengths).log


def test_the_loss_is_the_hinge_with_a_margin_of_a_fifth() -> None:
    assert CPFEANHead.default_loss == {"name": "hinge", "margin": 0.2}


# ---- explanation


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("alignment", ["prominent", "max_mean", "region"])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_are_those_of_the_patches_that_count(fusion: bool, alignment: str, masked: bool) -> None:
    head = made(6, fusion=fusion, alignment=alignment, region_layers=0)
    images, words, lengths = example(6, 0)
    mask = torch.arange(6) % 2 == 0 if masked else None
    photo, text = head.encode_image(images[:1]), head.encode_text(words[:1], lengths[:1])
    at = head.explain(photo, text, mask=mask)
    # Without layers over the regions, the patches that are left score as if there were no others.
    left = images[:1, ::2] if masked else images[:1]
    expected = float(head.similarity(head.encode_image(left), text).detach())
    assert at.score == pytest.approx(expected, abs=1e-9)
    assert at.patch_shares.sum() == pytest.approx(expected, abs=1e-9)
    counted = at.shares != 0
    assert (counted.sum(1 if alignment == "region" else 0) == 1).all()


def test_attention_is_not_explained() -> None:
    head = made(6, alignment="attention")
    images, words, lengths = example(6, 0)
    with pytest.raises(LapsValueError, match='"attention" is no sum over patches'):
        head.explain(head.encode_image(images[:1]), head.encode_text(words[:1], lengths[:1]))


# ---- options


def test_gates_start_half_open_at_a_cosine_of_0_3_and_fusion_without_bias() -> None:
    head = build_head("cpfean", embed_dim=CHANNELS, num_patches=4)
    assert isinstance(head, CPFEANHead)
    gate, _ = head._gate(torch.tensor([[0.3], [0.0]]), torch.tensor([True]))
    torch.testing.assert_close(gate.detach(), torch.tensor([0.5, 0.0474]), rtol=0, atol=1e-4)
    assert not head.fuse.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads does not fit \(expected a divisor of embed_dim=8, got 3\)"),
        ({"num_heads": 0}, "num_heads"),
        ({"region_layers": -1}, "region_layers"),
        ({"alignment": "best"}, "alignment"),
        ({"gamma": -0.1}, "gamma"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LapsValueError, match=message):
        build_head("cpfean", embed_dim=CHANNELS, num_patches=4, **options)


def test_without_layers_the_number_of_heads_is_free() -> None:
    head = laps.heads.cpfean.CPFEANHead(10, 4, region_layers=0)
    assert head.options()["num_heads"] == 8
