"""Figures: what they show is what the explanation holds."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import laps
import matplotlib as mpl
import numpy as np
import PIL.Image
import pytest
import torch
from _models import CAPTIONS, bert_tokenizer, tiny_laps
from laps import plot
from laps.explanation import Explanation
from matplotlib import pyplot
from matplotlib.axes import Axes

mpl.use("Agg")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def whys() -> list[Explanation]:
    model = tiny_laps(tokenizer=bert_tokenizer())
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    return [laps.explain(model, picture, caption) for caption in CAPTIONS]


def overlay(ax: Axes) -> np.ndarray[Any, Any]:
    """The colours of the patches."""
    return np.asarray(ax.images[1].get_array())


def test_dropped_patches_are_dark(whys: list[Explanation]) -> None:
    ax = plot.selection(whys[0])
    kept = whys[0].on_grid(whys[0].attribution.kept)
    np.testing.assert_array_equal(overlay(ax)[..., 3] > 0, ~kept)
    assert f"{kept.sum()} of 16 patches" in ax.get_title()
    left, right, bottom, top = ax.images[1].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(60 / 40), "the image's own proportions"


def test_fewer_patches_are_a_subset_of_more(whys: list[Explanation]) -> None:
    ratios = [1.0, 0.7, 0.5, 0.2]
    panels = plot.selections(whys[0], ratios=ratios)
    dark = [overlay(ax)[..., 3] > 0 for ax in panels]
    assert [int((~d).sum()) for d in dark] == [math.ceil(16 * ratio) for ratio in ratios]
    for more, fewer in itertools.pairwise(dark):
        assert (fewer >= more).all()
    # The model's own ratio is what the model keeps.
    np.testing.assert_array_equal(~dark[2], whys[0].on_grid(whys[0].attribution.kept))


def test_captions_side_by_side(whys: list[Explanation]) -> None:
    panels = plot.selections(whys)
    assert [ax.get_xlabel().replace("\n", " ") for ax in panels] == CAPTIONS
    with pytest.raises(laps.LapsValueError, match="ratios are of one explanation"):
        plot.selections(whys, ratios=[0.5])


def test_groups_have_their_colours_and_borders(whys: list[Explanation]) -> None:
    ax = plot.aggregation(whys[0])
    groups, paint = whys[0].on_grid(whys[0].attribution.groups), overlay(ax)
    for group in np.unique(groups):
        assert len(np.unique(paint[groups == group].reshape(-1, 4), axis=0)) == 1
    edges = (groups[1:] != groups[:-1]).sum() + (groups[:, 1:] != groups[:, :-1]).sum()
    assert len(ax.lines) == edges


def test_words_share_one_scale(whys: list[Explanation]) -> None:
    why = whys[1]
    panels = plot.word_maps(why, ["blue", "square", "star"])
    most = max(abs(word.patch_shares).max() for word in why.words if word.text in ("blue", "square", "star"))
    for ax, text in zip(panels, ("blue", "square", "star"), strict=True):
        word = next(word for word in why.words if word.text == text)
        strength = (overlay(ax)[..., 3] / 0.9) ** 2
        np.testing.assert_allclose(strength, abs(why.on_grid(word.patch_shares)) / most, atol=0.01)
        assert ax.get_title() == f"{text}  ({word.share:+.3f})"
    assert len(plot.word_maps(why)) == len(CAPTIONS[1].split())


def test_gradient_maps_and_positions(whys: list[Explanation]) -> None:
    ax = plot.word_map(whys[0], 2, kind="gradient")
    values = whys[0].on_grid(whys[0].words[2].map)
    np.testing.assert_allclose((overlay(ax)[..., 3] / 0.9) ** 2, values / values.max(), atol=0.01)
    with pytest.raises(laps.LapsValueError, match="no word 'zebra'"):
        plot.word_map(whys[0], "zebra")
    with pytest.raises(laps.LapsValueError, match="no such word"):
        plot.word_map(whys[0], 99)
    with pytest.raises(laps.LapsValueError, match="kind"):
        plot.word_map(whys[0], "red", kind="attention")


def test_alignment_marks_what_counts(whys: list[Explanation]) -> None:
    ax = plot.alignment(whys[0])
    at = whys[0].attribution
    rings = np.asarray(ax.collections[0].get_offsets()).astype(int)
    assert {(token, word) for word, token in rings} == set(zip(*np.nonzero(at.shares), strict=True))
    assert [label.get_text() for label in ax.get_yticklabels()] == whys[0].token_names


def test_axes_that_are_given_are_used(whys: list[Explanation]) -> None:
    figure, axes = pyplot.subplots(1, 2)
    assert plot.selection(whys[0], axes[0]) is axes[0]
    assert plot.word_maps(whys[0], ["red", "circle"], axes)[1] is axes[1]
    assert {ax.figure for ax in axes} == {figure}
    with pytest.raises(laps.LapsValueError, match=r"axes do not fit \(expected 3, got 2\)"):
        plot.selections(whys, axes)


def test_the_right_results_are_framed(whys: list[Explanation], tmp_path: Path) -> None:
    picture = whys[0].picture
    assert picture is not None
    file = tmp_path / "a.png"
    picture.save(file)
    panels = plot.retrieval_grid("a $5 note", [file, picture], scores=[1.5, 1.0], right=[False, True])
    visible = [[spine.get_visible() for spine in ax.spines.values()] for ax in panels]
    assert visible == [[False] * 4, [False] * 4, [True] * 4]
    assert panels[2].get_title() == "2  (1.000)  right"
    panels[0].figure.savefig(tmp_path / "grid.pdf")  # type: ignore[union-attr]
    assert (tmp_path / "grid.pdf").stat().st_size > 1000
    plot.retrieval_grid(file, ["a sentence", "another"])
    with pytest.raises(laps.LapsValueError, match="right does not fit"):
        plot.retrieval_grid("a", [file], right=[True, False])
    with pytest.raises(laps.LapsTypeError, match="an item"):
        plot.retrieval_grid("a", [7])  # type: ignore[list-item]


def test_curves_of_several_trainings(tmp_path: Path) -> None:
    history = [{"epoch": e, "loss": 3.0 - e, "rsum": 100.0 + e} for e in range(3)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    loss, rsum = plot.training_curves({"ours": log, "theirs": history[:2]})
    assert [len(line.get_xdata()) for line in loss.lines] == [3, 2]  # type: ignore[arg-type]
    np.testing.assert_array_equal(rsum.lines[0].get_ydata(), [100, 101, 102])
    styles = {(line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(styles) == 2
    with pytest.raises(laps.LapsValueError, match="no epoch has 'speed'"):
        plot.training_curves(history, names=["speed"])
    with pytest.raises(laps.LapsValueError, match="cannot be read"):
        plot.training_curves(tmp_path / "nowhere.jsonl")


def test_features_without_a_picture_are_drawn_on_grey() -> None:
    model = tiny_laps(tokenizer=bert_tokenizer())
    images = model.encode_image(torch.randn(1, 3, 32, 32))
    why = laps.explain(model, images, CAPTIONS[0])
    assert plot.selection(why).images[0].get_array().shape[2] == 3  # type: ignore[union-attr]
