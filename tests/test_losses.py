"""The losses equal plain double loops, for any caption-to-image map, and refuse what they cannot read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import laps
import numpy as np
import pytest
import torch
from laps import losses
from laps.losses import (
    InfoNCELoss,
    distance_weighted_triplet_loss,
    hinge_loss,
    info_nce_loss,
    ratio_loss,
)
from torch import Tensor
from torch.autograd import gradcheck

# Images of the rows, images of the columns.
MAPS: dict[str, tuple[list[int], list[int]]] = {
    "one_each": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "repeated_images": ([4, 7, 4, 7, 9], [4, 7, 4, 7, 9]),
    "five_each": ([0, 1, 2], [0] * 5 + [1] * 5 + [2] * 5),
    "ragged": ([3, 1, 8, 5], [1, 8, 8, 3, 5, 5, 5, 1, 3]),
    "captions_of_other_images": ([3, 1], [1, 6, 3, 6, 1]),
    "image_without_caption": ([3, 1, 2], [1, 3, 3, 1]),
    "more_images_than_captions": ([0, 1, 2, 0], [0, 2]),
    "one_image": ([5], [5, 5, 5]),
    "one_pair": ([5], [5]),
    "all_the_same": ([2, 2], [2, 2]),
}
every_map = pytest.mark.parametrize("ids", list(MAPS.values()), ids=list(MAPS))
Ids = tuple[list[int], list[int]]


def make_scores(ids: Ids, *, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """Scores (B_v, B_t) in [-1.8, 2], as the sum of two directions has them."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3.8 * torch.rand(len(ids[0]), len(ids[1]), generator=generator, dtype=torch.float64) - 1.8
    return scores.requires_grad_(requires_grad)


def positives(ids: Ids) -> list[tuple[int, int]]:
    rows, columns = ids
    if len(rows) == len(columns):
        return [(i, i) for i in range(len(rows))]
    return [(i, t) for i in range(len(rows)) for t in range(len(columns)) if rows[i] == columns[t]]


def negatives(ids: Ids, i: int, t: int) -> tuple[list[int], list[int]]:
    """Columns that are negatives of row i, rows that are negatives of column t."""
    rows, columns = ids
    return (
        [u for u in range(len(columns)) if columns[u] != rows[i]],
        [j for j in range(len(rows)) if rows[j] != columns[t]],
    )


# ---- hinge


def hinge_by_loops(scores: Tensor, ids: Ids, margin: float, hardest: bool) -> float:
    total = 0.0
    for i, t in positives(ids):
        columns, rows = negatives(ids, i, t)
        for others in ([scores[i, u] for u in columns], [scores[j, t] for j in rows]):
            hinges = [max(0.0, margin + float(other) - float(scores[i, t])) for other in others]
            total += (max(hinges) if hardest else sum(hinges)) if hinges else 0.0
    return total


@every_map
@pytest.mark.parametrize("hardest", [True, False], ids=["hardest", "all"])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5])
def test_hinge_equals_the_loops(ids: Ids, hardest: bool, margin: float) -> None:
    scores = make_scores(ids)
    expected = hinge_by_loops(scores, ids, margin, hardest)
    assert hinge_loss(scores, *ids, margin, hardest).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    mean = hinge_loss(scores, *ids, margin, hardest, reduction="mean").item()
    assert mean == pytest.approx(expected / len(positives(ids)), rel=1e-12, abs=1e-12)


def test_a_collapsed_model_pays_two_margins_per_pair() -> None:
    ids = torch.arange(128)
    assert hinge_loss(torch.ones(128, 128), ids, ids).item() == pytest.approx(51.2, rel=1e-6)


def test_captions_of_the_same_image_are_no_negatives_in_a_square_batch() -> None:
    scores = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    assert hinge_loss(scores, [7, 7], [7, 7]) == 0
    assert hinge_loss(scores, [7, 7], [7, 7], hardest=False) == 0
    assert hinge_loss(scores, [7, 8], [7, 8]).item() == pytest.approx(4 * 8.2)


# ---- distance-weighted triplets


