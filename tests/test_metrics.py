"""The metrics equal a slow plain loop, for any caption-to-image map, and refuse what they cannot rank."""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laps import LapsTypeError, LapsValueError, ranking
from laps.metrics import fold_metrics, ranks, retrieval_metrics
from numpy.typing import NDArray

FIVE_EACH = [0] * 5 + [1] * 5 + [2] * 5


# ---- the oracle


def ranks_by_loops(scores: NDArray[Any], image_of: Sequence[int]) -> tuple[list[int], list[int]]:
    i2t, t2i = [], []
    for i in range(len(scores)):
        own = [t for t in range(len(image_of)) if image_of[t] == i]
        others = [t for t in range(len(image_of)) if image_of[t] != i]
        if not own:
            i2t.append(0)
            continue
        best = max(scores[i, t] for t in own)
        i2t.append(1 + sum(bool(scores[i, t] >= best) for t in others))
    for t, image in enumerate(image_of):
        t2i.append(1 + sum(bool(scores[i, t] >= scores[image, t]) for i in range(len(scores)) if i != image))
    return i2t, t2i


def fraction_by_loops(scores: NDArray[Any], image_of: Sequence[int], k: int) -> float:
    """Sort each row with every non-relevant caption before the relevant ones of the same score."""
    fractions = []
    for i in range(len(scores)):
        ranking = [t for _, _, t in sorted((-scores[i, t], own == i, t) for t, own in enumerate(image_of))]
        own = [t for t in ranking if image_of[t] == i]
        if own:
            fractions.append(len([t for t in ranking[:k] if t in own]) / len(own))
    return 100.0 * statistics.fmean(fractions)


def metrics_by_loops(scores: NDArray[Any], image_of: Sequence[int]) -> dict[str, float]:
    i2t, t2i = ranks_by_loops(scores, image_of)
    i2t = [rank for rank in i2t if rank]
    result = {}
    for name, found in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = 100.0 * statistics.fmean(rank <= k for rank in found)
        result[f"{name}_medr"] = statistics.median(found)
        result[f"{name}_meanr"] = statistics.fmean(found)
    result["rsum"] = sum(value for name, value in result.items() if name[4] == "r")
    for k in (1, 5, 10):
        result[f"i2t_fraction_r{k}"] = fraction_by_loops(scores, image_of, k)
    return result


def make_scores(images: int, captions: int, *, seed: int = 0) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = np.random.default_rng(seed).random((images, captions), dtype=np.float32)
    return scores


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[int]]:
    """Images with 0 to 7 captions in any order, and scores with many ties."""
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any))
    image_of = [image for image, count in enumerate(counts) for _ in range(count)]
    image_of = draw(st.permutations(image_of))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = generator.integers(levels, size=(len(counts), len(image_of))).astype(np.float32)
    return scores - levels / 2, image_of


# ---- equal to the oracle


@given(problems())
@settings(max_examples=150, deadline=None)
def test_metrics_equal_plain_loops_for_any_map(problem: tuple[NDArray[np.float32], list[int]]) -> None:
    scores, image_of = problem
    assert retrieval_metrics(scores, image_of) == pytest.approx(metrics_by_loops(scores, image_of))
    i2t, t2i = ranks(scores, image_of)
    assert (i2t.tolist(), t2i.tolist()) == ranks_by_loops(scores, image_of)


