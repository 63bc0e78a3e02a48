"""Both backends, batched PyTorch and native, through `laps.functional`, against the oracle of `reference.py`.

float64 results must agree to 1e-10, scores and gradients; what is seen is below 1e-13, or 1e-11 where patches
cancel. Gradients are compared through one random cotangent each for scores and kept fractions.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laps import functional, torch_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

F32, F64 = torch.float32, torch.float64
TENSORS = ("patches", "words", "word_lengths", "logits")


# ---- inputs


def make_batch(
    seed: int = 0,
    *,
    images: int = 2,
    captions: int = 3,
    patches: int = 7,
    prefix: int = 1,
    channels: int = 5,
    aggregated: int = 2,
    words: int = 4,
    dtype: torch.dtype = F64,
) -> dict[str, Any]:
    """Random inputs with ragged lengths; padding holds NaN, which nothing may notice."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    lengths = torch.randint(1, words + 1, (captions,), generator=g)
    padded = torch.arange(words) >= lengths[:, None]
    return {
        "patches": normal(images, patches, channels),
        "words": normal(captions, words, channels).masked_fill(padded[..., None], math.nan),
        "word_lengths": lengths,
        "logits": 2 * normal(images, patches, aggregated),
        "prefix": normal(images, prefix, channels) if prefix else None,
    }


def choose(variant: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a variant of the method."""
    images, patches, _ = batch["patches"].shape
    dtype, captions = batch["patches"].dtype, len(batch["words"])
    g = torch.Generator().manual_seed(1)
    keep_prob = torch.rand(images, patches, generator=g, dtype=dtype)
    soft = torch.rand(images, captions, patches, generator=g, dtype=dtype)
    hard = soft > 0.4
    hard[..., 0] = True  # a mask keeps something
    return {
        "released": {},
        "paper": {"keep_prob": keep_prob},
        "paper, gumbel": {"keep_prob": keep_prob, "seed": 2**64 - 5},
        "paper, topk": {"keep_prob": keep_prob, "seed": 3, "sampling": "topk"},
        "bool mask": {"mask": hard},
        "float mask": {"mask": soft},
        "binary float mask": {"mask": hard.to(dtype)},
    }[variant]


VARIANTS = (
    "released",
    "paper",
    "paper, gumbel",
    "paper, topk",
    "bool mask",
    "float mask",
    "binary float mask",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"selection_ratio": 1.0},
    {"selection_ratio": 0.1},
    {"fusion": False},
    {"language_context": False},
    {"score": "dot"},
    {"score": "dot", "language_context": False, "fusion": False},
    {"directions": "word_to_patch"},
    {"directions": "patch_to_word", "direction_reduction": "mean"},
    {"direction_reduction": "mean"},
    {"negative_slope": 0.0},
    {"negative_slope": 1.0},
    {"attention_weight": 0.3, "temperature": 0.5},
    {"attention_weight": 0.0},
    {"attention_weight": 1.0},
)


# ---- comparison


Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """Calls `laps.functional` with one backend; scores and kept fractions."""

    name: str

    def __call__(self, *arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return functional.similarity(*arguments, **options, return_kept_fraction=True, backend=self.name)

    def pairwise(self, *arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return functional.similarity_pairwise(
            *arguments, **options, return_kept_fraction=True, backend=self.name
        )


TORCH, NATIVE = Backend("torch"), Backend("native")
both = pytest.mark.parametrize("backend", [TORCH, NATIVE], ids=lambda backend: backend.name)


def oracle(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.similarity(*arguments, **options, return_kept_fraction=True)


def evaluate(function: Function, **inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scores, kept fractions, and the gradient of every floating input."""
    inputs = {"selection_ratio": 0.5} | {name: value for name, value in inputs.items() if value is not None}
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = leaves[name] = value.detach().clone().requires_grad_()
    arguments = [inputs.pop(name) for name in TENSORS]
    scores, kept_fraction = function(*arguments, **inputs)
    g = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=F64)
    for result in (scores, kept_fraction):
        total = total + (result.double() * torch.randn(result.shape, generator=g, dtype=F64)).nansum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return (
        scores.detach(),
        kept_fraction.detach(),
        {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        },
    )


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """The same scores, kept fractions and gradients; NaN where there is NaN."""
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)
    for name, gradient in expected[2].items():
        scale = max(1.0, gradient.abs().max().item())
        difference = (actual[2][name] - gradient).abs().max().item() / scale
        assert difference <= tolerance, f"gradient of {name} differs by {difference}"


