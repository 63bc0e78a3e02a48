"""A run that was killed, at whatever moment, goes on and ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from _models import ENVIRONMENT, TESTS, bert_tokenizer, scenes


@pytest.fixture(scope="module", params=[0, 2], ids=["no-workers", "two-workers"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    train_data, _ = scenes(folder / "scenes", dev=6)
    bert_tokenizer(train_data.captions).save(folder / "scenes" / "tokenizer.json")
    command = [
        sys.executable,
        str(TESTS / "_runs.py"),
        str(folder),
        str(folder / "scenes"),
        str(request.param),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert results["whole"] == 0, done.stderr
    return results


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
    run, number = runs[name], {"terminated": signal.SIGTERM, "interrupted": signal.SIGINT}[name]

    assert run["ended"] == 3
    assert run["epoch"] == 1
    assert run["step"] == 12 + run["batch"]
    assert run["message"].startswith(f"{int(number)} Trainer: {number.name} after step {run['step']}; ")
    assert_same(run)


def test_killed_again_and_again_while_it_writes_checkpoints_it_can_always_go_on(runs: dict[str, Any]) -> None:
    run = runs["often"]

    assert run["kills"] >= 3
    assert run["seen"] == sorted(run["seen"])
    assert run["seen"][0] > 0
    assert_same(run)