@given(problems(), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_the_size_of_row_blocks_changes_nothing(
    problem: tuple[NDArray[np.float32], list[int]], elements: int
) -> None:
    scores, image_of = problem
    expected = retrieval_metrics(scores, image_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK_ELEMENTS", elements)
        assert retrieval_metrics(scores, image_of) == expected


def test_keys_and_their_order() -> None:
    assert list(retrieval_metrics(make_scores(3, 15), FIVE_EACH)) == [
        *("i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr", "i2t_meanr"),
        *("t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "t2i_meanr"),
        *("rsum", "i2t_fraction_r1", "i2t_fraction_r5", "i2t_fraction_r10"),
    ]


def test_a_perfect_matrix_has_rsum_600_and_rank_one() -> None:
    found = retrieval_metrics(np.eye(30)[:, np.repeat(np.arange(30), 5)], np.repeat(np.arange(30), 5))
    assert (found["rsum"], found["i2t_meanr"], found["t2i_medr"]) == (600.0, 1.0, 1.0)
    # Five captions do not fit in the first one: at least one hit, but a fifth of the captions.
    assert (found["i2t_r1"], found["i2t_fraction_r5"]) == (100.0, 100.0)
    assert found["i2t_fraction_r1"] == pytest.approx(20.0)


@pytest.mark.parametrize(
    "make",
    [
        torch.from_numpy,
        lambda scores: torch.from_numpy(scores).double().requires_grad_(),
        lambda scores: torch.from_numpy(scores).T.contiguous().T,
        np.asfortranarray,
        lambda scores: scores.astype(">f8"),
        lambda scores: np.repeat(scores, 2, axis=0)[::2],
    ],
    ids=["tensor", "tensor_f64_grad", "tensor_transposed", "fortran", "big_endian", "strided"],
)
def test_every_kind_of_array_has_the_same_metrics(make: Any) -> None:
    scores, image_of = make_scores(4, 12), [3, 0, 1, 2, 2, 1, 0, 3, 3, 0, 1, 2]
    expected = retrieval_metrics(scores, image_of)
    assert retrieval_metrics(make(scores), image_of) == expected
    assert retrieval_metrics(make(scores), torch.tensor(image_of)) == expected
    assert retrieval_metrics(make(scores), np.array(image_of, dtype=np.uint8)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_rank_by_their_exact_values(dtype: torch.dtype) -> None:
    scores = (100 * torch.from_numpy(make_scores(4, 12))).to(dtype)
    image_of = [0, 1, 2, 3] * 3
    assert retrieval_metrics(scores, image_of) == retrieval_metrics(scores.double(), image_of)


# ---- pessimism


def test_equal_scores_are_the_worst_case_and_never_a_hit() -> None:
    i2t, t2i = ranks(np.zeros((20, 100), dtype=np.float32), np.repeat(np.arange(20), 5))
    assert set(i2t.tolist()) == {96}
    assert set(t2i.tolist()) == {20}


def test_a_duplicate_of_a_caption_that_belongs_to_another_image_counts_before_it() -> None:
    scores = make_scores(4, 4) + np.eye(4, dtype=np.float32)
    assert ranks(scores, [0, 1, 2, 3])[0].tolist() == [1, 1, 1, 1]
    duplicated = np.concatenate([scores, scores[:, :1]], axis=1)
    assert ranks(duplicated, [0, 1, 2, 3, 1])[0].tolist() == [2, 1, 1, 1]


def test_captions_of_the_same_image_do_not_compete() -> None:
    scores = np.array([[0.5, 0.5, 0.5, 0.4], [0.0, 0.0, 0.0, 0.9]])
    found = retrieval_metrics(scores, [0, 0, 0, 1])
    assert (found["i2t_meanr"], found["i2t_fraction_r5"]) == (1.0, 100.0)


def test_an_image_without_captions_asks_nothing_but_is_a_distractor() -> None:
    scores = np.array([[0.5, 0.1], [0.1, 0.5], [0.9, 0.2]])
    i2t, t2i = ranks(scores, [0, 1])
    assert (i2t.tolist(), t2i.tolist()) == ([1, 1, 0], [2, 1])
    found = retrieval_metrics(scores, [0, 1])
    assert (found["i2t_r1"], found["i2t_meanr"], found["t2i_r1"]) == (100.0, 1.0, 50.0)


# ---- folds


@pytest.mark.parametrize("shuffled", [False, True], ids=["in_order", "any_map"])
def test_folds_are_diagonal_blocks_cut_by_hand(shuffled: bool) -> None:
    images, folds = 40, 5
    image_of = np.repeat(np.arange(images), 5)
    if shuffled:
        np.random.default_rng(1).shuffle(image_of)
    scores = make_scores(images, len(image_of))
    parts = []
    for fold in range(folds):
        first, last = 8 * fold, 8 * fold + 8
        columns = [t for t, image in enumerate(image_of) if first <= image < last]
        parts.append(metrics_by_loops(scores[first:last][:, columns], [image_of[t] - first for t in columns]))
    expected = {name: statistics.fmean(part[name] for part in parts) for name in parts[0]}
    assert fold_metrics(scores, image_of, folds) == pytest.approx(expected)


def test_one_fold_is_the_whole_and_uneven_folds_cover_all_images() -> None:
    image_of = np.arange(7)
    scores = make_scores(7, 7)
    assert fold_metrics(scores, image_of, 1) == retrieval_metrics(scores, image_of)
    # Folds of 2, 2 and 3 images.
    parts = [retrieval_metrics(scores[a:b, a:b], np.arange(b - a)) for a, b in ((0, 2), (2, 4), (4, 7))]
    expected = {name: statistics.fmean(part[name] for part in parts) for name in parts[0]}
    assert fold_metrics(scores, image_of, 3) == pytest.approx(expected)


def test_folds_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        LapsValueError, match=r"folds is out of range \(expected 1 <= folds <= B_v=3, got 4\)"
    ):
        fold_metrics(make_scores(3, 15), FIVE_EACH, 4)
    with pytest.raises(LapsValueError, match=r"fold 1 \(images 1\.\.1\) has no captions"):
        fold_metrics(make_scores(3, 2), [0, 2], 3)
    with pytest.raises(LapsTypeError, match="folds is no integer"):
        fold_metrics(make_scores(3, 15), FIVE_EACH, 1.5)  # type: ignore[arg-type]


# ---- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [retrieval_metrics, ranks, fold_metrics])
def test_a_score_that_is_not_finite_is_refused_with_its_place(function: Any, value: float) -> None:
    scores = make_scores(6, 30)
    scores[4, 7] = scores[5, 1] = value
    place = rf"{function.__name__}: scores\[4, 7\] is not finite \(expected finite scores, got {value}\)"
    with pytest.raises(LapsValueError, match=place):
        function(scores, np.repeat(np.arange(6), 5))


def test_arguments_that_do_not_fit_are_named() -> None:
    scores = make_scores(3, 15)
    for wrong, message in (
        (
            FIVE_EACH[:-1],
            r"caption_to_image does not fit scores \(expected shape \(15,\), one image per column",
        ),
        (
            [*FIVE_EACH[:-1], 3],
            r"caption_to_image\[14\] is out of range \(expected 0 <= image < B_v=3, got 3\)",
        ),
        ([-1, *FIVE_EACH[1:]], r"caption_to_image\[0\] is out of range .*got -1\)"),
    ):
        with pytest.raises(LapsValueError, match=message):
            retrieval_metrics(scores, wrong)
    no_integers: list[Any] = [[0.0] * 15, ["a"] * 15, [[0], [0, 1]], None]
    for wrong in no_integers:
        with pytest.raises(LapsTypeError, match="caption_to_image"):
            retrieval_metrics(scores, wrong)
    for shape in ((15,), (3, 15, 1), (0, 15), (3, 0)):
        with pytest.raises(LapsValueError, match="scores has the wrong shape"):
            retrieval_metrics(np.zeros(shape), FIVE_EACH)
    for array in (
        scores.astype(complex),
        scores.astype(str),
        scores > 0,
        torch.zeros(3, 15, dtype=torch.cfloat),
    ):
        with pytest.raises(LapsTypeError, match="scores has the wrong dtype"):
            retrieval_metrics(array, FIVE_EACH)
    with pytest.raises(LapsTypeError, match="scores is no array"):
        retrieval_metrics([[1.0]], [0])  # type: ignore[arg-type]


# ---- memory


@pytest.mark.parametrize("function", [retrieval_metrics, fold_metrics])
def test_a_large_matrix_is_not_copied(function: Any) -> None:
    """2,000 x 10,000 scores are 76 MiB; a fold of five is 3 MiB, a block 16 MiB with its mask and copy."""
    scores, image_of = make_scores(2000, 10_000), np.repeat(np.arange(2000), 5)
    tracemalloc.start()
    try:
        function(scores, image_of)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20