def assert_equals_oracle(backend: Backend, **inputs: Any) -> None:
    assert_same(evaluate(backend, **inputs), evaluate(oracle, **inputs))


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def assert_float32_is_accurate(backend: Backend, inputs: dict[str, Any], tolerance: float = 1e-5) -> None:
    """float32 scores are within 1e-5 of the oracle in float64, on the same selection."""
    names = ("selection_ratio", "keep_prob", "seed", "sampling", "mask", "score", "language_context")
    context = {name: value for name, value in double(inputs).items() if name in names}
    sides = (double(inputs)[name] for name in TENSORS[:3])
    _, margin = reference.selection_mask(*sides, **{"selection_ratio": 0.5} | context)
    clear = margin > 1e-6  # selection is float64 inside, so this excludes next to nothing
    assert clear.float().mean() >= 0.5
    actual, expected = evaluate(backend, **inputs), evaluate(oracle, **double(inputs))
    assert actual[0].dtype == actual[1].dtype == F32
    assert ((actual[0].double() - expected[0]).abs()[clear] <= tolerance).all()
    if clear.all():
        for name, gradient in expected[2].items():
            scale = max(gradient.abs().max().item(), 1e-30)
            difference = (actual[2][name].double() - gradient).abs().max().item() / scale
            assert difference <= 1e-4, f"gradient of {name} differs by {difference} of its largest value"


# ---- agreement with the oracle


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradients_equal_the_oracle_for_every_option(backend: Backend, variant: str) -> None:
    batch = make_batch()
    for options in OPTIONS:
        assert_equals_oracle(backend, **batch, **choose(variant, batch) | options)


@both
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_any_number_of_prefix_tokens(backend: Backend, variant: str, prefix: int) -> None:
    batch = make_batch(prefix=prefix)
    assert_equals_oracle(backend, **batch, **choose(variant, batch))


@both
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    images=st.integers(1, 3),
    captions=st.integers(1, 3),
    patches=st.integers(1, 9),
    prefix=st.integers(0, 2),
    channels=st.integers(1, 6),
    aggregated=st.integers(1, 3),
    words=st.integers(1, 5),
    ratio=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend: Backend, variant: str, ratio: float, **sizes: int) -> None:
    batch = make_batch(**sizes)
    assert_equals_oracle(backend, **batch, **choose(variant, batch), selection_ratio=ratio)


@both
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("captions", [1, 8])
def test_few_and_many_captions(backend: Backend, captions: int, variant: str) -> None:
    # The native backend computes lengths from the tokens for few captions, from G for 8 and more.
    batch = make_batch(images=1, captions=captions, patches=9)
    for options in ({}, {"selection_ratio": 1.0}):
        assert_equals_oracle(backend, **batch, **choose(variant, batch), **options)


