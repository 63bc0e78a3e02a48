"""The functions refuse bad input by name, answer in the caller's kind of array, and choose their backend."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import laps
import numpy as np
import pytest
import torch
from laps import functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

B_V, B_T, N, C, L, N_C, P = 2, 3, 8, 6, 5, 3, 2


def make(**changes: Any) -> dict[str, Any]:
    """Valid arguments of `similarity`, but for the changes."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "patches": torch.randn(B_V, N, C, generator=generator),
        "words": torch.randn(B_T, L, C, generator=generator),
        "word_lengths": torch.tensor([5, 1, 3]),
        "logits": torch.randn(B_V, N, N_C, generator=generator),
        "selection_ratio": 0.5,
    }
    return arguments | changes


def make_pairs(**changes: Any) -> dict[str, Any]:
    """Valid arguments of `similarity_pairwise`, but for the changes."""
    arguments = make()
    return arguments | {"words": arguments["words"][:B_V], "word_lengths": torch.tensor([5, 1])} | changes


def as_arrays(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in arguments.items()}


# ---- bad input

ZERO_ROW = torch.ones(B_V, B_T, N)
ZERO_ROW[1, 2] = 0

BAD: list[tuple[str, dict[str, Any], type[laps.LapsError], str]] = [
    # Rank.
    (
        "patches_rank",
        {"patches": torch.ones(N, C)},
        laps.LapsValueError,
        "patches has the wrong rank (expected 3",
    ),
    ("words_rank", {"words": torch.ones(B_T, L)}, laps.LapsValueError, "words has the wrong rank"),
    ("logits_rank", {"logits": torch.ones(B_V, N)}, laps.LapsValueError, "logits has the wrong rank"),
    ("prefix_rank", {"prefix": torch.ones(B_V, C)}, laps.LapsValueError, "prefix has the wrong rank"),
    (
        "keep_prob_rank",
        {"keep_prob": torch.ones(B_V, N, 1)},
        laps.LapsValueError,
        "keep_prob has the wrong rank",
    ),
    ("mask_rank", {"mask": torch.ones(B_V, N)}, laps.LapsValueError, "mask has the wrong rank"),
    (
        "lengths_rank",
        {"word_lengths": torch.ones(B_T, 1).long()},
        laps.LapsValueError,
        "word_lengths has the wrong rank",
    ),
    (
        "seed_rank",
        {"keep_prob": torch.ones(B_V, N), "seed": torch.tensor([1])},
        laps.LapsValueError,
        "seed has the",
    ),
    # Type and dtype.
    (
        "patches_dtype",
        {"patches": torch.ones(B_V, N, C).long()},
        laps.LapsTypeError,
        "patches has the wrong dtype",
    ),
    ("words_complex", {"words": torch.ones(B_T, L, C) * 1j}, laps.LapsTypeError, "words has the wrong dtype"),
    (
        "words_float64",
        {"words": torch.ones(B_T, L, C).double()},
        laps.LapsTypeError,
        "words has dtype float64, but",
    ),
    (
        "logits_bool",
        {"logits": torch.ones(B_V, N, N_C) > 0},
        laps.LapsTypeError,
        "logits has the wrong dtype",
    ),
    ("mask_dtype", {"mask": torch.ones(B_V, B_T, N).int()}, laps.LapsTypeError, "mask has the wrong dtype"),
    (
        "lengths_dtype",
        {"word_lengths": torch.ones(B_T)},
        laps.LapsTypeError,
        "word_lengths has the wrong dtype",
    ),
    (
        "lengths_bool",
        {"word_lengths": torch.ones(B_T) > 0},
        laps.LapsTypeError,
        "word_lengths has the wrong dtype",
    ),
    ("lengths_array", {"word_lengths": np.ones(B_T)}, laps.LapsTypeError, "word_lengths has the wrong dtype"),
    (
        "lengths_list",
        {"word_lengths": [1.0, 2.0, 3.0]},
        laps.LapsTypeError,
        "word_lengths[0] is no integer (expected int, got float)",
    ),
    ("lengths_none", {"word_lengths": None}, laps.LapsTypeError, "word_lengths is no list of integers"),
    (
        "patches_list",
        {"patches": [[[1.0]]]},
        laps.LapsTypeError,
        "patches is no array (expected torch.Tensor or",
    ),
    ("patches_none", {"patches": None}, laps.LapsTypeError, "patches is missing"),
    ("seed_float", {"keep_prob": torch.ones(B_V, N), "seed": 1.5}, laps.LapsTypeError, "seed is no integer"),
    (
        "seed_dtype",
        {"keep_prob": torch.ones(B_V, N), "seed": torch.tensor(1.0)},
        laps.LapsTypeError,
        "seed has the",
    ),
    (
        "array_dtype",
        as_arrays(make(patches=np.ones((B_V, N, C), "U1"))),
        laps.LapsTypeError,
        "patches has the wrong",
    ),
    (
        "float128",
        as_arrays(make(words=np.ones((B_T, L, C), "g"))),
        laps.LapsTypeError,
        "words has the wrong dtype",
    ),
    # Device.
    (
        "device",
        {"words": torch.ones(B_T, L, C, device="meta")},
        laps.LapsValueError,
        "words is on meta, but patches",
    ),
    (
        "mask_device",
        {"mask": torch.ones(B_V, B_T, N, device="meta")},
        laps.LapsValueError,
        "mask is on meta, but patches is on cpu (expected the same device)",
    ),
    (
        "lengths_device",
        {"word_lengths": torch.ones(B_T, dtype=torch.int64, device="meta")},
        laps.LapsValueError,
        "word_lengths is on meta, but patches is on cpu",
    ),
    # Sizes.
    (
        "words_c",
        {"words": torch.ones(B_T, L, C + 1)},
        laps.LapsValueError,
        f"words has C={C + 1}, but patches has C={C} (expected equal)",
    ),
    (
        "prefix_c",
        {"prefix": torch.ones(B_V, P, 2 * C)},
        laps.LapsValueError,
        f"prefix has C={2 * C}, but patches",
    ),
    (
        "logits_n",
        {"logits": torch.ones(B_V, N - 1, N_C)},
        laps.LapsValueError,
        f"logits has N={N - 1}, but patches",
    ),
    (
        "logits_b",
        {"logits": torch.ones(1, N, N_C)},
        laps.LapsValueError,
        "logits has B_v=1, but patches has B_v=2",
    ),
    ("prefix_b", {"prefix": torch.ones(1, P, C)}, laps.LapsValueError, "prefix has B_v=1, but patches"),
    ("keep_prob_n", {"keep_prob": torch.ones(B_V, 1)}, laps.LapsValueError, "keep_prob has N=1, but patches"),
    ("mask_t", {"mask": torch.ones(B_V, 1, N)}, laps.LapsValueError, "mask has B_t=1, but words has B_t=3"),
    (
        "lengths_t",
        {"word_lengths": torch.ones(2).long()},
        laps.LapsValueError,
        "word_lengths has B_t=2, but words",
    ),
    # Empty.
    (
        "no_images",
        {"patches": torch.ones(0, N, C)},
        laps.LapsValueError,
        "patches has B_v=0 (expected B_v >= 1",
    ),
    ("no_captions", {"words": torch.ones(0, L, C)}, laps.LapsValueError, "words has B_t=0"),
    ("no_patches", {"patches": torch.ones(B_V, 0, C)}, laps.LapsValueError, "patches has N=0"),
    ("no_words", {"words": torch.ones(B_T, 0, C)}, laps.LapsValueError, "words has L=0"),
    ("no_channels", {"patches": torch.ones(B_V, N, 0)}, laps.LapsValueError, "patches has C=0"),
    (
        "no_tokens",
        {"logits": torch.ones(B_V, N, 0)},
        laps.LapsValueError,
        "logits has N_c=0 (expected N_c >= 1",
    ),
    # Lengths.
    (
        "length_zero",
        {"word_lengths": [5, 0, 3]},
        laps.LapsValueError,
        "word_lengths[1] is out of range (expected 1 <= length <= L=5, got 0)",
    ),
    (
        "length_negative",
        {"word_lengths": torch.tensor([5, 1, -2])},
        laps.LapsValueError,
        "word_lengths[2] is out of",
    ),
    (
        "length_beyond",
        {"word_lengths": np.array([6, 1, 3])},
        laps.LapsValueError,
        "word_lengths[0] is out of range",
    ),
    # Masks and probabilities.
    ("mask_empty_row", {"mask": ZERO_ROW}, laps.LapsValueError, "mask[1, 2] keeps no patch"),
    ("bool_mask_empty_row", {"mask": ZERO_ROW > 0}, laps.LapsValueError, "mask[1, 2] keeps no patch"),
    (
        "mask_above",
        {"mask": ZERO_ROW + 0.25},
        laps.LapsValueError,
        "mask has a value out of range (expected 0 <=",
    ),
    ("mask_below", {"mask": ZERO_ROW - 0.25}, laps.LapsValueError, "mask has a value out of range"),
    (
        "keep_prob_above",
        {"keep_prob": torch.full((B_V, N), 1.01)},
        laps.LapsValueError,
        "keep_prob has a value out",
    ),
    (
        "keep_prob_below",
        {"keep_prob": torch.full((B_V, N), -0.01)},
        laps.LapsValueError,
        "keep_prob has a value out",
    ),
    (
        "keep_prob_and_mask",
        {"keep_prob": torch.ones(B_V, N), "mask": torch.ones(B_V, B_T, N)},
        laps.LapsValueError,
        "keep_prob and mask exclude each other",
    ),
    ("seed_alone", {"seed": 1}, laps.LapsValueError, "seed has no use without keep_prob"),
    # Options.
    (
        "ratio_zero",
        {"selection_ratio": 0.0},
        laps.LapsValueError,
        "selection_ratio is out of range (expected 0 < s",
    ),
    ("ratio_above", {"selection_ratio": 1.5}, laps.LapsValueError, "selection_ratio is out of range"),
    ("ratio_nan", {"selection_ratio": math.nan}, laps.LapsValueError, "selection_ratio is out of range"),
    ("ratio_type", {"selection_ratio": "half"}, laps.LapsTypeError, "selection_ratio is no number"),
    (
        "directions",
        {"directions": "neither"},
        laps.LapsValueError,
        'directions is unknown (expected one of "both"',
    ),
    ("reduction", {"direction_reduction": "max"}, laps.LapsValueError, "direction_reduction is unknown"),
    ("score", {"score": "l2"}, laps.LapsValueError, "score is unknown"),
    ("sampling", {"sampling": None}, laps.LapsTypeError, "sampling is unknown"),
    ("slope", {"negative_slope": -0.1}, laps.LapsValueError, "negative_slope is out of range"),
    ("slope_steep", {"negative_slope": 1.5}, laps.LapsValueError, "negative_slope is out of range"),
    ("slope_inf", {"negative_slope": math.inf}, laps.LapsValueError, "negative_slope is out of range"),
    ("slope_huge", {"negative_slope": 10**5000}, laps.LapsValueError, "negative_slope is out of range"),
    ("weight", {"attention_weight": 1.1}, laps.LapsValueError, "attention_weight is out of range"),
    ("temperature", {"temperature": 0.0}, laps.LapsValueError, "temperature is out of range"),
    ("fusion", {"fusion": "yes"}, laps.LapsTypeError, "fusion is no flag"),
    ("chunk", {"chunk": 0}, laps.LapsValueError, "chunk is out of range (expected chunk >= 1, got 0)"),
    ("chunk_type", {"chunk": 1.0}, laps.LapsTypeError, "chunk is no integer"),
    ("backend", {"backend": "cuda"}, laps.LapsValueError, "backend is unknown"),
    (
        "all_prefix",
        {"prefix": N},
        laps.LapsValueError,
        f"prefix is {N}, the number of leading rows of patches",
    ),
    ("prefix_negative", {"prefix": -1}, laps.LapsValueError, "prefix is out of range"),
    ("prefix_type", {"prefix": 1.0}, laps.LapsTypeError, "prefix is no array"),
    # NumPy beside autograd.
    (
        "array_and_gradient",
        {"patches": np.ones((B_V, N, C), "f"), "words": torch.ones(B_T, L, C, requires_grad=True)},
        laps.LapsTypeError,
        "words requires grad, but patches is a NumPy array",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_bad_input_is_refused_by_name(
    changes: dict[str, Any], error: type[laps.LapsError], message: str, backend: str
) -> None:
    with pytest.raises(error) as caught:
        F.similarity(**make(**{"backend": backend} | changes))
    assert str(caught.value).startswith(f"similarity: {message}")
    assert "(expected " in str(caught.value)


def test_pairs_must_be_as_many_captions_as_images() -> None:
    with pytest.raises(laps.LapsValueError, match=r"similarity_pairwise: words has B=3, but patches has B=2"):
        F.similarity_pairwise(**make())
    with pytest.raises(
        laps.LapsValueError, match=r"similarity_pairwise: mask has the wrong rank \(expected 2"
    ):
        F.similarity_pairwise(**make_pairs(mask=torch.ones(B_V, B_V, N)))


V, W, LOGITS, TOKENS = torch.ones(1, 4, 3), torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(1, 1, 4, 3)
KEPT = SCORES = torch.ones(1, 1, 4)

STAGES: list[tuple[Callable[[], Any], type[laps.LapsError], str]] = [
    (
        lambda: F.select_patches(V, torch.ones(1, 2, 5), [1], 0.5),
        laps.LapsValueError,
        "select_patches: words has C=5, but patches has C=3",
    ),
    (
        lambda: F.select_patches(V, W, [1], 2.0),
        laps.LapsValueError,
        "select_patches: selection_ratio is out of range",
    ),
    (
        lambda: F.selection_scores(V, W, [3]),
        laps.LapsValueError,
        "selection_scores: word_lengths[0] is out of range",
    ),
    (
        lambda: F.selection_scores(V, W, [2], language_context=None),
        laps.LapsTypeError,
        "selection_scores: language_context is no flag",
    ),
    (lambda: F.max_sim(V.int(), W, [2]), laps.LapsTypeError, "max_sim: patches has the wrong dtype"),
    (
        lambda: F.calibrate_patches(V, LOGITS, KEPT < 0, SCORES),
        laps.LapsValueError,
        "calibrate_patches: mask[0, 0] keeps no patch",
    ),
    (
        lambda: F.calibrate_patches(V, LOGITS, KEPT.int(), SCORES),
        laps.LapsTypeError,
        "calibrate_patches: mask has the wrong dtype",
    ),
    (
        lambda: F.calibrate_patches(V, LOGITS, KEPT > 0, torch.ones(1, 2, 4)),
        laps.LapsValueError,
        "calibrate_patches: scores has B_t=2, but mask has B_t=1",
    ),
    (
        lambda: F.align_patches_words(torch.ones(1, 2, 4, 3), W, [2]),
        laps.LapsValueError,
        "align_patches_words: words has B_t=1, but tokens has B_t=2",
    ),
    (
        lambda: F.align_patches_words(TOKENS, W, [2], token_counts=torch.tensor([[5]])),
        laps.LapsValueError,
        "align_patches_words: token_counts has a value out of range",
    ),
    (
        lambda: F.align_patches_words(TOKENS, W, [2], token_counts=torch.tensor([[1.0]])),
        laps.LapsTypeError,
        "align_patches_words: token_counts has the wrong dtype",
    ),
]


@pytest.mark.parametrize(("function", "error", "message"), STAGES, ids=[case[2] for case in STAGES])
def test_stages_refuse_bad_input_by_name(
    function: Callable[[], Any], error: type[laps.LapsError], message: str
) -> None:
    with pytest.raises(error) as caught:
        function()
    assert str(caught.value).startswith(message)


# ---- what is accepted


def test_lengths_come_as_tensor_list_or_array() -> None:
    expected = F.similarity(**make())
    for lengths in (
        torch.tensor([5, 1, 3], dtype=torch.int32),
        [5, 1, 3],
        (5, np.int64(1), np.int32(3)),
        np.array([5, 1, 3], dtype=np.int16),
        torch.tensor([[5, 0], [1, 0], [3, 0]])[:, 0],
    ):
        assert torch.equal(F.similarity(**make(word_lengths=lengths)), expected)


def test_no_prefix_tokens_are_as_no_prefix() -> None:
    assert torch.equal(F.similarity(**make(prefix=torch.ones(B_V, 0, C))), F.similarity(**make()))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rounding_may_leave_the_unit_interval(backend: str) -> None:
    hard = (torch.arange(N) < 4).float().expand(B_V, B_T, N)
    rounded = hard * (1 + 1e-7)
    assert rounded.max() > 1
    scores = F.similarity(**make(mask=rounded, backend=backend))
    torch.testing.assert_close(scores, F.similarity(**make(mask=hard, backend=backend)))
    F.similarity(**make(keep_prob=torch.full((B_V, N), 1 + 1e-7), backend=backend))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_pair_scores_nan_alone(backend: str, bad: float) -> None:
    clean = F.similarity(**make(backend=backend))
    for name, index, rows in (
        ("patches", (1, 2, 3), (1, slice(None))),
        ("logits", (1, 2, 1), (1, slice(None))),
        ("words", (2, 1, 0), (slice(None), 2)),
    ):
        arguments = make(backend=backend)
        arguments[name][index] = bad
        expected = clean.clone()
        expected[rows] = math.nan
        torch.testing.assert_close(F.similarity(**arguments), expected, equal_nan=True)
    arguments = make(backend=backend)
    arguments["words"][1, 1:] = bad  # padding
    torch.testing.assert_close(F.similarity(**arguments), clean)
    soft = torch.rand(B_V, B_T, N, generator=torch.Generator().manual_seed(1))
    expected = F.similarity(**make(mask=soft, backend=backend))
    soft[0, 1, 2], expected[0, 1] = bad, math.nan
    torch.testing.assert_close(F.similarity(**make(mask=soft, backend=backend)), expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_float64_for_float64_and_float32_for_the_rest(backend: str, dtype: torch.dtype) -> None:
    arguments = make(backend=backend, return_kept_fraction=True)
    half = {
        k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()
    }
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in F.similarity(**half)] == [expected, expected]


def test_half_precision_mixes_with_float32() -> None:
    arguments = make()
    mixed = arguments | {"logits": arguments["logits"].bfloat16()}
    rounded = arguments | {"logits": arguments["logits"].bfloat16().float()}
    assert torch.equal(F.similarity(**mixed), F.similarity(**rounded))


# ---- NumPy


def every_function(arguments: dict[str, Any]) -> dict[str, Any]:
    """The results of all functions, by name."""
    v, w, lengths, logits = (arguments[name] for name in ("patches", "words", "word_lengths", "logits"))
    scores = F.selection_scores(v, w, lengths)
    tokens, counts = F.calibrate_patches(v, logits, scores > 0, scores)
    pairs = arguments | {"words": w[:B_V], "word_lengths": lengths[:B_V]}
    aligned, alignment = F.align_patches_words(tokens, w, lengths, token_counts=counts)
    similarity, kept_fraction = F.similarity(**arguments, return_kept_fraction=True)
    return {
        "selection_scores": scores,
        "select_patches": F.select_patches(v, w, lengths, 0.5),
        "tokens": tokens,
        "counts": counts,
        "aligned": aligned,
        "alignment": alignment,
        "similarity": similarity,
        "kept_fraction": kept_fraction,
        "similarity_pairwise": F.similarity_pairwise(**pairs),
        "max_sim": F.max_sim(v, w, lengths),
    }


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4"])
def test_arrays_in_arrays_out(backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_BACKEND", backend)
    rounded = {
        k: x.astype(dtype) if k in ("patches", "words", "logits") else x for k, x in as_arrays(make()).items()
    }
    tensors = {k: torch.tensor(x.astype(x.dtype.newbyteorder("="))) if isinstance(x, np.ndarray) else x
               for k, x in rounded.items()}  # fmt: skip
    expected = every_function(tensors)
    for name, result in every_function(rounded).items():
        assert isinstance(result, np.ndarray), name
        assert np.array_equal(result, expected[name].numpy()), name


def test_read_only_and_strided_arrays_pass_without_a_warning() -> None:
    arrays = as_arrays(make())
    expected = F.similarity(**arrays)
    for name in ("patches", "words", "logits"):
        arrays[name] = arrays[name][::-1].copy()[::-1]
        arrays[name].flags.writeable = False
    arrays["word_lengths"].flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(F.similarity(**arrays), expected)


def test_arrays_beside_tensors_give_tensors() -> None:
    arguments = make()
    mixed = arguments | {"patches": arguments["patches"].numpy()}
    assert torch.equal(F.similarity(**mixed), F.similarity(**arguments))


def test_optional_arrays_are_arrays_too() -> None:
    extra = {"prefix": torch.ones(B_V, P, C), "mask": torch.arange(N).expand(B_V, B_T, N) % 2 == 0}
    result = F.similarity(**as_arrays(make(**extra)))
    assert np.array_equal(result, F.similarity(**make(**extra)).numpy())


# ---- backends


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of each call of `similarity` in the test."""
    record: list[str] = []
    native, portable = F._laps.similarity_forward, F.torch_backend.similarity
    monkeypatch.setattr(F._laps, "similarity_forward", lambda *a: (record.append("native"), native(*a))[1])
    monkeypatch.setattr(
        F.torch_backend, "similarity", lambda *a, **k: (record.append("torch"), portable(*a, **k))[1]
    )
    monkeypatch.delenv("LAPS_BACKEND", raising=False)
    return record


def test_backend_is_the_argument_then_the_environment_then_native(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    F.similarity(**make())
    F.similarity(**make(backend="torch"))
    monkeypatch.setenv("LAPS_BACKEND", "torch")
    F.similarity(**make())
    F.similarity(**make(backend="native"))
    F.similarity(**make(backend="auto"))
    assert calls == ["native", "torch", "torch", "native", "native"]


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_BACKEND", "fast")
    with pytest.raises(laps.LapsValueError, match="info: LAPS_BACKEND is unknown"):
        laps.info()
    with pytest.raises(laps.LapsValueError, match=r"similarity: LAPS_BACKEND is unknown .*got \'fast\'"):
        F.similarity(**make())


def test_native_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in make().items()}
    with pytest.raises(laps.LapsValueError, match='similarity: backend is "native", which runs on the CPU'):
        F.similarity(**arguments, backend="native")
    monkeypatch.setenv("LAPS_BACKEND", "native")
    with pytest.raises(laps.LapsValueError, match='max_sim: LAPS_BACKEND is "native"'):
        F.max_sim(arguments["patches"], arguments["words"], arguments["word_lengths"])


@pytest.mark.parametrize("form", ["released", "prefix", "paper", "bool_mask", "float_mask"])
def test_backends_agree(form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    extra: dict[str, Any] = {
        "released": {},
        "prefix": {"prefix": torch.randn(B_V, P, C, generator=generator)},
        "paper": {"keep_prob": torch.rand(B_V, N, generator=generator), "seed": 3},
        "bool_mask": {"mask": torch.rand(B_V, B_T, N, generator=generator) > 0.3},
        "float_mask": {"mask": torch.rand(B_V, B_T, N, generator=generator)},
    }[form]
    arguments = make(**extra, return_kept_fraction=True)
    for a, b in zip(
        F.similarity(**arguments, backend="native"), F.similarity(**arguments, backend="torch"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_stages_agree_between_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in make().items()
    }
    results = {}
    for backend in ("native", "torch"):
        monkeypatch.setenv("LAPS_BACKEND", backend)
        results[backend] = every_function(arguments)
    for name, result in results["native"].items():
        assert result.dtype == results["torch"][name].dtype, name
        torch.testing.assert_close(result, results["torch"][name], rtol=1e-10, atol=1e-10)


def test_stages_in_a_row_are_the_similarity() -> None:
    arguments = make()
    v, w, lengths, logits = (arguments[name] for name in ("patches", "words", "word_lengths", "logits"))
    scores = F.selection_scores(v, w, lengths)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(2, F.select_patches(v, w, lengths, 0.5), True)
    tokens, counts = F.calibrate_patches(v, logits, kept, scores)
    aligned, _ = F.align_patches_words(tokens, w, lengths, token_counts=counts)
    torch.testing.assert_close(aligned, F.similarity(**arguments), rtol=1e-5, atol=1e-5)


def test_stages_are_differentiable() -> None:
    arguments = make()
    v, w, lengths, logits = (arguments[name] for name in ("patches", "words", "word_lengths", "logits"))
    scores = F.selection_scores(v, w, lengths)
    assert not F.selection_scores(v.requires_grad_(), w, lengths).requires_grad
    tokens, counts = F.calibrate_patches(v, logits.requires_grad_(), scores > 0, scores)
    aligned, _ = F.align_patches_words(tokens, w.requires_grad_(), lengths, token_counts=counts)
    total = aligned.sum() + F.max_sim(v, w, lengths).sum()
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(total, (v, w, logits)))


# ---- without values


def test_fake_tensors_give_shapes() -> None:
    def operators(arguments: dict[str, Any]) -> list[Tensor]:
        v, w, lengths = (arguments[name] for name in ("patches", "words", "word_lengths"))
        pairs = arguments | {"words": w[:B_V], "word_lengths": lengths[:B_V]}
        return [
            *F.similarity(**arguments, return_kept_fraction=True),
            F.similarity_pairwise(**pairs),
            F.max_sim(v, w, lengths),
        ]

    expected = [(result.shape, result.dtype) for result in operators(make())]
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) if isinstance(x, Tensor) else x for k, x in make().items()}
        assert [(result.shape, result.dtype) for result in operators(fake)] == expected


def test_fake_tensors_are_refused_where_values_are_needed() -> None:
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) if isinstance(x, Tensor) else x for k, x in make().items()}
        with pytest.raises(laps.LapsTypeError, match="similarity: patches has no values"):
            F.similarity(**fake, backend="torch")
        with pytest.raises(laps.LapsTypeError, match="selection_scores: patches has no values"):
            F.selection_scores(fake["patches"], fake["words"], fake["word_lengths"])
    meta = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in make().items()}
    with pytest.raises(laps.LapsTypeError, match=r"similarity: patches has no values .*got a meta tensor"):
        F.similarity(**meta)


@pytest.mark.parametrize("name", ["patches", "words", "word_lengths", "logits"])
def test_a_fake_tensor_beside_real_ones_is_refused(name: str) -> None:
    arguments = make()
    arguments[name] = FakeTensorMode().from_tensor(arguments[name])
    with pytest.raises(laps.LapsTypeError, match=rf"similarity: {name} is a FakeTensor, but \w+ is none"):
        F.similarity(**arguments)


def test_stages_compile_to_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(every_function, fullgraph=True, backend="aot_eager")
    arguments = make()
    expected = every_function(arguments)
    for name, result in compiled(arguments).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)
