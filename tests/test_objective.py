"""The objective is the named loss, scaled in the warm-up, plus the ratio loss where patches are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import laps
import laps.compare
import pytest
import torch
from laps import LapsValueError, losses
from laps.objective import Objective
from torch import Tensor

IDS = torch.tensor([0, 1, 2, 1, 4])


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_hinge_takes_the_hardest_negatives_after_the_warm_up_and_all_of_them_within() -> None:
    objective, scores = Objective("hinge", margin=0.1), matrix()

    assert torch.equal(objective(scores, IDS)[0], losses.hinge_loss(scores, IDS, IDS, 0.1, hardest=True))
    every = losses.hinge_loss(scores, IDS, IDS, 0.1, hardest=False)
    torch.testing.assert_close(objective(scores, IDS, warmup=0.25)[0], every * 0.25)
    assert not torch.equal(every, objective(scores, IDS)[0])


def test_info_nce_learns_its_temperature() -> None:
    objective = Objective("info_nce", temperature=0.05)
    loss, values = objective(matrix(), IDS)
    loss.backward()
    (scale,) = objective.parameters()

    assert values["temperature"].item() == pytest.approx(0.05)
    assert scale.grad is not None
    assert scale.grad.item() != 0


def test_triplet_turns_scores_into_distances_by_their_bound() -> None:
    torch.manual_seed(0)
    ours = Objective("triplet", margin=0.3, max_score=1.0)(matrix(), IDS)[0]
    torch.manual_seed(0)
    expected = losses.distance_weighted_triplet_loss(matrix(), IDS, IDS, 0.3, max_score=1.0)
    torch.manual_seed(0)
    other = Objective("triplet", margin=0.3, max_score=2.0)(matrix(), IDS)[0]

    assert torch.equal(ours, expected)
    assert not torch.equal(ours, other)


def test_triplet_draws_no_negatives_beyond_its_cutoff() -> None:
    # At distances of 1.8: beyond the cutoff of Flickr30K, within that of COCO.
    scores = torch.eye(4) + (1 - 1.8**2 / 2) * (1 - torch.eye(4))
    ids, near = torch.arange(4), Objective("triplet", margin=2.0, max_score=1.0)
    far = Objective("triplet", margin=2.0, max_score=1.0, cutoff=1.9)

    assert near.cutoff == 1.7
    assert near(scores, ids)[0] == 0
    torch.testing.assert_close(far(scores, ids)[0], 8 * (2 - torch.tensor(1.8**2 / 2)))


def test_a_comparison_may_set_the_cutoff(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    row = "{name: HREM, head: hrem, options: {num_heads: 2}, loss: {name: triplet, cutoff: 1.9}}"
    file.write_text(f"title: COCO\nscenes: {{}}\nrows:\n  - {row}\n")
    comparison = laps.compare.read(file)
    head = laps.heads.build_head("hrem", embed_dim=8, num_patches=4, num_heads=2)
    objective = Objective.for_head(head, comparison.loss_of(comparison.rows[0]))
    assert (objective.name, objective.margin, objective.cutoff) == ("triplet", 0.2, 1.9)
    file.write_text(file.read_text().replace("1.9", "2.1"))
    # No distance is smaller: nothing would be trained.
    with pytest.raises(LapsValueError, match=r"cutoff is out of range .expected 0\.5 < cutoff <= 2"):
        Objective("triplet", cutoff=0.5)
    with pytest.raises(LapsValueError, match="cutoff is out of range"):
        laps.compare.read(file)


def test_the_ratio_loss_is_added_with_its_weight_and_not_scaled_by_the_warm_up() -> None:
    kept = torch.full((5, 5), 0.7)
    objective = Objective(ratio_weight=3.0)
    plain = objective(matrix(), IDS, warmup=0.5)[0]
    loss, values = objective(matrix(), IDS, warmup=0.5, kept_fraction=kept, selection_ratio=0.5)

    torch.testing.assert_close(loss - plain, torch.tensor(3.0 * 0.04))
    assert values["ratio_loss"].item() == pytest.approx(0.04)
    assert values["kept_fraction"].item() == pytest.approx(0.7)


def test_the_log_tells_positives_hardest_negatives_and_the_share_of_rows_in_order() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.8], [0.0, 0.5, 0.6]], requires_grad=True)
    _, values = Objective()(scores, torch.tensor([5, 6, 6]))

    # Rows 1 and 2 show the same image, so each has only caption 0 as a negative.
    assert values["positive"].item() == pytest.approx((0.9 + 0.2 + 0.6) / 3)
    assert values["negative"].item() == pytest.approx((0.2 + 0.3 + 0.0) / 3)
    assert values["accuracy"].item() == pytest.approx(2 / 3)
    assert all(value.dim() == 0 and not value.requires_grad for value in values.values())


@pytest.mark.parametrize("name", ["hinge", "triplet", "info_nce"])
def test_a_batch_of_one_image_or_one_pair_has_a_finite_loss(name: str) -> None:
    objective = Objective(name)
    for size in (1, 3):
        scores = torch.full((size, size), 0.2, requires_grad=True)
        loss, values = objective(scores, torch.zeros(size, dtype=torch.int64))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value) for value in values.values())
        assert scores.grad is not None
        assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "triplet", "margin": 0.3, "cutoff": 1.9},
        {"name": "info_nce", "temperature": 0.2, "ratio_weight": 0.0},
    ],
)
def test_an_objective_built_from_its_own_options_is_the_same(options: dict[str, Any]) -> None:
    objective = Objective(**options)
    again = Objective(**objective.options())

    assert again.options() == objective.options()
    assert options.items() <= objective.options().items()
    torch.manual_seed(1)
    first = objective(matrix(), IDS)[0]
    torch.manual_seed(1)
    assert torch.equal(again(matrix(), IDS)[0], first)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "contrastive"}, "hinge.*triplet.*info_nce.*contrastive"),
        ({"margin": -0.1}, "margin"),
        ({"name": "info_nce", "temperature": 0.0}, "temperature"),
        (
            {"name": "info_nce", "margin": 0.2},
            '"info_nce" has no margin .expected another loss, or no margin, got 0.2',
        ),
        ({"temperature": 0.07}, '"hinge" has no temperature'),
        ({"name": "triplet", "temperature": 0.07}, '"triplet" has no temperature'),
        ({"cutoff": 1.9}, '"hinge" has no cutoff'),
        ({"name": "info_nce", "cutoff": 1.9}, '"info_nce" has no cutoff'),
        ({"name": "triplet", "cutoff": 0.0}, "cutoff is out of range"),
        ({"ratio_weight": -1.0}, "ratio_weight"),
    ],
)
def test_an_option_out_of_its_range_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LapsValueError, match=match):
        Objective(**options)
