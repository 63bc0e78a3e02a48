"""A run that was killed, at whatever moment, goes on and ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _models import ENVIRONMENT, bert_tokenizer, scenes


def run(folder: Path, method: str, workers: int) -> dict[str, Any]:
    """What became of all the runs of _runs.py."""
    train_data, _ = scenes(folder / "scenes", dev=6)
    bert_tokenizer(train_data.captions).save(folder / "scenes" / "tokenizer.json")
    command = [sys.executable, "-c", "import _runs; _runs.main()", folder, folder / "scenes", method, workers]
    done = subprocess.run(
        [str(part) for part in command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module", params=[0, 2], ids=["no-workers", "two-workers"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = run(tmp_path_factory.mktemp("runs"), "fork", request.param)
    assert results["whole"] == 0
    return results


# Python 3.14 starts workers by a fork server, macOS by spawning: nothing of the trainer is inherited.
@pytest.fixture(scope="module", params=["forkserver", "spawn"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("runs"), request.param, 1)


def assert_same(run: dict[str, Any]) -> None:
    assert run["resumed"] == 0
    assert (run["same_weights"], run["same_best"], run["same_log"]) == (True, True, True)


def test_killed_in_mid_epoch_and_resumed_it_has_the_weights_of_an_uninterrupted_run(
    runs: dict[str, Any],
) -> None:
    run = runs["killed"]

    assert run["ended"] == -signal.SIGKILL
    assert (run["epoch"], run["batch"] % 4) == (0, 0)
    assert 4 <= run["batch"] < 12
    assert_same(run)


@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_signal_to_all_processes_of_the_run_ends_it_with_a_checkpoint(
    name: str, runs: dict[str, Any]
) -> None:
    assert_stopped(name, runs[name])
    assert runs[name]["epoch"] == 1
    assert_same(runs[name])


@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_signal_ends_it_with_a_checkpoint_however_its_workers_are_started(
    name: str, started: dict[str, Any]
) -> None:
    assert_stopped(name, started[name])


def assert_stopped(name: str, run: dict[str, Any]) -> None:
    number = {"terminated": signal.SIGTERM, "interrupted": signal.SIGINT}[name]

    assert run["ended"] == 3
    assert run["batches"] == 12 * run["epoch"] + run["batch"] >= 4
    assert run["message"].startswith(f"{int(number)} Trainer: {number.name} after step {run['step']}; ")


def test_a_signal_in_the_evaluation_ends_it_at_once_with_the_checkpoint_of_before(
    runs: dict[str, Any],
) -> None:
    run = runs["evaluating"]

    assert_stopped_in_evaluation(run)
    assert (run["resumed"], run["epochs"], run["same_weights"]) == (0, 2, True)


def test_a_signal_ends_an_evaluation_however_its_workers_are_started(started: dict[str, Any]) -> None:
    assert_stopped_in_evaluation(started["evaluating"])


def assert_stopped_in_evaluation(run: dict[str, Any]) -> None:
    assert run["ended"] == 3
    assert (run["epoch"], run["batch"], run["history"]) == (0, 12, 0)
    assert run["message"].startswith(f"15 Trainer: SIGTERM after step {run['step']}; the checkpoint is ")


def test_killed_again_and_again_while_it_writes_checkpoints_it_can_always_go_on(runs: dict[str, Any]) -> None:
    run = runs["often"]

    assert run["kills"] >= 3
    assert run["seen"] == sorted(run["seen"])
    assert run["seen"][0] > 0
    assert_same(run)
