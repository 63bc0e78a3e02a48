"""Two processes with half a batch each compute what one computes with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import ENVIRONMENT, TESTS
from _ranks import cases
from _step_cases import assert_same, gradients, joint_batch, model_with
from _torchrun import torchrun
from laps.distributed import Ranks
from laps.step import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What two ranks computed."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    torchrun(TESTS / "_ranks.py", out)
    return torch.load(out), json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize("name", list(cases()))
def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(name: str, found: tuple[Any, Any]) -> None:
    case = cases()[name]
    model = model_with(case.get("head", "laps"), case.get("objective"))
    if case.get("frozen"):
        model.freeze_backbones()
    expected = gradients(TrainingStep(model), joint_batch(dense=True), **case.get("call", {}))
    assert_same(found[0][name], expected)


def test_ranks_that_talk_in_the_last_batch_alone_accumulate_the_same(found: tuple[Any, Any]) -> None:
    step = TrainingStep(model_with("laps"))
    for first, last in [(0, 4), (4, 10)]:
        step(joint_batch().part(first, last), scale=0.5)
    for name, parameter in step.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[0]["accumulated"][name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_ranks_share_what_they_know(found: tuple[Any, Any]) -> None:
    assert found[1] == [
        {"objects": [0, 1], "on_main": "of rank 0", "part": [0, 3]},
        {"objects": [0, 1], "on_main": "of rank 0", "part": [3, 7]},
    ]


def test_without_a_process_group_there_is_one_rank() -> None:
    ranks, numbers = Ranks.here(), torch.arange(3)
    assert (ranks.rank, ranks.size, ranks.main) == (0, 1, True)
    assert ranks.gather(numbers) is numbers
    assert ranks.gather_padded(numbers) is numbers
    assert ranks.objects("a") == ["a"]
    assert ranks.on_main(lambda: 3) == 3
    assert ranks.part(7) == slice(0, 7)
    assert ranks.largest(3, torch.device("cpu")) == 3
    assert ranks.together(lambda: 4) == 4
    ranks.wait()


def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "laps.cli", "train", "/nowhere", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("laps: ")]
    assert told == ["laps: load: /nowhere is missing (expected a file or a folder)"]
