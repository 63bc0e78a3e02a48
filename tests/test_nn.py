"""The head: its parameters, its switches, its training, and the company it keeps with the rest of PyTorch."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import laps
import pytest
import torch
from laps import functional as F
from laps.nn import LAPSHead, PatchCalibration, PatchScore, PatchSelection, PatchWordAlignment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

C, N, P, L = 20, 16, 1, 6
LENGTHS = torch.tensor([6, 2, 4, 1])


def batch(*, images: int = 3, captions: int = 4, prefix: int = P, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(images, prefix + N, C, generator=generator).to(dtype)
    words = torch.randn(captions, L, C, generator=generator).to(dtype)
    return tokens, words, LENGTHS[:captions]


def make(**options: Any) -> LAPSHead:
    torch.manual_seed(0)
    return LAPSHead(C, N, **options)


variants = pytest.mark.parametrize("variant", ["released", "paper"])

# ---- parameters


def test_released_state_has_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    assert shapes == {
        "aggregation.scale": (1, 1, 1),
        "aggregation.norm.weight": (C,),
        "aggregation.norm.bias": (C,),
        "aggregation.fc1.weight": (4, C),
        "aggregation.fc1.bias": (4,),
        "aggregation.fc2.weight": (3, 4),
        "aggregation.fc2.bias": (3,),
    }


def test_paper_state_adds_the_score_net() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make(variant="paper").state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name not in make().state_dict()} == {
        "score.norm.weight": (C,),
        "score.norm.bias": (C,),
        "score.fc1.weight": (5, C),
        "score.fc1.bias": (5,),
        "score.fc2.weight": (2, 5),
        "score.fc2.bias": (2,),
    }


@pytest.mark.parametrize(
    ("num_patches", "selection_ratio", "aggregation_ratio", "num_tokens"),
    [(196, 0.5, 0.4, 39), (576, 0.5, 0.4, 115), (49, 0.8, 0.6, 23), (144, 0.8, 0.6, 69), (256, 0.5, 0.4, 51)],
    ids=["vit_224", "vit_384", "swin_224", "swin_384", "clip_l"],
)
def test_number_of_tokens_is_the_published_one(
    num_patches: int, selection_ratio: float, aggregation_ratio: float, num_tokens: int
) -> None:
    head = LAPSHead(32, num_patches, selection_ratio, aggregation_ratio)
    assert head.num_tokens == head.aggregation.fc2.out_features == num_tokens


def test_hidden_sizes_are_a_fifth_and_a_quarter() -> None:
    head = LAPSHead(512, 196, variant="paper")
    assert head.score is not None
    assert (head.aggregation.fc1.out_features, head.score.fc1.out_features) == (102, 128)


# ---- scores


@variants
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_scores_are_those_of_the_function(variant: str, prefix: int) -> None:
    head = make(variant=variant, num_prefix_tokens=prefix).eval()
    tokens, words, lengths = batch(prefix=prefix)
    patches = tokens[:, prefix:]
    options: dict[str, Any] = {"negative_slope": 0.1}
    if variant == "paper":
        options = {"negative_slope": 1.0, "keep_prob": head.keep_probability(tokens)}
    expected = F.similarity(
        patches,
        words,
        lengths,
        head.aggregation.logits(patches),
        selection_ratio=0.5,
        prefix=tokens[:, :prefix],
        **options,
    )
    scores, kept_fraction = head(tokens, words, lengths, return_kept_fraction=True)
    assert torch.equal(scores, expected)
    torch.testing.assert_close(kept_fraction, torch.full((3, 4), 0.5))
    assert torch.equal(head(tokens, words, lengths), scores)
    torch.testing.assert_close(head.pairwise(tokens, words[:3], lengths[:3]), scores.diagonal())
    assert [x.shape for x in head.pairwise(tokens, words[:3], lengths[:3], return_kept_fraction=True)] == [
        (3,),
        (3,),
    ]


@variants
def test_one_image_and_one_caption(variant: str) -> None:
    tokens, words, lengths = batch(images=1, captions=1)
    assert make(variant=variant)(tokens, words, lengths).shape == (1, 1)


@variants
def test_backends_agree_in_training(variant: str) -> None:
    scores = []
    for backend in ("native", "torch"):
        head = make(variant=variant, backend=backend)
        torch.manual_seed(1)
        scores.append(head(*batch()))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_the_written_formula() -> None:
    module = PatchCalibration(C, 3)
    with torch.no_grad():
        module.scale.fill_(1.7)
    v = torch.randn(2, N, C)
    centred = v - v.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = normal @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = 1.7 * (hidden @ module.fc2.weight.T + module.fc2.bias)
    torch.testing.assert_close(module.logits(v), expected)


def test_keep_probability_is_the_first_of_two() -> None:
    net = PatchScore(C)
    with torch.no_grad():
        net.fc2.weight.zero_()
        net.fc2.bias.copy_(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(
        net(torch.randn(2, N, C)), torch.full((2, N), torch.tensor(2.0).sigmoid().item())
    )


# ---- switches (Table 4)

SWITCHES: list[dict[str, Any]] = [
    {},
    {"selection": "none"},
    {"selection": "image"},
    {"fusion": False},
    {"directions": "patch_to_word"},
    {"directions": "word_to_patch"},
    {"direction_reduction": "mean"},
    {"negative_slope": 0.5},
    {"score": "dot"},
    {"variant": "paper"},
    {"variant": "paper", "selection": "none"},
    {"variant": "paper", "selection": "image"},
    {"variant": "paper", "selection": "image", "attention_weight": 0.0},
    {"variant": "paper", "attention_weight": 0.0},
    {"variant": "paper", "attention_weight": 1.0},
    {"variant": "paper", "attention_weight": 1.0, "selection": "image"},
    {"variant": "paper", "sampling": "topk"},
    {"variant": "paper", "temperature": 0.5},
    {"variant": "paper", "fusion": False},
]


@pytest.mark.parametrize("options", SWITCHES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_switch_runs_and_trains_all_its_parameters(options: dict[str, Any], training: bool) -> None:
    head = make(**options).train(training)
    scores, kept_fraction = head(*batch(), return_kept_fraction=True)
    assert scores.shape == kept_fraction.shape == (3, 4)
    assert bool(scores.isfinite().all())
    (scores.square().sum() + (kept_fraction.sum() if kept_fraction.requires_grad else 0)).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


# What the two heads differ in beside the scores: (a, b, whether the scores differ).
@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({}, {"selection": "none"}, True),
        ({}, {"selection": "image"}, True),
        ({}, {"fusion": False}, True),
        ({}, {"direction_reduction": "mean"}, True),
        ({}, {"negative_slope": 0.5}, True),
        ({}, {"score": "dot"}, True),
        ({}, {"negative_slope": 0.1}, False),
        ({"selection": "none"}, {"selection": "none", "fusion": False}, False),  # nothing is dropped
        ({"directions": "word_to_patch"}, {"directions": "patch_to_word"}, True),
        (
            {"directions": "word_to_patch"},
            {"directions": "word_to_patch", "direction_reduction": "mean"},
            False,
        ),
        ({"variant": "paper"}, {"variant": "paper", "attention_weight": 0.0}, True),
        ({"variant": "paper"}, {"variant": "paper", "attention_weight": 1.0}, True),
        ({"variant": "paper"}, {"variant": "paper", "selection": "image"}, True),
        ({"variant": "paper"}, {"variant": "paper", "negative_slope": 1.0}, False),
        # With beta = 0 no context is left to take away.
        (
            {"variant": "paper", "attention_weight": 0.0},
            {"variant": "paper", "attention_weight": 0.0, "selection": "image"},
            False,
        ),
        # Sampling is for training.
        ({"variant": "paper"}, {"variant": "paper", "sampling": "topk"}, False),
    ],
    ids=str,
)
def test_switches_change_what_they_should(one: dict[str, Any], other: dict[str, Any], differ: bool) -> None:
    a, b = (make(**options).eval()(*batch()) for options in (one, other))
    assert torch.allclose(a, b) != differ


def test_the_two_directions_add_up() -> None:
    one, other, both, mean = (
        make(**options)(*batch())
        for options in (
            {"directions": "word_to_patch"},
            {"directions": "patch_to_word"},
            {},
            {"direction_reduction": "mean"},
        )
    )
    torch.testing.assert_close(one + other, both)
    torch.testing.assert_close(both / 2, mean)


def test_without_language_context_all_captions_keep_the_same_patches() -> None:
    tokens, words, lengths = batch()
    indices = PatchSelection(0.5, language_context=False)(tokens[:, P:], words, lengths)
    assert torch.equal(indices, indices[:, :1].expand_as(indices))
    assert not torch.equal(*PatchSelection(0.5)(tokens[:, P:], words, lengths)[:, :2].unbind(1))


def test_without_selection_everything_is_kept() -> None:
    head = make(selection="none")
    assert head.num_kept == N
    assert head.num_tokens == make().num_tokens
    assert torch.equal(head(*batch(), return_kept_fraction=True)[1], torch.ones(3, 4))
    assert make(variant="paper", selection="none").score is None


# ---- the paper variant's noise


def test_paper_scores_repeat_with_the_seed() -> None:
    head, inputs = make(variant="paper"), batch()
    torch.manual_seed(5)
    first, second = head(*inputs), head(*inputs)
    torch.manual_seed(5)
    assert torch.equal(head(*inputs), first)
    assert not torch.equal(first, second)


def test_paper_scores_without_training_have_no_noise() -> None:
    head, inputs = make(variant="paper").eval(), batch()
    state = torch.get_rng_state()
    assert torch.equal(head(*inputs), head(*inputs))
    assert torch.equal(torch.get_rng_state(), state)


def test_released_scores_are_the_same_in_training() -> None:
    head, inputs = make(), batch()
    state = torch.get_rng_state()
    assert torch.equal(head(*inputs), head.eval()(*inputs))
    assert torch.equal(torch.get_rng_state(), state)


def test_topk_sampling_keeps_the_budget_and_gumbel_does_not() -> None:
    tokens, words, lengths = batch()
    options = {"variant": "paper", "attention_weight": 0.0}
    exact = make(**options, sampling="topk")(tokens, words, lengths, return_kept_fraction=True)[1]
    torch.testing.assert_close(exact, torch.full((3, 4), 0.5))
    loose = make(**options)(tokens, words, lengths, return_kept_fraction=True)[1]
    assert loose.unique().numel() > 1


def test_the_ratio_loss_moves_the_score_net() -> None:
    head = make(variant="paper")
    kept_fraction = head(*batch(), return_kept_fraction=True)[1]
    laps.losses.ratio_loss(kept_fraction, 0.9).backward()
    assert head.score is not None
    assert head.score.fc2.weight.grad is not None
    assert head.score.fc2.weight.grad.abs().sum() > 0


# ---- errors

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"selection_ratio": 0.0}, "selection_ratio is out of range"),
    ({"selection_ratio": 1.1}, "selection_ratio is out of range"),
    ({"aggregation_ratio": -1}, "aggregation_ratio is out of range"),
    (
        {"aggregation_ratio": 0.1},
        "leaves no aggregated token (expected N_c >= 1, got int(16 * 0.1 * 0.5) = 0)",
    ),
    ({"variant": "published"}, 'variant is unknown (expected one of "released", "paper", got \'published\')'),
    ({"num_prefix_tokens": -1}, "num_prefix_tokens is out of range"),
    ({"num_prefix_tokens": 1.0}, "num_prefix_tokens is no integer"),
    ({"directions": "up"}, "directions is unknown"),
    ({"direction_reduction": "up"}, "direction_reduction is unknown"),
    ({"negative_slope": -1.0}, "negative_slope is out of range"),
    ({"selection": "words"}, "selection is unknown"),
    ({"attention_weight": 2.0}, "attention_weight is out of range"),
    ({"score": "cos"}, "score is unknown"),
    ({"sampling": "sometimes"}, "sampling is unknown"),
    ({"temperature": 0}, "temperature is out of range"),
    ({"chunk": -1}, "chunk is out of range"),
    ({"backend": "cuda"}, "backend is unknown"),
    ({"fusion": 1}, "fusion is no flag"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_options_are_refused_when_the_head_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(laps.LapsError) as caught:
        make(**options)
    assert message in str(caught.value)


def test_a_head_without_channels_or_patches_is_refused() -> None:
    with pytest.raises(laps.LapsValueError, match="LAPSHead: embed_dim is out of range"):
        LAPSHead(0, N)
    with pytest.raises(laps.LapsTypeError, match="LAPSHead: num_patches is no integer"):
        LAPSHead(C, 16.0)


@variants
def test_wrong_tokens_are_refused(variant: str) -> None:
    head = make(variant=variant)
    tokens, words, lengths = batch()
    for wrong, message in (
        (tokens[:, 1:], r"16 tokens per image \(expected 1 prefix tokens \+ 16 patches = 17\)"),
        (tokens[..., 1:], r"image_tokens has C=19 \(expected embed_dim=20\)"),
        (tokens[0], r"image_tokens has the wrong rank \(expected 3: \(B_v, P\+N, C\), got 2"),
        (tokens.double(), "image_tokens has dtype float64, but the head has dtype float32"),
        (tokens.bfloat16(), "image_tokens has dtype bfloat16, but the head has dtype float32"),
        (tokens.to("meta"), "image_tokens is on meta, but the head is on cpu"),
        (tokens.numpy(), "image_tokens is no tensor"),
    ):
        for call in (head, head.pairwise):
            with pytest.raises(laps.LapsError, match=f"LAPSHead: .*{message}"):
                call(wrong, words, lengths)
    for wrong, message in (
        (words[..., 1:], r"word_tokens has C=19 \(expected embed_dim=20\)"),
        (words[0], r"word_tokens has the wrong rank \(expected 3: \(B_t, L, C\), got 2"),
        (words[:0], r"word_tokens has B_t=0 \(expected B_t >= 1, got \(0, "),
        (words.double(), "word_tokens has dtype float64, but the head has dtype float32"),
        (words.long(), "word_tokens has the wrong dtype"),
        (words.to_sparse(), "word_tokens is not dense"),
        (words.to("meta"), "word_tokens is on meta, but the head is on cpu"),
        (words.numpy(), "word_tokens is no tensor"),
        (words[1:], "word_lengths has B_t=4, but word_tokens has B_t=3"),
    ):
        with pytest.raises(laps.LapsError, match=f"LAPSHead: .*{message}"):
            head(tokens, wrong, lengths)


def test_keep_probability_needs_a_score_net() -> None:
    with pytest.raises(laps.LapsValueError, match=r"LAPSHead\.keep_probability: variant has no score net"):
        make().keep_probability(batch()[0])


# ---- in company


@variants
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiles_to_one_graph(variant: str, training: bool, backend: str) -> None:
    torch.compiler.reset()
    head = make(variant=variant, backend=backend).train(training)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (head, compiled):
        torch.manual_seed(2)
        scores, kept_fraction = call(*batch(), return_kept_fraction=True)
        total = scores.square().sum()
        if kept_fraction.requires_grad:
            total = total + kept_fraction.square().sum()
        gradients.append((scores, *torch.autograd.grad(total, list(head.parameters()))))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@variants
def test_autocast_runs_the_networks_in_bfloat16_and_scores_in_float32(variant: str) -> None:
    head = make(variant=variant).eval()
    seen = []
    head.aggregation.fc2.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    tokens, words, lengths = batch()
    expected = head(tokens, words, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(tokens, words, lengths)
        half = head(tokens.bfloat16(), words.bfloat16(), lengths)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert scores.dtype == half.dtype == torch.float32
    # The networks' rounding may change which patches of the paper variant are kept.
    tolerance = 0.02 if variant == "released" else 0.5
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_the_dtype_of_its_parameters(variant: str, dtype: torch.dtype) -> None:
    scores = make(variant=variant).to(dtype)(*batch(dtype=dtype))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@variants
def test_copies_and_pickles_compute_the_same(variant: str) -> None:
    head = make(variant=variant, selection="image", directions="word_to_patch").eval()
    expected = head(*batch())
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    loaded = LAPSHead(C, N, variant=variant, selection="image", directions="word_to_patch").eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        assert torch.equal(other(*batch()), expected)
        assert repr(other) == repr(head)


def test_the_representation_names_the_options() -> None:
    text = repr(make(variant="paper", selection="image", num_prefix_tokens=5))
    for part in (
        "embed_dim=20",
        "variant='paper'",
        "num_prefix_tokens=5",
        "selection='image'",
        "attention_weight=0.8",
    ):
        assert part in text
    assert "attention_weight" not in repr(make())
    assert "negative_slope=0.1" in repr(PatchWordAlignment())
    assert "language_context=True" in repr(PatchSelection())
    assert "num_tokens=3" in repr(PatchCalibration(C, 3))


@pytest.fixture
def one_process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@variants
@pytest.mark.usefixtures("one_process_group")
def test_distributed_training_finds_a_gradient_for_every_parameter(variant: str) -> None:
    head = DistributedDataParallel(make(variant=variant))
    for _ in range(2):  # the second step is where DDP complains about unused parameters
        head(*batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@variants
def test_training_lowers_the_loss(variant: str) -> None:
    # Patches of image i contain the words of caption i among noise; the encoders are one linear layer each.
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(6, L, C, generator=generator)
    noise = torch.randn(6, P + N - L, C, generator=generator)
    mixing = torch.randn(C, C, generator=generator) / C**0.5
    images = torch.cat([noise, words @ mixing], dim=1)
    lengths, ids = torch.full((6,), L), torch.arange(6)
    torch.manual_seed(0)
    head, image_encoder, text_encoder = LAPSHead(C, N, variant=variant), nn.Linear(C, C), nn.Linear(C, C)
    parameters = [*head.parameters(), *image_encoder.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def step() -> Tensor:
        scores, kept_fraction = head(
            image_encoder(images), text_encoder(words), lengths, return_kept_fraction=True
        )
        ratio = laps.losses.ratio_loss(kept_fraction, 0.5)
        return laps.losses.hinge_loss(scores, ids, ids) + ratio

    losses = []
    for _ in range(60):
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


# ---- the stages


def test_stages_in_a_row_are_the_head() -> None:
    head = make(fusion=True)
    tokens, words, lengths = batch()
    prefix, patches = tokens[:, :P], tokens[:, P:]
    selection = PatchSelection(head.selection_ratio)
    significance = selection.scores(patches, words, lengths)
    kept = torch.zeros_like(significance, dtype=torch.bool)
    kept.scatter_(2, selection(patches, words, lengths), True)
    u, counts = head.aggregation(patches, kept, significance, prefix=prefix)
    scores, alignment = PatchWordAlignment()(u, words, lengths, token_counts=counts)
    assert u.shape == (3, 4, P + 3 + 1, C)
    assert alignment.shape == (3, 4, P + 3 + 1, L)
    torch.testing.assert_close(scores, head(tokens, words, lengths), rtol=1e-5, atol=1e-5)