@both
@pytest.mark.parametrize("captions", [1, 8])
@pytest.mark.parametrize(("patches", "aggregated"), [(4, 1), (49, 23), (196, 39), (576, 115)])
def test_token_grids_of_the_encoders(backend: Backend, patches: int, aggregated: int, captions: int) -> None:
    batch = make_batch(
        images=1, captions=captions, patches=patches, channels=16, aggregated=min(aggregated, 40)
    )
    for variant in ("released", "paper, gumbel"):
        assert_equals_oracle(backend, **batch, **choose(variant, batch))


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_pairwise_scores_image_i_with_text_i(backend: Backend, variant: str) -> None:
    batch = make_batch(images=3, captions=3)
    batch |= choose(variant, batch)
    if "mask" in batch:
        batch["mask"] = batch["mask"][:, 0].clone()

    def expected(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return reference.similarity_pairwise(*arguments, **options, return_kept_fraction=True)

    pairwise = evaluate(backend.pairwise, **batch)
    assert_same(pairwise, evaluate(expected, **batch))
    if "mask" not in batch:
        assert torch.allclose(pairwise[0], evaluate(backend, **batch)[0].diagonal(), rtol=0, atol=1e-12)
    assert_same(evaluate(backend.pairwise, **batch, chunk=1), pairwise)


@both
@pytest.mark.parametrize("variant", ["released", "paper", "float mask"])
def test_gradients_are_those_of_finite_differences(backend: Backend, variant: str) -> None:
    # Not for keep_prob, whose straight-through gradient is not that of the function, and without the fused
    # token, whose weights depend on patches and words without gradient.
    batch = make_batch(images=1, captions=1, patches=4, channels=3, words=2)
    options = choose(variant, batch)
    names = [name for name in ("patches", "words", "logits", "prefix", "mask") if name in batch | options]
    fixed = {name: value for name, value in (batch | options).items() if name not in names}
    lengths = fixed.pop("word_lengths")

    def scores(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        main = (given.pop("patches"), given.pop("words"), lengths, given.pop("logits"))
        return backend(*main, **given, **fixed, selection_ratio=0.5, fusion=False)[0]

    batch["words"] = batch["words"].nan_to_num()
    leaves = [(batch | options)[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(scores, leaves, eps=1e-6, atol=1e-6)


def test_noise_equals_that_of_the_oracle() -> None:
    for seed in (0, 1, 2**63, 2**64 - 1):
        image, caption = torch.tensor([[0], [3], [70_000]]), torch.tensor([[0, 2**33]])
        noise = torch_backend.logistic_noise(seed, image, caption, 5)
        for i, t in itertools.product(range(3), range(2)):
            expected = reference.logistic_noise(seed, int(image[i, 0]), int(caption[0, t]), 5)
            # The hash is exact; logarithms of vectors of other lengths may round otherwise.
            torch.testing.assert_close(noise[i, t], expected, rtol=1e-14, atol=1e-15)
    as_tensor = torch_backend.logistic_noise(torch.tensor(-1), image, caption, 5)
    assert torch.equal(as_tensor, noise)


@pytest.mark.parametrize("variant", ["released", "paper", "paper, gumbel", "paper, topk"])
def test_the_oracle_takes_a_selection_in_place_of_its_own(variant: str) -> None:
    batch = make_batch()
    batch |= choose(variant, batch)
    given = {name: batch[name] for name in ("keep_prob", "seed", "sampling") if name in batch}
    decision, margin = reference.selection_mask(
        *(batch[n] for n in TENSORS[:3]), selection_ratio=0.5, **given
    )
    assert decision.dtype == torch.bool
    assert (margin > 0).all()
    own = evaluate(oracle, **batch)
    assert_same(evaluate(oracle, **batch, selection=decision), own, 0.0)
    assert not torch.equal(evaluate(oracle, **batch, selection=~decision)[0], own[0])


# ---- ties


def test_ties_go_to_the_lower_index_and_zero_has_no_sign() -> None:
    values = torch.tensor([0.0, 1.0, -0.0, 0.0, 1.0, -1.0])
    for k in range(1, 7):
        expected = torch.zeros(6, dtype=torch.bool)
        expected[[1, 4, 0, 2, 3, 5][:k]] = True
        for signed in (values, torch.where(values == 0, -values, values)):
            assert torch.equal(torch_backend._top(signed, k), expected)


@both
@pytest.mark.parametrize("keep_prob", [None, 0.5])
def test_equal_patches_are_kept_in_order(backend: Backend, keep_prob: float | None) -> None:
    batch = make_batch(patches=8, channels=4)
    batch["patches"] = torch.tensor([1.0, 0.3, -0.7, 0.1], dtype=F64).expand(2, 8, 4).contiguous()
    if keep_prob is not None:
        batch["keep_prob"] = torch.full((2, 8), keep_prob, dtype=F64)
    kept = functional.select_patches(*(batch[name] for name in TENSORS[:3]), 0.4, backend=backend.name)
    assert torch.equal(kept, torch.arange(4).expand(2, 3, 4))
    # Not gradients: equal tokens compete for them, and their cosines may differ in the last digit.
    expected = evaluate(oracle, **batch, selection_ratio=0.4)[:2]
    for ours, theirs in zip(evaluate(backend, **batch, selection_ratio=0.4), expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---- input that is not finite


@both
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_bad_input_makes_its_own_pairs_nan_and_leaves_others_untouched(
    backend: Backend, variant: str, bad: float
) -> None:
    batch = make_batch(images=3, captions=3)
    batch |= choose(variant, batch)
    clean = evaluate(backend, **batch)
    hit = {
        "patches": ((1, 2, 3), (1, slice(None))),
        "prefix": ((1, 0, 1), (1, slice(None))),
        "logits": ((1, 6, 0), (1, slice(None))),
        "keep_prob": ((1, 4), (1, slice(None))),
        "words": ((2, 0, 1), (slice(None), 2)),
        "mask": ((0, 1, 5), (0, 1)),
    }
    for name, (place, pairs) in hit.items():
        if name not in batch or not batch[name].is_floating_point():
            continue
        spoilt = batch | {name: batch[name].clone()}
        spoilt[name][place] = bad
        expected = torch.zeros(3, 3, dtype=torch.bool)
        expected[pairs] = True
        scores, kept_fraction, gradients = result = evaluate(backend, **spoilt)
        assert torch.equal(scores.isnan(), expected), name
        assert torch.equal(scores[~expected], clean[0][~expected]), name
        assert torch.equal(kept_fraction[~expected], clean[1][~expected]), name
        assert all(gradient.isfinite().all() for gradient in gradients.values()), name
        assert_same(result, evaluate(oracle, **spoilt))


@both
def test_padding_has_no_effect_and_no_gradient(backend: Backend) -> None:
    batch = make_batch(words=6)
    garbage = evaluate(backend, **batch)
    padded = batch["words"].isnan()
    zeros = evaluate(backend, **batch | {"words": batch["words"].masked_fill(padded, 0.0)})
    assert_same(garbage, zeros, 0.0)
    assert (garbage[2]["words"][padded] == 0).all()
    longer = torch.nn.functional.pad(batch["words"], (0, 0, 0, 3), value=math.inf)
    assert torch.equal(evaluate(backend, **batch | {"words": longer})[0], garbage[0])


def test_an_impossible_length_makes_its_caption_nan() -> None:
    batch = make_batch(captions=4)
    batch["words"] = batch["words"].nan_to_num()
    batch["word_lengths"] = torch.tensor([4, 0, 5, 2])
    scores = evaluate(torch_backend.similarity, **batch)[0]
    assert torch.equal(scores.isnan(), torch.tensor([[False, True, True, False]]).expand(2, 4))


# ---- vectors without a direction, cancelling, huge, tiny


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_vectors_give_zero_and_no_nan(backend: Backend, variant: str) -> None:
    batch = make_batch(images=3)
    batch["patches"][0] = 0.0  # an empty image
    batch["patches"][1, ::2] = 0.0
    batch["prefix"][1] = 0.0
    batch["words"][0, 0] = 0.0
    assert_equals_oracle(backend, **batch, **choose(variant, batch))


def opposed(seed: int, difference: float, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    """Patches v and -v of equal weight, all kept, so that tokens are `difference` of what they sum up."""
    batch = make_batch(seed, dtype=dtype, **sizes)
    half = batch["patches"].shape[1] // 2
    v = batch["patches"][:, :half]
    other = batch["patches"][:, half : 2 * half].clone()
    batch["patches"][:, half : 2 * half] = -v + difference * other
    batch["logits"][:, half : 2 * half] = batch["logits"][:, :half]
    mask = torch.ones(len(v), len(batch["words"]), batch["patches"].shape[1], dtype=torch.bool)
    mask[..., 0] = mask[..., half] = False  # which cancel too, in the fused token
    return batch | {"mask": mask}


@both
@pytest.mark.parametrize("captions", [3, 8])
@pytest.mark.parametrize("difference", [0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3])
def test_opposed_patches(backend: Backend, captions: int, difference: float) -> None:
    batch = opposed(0, difference, F64, patches=8, captions=captions)
    options = ({}, {"mask": batch["mask"].double()}, {"mask": None, "selection_ratio": 1.0})
    for inputs in (batch | option for option in options):
        actual, expected = evaluate(backend, **inputs), evaluate(oracle, **inputs)
        # Tokens are differences of numbers 1 / difference as large: so many digits are gone in any
        # arithmetic.
        assert_same(actual, expected, 1e-10 if difference else 1e-15)
        assert_same(evaluate(backend, **inputs, chunk=1), actual, 1e-10)


@both
def test_patches_that_cancel_exactly_are_a_zero_token(backend: Backend) -> None:
    batch = opposed(0, 0.0, F64, patches=8, prefix=0)
    batch["patches"][:, 4] = batch["patches"][:, 0]  # the fused token does not cancel
    batch["patches"] *= 3.0
    actual = evaluate(backend, **batch, fusion=False)
    assert (actual[0] == 0).all()
    assert all((gradient == 0).all() for gradient in actual[2].values())
    assert_same(actual, evaluate(oracle, **batch, fusion=False))


@both
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_logits_of_any_range(backend: Backend, variant: str, spread: float) -> None:
    # Kept logits far below the image's largest: the shared exponentials of the hard form are zero.
    batch = make_batch()
    batch["logits"] *= spread
    batch["logits"][:, 0] += 1000.0
    assert_equals_oracle(backend, **batch, **choose(variant, batch))
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[..., 0] = False
    assert_equals_oracle(backend, **batch, mask=mask)


@both
@pytest.mark.parametrize("norm", [1e-5, 450.0, 1e15, 1e100])
def test_norms_of_any_size(backend: Backend, norm: float) -> None:
    for variant in VARIANTS:
        batch = make_batch()
        batch["patches"] *= norm
        batch["prefix"] *= norm
        assert_equals_oracle(backend, **batch, **choose(variant, batch))


@both
def test_patches_of_very_unequal_norms(backend: Backend) -> None:
    batch = make_batch()
    batch["patches"] *= torch.logspace(-9, 9, 7, dtype=F64)[:, None]
    for variant in VARIANTS:
        assert_equals_oracle(backend, **batch, **choose(variant, batch))


# ---- float32


WIDE = {"patches": 24, "channels": 16, "aggregated": 4, "words": 6, "dtype": F32}


@both
@pytest.mark.parametrize("captions", [3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_float32_is_within_1e5_of_float64(backend: Backend, captions: int, variant: str, score: str) -> None:
    batch = make_batch(**WIDE, captions=captions)
    assert_float32_is_accurate(backend, batch | choose(variant, batch) | {"score": score})


@both
@pytest.mark.parametrize("captions", [3, 8])
@pytest.mark.parametrize("difference", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.25])
def test_float32_with_opposed_patches(backend: Backend, captions: int, difference: float) -> None:
    batch = opposed(0, difference, **WIDE, captions=captions)
    assert_float32_is_accurate(backend, batch)
    assert_float32_is_accurate(backend, batch | {"mask": batch["mask"].float()})
    assert_float32_is_accurate(backend, batch | {"mask": None})
    assert_float32_is_accurate(backend, batch | {"mask": None, "score": "dot"})
    assert_float32_is_accurate(backend, batch | choose("paper", batch) | {"mask": None})


@both
@pytest.mark.parametrize("norm", [450.0, 1e15, 1e30, 1e-15])
def test_float32_with_huge_and_tiny_norms(backend: Backend, norm: float) -> None:
    for variant in ("released", "paper", "float mask"):
        batch = make_batch(**WIDE)
        batch["patches"] *= norm
        batch["prefix"] *= max(norm, 1e-6)
        # Below 1e-12 a vector alone has no direction; sums of such vectors still have one. Not promised, not
        # tested.
        if norm > 1e-12:
            assert_float32_is_accurate(backend, batch | choose(variant, batch))
        result = evaluate(backend, **batch, **choose(variant, batch))
        assert result[0].isfinite().all()
        assert all(gradient.isfinite().all() for gradient in result[2].values())


@both
def test_float32_with_logits_that_underflow(backend: Backend) -> None:
    batch = make_batch(**WIDE)
    batch["logits"] *= 20.0
    batch["logits"][:, 0] += 200.0
    mask = torch.arange(24).expand(2, 3, 24) % 2 == 1
    assert_float32_is_accurate(backend, batch | {"mask": mask})


@both
def test_float32_at_the_size_of_a_vit(backend: Backend) -> None:
    for captions in (1, 8):
        sizes = {"images": 1, "captions": captions, "patches": 196, "channels": 512, "aggregated": 39}
        batch = make_batch(**sizes, words=9, dtype=F32)
        assert_float32_is_accurate(backend, batch)
        assert_float32_is_accurate(backend, batch | choose("paper", batch))


def test_random_patches_need_no_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their squared lengths are about 1 / 98 of what they could be, for want of alignment, not by cancelling.
    record: list[float] = []
    repair = torch_backend._repair

    def recording(cosines: Tensor, doubtful: Tensor, *rest: Any) -> Tensor:
        record.append(doubtful.float().mean().item())
        return repair(cosines, doubtful, *rest)

    monkeypatch.setattr(torch_backend, "_repair", recording)
    batch = make_batch(images=1, captions=8, patches=196, channels=512, aggregated=39, words=9, dtype=F32)
    for variant in VARIANTS:
        evaluate(TORCH, **batch, **choose(variant, batch))
    assert len(record) == 2 * len(VARIANTS)
    assert max(record) == 0


# ---- how it is computed


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_do_not_change_the_result(backend: Backend, variant: str) -> None:
    batch = make_batch(images=3, captions=4)
    batch |= choose(variant, batch)
    whole = evaluate(backend, **batch)
    for chunk in (1, 30_000):
        assert_same(evaluate(backend, **batch, chunk=chunk), whole, 1e-12)


def evaluate_native(threads: int, **inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`evaluate` of the native backend on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return evaluate(NATIVE, **inputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("captions", [1, 9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_results_do_not_depend_on_threads(variant: str, captions: int, dtype: torch.dtype) -> None:
    batch = make_batch(images=5, captions=captions, patches=12, channels=20, aggregated=3, dtype=dtype)
    batch |= choose(variant, batch)
    whole = evaluate_native(1, **batch)
    for chunk in (None, 20_000, 1):
        alone = evaluate_native(1, **batch, chunk=chunk)
        assert_same(evaluate_native(2, **batch, chunk=chunk), alone, 0.0)
        assert torch.equal(alone[0], whole[0])
        assert torch.equal(alone[1], whole[1])
        assert_same(alone, whole, 1e-12 if dtype == F64 else 1e-5)


def test_squared_lengths_have_gradients_of_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 4, generator=g, dtype=F64).requires_grad_()
    vectors = torch.randn(2, 4, 5, generator=g, dtype=F64).requires_grad_()

    def squares(e: Tensor, v: Tensor) -> Tensor:
        return torch_backend._Squares.apply(e, v @ v.mT)[0]

    assert torch.autograd.gradcheck(squares, (weights, vectors))
    assert torch.autograd.gradgradcheck(squares, (weights, vectors))


def check_native(level: str) -> None:
    """The native backend against the oracle at one level of vector instructions; run in its own process."""
    torch.set_num_threads(1)
    assert functional._laps.build_info()["simd"] == level
    for variant, captions in itertools.product(VARIANTS, (1, 8)):
        batch = make_batch(images=1, captions=captions, patches=19, channels=21, aggregated=5, words=9)
        assert_equals_oracle(NATIVE, **batch, **choose(variant, batch))
    for difference in (0.0, 1e-3, 0.1):
        assert_equals_oracle(NATIVE, **opposed(0, difference, F64, patches=8, captions=8))
    batch = make_batch(**WIDE)
    assert_float32_is_accurate(NATIVE, batch)
    assert_float32_is_accurate(NATIVE, opposed(0, 1e-3, **WIDE))
    sides = [batch[name].double() for name in TENSORS[:2]]
    actual = functional.max_sim(*sides, batch["word_lengths"], backend="native")
    expected = reference.max_sim(*sides, batch["word_lengths"])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def run_at_level(level: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python code in its own process: the level of vector instructions is chosen once in each."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"LAPS_SIMD": level, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_every_level_of_vector_instructions(level: str) -> None:
    if level not in functional._laps.build_info()["simd_available"]:
        pytest.skip(f"this processor has no {level}")
    result = run_at_level(level, f"import test_backends; test_backends.check_native({level!r})")
    assert result.returncode == 0, result.stderr


def test_unknown_level_is_refused() -> None:
    code = (
        "import laps, torch; one = torch.ones(1, 1, 1); laps.functional.max_sim(one, one, torch.tensor([1]))"
    )
    result = run_at_level("avx1024", code)
    assert result.returncode != 0
    assert "LapsValueError" in result.stderr
    assert re.search(r"LAPS_SIMD .*\(expected one of .*scalar, got \"avx1024\"\)", result.stderr)


class Rescored(torch.utils.data.Dataset[Tensor]):
    """Items that are computed with the native head, by whichever process loads them."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return evaluate(NATIVE, **self.batch)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_native_works_in_a_forked_worker_after_use_in_the_parent() -> None:
    batch = make_batch(images=3, captions=9)
    expected = evaluate(NATIVE, **batch)[0]  # starts the parent's threads, which no fork copies
    loader = torch.utils.data.DataLoader(
        Rescored(batch), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for actual in loader:
        assert torch.equal(actual, expected)
    assert torch.equal(evaluate(NATIVE, **batch)[0], expected)


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that tensors took at once while the function ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("difference", [1.0, 0.0])
def test_scratch_memory_stays_below_the_budget(difference: float) -> None:
    # With no difference all tokens cancel and are computed again.
    sizes = {"images": 8, "captions": 8, "patches": 48, "channels": 64, "aggregated": 8}
    batch = opposed(0, difference, F32, **sizes)
    arguments = [batch[name] for name in TENSORS]
    for chunk, options in ((2**20, {"mask": batch["mask"]}), (2**22, choose("paper, gumbel", batch))):
        call = functools.partial(
            torch_backend.similarity, *arguments, selection_ratio=0.5, **options, chunk=chunk
        )
        assert peak_memory(call) < chunk
    assert peak_memory(lambda: torch_backend.max_sim(*arguments[:3], chunk=2**18)) < 2**18


@pytest.mark.parametrize("variant", ["released", "paper, gumbel", "float mask"])
def test_compiles_to_one_graph(variant: str) -> None:
    # Ordinary input: what is traced computes no token again.
    batch = make_batch()
    batch |= choose(variant, batch)
    if "seed" in batch:
        batch["seed"] = torch.tensor(batch["seed"] - 2**64 if batch["seed"] >= 2**63 else batch["seed"])
    torch._dynamo.reset()
    compiled = torch.compile(torch_backend.similarity, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(evaluate(compiled, **batch), evaluate(torch_backend.similarity, **batch))


def test_shapes_are_known_without_values() -> None:
    with FakeTensorMode() as mode:
        batch = make_batch()
        batch = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in batch.items()}
        v, w, lengths, logits = (batch[name] for name in TENSORS)
        assert torch_backend.similarity(v, w, lengths, logits, selection_ratio=0.5)[0].shape == (2, 3)
        assert torch_backend.select_patches(v, w, lengths, 0.5).shape == (2, 3, 4)
        scores = torch_backend.selection_scores(v, w, lengths)
        tokens, counts = torch_backend.calibrate_patches(v, logits, scores > 0, scores)
        assert tokens.shape == (2, 3, 3, 5)
        _, alignment = torch_backend.align_patches_words(tokens, w, lengths, token_counts=counts)
        assert alignment.shape == (2, 3, 3, 4)
        assert torch_backend.max_sim(v, w, lengths).shape == (2, 3)


@both
def test_autocast_does_not_reach_inside(backend: Backend) -> None:
    def mixed(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return backend(*arguments, **options)

    batch = make_batch(dtype=F32)
    assert_same(evaluate(mixed, **batch), evaluate(backend, **batch), 0.0)


# ---- the stages alone


@pytest.mark.parametrize("options", [{}, {"language_context": False}, {"score": "dot"}])
def test_stage_selection(options: dict[str, Any]) -> None:
    batch = make_batch()
    sides = [batch[name] for name in TENSORS[:3]]
    keep_prob = choose("paper", batch)["keep_prob"].requires_grad_()
    for given_prob in (None, keep_prob):
        scores = torch_backend.selection_scores(*sides, keep_prob=given_prob, **options)
        for i, t in itertools.product(range(2), range(3)):
            words = batch["words"][t, : batch["word_lengths"][t]]
            probability = None if given_prob is None else given_prob[i]
            expected = reference.selection_scores(batch["patches"][i], words, probability, **options)
            torch.testing.assert_close(scores[i, t], expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(scores.sum(), keep_prob)
    torch.testing.assert_close(gradient, torch.full_like(keep_prob, 3 * 0.2))

    indices = torch_backend.select_patches(*sides, 0.5, **options)
    decision, _ = reference.selection_mask(*sides, selection_ratio=0.5, **options)
    assert indices.dtype == torch.int64
    assert (indices.diff() > 0).all()
    assert torch.equal(torch.zeros_like(decision).scatter(-1, indices, True), decision)


@both
@pytest.mark.parametrize("options", [{}, {"language_context": False}, {"score": "dot"}])
@pytest.mark.parametrize("fusion", [True, False])
def test_stages_equal_the_oracle(backend: Backend, fusion: bool, options: dict[str, Any]) -> None:
    batch, name = make_batch(patches=9), {"backend": backend.name}
    v, w, lengths, logits = (batch[name] for name in TENSORS)
    scores = functional.selection_scores(v, w, lengths, **options, **name)
    kept = functional.select_patches(v, w, lengths, 0.5, **options, **name)
    decision, _ = reference.selection_mask(v, w, lengths, selection_ratio=0.5, **options)
    assert kept.dtype == torch.int64
    assert (kept.diff() > 0).all()
    assert torch.equal(torch.zeros_like(decision).scatter(-1, kept, True), decision)
    decision[0, 0] = True  # a pair without a fused token
    tokens, counts = functional.calibrate_patches(
        v, logits, decision, scores, prefix=batch["prefix"], fusion=fusion, **name
    )
    aligned, matrix = functional.align_patches_words(tokens, w, lengths, token_counts=counts, **name)
    assert tokens.shape == (2, 3, 3 + fusion, 5)
    assert matrix.shape == (2, 3, 3 + fusion, 4)
    for i, t in itertools.product(range(2), range(3)):
        words, own = w[t, : lengths[t]], decision[i, t]
        expected_scores = reference.selection_scores(v[i], words, **options)
        torch.testing.assert_close(scores[i, t], expected_scores, rtol=0, atol=1e-12)
        expected = reference.tokens(
            v[i], logits[i], own, scores[i, t], prefix=batch["prefix"][i], fusion=fusion
        )
        count = int(counts[i, t])
        assert count == len(expected)
        torch.testing.assert_close(tokens[i, t, :count], expected, rtol=0, atol=1e-12)
        assert (tokens[i, t, count:] == 0).all()
        torch.testing.assert_close(aligned[i, t], reference.alignment(expected, words), rtol=0, atol=1e-12)
        rows = torch.stack([torch.stack(row) for row in reference.alignment_matrix(expected, words)])
        torch.testing.assert_close(matrix[i, t, :count, : len(words)], rows, rtol=0, atol=1e-12)
        assert (matrix[i, t, count:] == 0).all()
        assert (matrix[i, t, :, len(words) :] == 0).all()


def test_stage_selection_of_bad_input_is_nan() -> None:
    batch = make_batch()
    batch["patches"][0, 1, 2] = math.inf
    batch["words"][1, 0, 0] = math.nan
    scores = torch_backend.selection_scores(*(batch[name] for name in TENSORS[:3]))
    assert torch.equal(scores.isnan().all(-1), torch.tensor([[True, True, True], [False, True, False]]))
    assert torch.equal(scores.isnan().any(-1), scores.isnan().all(-1))


@pytest.mark.parametrize("variant", ["bool mask", "float mask", "paper, gumbel"])
@pytest.mark.parametrize("fusion", [True, False])
def test_stages_together_are_the_similarity(variant: str, fusion: bool) -> None:
    batch = make_batch()
    options = choose(variant, batch)
    if "mask" in options:
        options["mask"][0, 0] = 1  # a pair without a fused token

    def staged(
        patches: Tensor, words: Tensor, lengths: Tensor, logits: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor]:
        keep_prob = given.get("keep_prob")
        scores = torch_backend.selection_scores(patches, words, lengths, keep_prob=keep_prob)
        decision = given["mask"] if keep_prob is None else straight_through(scores, given["seed"])
        tokens, counts = torch_backend.calibrate_patches(
            patches, logits, decision, scores, prefix=given["prefix"], fusion=fusion
        )
        assert tokens.shape == (2, 3, 3 + fusion, 5)
        dropped = (decision != 1).any(-1)
        assert torch.equal(counts, 3 + (dropped & fusion))
        if fusion:
            assert (tokens[:, :, -1][~dropped] == 0).all()
        aligned, alignment = torch_backend.align_patches_words(tokens, words, lengths, token_counts=counts)
        existing = torch.arange(3 + fusion) < counts[..., None]
        shown = existing[..., None] & (torch.arange(4) < lengths[:, None])[None, :, None]
        assert ((alignment != 0) == shown).all()
        return aligned, decision.to(aligned.dtype).mean(-1)

    def straight_through(scores: Tensor, seed: int) -> Tensor:
        noise = torch_backend.logistic_noise(seed, torch.arange(2)[:, None], torch.arange(3)[None], 7)
        z = torch.logit(scores, 1e-6) + noise
        soft = torch.sigmoid(z)
        return (z > 0).double() + (soft - soft.detach())

    expected = evaluate(TORCH, **batch, **options, fusion=fusion)
    assert_same(evaluate(staged, **batch, **options), expected)


def test_stage_calibration_without_dropped_patches_has_no_fused_token() -> None:
    batch = make_batch()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    tokens, counts = torch_backend.calibrate_patches(batch["patches"], batch["logits"], mask, mask.double())
    assert tokens.shape == (2, 3, 2, 5)
    assert (counts == 2).all()
    scores, _ = torch_backend.align_patches_words(tokens, batch["words"], batch["word_lengths"])
    expected = evaluate(TORCH, **batch | {"prefix": None}, selection_ratio=1.0)[0]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("channels", [1, 5, 40])
def test_max_sim_of_both_backends(backend: Backend, channels: int) -> None:
    batch = make_batch(images=3, captions=9, patches=30, channels=channels)
    batch["patches"][1, 2, 0] = math.inf
    batch["words"][3, 0, 0] = math.nan
    sides = [batch[name] for name in TENSORS[:3]]
    actual = functional.max_sim(*sides, backend=backend.name)
    torch.testing.assert_close(actual, reference.max_sim(*sides), rtol=0, atol=1e-12, equal_nan=True)


def test_max_sim_equals_the_oracle() -> None:
    batch = make_batch(images=3, captions=4)
    batch["patches"][1, 2, 0] = math.inf
    sides = [batch[name] for name in TENSORS[:3]]
    leaves = [side.clone().requires_grad_() for side in sides[:2]]
    expected = reference.max_sim(*leaves, sides[2])
    assert torch.equal(expected.isnan(), torch.tensor([[False], [True], [False]]).expand(3, 4))
    gradients = torch.autograd.grad(expected.nansum(), leaves)
    for chunk in (None, 1):
        actual = torch_backend.max_sim(*leaves, sides[2], chunk=chunk)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)
        for ours, theirs in zip(torch.autograd.grad(actual.nansum(), leaves), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
