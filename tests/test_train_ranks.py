"""Training and evaluation by two processes: what is learned, what is written, how it ends and goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laps
import numpy as np
import pytest
import torch
from _models import TESTS, bert_tokenizer, scenes, tiny_laps
from _torchrun import torchrun
from _train_ranks import main as train_and_evaluate
from laps.data import load
from laps.data.sampler import EpochSampler
from laps.distributed import Ranks
from laps.train import TrainConfig, Trainer
from safetensors.torch import load_file

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]


@dataclass
class Runs:
    """A folder with scenes, and ways to train on them."""

    folder: Path

    @property
    def scenes(self) -> Path:
        return self.folder / "scenes"

    def run(self, name: str, mode: str, ranks: int) -> list[dict[str, Any]]:
        """What each rank tells."""
        out = self.folder / name
        out.mkdir(exist_ok=True)
        if ranks == 1:
            train_and_evaluate(out, self.scenes, mode)
            return [json.loads((out / f"{mode}0.json").read_text())]
        torchrun(TESTS / "_train_ranks.py", out, self.scenes, mode)
        return [json.loads((out / f"{mode}{rank}.json").read_text()) for rank in range(ranks)]

    def weights(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / f"weights{rank}.safetensors")


# Of logits, which a softmax over the patches makes weights: a bias changes nothing, its gradient is rounding
# noise, and Adam makes steps of full length of that.
WITHOUT_GRADIENT = "head.aggregation.fc2.bias"


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected.keys() - {WITHOUT_GRADIENT}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("ranks"))
    train, _ = scenes(found.scenes, train=20, dev=6)
    bert_tokenizer(train.captions).save(found.scenes / "tokenizer.json")
    return found


@pytest.fixture(scope="module")
def whole(runs: Runs) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two ranks tell of a whole run, and what one process does."""
    return runs.run("two", "whole", 2), runs.run("one", "whole", 1)[0]


def test_two_ranks_learn_what_one_process_learns(runs: Runs, whole: tuple[Any, Any]) -> None:
    own, other, alone = runs.weights("two"), runs.weights("two", 1), runs.weights("one")
    # Ranks keep the same weights to the bit, and those of one process to the rounding of float32.
    assert all(torch.equal(own[name], other[name]) for name in alone)
    assert_alike(own, alone)
    two, one = whole
    assert [entry["loss"] for entry in two[0]["history"]] == pytest.approx(
        [entry["loss"] for entry in one["history"]], rel=1e-3
    )
    assert [entry["rsum"] for entry in two[1]["history"]] == [entry["rsum"] for entry in two[0]["history"]]


def test_rank_0_writes_the_folder(runs: Runs, whole: tuple[Any, Any]) -> None:
    folder = runs.folder / "two" / "run"
    assert laps.LAPS.from_pretrained(folder / "best").head.name == "laps"
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / ".lock").exists()


def test_ranks_share_an_evaluation(runs: Runs, whole: tuple[Any, Any]) -> None:
    two, _ = whole
    assert two[0]["scores"] == two[1]["scores"]
    assert two[0]["metrics"] == two[1]["metrics"]
    model = laps.LAPS.from_pretrained(runs.folder / "two" / "run" / "best")
    # A model that is loaded has no poolers.
    model.load_state_dict({n: t for n, t in runs.weights("two").items() if ".pooler." not in n})
    alone = laps.evaluate(model, laps.data.load(runs.scenes, "test"), progress=False)
    np.testing.assert_allclose(np.array(two[0]["scores"]), alone.scores, rtol=1e-4, atol=1e-5)


def test_all_ranks_stop_where_one_was_told_to_and_go_on(runs: Runs, whole: tuple[Any, Any]) -> None:
    stopped = runs.run("ended", "stopped", 2)
    assert [rank["signal"] for rank in stopped] == [15, 15]
    state = json.loads((runs.folder / "ended" / "run" / "last" / "state.json").read_text())
    assert 0 < state["progress"]["step"] < 4
    runs.run("ended", "resumed", 2)
    for name, tensor in runs.weights("two").items():
        assert torch.equal(runs.weights("ended")[name], tensor), name


def test_a_run_of_two_ranks_goes_on_in_one_process(runs: Runs, whole: tuple[Any, Any]) -> None:
    if not (runs.folder / "ended").exists():
        runs.run("ended", "stopped", 2)
    shutil.copytree(runs.folder / "ended", runs.folder / "alone")
    shutil.rmtree(runs.folder / "alone" / "run" / "last")
    runs.run("alone", "resumed", 1)
    assert_alike(runs.weights("alone"), runs.weights("two"))


def test_a_batch_that_ranks_cannot_share_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "here", lambda: Ranks(0, 2))
    with pytest.raises(laps.LapsValueError, match="a multiple of 2 for batch_size, got 7"):
        Trainer(tiny_laps(), load(runs.scenes, "train"), None, runs.folder / "odd", TrainConfig(batch_size=7))


def test_shares_make_the_batches_of_one_rank() -> None:
    def drawn(rank: int, ranks: int, skip: int = 0) -> list[int]:
        sampler = EpochSampler(23, 5, batch_size=6, rank=rank, world_size=ranks)
        sampler.start(1, skip)
        found = list(sampler)
        assert ranks == 1 or len(sampler) == len(found)
        return found

    one = drawn(0, 1)
    shares = [np.array(drawn(rank, 3)).reshape(-1, 2) for rank in range(3)]
    assert np.concatenate(shares, axis=1).flatten().tolist() == one[:18]
    assert drawn(1, 3, skip=6) == shares[1].flatten().tolist()[2:]


def test_the_command_trains_and_evaluates_under_torchrun(runs: Runs) -> None:
    model, out = runs.folder / "one" / "run" / "best", runs.folder / "command"
    if not model.exists():
        runs.run("one", "whole", 1)

    scenes = str(runs.scenes)
    options = ["--num-workers", "0", "--device", "cpu"]
    training = ["--epochs", "1", "--batch-size", "8", "--mini-batch-size", "2", "--augment", "none", *options]
    train = ["train", scenes, "--model", model, "--out", out]
    assert torchrun("-m", "laps.cli", *train, *training).count("best epoch") == 1
    table = torchrun(
        "-m", "laps.cli", "eval", str(out / "best"), scenes, *options, "--json", str(out / "e.json")
    )
    assert table.count("rSum") == 1
    assert json.loads((out / "e.json").read_text())["metrics"]["rsum"] >= 0