def log_weight_by_hand(
    score: float, *, max_score: float, dim: int, min_distance: float
) -> tuple[float, float]:
    """The log weight of a pair, and its distance."""
    cosine = min(1.0, max(-1.0, score / max_score))
    distance = max(math.sqrt(2 - 2 * cosine), min_distance)
    return (2 - dim) * math.log(distance) - (dim - 3) / 2 * math.log(
        max(1 - distance**2 / 4, 1e-12)
    ), distance


@every_map
@pytest.mark.parametrize(("dim", "max_score", "cutoff"), [(512, 2.0, 1.7), (8, 1.0, 1.9), (64, 2.0, 1.2)])
def test_weights_equal_the_loops(ids: Ids, dim: int, max_score: float, cutoff: float) -> None:
    scores = make_scores(ids)
    match = torch.tensor([[row == column for column in ids[1]] for row in ids[0]])
    actual = losses._log_weights(scores / max_score, match, dim, 0.5, cutoff)
    for i in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            expected, distance = log_weight_by_hand(
                float(scores[i, t]), max_score=max_score, dim=dim, min_distance=0.5
            )
            if match[i, t] or distance >= cutoff:
                expected = -math.inf
            assert float(actual[i, t]) == pytest.approx(expected, rel=1e-9)


def triplets_by_loops(
    scores: Tensor, ids: Ids, margin: float, choose: Callable[[list[float]], float]
) -> float:
    """The loss, given how a negative is chosen among the scores of those nearer than the cutoff."""
    total = 0.0
    for i, t in positives(ids):
        columns, rows = negatives(ids, i, t)
        for others in ([scores[i, u] for u in columns], [scores[j, t] for j in rows]):
            near = [
                float(other)
                for other in others
                if log_weight_by_hand(float(other), max_score=2.0, dim=512, min_distance=0.5)[1] < 1.7
            ]
            if near:
                total += max(0.0, margin + choose(near) - float(scores[i, t]))
    return total


@every_map
def test_triplets_lie_between_the_best_and_the_worst_choice(ids: Ids) -> None:
    scores = make_scores(ids)
    lowest, highest = (triplets_by_loops(scores, ids, 0.2, choose) for choose in (min, max))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        loss = distance_weighted_triplet_loss(scores, *ids, generator=generator).item()
        assert lowest - 1e-9 <= loss <= highest + 1e-9


def test_triplets_with_one_candidate_equal_the_loops() -> None:
    # Two images and two captions: there is one negative each way.
    for seed in range(10):
        ids = ([3, 8], [3, 8])
        scores = make_scores(ids, seed=seed)
        expected = triplets_by_loops(scores, ids, 0.2, lambda near: near[0])
        actual = distance_weighted_triplet_loss(scores, *ids).item()
        assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)
        mean = distance_weighted_triplet_loss(scores, *ids, reduction="mean").item()
        assert mean == pytest.approx(expected / 2, rel=1e-12, abs=1e-12)


def test_negatives_are_drawn_with_the_stated_probabilities() -> None:
    # One image, its caption, three others, in a low dimension where no weight dominates.
    scores = torch.tensor([[0.0, 1.0, 0.5, -0.5]], dtype=torch.float64)
    ids = ([0], [0, 1, 2, 3])
    log_weights = [
        log_weight_by_hand(float(s), max_score=2.0, dim=6, min_distance=0.5)[0] for s in scores[0, 1:]
    ]
    expected = torch.tensor(log_weights).softmax(0)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        distance_weighted_triplet_loss(scores, *ids, margin=1.0, dim=6, generator=generator).item()
        for _ in range(2000)
    ]
    for score, probability in zip(scores[0, 1:], expected, strict=True):
        share = sum(math.isclose(loss, 1.0 + float(score)) for loss in drawn) / len(drawn)
        # Four standard deviations of 2000 draws.
        assert share == pytest.approx(float(probability), abs=4 * math.sqrt(0.25 / 2000))


