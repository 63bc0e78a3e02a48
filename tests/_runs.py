"""Training runs in processes that are killed or told to stop: `_runs.main()`, not as a script, which spawned
workers would import, in a process with the arguments FOLDER SCENES METHOD WORKERS.

Prints one line of JSON: what became of each way to end a run, and whether the run that went on from there has
the weights and the log of the one that nobody disturbed. The processes are forked from one that has imported
everything and computed nothing, so that each starts at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# transformers imports its parts late; here they come before the forks.
import transformers.models.bert.modeling_bert
import transformers.models.vit.modeling_vit  # noqa: F401
from _models import tiny_laps
from laps.data import CaptionTokenizer, RetrievalData, load
from laps.train import TrainConfig, Trainer, TrainingStoppedError
from safetensors.torch import load_file, save_file

ROOT, SCENES, METHOD, WORKERS = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

# Of a step. With six a run that is told to stop needs more batches than its worker has made ready.
BATCHES = 1 if METHOD == "fork" else 6


def train(folder: Path, save_every: int, resume: bool) -> None:
    """Two epochs of twelve steps, with dropout, both augmentations, AdamW and a choice by dev."""
    train_data, dev_data = load(SCENES, "train"), load(SCENES, "dev")
    if folder.name == "evaluating":
        # An evaluation of several batches, which take long enough to be interrupted (below).
        dev_data = RetrievalData(dev_data.image_paths * 80, ["a circle"] * 480, [*range(480)])
    # A resumed run starts from other weights: all of them have to come from the checkpoint.
    tokenizer = CaptionTokenizer.from_file(SCENES / "tokenizer.json")
    model = tiny_laps(tokenizer=tokenizer, seed=1 if resume else 0, variant="paper")
    if folder.name == "evaluating" and not resume:
        model.image_encoder.register_forward_pre_hook(lambda *_: None if model.training else time.sleep(0.5))
    config = TrainConfig(
        epochs=2,
        batch_size=4,
        num_workers=WORKERS,
        accumulation=BATCHES,
        save_every=save_every,
        learning_rate=1e-3,
        milestones=(1,),
        device="cpu",
        progress=False,
    )
    try:
        Trainer(model, train_data, dev_data, folder, config).fit(resume=resume)
    except TrainingStoppedError as error:
        (folder / "stopped.txt").write_text(f"{error.signal_number} {error}")
        os._exit(3)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "weights.safetensors")


def start(function: Callable[[], None]) -> int:
    """A process of its own group that calls the function; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgrp()
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def runs(child: int) -> bool:
    """Whether it still does; one that has ended keeps its id until `end`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(child: int) -> int:
    """Wait; the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def progress(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "last" / "state.json").read_text())["progress"]
    except FileNotFoundError:
        return {"step": 0, "epoch": 0, "batch": 0}
    return state


def when_at(step: int, folder: Path, child: int, send: Callable[[int, int], None], number: int) -> int:
    """Send the process a signal once its checkpoint has come to the step; returns how it ended."""
    while progress(folder)["step"] < step:
        if not runs(child):
            raise SystemExit(f"{folder} ended before step {step}")
        time.sleep(0.002)
    send(child, number)
    return end(child)


def log(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def left(name: str, ended: int) -> dict[str, Any]:
    """What a run that ended early has left."""
    found, stopped = progress(ROOT / name), ROOT / name / "stopped.txt"
    return {
        "ended": ended,
        "epoch": found["epoch"],
        "batch": found["batch"],
        "step": found["step"],
        "batches": found["step"] * BATCHES,
        "history": len(found.get("history", ())),
        "message": stopped.read_text() if stopped.exists() else "",
    }


def outcome(name: str, ended: int) -> dict[str, Any]:
    """What a run has left, and what comes of it when it goes on."""
    folder, result = ROOT / name, left(name, ended)
    resumed = end(start(lambda: train(folder, 4, True)))
    whole, weights = (
        load_file(ROOT / "whole" / "weights.safetensors"),
        load_file(folder / "weights.safetensors"),
    )
    return result | {
        "resumed": resumed,
        "same_weights": whole.keys() == weights.keys()
        and all(torch.equal(whole[n], weights[n]) for n in whole),
        "same_best": (folder / "best" / "model.safetensors").read_bytes()
        == (ROOT / "whole" / "best" / "model.safetensors").read_bytes(),
        "same_log": log(folder) == log(ROOT / "whole") and len(log(folder)) == 2,
        "epochs": len(log(folder)),
    }


def main() -> None:
    multiprocessing.set_start_method(METHOD)
    print(json.dumps(in_full() if METHOD == "fork" else stopped(1, left)))


def in_full() -> dict[str, Any]:
    """All ways to end a run, each followed by its continuation."""
    whole = end(start(lambda: train(ROOT / "whole", 100, False)))
    return {"whole": whole} | stopped(16, outcome) | killed()


def stopped(step: int, judge: Callable[[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Runs that are told to stop after a step, or in their evaluation.

    The whole group is told, as schedulers and `timeout` do it: the loader's workers get the signal too.
    """
    results = {}
    for name, at, send, number in (
        ("evaluating", 12 // BATCHES, later(os.killpg), signal.SIGTERM),
        ("terminated", step, os.killpg, signal.SIGTERM),
        ("interrupted", step, os.killpg, signal.SIGINT),
    ):
        child = start(lambda name=name: train(ROOT / name, min(4, step), False))
        results[name] = judge(name, when_at(at, ROOT / name, child, send, number))
    return results


def later(send: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Send a signal not in the moment in which a checkpoint is complete, but after it."""

    def wait_and_send(child: int, number: int) -> None:
        # A worker that is not forked takes a second or two to begin.
        time.sleep(0.05 if METHOD == "fork" else 0.3)
        send(child, number)

    return wait_and_send


def killed() -> dict[str, Any]:
    """Runs that end by SIGKILL, in mid-epoch and as they write checkpoints."""
    results = {}
    child = start(lambda: train(ROOT / "killed", 4, False))
    results["killed"] = outcome("killed", when_at(4, ROOT / "killed", child, os.kill, signal.SIGKILL))

    # At random moments, most of them while a checkpoint is written: one is written after each step.
    folder, generator, kills = ROOT / "often", random.Random(0), 0
    resume, seen = False, []
    while kills < 4:
        child = start(lambda resume=resume: train(folder, 1, resume))
        before = progress(folder)["step"]
        while progress(folder)["step"] == before and runs(child):
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        if end(child) != -signal.SIGKILL:
            break
        kills, resume = kills + 1, True
        seen.append(progress(folder)["step"])
    results["often"] = outcome("often", 0) | {"kills": kills, "seen": seen}
    return results
