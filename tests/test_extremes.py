"""Input at the edge of the number range: weights that underflow, patches that cancel, what overflows."""

from __future__ import annotations

import math
from typing import Any

import laps
import pytest
import reference
import torch
from laps import functional
from test_backends import F32, F64, Backend, assert_same, both, double, evaluate, make_batch, oracle
from torch import Tensor


def one_zero_patch(gap: float) -> dict[str, Any]:
    """A zero patch whose logits lead all others by `gap`: the tokens are sums of terms as small as e^-gap."""
    batch = make_batch(1, images=3, captions=2, patches=4, prefix=0, channels=8, aggregated=2, dtype=F32)
    batch["patches"][0, 0] = 0
    batch["logits"][0, 0] = gap
    return batch | {"selection_ratio": 1.0}


@both
@pytest.mark.parametrize("gap", [40.0, 60.0, 88.0, 95.0, 120.0, 300.0])
def test_weights_that_underflow_beside_a_zero_patch(backend: Backend, gap: float) -> None:
    batch = one_zero_patch(gap)
    actual, expected = evaluate(backend, **double(batch)), evaluate(oracle, **double(batch))
    assert_same(actual, expected)

    scores, _, gradients = evaluate(backend, **batch)
    torch.testing.assert_close(scores.double(), expected[0], rtol=0, atol=1e-5)
    for name in ("words", "logits"):
        torch.testing.assert_close(gradients[name].double(), expected[2][name], rtol=0, atol=1e-5)
    # The zero patch's own gradient is as large as e^gap, which float32 cannot hold beyond 88.
    others, their = gradients["patches"].double().flatten(0, 1)[1:], expected[2]["patches"].flatten(0, 1)[1:]
    torch.testing.assert_close(others, their, rtol=0, atol=1e-5)
    assert not gradients["patches"].isnan().any()


def test_a_pair_without_gradient_does_not_reach_the_others() -> None:
    batch = one_zero_patch(120.0)
    patches = batch["patches"].requires_grad_()
    scores = functional.similarity(
        patches, batch["words"], batch["word_lengths"], batch["logits"], selection_ratio=1.0, backend="native"
    )
    scores[1:].sum().backward()
    assert patches.grad is not None
    assert patches.grad.isfinite().all()
    assert torch.equal(patches.grad[0], torch.zeros_like(patches.grad[0]))


