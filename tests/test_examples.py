"""Every script of examples/ runs as a user runs it, learns, and leaves a model that gives what it printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import laps
import pytest
import torch
from laps.data import load, make_scenes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Script: the package it needs beyond those of laps.
SCRIPTS = {
    "plain_pytorch.py": "torch",
    "lightning_module.py": "lightning",
    "accelerate_loop.py": "accelerate",
}
EPOCH = re.compile(r"^epoch (\d+): loss ([\d.]+), dev rSum ([\d.]+)$", re.MULTILINE)
# The first table after the model was loaded again; its last column.
RSUM = re.compile(r"loaded again.*?rSum\nall [^\n]* ([\d.]+)\n", re.DOTALL)


@dataclass
class Run:
    """What a script printed and where its model is."""

    output: str
    folder: Path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(
        tmp_path_factory.mktemp("scenes"), num_train=8, num_dev=8, num_test=8, workers=1, progress=False
    )


def run_example(script: str, folder: Path, *options: str) -> Run:
    """Three epochs of five batches on eight scenes."""
    command = [sys.executable, str(EXAMPLES / script), "--out", str(folder)]
    command += ["--epochs", "3", "--batch-size", "8", "--workers", "0", *options]
    # One thread: on so small batches, threads that wait for each other cost a busy machine more than they
    # give. Off line: nothing may be downloaded.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder.parent, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return Run(answer.stdout, folder)


def losses(run: Run) -> list[float]:
    epochs = EPOCH.findall(run.output)
    assert [epoch for epoch, _, _ in epochs] == ["1", "2", "3"]
    return [float(loss) for _, loss, _ in epochs]


@pytest.fixture(scope="module")
def plain(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("plain") / "model"
    return run_example("plain_pytorch.py", folder, "--data", str(scenes))


def test_every_script_is_tested_and_explained() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | {"common.py"}
    assert all(name in (EXAMPLES / "README.md").read_text() for name in SCRIPTS)


def test_plain_loop_learns_and_keeps_the_model_that_it_measured(plain: Run, scenes: Path) -> None:
    # Below ln 8 too, the loss of a model that cannot tell the eight pairs of a batch apart.
    assert losses(plain)[-1] < min(losses(plain)[0], torch.tensor(8.0).log())
    check_saved_model(plain, scenes)


@pytest.mark.parametrize(
    ("script", "given"), [("lightning_module.py", True), ("accelerate_loop.py", False)], ids=str
)
def test_other_loops_train_as_the_plain_one(
    script: str, given: bool, plain: Run, scenes: Path, tmp_path: Path
) -> None:
    pytest.importorskip(SCRIPTS[script], reason=f"{script} needs {SCRIPTS[script]}, which is not installed")

    # Without --data a script draws the very same scenes itself.
    data = ["--data", str(scenes)] if given else ["--scenes", "8"]

    run = run_example(script, tmp_path / "model", *data)

    # Same seed, order and steps; the frameworks may draw or add up in another order some day.
    assert losses(run) == pytest.approx(losses(plain), rel=0.1)
    assert losses(run)[-1] < losses(run)[0]
    check_saved_model(run, scenes)


def check_saved_model(run: Run, scenes: Path) -> None:
    """The folder holds a model whose test metrics are those that the script printed last."""
    model = laps.LAPS.from_pretrained(run.folder)
    found = laps.evaluate(model, load(scenes, "test"), progress=False).metrics
    printed = RSUM.search(run.output)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(found["rsum"], abs=0.06)  # one decimal is printed