def test_the_hardest_negatives_of_laps_scores_can_be_drawn() -> None:
    # At S = 1.9 the unscaled sqrt(2 - 2 S) is NaN.
    scores = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    assert distance_weighted_triplet_loss(scores, [0, 1], [0, 1]).item() == pytest.approx(4 * 0.1, rel=1e-5)
    beyond = torch.tensor([[2.5, 2.4], [2.4, 2.5]])
    assert distance_weighted_triplet_loss(beyond, [0, 1], [0, 1]).item() == pytest.approx(4 * 0.1, rel=1e-5)


def test_far_negatives_are_never_drawn() -> None:
    scores = torch.tensor([[2.0, -1.9], [-1.9, 2.0]])
    assert distance_weighted_triplet_loss(scores, [0, 1], [0, 1], margin=9.0) == 0


def test_draws_repeat_with_the_generator() -> None:
    ids = MAPS["ragged"]
    scores = make_scores(ids)

    def draw(seed: int) -> Tensor:
        return distance_weighted_triplet_loss(
            scores, *ids, dim=8, cutoff=2.0, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(1), draw(1))
    assert len({draw(seed).item() for seed in range(8)}) > 1
    torch.manual_seed(3)
    first = distance_weighted_triplet_loss(scores, *ids, dim=8, cutoff=2.0)
    torch.manual_seed(3)
    assert torch.equal(distance_weighted_triplet_loss(scores, *ids, dim=8, cutoff=2.0), first)


# ---- InfoNCE


def info_nce_by_loops(scores: Tensor, ids: Ids, temperature: float) -> float:
    total = 0.0
    for matrix, rows, columns in ((scores, *ids), (scores.T, ids[1], ids[0])):
        terms = []
        for i, row in enumerate(rows):
            logits = [float(score) / temperature for score in matrix[i]]
            log_sum = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
            own = [logits[t] - log_sum for t, column in enumerate(columns) if column == row]
            if own:
                terms.append(-sum(own) / len(own))
        total += sum(terms) / len(terms) / 2
    return total


@every_map
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_equals_the_loops(ids: Ids, temperature: float) -> None:
    scores = make_scores(ids)
    expected = info_nce_by_loops(scores, ids, temperature)
    actual = info_nce_loss(scores, *ids, temperature=temperature).item()
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_info_nce_of_one_positive_each_is_cross_entropy() -> None:
    scores = make_scores(MAPS["one_each"])
    target = torch.arange(4)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(scores / 0.1, target) + cross_entropy(scores.T / 0.1, target)) / 2
    torch.testing.assert_close(info_nce_loss(scores, *MAPS["one_each"], temperature=0.1), expected)


def test_the_temperature_is_learned_and_bounded() -> None:
    module = InfoNCELoss()
    assert module.temperature == pytest.approx(0.07)
    assert dict(module.named_parameters()).keys() == {"log_scale"}
    scores, ids = make_scores(MAPS["one_each"]), MAPS["one_each"]
    loss = module(scores, *ids)
    torch.testing.assert_close(loss, info_nce_loss(scores, *ids, temperature=0.07), rtol=1e-6, atol=1e-6)
    loss.backward()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.abs() > 0
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    module.zero_grad()
    module(scores, *ids).backward()
    assert module.temperature == pytest.approx(0.01)
    assert module.log_scale.item() == pytest.approx(math.log(100))
    # At the bound the gradient must live on, or the temperature would be stuck there.
    assert module.log_scale.grad.abs() > 0
    assert "temperature=0.01" in repr(module)
    assert torch.equal(copy.deepcopy(module)(scores, *ids), module(scores, *ids))


# ---- ratio


def test_ratio_loss_is_the_mean_squared_difference() -> None:
    kept = make_scores(MAPS["ragged"]).abs() / 2
    expected = sum((0.5 - float(fraction)) ** 2 for fraction in kept.flatten()) / kept.numel()
    assert ratio_loss(kept, 0.5).item() == pytest.approx(expected, rel=1e-12)
    assert ratio_loss(torch.full((7,), 0.25), 0.25) == 0


# ---- all of them

