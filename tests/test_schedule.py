"""The learning rates of a run."""

from __future__ import annotations

import pytest
from laps import LapsValueError
from laps.train_config import TrainConfig


def test_published_rates_fall_before_the_milestones_whatever_is_done() -> None:
    config = TrainConfig(milestones=(2, 4), gamma=0.5)
    assert [config.lr_scale(epoch, 0.7) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]


def test_one_cycle_rises_for_a_tenth_of_the_steps_and_falls_to_nothing() -> None:
    config = TrainConfig(schedule="one_cycle")
    scales = [config.lr_scale(0, done / 100) for done in range(1, 101)]

    assert scales[:10] == pytest.approx([done / 10 for done in range(1, 11)])
    assert scales[9:] == sorted(scales[9:], reverse=True)
    # Half-way down, at the cosine's middle.
    assert scales[54] == pytest.approx(0.5)
    assert scales[-1] == pytest.approx(0)


def test_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(LapsValueError, match=r"schedule.*one_cycle"):
        TrainConfig(schedule="cosine")
