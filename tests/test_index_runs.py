"""An index survives whatever ends the process that writes to it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from _models import ENVIRONMENT
from laps.data import make_scenes

IMAGES = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    make_scenes(
        folder / "scenes",
        num_train=IMAGES,
        num_dev=0,
        num_test=0,
        image_size=40,
        captions_per_image=1,
        workers=1,
        progress=False,
    )
    answer = subprocess.run(
        [sys.executable, "-c", "import _index_runs; _index_runs.main()", folder, folder / "scenes/images"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two indexes give the same images the same scores, to rounding of other batches."""
    return one["images"] == other["images"] and all(
        mine == pytest.approx(theirs, abs=1e-4)
        for mine, theirs in zip(one["hits"], other["hits"], strict=True)
    )


def part(one: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether an index has some of the images of another, with their scores."""
    return bool(one["ok"]) and all(
        mine == pytest.approx({path: theirs[path] for path in mine}, abs=1e-4) and len(mine) == one["images"]
        for mine, theirs in zip(one["hits"], whole["hits"], strict=True)
    )


def test_a_run_that_is_not_disturbed_encodes_all(runs: dict[str, Any]) -> None:
    status, found = runs["whole"]
    assert (status, found["images"], found["ok"]) == (0, IMAGES, True)


def test_killed_at_any_moment_an_index_can_be_searched_and_is_completed(runs: dict[str, Any]) -> None:
    killed, (_, whole) = runs["killed"], runs["whole"]

    assert killed["kills"] >= 3
    assert all(part(each, whole) for each in killed["seen"])
    sizes = [each["images"] for each in killed["seen"]]
    assert sizes == sorted(sizes)
    assert same(killed["found"], whole)
    assert killed["found"]["ok"]


@pytest.mark.parametrize(("name", "status"), [("terminated", 143), ("interrupted", 130)])
def test_told_to_stop_a_run_keeps_what_it_has_encoded(runs: dict[str, Any], name: str, status: int) -> None:
    run, (_, whole) = runs[name], runs["whole"]

    assert run["ended"] == status
    # Less than a shard: it was written because of the signal.
    assert 0 < run["began"]["images"] < IMAGES
    assert part(run["began"], whole)
    assert run["last"] == 0
    assert same(run["found"], whole)


def test_a_second_writer_is_refused_and_a_reader_is_not(runs: dict[str, Any]) -> None:
    two, (_, whole) = runs["two"], runs["whole"]

    assert (two["first"], two["second"]) == (0, 2)
    assert part(two["reading"], whole)
    assert same(two["found"], whole)