def cancelling(scale: float, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Patches in opposed pairs, whose mean is exactly zero, under logits of a wide range."""
    batch = make_batch(
        2, images=3, captions=3, patches=16, prefix=0, channels=17, aggregated=4, words=5, dtype=dtype
    )
    batch["patches"][:, 1::2] = -batch["patches"][:, 0::2]
    batch["logits"] *= scale
    return batch | options


@both
@pytest.mark.parametrize("scale", [1.0, 20.0, 45.0, 100.0, 300.0])
def test_cancelling_patches_in_the_stable_form(backend: Backend, scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    soft = torch.rand(3, 3, 16, generator=g, dtype=F64)
    hard = (soft > 0.5).double()
    hard[..., 0] = 1
    probability = torch.rand(3, 16, generator=g, dtype=F64)
    batch = cancelling(scale, F64, mask=soft)
    assert_same(evaluate(backend, **batch), evaluate(oracle, **batch), 1e-10)
    for options in ({"mask": hard}, {"keep_prob": probability}, {"keep_prob": probability, "seed": 5}):
        batch = cancelling(scale, F64, **options)
        actual, expected = evaluate(backend, **batch), evaluate(oracle, **batch)
        # Where a token is 1e-12 to 1e-6 of its terms, float64 leaves it 6 digits or fewer, the oracle too.
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-4)
        assert all(gradient.isfinite().all() for gradient in actual[2].values())
        narrow = {name: t.float() for name, t in options.items() if isinstance(t, Tensor)}
        single = evaluate(backend, **cancelling(scale, F32, **(options | narrow)))
        assert single[0].isfinite().all()
        assert not any(gradient.isnan().any() for gradient in single[2].values())


@both
def test_all_but_closed_patches_in_the_fused_token(backend: Backend) -> None:
    # 1 - D is so small that the square of the fused token underflows in float32.
    batch = make_batch(4, patches=9, dtype=F32)
    mask = torch.ones(2, 3, 9)
    mask[..., 4:] = 1 - 2.0**-24
    batch |= {"mask": mask}
    actual, expected = evaluate(backend, **batch), evaluate(oracle, **double(batch))
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in actual[2].values())


@both
@pytest.mark.parametrize("dtype", [F32, F64])
def test_alignment_normalises_the_tokens_itself(backend: Backend, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(2, 3, 4, 6, generator=g, dtype=dtype)
    tokens[1, 1, 2] = 0
    words, lengths = torch.randn(3, 5, 6, generator=g, dtype=dtype), [5, 2, 1]
    scores, alignment = functional.align_patches_words(tokens, words, lengths, backend=backend.name)
    for i in range(2):
        for t, length in enumerate(lengths):
            units = torch.stack([reference.l2(token) for token in tokens[i, t].double()])
            real = words[t, :length].double()
            expected = torch.tensor(
                [[float(a) for a in row] for row in reference.alignment_matrix(units, real)]
            )
            torch.testing.assert_close(
                alignment[i, t, :, :length].double(), expected.double(), rtol=0, atol=1e-6
            )
            score = reference.alignment(units, real)
            torch.testing.assert_close(scores[i, t].double(), score.double(), rtol=0, atol=1e-6)


@both
def test_overflow_in_max_sim_is_no_hit(backend: Backend) -> None:
    patches, words = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    patches[0] *= 1e25
    words[1] *= 1e25
    scores = functional.max_sim(patches, words, [5, 5], backend=backend.name)
    assert scores.isnan().tolist() == [[False, True], [False, False]]


def test_max_sim_that_overflows_in_a_sum_only() -> None:
    # Each product is finite, the sum over the words is not.
    patches, words = torch.full((1, 1, 1), 1.5e38), torch.ones(1, 3, 1)
    for backend in ("native", "torch"):
        assert functional.max_sim(patches, words, [3], backend=backend).isnan().all()


@both
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("patches", [17, 49])
def test_copies_of_a_patch_have_one_score(backend: Backend, dtype: torch.dtype, patches: int) -> None:
    # A library's product may round its rows differently; the copies' ties must go by index all the same.
    g = torch.Generator().manual_seed(patches)
    v = torch.randn(3, patches, 37, generator=g, dtype=dtype)
    copies = torch.randint(patches // 3, (patches,), generator=g)
    v = v[:, copies]
    v[0, :, 0] = torch.where(v[0, :, 0] > 0, 0.0, -0.0)  # equal, too
    w = torch.randn(5, 7, 37, generator=g, dtype=dtype)
    lengths = [7, 6, 5, 4, 1]
    scores = functional.selection_scores(v, w, lengths, backend=backend.name)
    first = torch.tensor([(copies == c).nonzero()[0, 0] for c in copies])
    assert torch.equal(scores, scores[..., first])
    kept = functional.select_patches(v, w, lengths, 0.5, backend=backend.name)
    mask = torch.zeros(3, 5, patches, dtype=torch.bool).scatter_(2, kept, True)
    for i in range(patches):
        for j in range(i):
            if copies[i] == copies[j]:
                assert not (mask[..., i] & ~mask[..., j]).any()


@both
def test_equal_patches_leave_the_choice_to_the_score_net(backend: Backend) -> None:
    # Min-max scaling must not blow the rounding of equal cosines up to the whole range.
    g = torch.Generator().manual_seed(0)
    one = torch.randn(2, 1, 37, generator=g)
    batch = make_batch(5, patches=17, channels=37, dtype=F32)
    batch["patches"] = one * torch.rand(2, 17, 1, generator=g).add(0.5)
    p = torch.rand(2, 17, generator=g)
    options = {"keep_prob": p, "selection_ratio": 0.4}
    chosen = functional.similarity(**batch, **options, backend=backend.name)
    k = 7
    mask = torch.zeros(2, batch["words"].shape[0], 17, dtype=torch.bool)
    mask.scatter_(2, p.topk(k).indices[:, None].expand(-1, mask.shape[1], -1), True)
    given = functional.similarity(**batch, selection_ratio=1.0, mask=mask.float(), backend=backend.name)
    torch.testing.assert_close(chosen, given, rtol=0, atol=1e-5)


@both
def test_a_mask_just_below_zero_counts_as_zero(backend: Backend) -> None:
    batch = make_batch(0, patches=6, dtype=F32)
    mask = torch.full((2, batch["words"].shape[0], 6), -1e-8)
    with pytest.raises(laps.LapsValueError, match=r"mask\[0, 0\] keeps no patch"):
        functional.similarity(**batch, selection_ratio=0.5, mask=mask, backend=backend.name)
    mask[..., 2] = 1
    scores = functional.similarity(**batch, selection_ratio=0.5, mask=mask, backend=backend.name)
    exact = functional.similarity(**batch, selection_ratio=0.5, mask=mask.clamp(min=0), backend=backend.name)
    torch.testing.assert_close(scores, exact, rtol=0, atol=1e-6)


@both
def test_scores_that_are_not_finite_make_their_pair_nan(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    v, logits = torch.randn(2, 6, 8, generator=g), torch.randn(2, 6, 3, generator=g)
    s = torch.randn(2, 3, 6, generator=g)
    mask = s > 0
    mask[..., 0] = True
    right = functional.calibrate_patches(v, logits, mask, s, backend=backend.name)[0]
    wrong = s.clone()
    wrong[1, 2, 4], wrong[0, 1, 0] = math.nan, math.inf
    tokens = functional.calibrate_patches(v, logits, mask, wrong, backend=backend.name)[0]
    for i in range(2):
        for t in range(3):
            if (i, t) in ((1, 2), (0, 1)):
                assert tokens[i, t].isnan().all()
            else:
                assert torch.equal(tokens[i, t], right[i, t])