LOSSES: dict[str, Callable[..., Tensor]] = {
    "hinge": hinge_loss,
    "hinge_all": lambda *args: hinge_loss(*args, hardest=False),
    "hinge_mean": lambda *args: hinge_loss(*args, reduction="mean"),
    "triplet": lambda *args: distance_weighted_triplet_loss(
        *args, generator=torch.Generator().manual_seed(0)
    ),
    "info_nce": info_nce_loss,
    "info_nce_module": lambda *args: InfoNCELoss().double()(*args),
}
every_loss = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


@every_loss
@every_map
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Tensor], ids: Ids) -> None:
    assert gradcheck(lambda scores: loss(scores, *ids), make_scores(ids, requires_grad=True))


def test_gradients_of_temperature_and_kept_fraction_are_those_of_finite_differences() -> None:
    scores, ids = make_scores(MAPS["ragged"], requires_grad=True), MAPS["ragged"]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s, tau: info_nce_loss(s, *ids, temperature=tau), (scores, temperature))
    assert gradcheck(lambda kept: ratio_loss(kept, 0.5), scores)


@every_loss
@every_map
def test_half_precision_and_missing_negatives_give_no_nan(loss: Callable[..., Tensor], ids: Ids) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scores = make_scores(ids).to(dtype).requires_grad_()
        result = loss(scores, *ids)
        (gradient,) = torch.autograd.grad(result, scores)
        assert result.dim() == 0
        assert bool(result.isfinite())
        assert bool(gradient.isfinite().all())


@every_loss
def test_a_nan_score_reaches_the_loss(loss: Callable[..., Tensor]) -> None:
    for index in ((0, 0), (0, 1)):
        scores = make_scores(MAPS["one_each"])
        scores[index] = math.nan
        assert bool(loss(scores, *MAPS["one_each"]).isnan())


@every_loss
def test_ids_come_as_list_array_or_tensor_of_any_integer_type(loss: Callable[..., Tensor]) -> None:
    rows, columns = MAPS["ragged"]
    scores = make_scores((rows, columns))
    expected = loss(scores, rows, columns)
    assert torch.equal(loss(scores, np.array(rows), np.array(columns, dtype=np.uint8)), expected)
    assert torch.equal(loss(scores, torch.tensor(rows, dtype=torch.int32), torch.tensor(columns)), expected)


