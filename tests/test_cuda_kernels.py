"""The CUDA kernels, run on the CPU by tests/cuda; the launches, tables and products around them are real.

Scores and gradients are compared with the CPU's in float64, which the CPU's tests compare with the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import _cuda_cases
import pytest
import torch
from _cuda_cases import GRADIENTS, KINDS, TOLERANCE, Case, arguments, make, selected
from _cuda_emulator import build
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from laps import _laps, cuda_backend
from torch import Tensor


@pytest.fixture(scope="session", autouse=True)
def _emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in build(tmp_path_factory.mktemp("cuda")).items():
            patch.setenv(name, value)
        if not _laps.cuda_info()["emulated"]:
            pytest.skip("this process has already loaded the driver of a GPU")
        yield


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Matrices this small gain nothing from more."""


def forward(case: Case) -> tuple[Tensor, ...]:
    """The operator's five outputs, poisoned before."""
    inputs, options = case.inputs, case.options
    n = inputs.patches.shape[1] - options.num_prefix_tokens
    p = options.num_prefix_tokens or (0 if inputs.prefix is None else inputs.prefix.shape[1])
    pairs: tuple[int, ...] = (len(inputs.patches),)
    if not options.pairwise:
        pairs = (len(inputs.patches), len(inputs.words))
    outputs = (
        torch.full(pairs, 77.0),
        torch.full(pairs, 77.0),
        torch.full((*pairs, (n + 7) // 8), 77, dtype=torch.uint8),
        torch.full((*pairs, inputs.words.shape[1]), 77, dtype=torch.int16),
        torch.full((*pairs, p + inputs.logits.shape[2] + 1), 77, dtype=torch.int16),
    )
    cuda_backend.forward(inputs, options, outputs)
    return outputs


def backward(case: Case, saved: list[Tensor], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return cuda_backend.backward(case.inputs, case.options, tuple(saved), *grads)


def check(case: Case, *, degenerate: bool = False) -> None:
    _cuda_cases.check(case, forward, backward, degenerate=degenerate)


@pytest.mark.parametrize("pairwise", [False, True], ids=["all pairs", "pairwise"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("element", TOLERANCE, ids=str)
def test_scores_and_gradients(element: torch.dtype, kind: str, pairwise: bool) -> None:
    check(make(kind, element, pairwise=pairwise, channels=64))


@pytest.mark.parametrize(
    "options",
    [
        {"directions": "word_to_patch"},
        {"directions": "patch_to_word"},
        {"direction_reduction": "mean"},
        {"negative_slope": 0.0},
        {"negative_slope": 1.0},
        {"fusion": False},
        {"language_context": False},
        {"score": "dot"},
        {"selection_ratio": 1.0},
        {"selection_ratio": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["scores", "gumbel"])
def test_options(kind: str, options: dict[str, Any]) -> None:
    check(make(kind, **options))


@pytest.mark.parametrize(("attention_weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 0.5)])
def test_options_of_the_paper_variant(attention_weight: float, temperature: float) -> None:
    check(make("gumbel", attention_weight=attention_weight, temperature=temperature))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    images=st.integers(1, 4),
    patches=st.integers(1, 70),
    channels=st.integers(1, 40),
    texts=st.integers(1, 5),
    length=st.integers(1, 40),
    aggregated=st.integers(1, 60),
    prefix=st.integers(0, 3),
    pairwise=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shapes(kind: str, channels: int, **sizes: Any) -> None:
    # A lone patch that is not kept leaves eps times itself, whose direction no mask changes: its gradient is
    # noise / eps.
    assume(kind != "gumbel" or sizes["patches"] > 1)
    # Of two channels and less, cosines are 1 or -1 and ties abound.
    check(make(kind, channels=channels + 3, **sizes), degenerate=True)


@pytest.mark.parametrize("kind", ["scores", "gumbel", "soft_mask"])
def test_more_tokens_and_words_than_one_block_holds(kind: str) -> None:
    check(make(kind, patches=70, aggregated=55, prefix=4, length=40, texts=2, images=2))


@pytest.mark.parametrize("kind", KINDS)
def test_small_budgets_cut_the_work_into_chunks(kind: str) -> None:
    sizes = {"images": 5, "texts": 9, "patches": 33, "aggregated": 9}
    whole, cut = make(kind, **sizes), make(kind, chunk=30_000, **sizes)
    check(cut)
    for ours, theirs in zip(forward(cut), forward(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_prefix_tokens_may_lead_the_patches() -> None:
    check(make(prefix=3, joined=True))


def test_padded_words_give_what_packed_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("gumbel", texts=6)
    packed = forward(case)
    monkeypatch.setattr(cuda_backend, "_known", lambda lengths: False)
    for ours, theirs in zip(forward(case), packed, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    check(case)


def test_impossible_lengths_on_the_device_give_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_known", lambda lengths: False)
    case = make()
    sound = forward(case)[0]
    case.inputs.word_lengths[1], case.inputs.word_lengths[2] = 0, 8
    scores = forward(case)[0]
    assert scores[:, 1:3].isnan().all()
    torch.testing.assert_close(scores[:, [0, 3]], sound[:, [0, 3]])


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("kind", ["scores", "gumbel", "soft_mask"])
def test_no_result_depends_on_the_order_of_threads(
    kind: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(kind, aggregated=20, length=20)
    expected = forward(case)
    grads = torch.randn(expected[0].shape)
    wanted = cuda_backend.backward(case.inputs, case.options, tuple(expected[2:]), grads, grads)
    monkeypatch.setenv("LAPS_EMULATOR_ORDER", order)
    for ours, theirs in zip(forward(case), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        cuda_backend.backward(case.inputs, case.options, tuple(expected[2:]), grads, grads),
        wanted,
        strict=True,
    ):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["scores", "gumbel"])
def test_images_that_do_not_fit_shared_memory_are_read_where_they_are(kind: str) -> None:
    # G alone has 304 x 304 floats.
    check(make(kind, patches=300, texts=8, length=3, images=1, aggregated=9))


@pytest.mark.parametrize("element", TOLERANCE, ids=str)
@pytest.mark.parametrize("exponent", [-27, 50])
def test_the_length_of_vectors_does_not_matter(element: torch.dtype, exponent: int) -> None:
    size = 2.0 ** (exponent // 5 if element == torch.float16 else exponent)
    case = make("gumbel", element, channels=64)
    expected = forward(case)[0]
    case.inputs.patches, case.inputs.words = case.inputs.patches * size, case.inputs.words * size
    torch.testing.assert_close(forward(case)[0], expected, atol=TOLERANCE[element][0], rtol=0)


@pytest.mark.parametrize("kind", ["scores", "mask", "gumbel"])
def test_opposed_patches_are_computed_exactly(kind: str) -> None:
    # Every second patch all but cancels the one before it: e^T G e has no digits left.
    case = make(kind, patches=24, channels=48)
    patches = case.inputs.patches
    patches[:, 1::2] = -patches[:, ::2] + 1e-4 * patches[:, 1::2]
    case.inputs.logits.fill_(0.0)
    scores, _, *saved = forward(case)
    tensors, options = arguments(case)
    tensors[6] = selected(saved[0], 24) if kind == "scores" else tensors[6]
    expected = torch.ops.laps.similarity(*tensors, **options)[0]
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_weights_that_underflow_are_computed_exactly() -> None:
    case = make("mask")
    case.inputs.logits[:, 3] = 200.0
    assert case.inputs.mask is not None
    case.inputs.mask[..., 3] = False
    scores, *_ = forward(case)
    tensors, options = arguments(case)
    expected = torch.ops.laps.similarity(*tensors, **options)[0]
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("element", TOLERANCE, ids=str)
@pytest.mark.parametrize("gap", [12.0, 22.0, 30.0, 60.0, 200.0])
def test_no_gradient_overflows_where_weights_underflow(element: torch.dtype, gap: float) -> None:
    case = make("mask", element, channels=64)
    case.inputs.logits[:, 3] = gap
    assert case.inputs.mask is not None
    case.inputs.mask[..., 3] = False
    scores, _, *saved = forward(case)
    tensors, options = arguments(case)
    expected = torch.ops.laps.similarity(*tensors, **options)[0]
    torch.testing.assert_close(scores.double(), expected, atol=TOLERANCE[element][0], rtol=0)
    for gradient in backward(case, saved, torch.ones(scores.shape), None):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("element", TOLERANCE, ids=str)
@pytest.mark.parametrize("gap", [0.0, 8.0, 12.0])
def test_gradients_of_very_different_sizes(element: torch.dtype, gap: float) -> None:
    # Long tokens of like patches make small gradients, and a loss may make those of one image smaller still.
    case = make("mask", element, images=2, patches=196, channels=128, texts=2, aggregated=9)
    inputs = case.inputs
    inputs.patches = inputs.patches + 2
    inputs.logits = inputs.logits * 0.1
    assert inputs.mask is not None
    inputs.mask[..., 3] = False
    inputs.logits[:, 3] = gap
    _, _, *saved = forward(case)
    tensors, options = arguments(case)
    # As GradScaler does: the results are halves again.
    grads = 2.0**14 * torch.tensor([[1.0, 1e-3], [1e-3, 1e-3]])
    found = backward(case, saved, grads, None)
    zeros = torch.zeros_like(grads, dtype=torch.float64)
    wanted = torch.ops.laps.similarity_backward(*tensors, *saved, grads.double(), zeros, **options)
    for name, ours, other in zip(GRADIENTS, found, wanted, strict=True):
        if ours is None:
            continue
        # Each image by itself: the second has none of the large gradient.
        for own, theirs in zip(ours.double(), other, strict=True):
            error = (own - theirs).abs().max() / theirs.abs().max()
            assert error < TOLERANCE[element][1], f"{name}: {error}"


def test_a_token_of_vanishing_weights_has_a_score_and_no_gradient() -> None:
    # A limit that the CPU does not have; `cuda_backend` states it.
    case = make("mask", aggregated=1, fusion=False, prefix=0)
    assert case.inputs.mask is not None
    case.inputs.mask[..., 3] = False
    case.inputs.logits[:, 3] = 60.0
    scores, _, *saved = forward(case)
    tensors, options = arguments(case)
    torch.testing.assert_close(
        scores.double(), torch.ops.laps.similarity(*tensors, **options)[0], atol=1e-6, rtol=0
    )
    assert all(gradient is None or not gradient.any() for gradient in backward(case, saved, scores, None))


@pytest.mark.parametrize("channels", [48, 512])
@pytest.mark.parametrize("side", ["patches", "words"])
def test_means_that_cancel_have_no_direction(side: str, channels: int) -> None:
    case = make(channels=channels, length=6, language_context=side == "words")
    own = getattr(case.inputs, side)
    half = own.shape[1] // 2
    order = torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(0))
    own[:] = torch.cat([own[:, :half], -own[:, :half]], dim=1)[:, order]
    case.inputs.word_lengths[:] = 6
    check(case)


@pytest.mark.parametrize("pairwise", [False, True])
def test_words_may_have_any_strides(pairwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(images=1, texts=1, pairwise=pairwise)
    expected = forward(case)
    case.inputs.words = case.inputs.words.mT.contiguous().mT
    monkeypatch.setattr(cuda_backend, "_known", lambda lengths: False)
    for ours, theirs in zip(forward(case), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("element", TOLERANCE, ids=str)
def test_a_zero_prefix_token_matches_nothing(element: torch.dtype) -> None:
    case = make("mask", element, prefix=2, channels=64)
    assert case.inputs.prefix is not None
    case.inputs.prefix[0, 0] = 0.0
    check(case)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_patches_and_words(kind: str) -> None:
    case = make(kind)
    case.inputs.patches[0] = 0.0
    case.inputs.patches[1, 3:6] = 0.0
    case.inputs.words[0, 0] = 0.0
    case.inputs.words[1] = 0.0
    scores = forward(case)[0]
    tensors, options = arguments(case)
    torch.testing.assert_close(
        scores.double(), torch.ops.laps.similarity(*tensors, **options)[0], atol=1e-6, rtol=0
    )


def test_ties_go_to_the_lower_patch() -> None:
    case = make("mask", patches=40)
    case = Case(replace(case.inputs, mask=None), case.options)
    case.inputs.patches[:] = case.inputs.patches[:, :1]
    bits = forward(case)[2]
    kept = selected(bits, 40)
    assert kept[..., :20].all()
    assert not kept[..., 20:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_number_touches_its_own_pairs_only(kind: str) -> None:
    case = make(kind, images=4, texts=5)
    sound, grads = forward(case), torch.randn(4, 5)
    inputs = case.inputs
    wanted = cuda_backend.backward(inputs, case.options, tuple(sound[2:]), grads, None)
    inputs.patches[1, 2, 3] = math.nan
    inputs.words[2, 0, 0] = math.inf
    inputs.logits[3, 0, 0] = -math.inf
    outputs = forward(case)
    bad = torch.zeros(4, 5, dtype=torch.bool)
    bad[1], bad[3], bad[:, 2] = True, True, True
    assert torch.equal(outputs[0].isnan(), bad)
    torch.testing.assert_close(outputs[0][~bad], sound[0][~bad])

    # No gradient comes to pairs without a score, as where a loss has left them out.
    quiet = grads.masked_fill(bad, 0.0)
    patches, words, logits, *_ = cuda_backend.backward(inputs, case.options, tuple(outputs[2:]), quiet, None)
    assert patches is not None
    assert words is not None
    assert logits is not None
    assert all(gradient.isfinite().all() for gradient in (patches, words, logits))
    assert (patches[1] == 0).all()
    # Where it does come, it is the gradient's turn to be NaN.
    poisoned, *_ = cuda_backend.backward(inputs, case.options, tuple(outputs[2:]), grads, None)
    assert poisoned is not None
    assert poisoned[1].isnan().all()
    assert wanted[0] is not None


def test_a_mask_that_keeps_nothing_gives_nan() -> None:
    # On the CPU it is refused; values on a device are not looked at.
    case = make("mask")
    assert case.inputs.mask is not None
    case.inputs.mask[1, 2] = False
    nan = forward(case)[0].isnan()
    assert nan[1, 2]
    assert nan.sum() == 1