@pytest.mark.parametrize(
    "loss", [hinge_loss, info_nce_loss, InfoNCELoss()], ids=["hinge", "info_nce", "module"]
)
def test_compiles_to_one_graph(loss: Callable[..., Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name in ("one_each", "ragged"):
        rows, columns = map(torch.tensor, MAPS[name])
        scores = make_scores(MAPS[name], requires_grad=True)
        torch.testing.assert_close(compiled(scores, rows, columns), loss(scores, rows, columns))


S, I = torch.zeros(2, 2), [0, 1]  # noqa: E741

BAD: list[tuple[Callable[[], Any], type[laps.LapsError], str]] = [
    (lambda: hinge_loss(torch.zeros(4), I, I), laps.LapsValueError, "hinge_loss: scores has the wrong rank"),
    (lambda: hinge_loss(S.numpy(), I, I), laps.LapsTypeError, "hinge_loss: scores is no tensor"),
    (lambda: hinge_loss(S.long(), I, I), laps.LapsTypeError, "hinge_loss: scores has the wrong dtype"),
    (lambda: hinge_loss(S[:0], [], I), laps.LapsValueError, "hinge_loss: scores has B_v=0"),
    (
        lambda: hinge_loss(S, [0, 1, 2], I),
        laps.LapsValueError,
        "hinge_loss: image_ids does not fit scores (expected shape (2,), one id per row, got (3,))",
    ),
    (
        lambda: hinge_loss(S, I, torch.zeros(2, 1).long()),
        laps.LapsValueError,
        "hinge_loss: caption_image_ids does not fit scores (expected shape (2,), one id per column, got",
    ),
    (lambda: hinge_loss(S, [0.0, 1.0], I), laps.LapsTypeError, "hinge_loss: image_ids has the wrong dtype"),
    (lambda: hinge_loss(S, ["a", "b"], I), laps.LapsTypeError, "hinge_loss: image_ids is no list of"),
    (
        lambda: hinge_loss(S, [0, 1], [0, 2]),
        laps.LapsValueError,
        "hinge_loss: caption_image_ids[1] differs from image_ids[1], but scores is square",
    ),
    (
        lambda: hinge_loss(S, [0, 1], [2, 3]),
        laps.LapsValueError,
        "hinge_loss: caption_image_ids has no id in common with image_ids",
    ),
    (lambda: hinge_loss(S, I, I, margin=-0.1), laps.LapsValueError, "hinge_loss: margin is out of range"),
    (lambda: hinge_loss(S, I, I, margin=math.nan), laps.LapsValueError, "hinge_loss: margin is out of range"),
    (lambda: hinge_loss(S, I, I, reduction="max"), laps.LapsValueError, "hinge_loss: reduction is unknown"),
    (lambda: hinge_loss(S, I, I, hardest=2), laps.LapsTypeError, "hinge_loss: hardest is no flag"),
    (
        lambda: distance_weighted_triplet_loss(S, I, I, max_score=0),
        laps.LapsValueError,
        "distance_weighted_triplet_loss: max_score is out of range",
    ),
    (
        lambda: distance_weighted_triplet_loss(S, I, I, dim=3),
        laps.LapsValueError,
        "distance_weighted_triplet_loss: dim is out of range",
    ),
    (
        lambda: distance_weighted_triplet_loss(S, I, I, cutoff=2.5),
        laps.LapsValueError,
        "distance_weighted_triplet_loss: cutoff is out of range",
    ),
    (
        lambda: distance_weighted_triplet_loss(S, I, [3, 4]),
        laps.LapsValueError,
        "distance_weighted_triplet_loss: caption_image_ids has no id in common",
    ),
    (
        lambda: info_nce_loss(S, I, I, temperature=0),
        laps.LapsValueError,
        "info_nce_loss: temperature is out of range",
    ),
    (
        lambda: info_nce_loss(S, I, I, temperature=torch.tensor(-1.0)),
        laps.LapsValueError,
        "info_nce_loss: temperature is out of range",
    ),
    (
        lambda: info_nce_loss(S, I, I, temperature=torch.ones(2)),
        laps.LapsValueError,
        "info_nce_loss: temperature has the wrong rank",
    ),
    (lambda: InfoNCELoss(-1), laps.LapsValueError, "InfoNCELoss: temperature is out of range"),
    (lambda: InfoNCELoss(2), laps.LapsValueError, "InfoNCELoss: temperature is out of range"),
    (
        lambda: InfoNCELoss(0.005),
        laps.LapsValueError,
        "InfoNCELoss: temperature is out of range (expected 0.01 <= temperature <= 1, got 0.005",
    ),
    (
        lambda: InfoNCELoss(0.05, max_scale=10),
        laps.LapsValueError,
        "InfoNCELoss: temperature is out of range (expected 0.1 <= temperature <= 1, got 0.05",
    ),
    (lambda: InfoNCELoss(max_scale=0.5), laps.LapsValueError, "InfoNCELoss: max_scale is out of range"),
    (lambda: ratio_loss(S, 0.0), laps.LapsValueError, "ratio_loss: ratio is out of range"),
    (lambda: ratio_loss(S[:0], 0.5), laps.LapsValueError, "ratio_loss: kept_fraction is empty"),
    (lambda: ratio_loss(S.long(), 0.5), laps.LapsTypeError, "ratio_loss: kept_fraction has the wrong dtype"),
    (lambda: ratio_loss(0.5, 0.5), laps.LapsTypeError, "ratio_loss: kept_fraction is no tensor"),
]


@pytest.mark.parametrize(("function", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input_is_refused_by_name(
    function: Callable[[], Any], error: type[laps.LapsError], message: str
) -> None:
    with pytest.raises(error) as caught:
        function()
    assert str(caught.value).startswith(message)
