"""One rank of a training run, started by torchrun: ``_train_ranks.py OUT SCENES MODE``.

MODE: "whole" trains to the end; in "stopped" rank 1 alone is told to stop; "resumed" goes on. Without
torchrun this is the one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import laps
import torch
import torch.distributed as dist
from _models import tiny_laps
from _step_cases import without_dropout
from laps.data import CaptionTokenizer, load
from laps.distributed import Ranks
from laps.train import TrainConfig, Trainer, TrainingStoppedError
from safetensors.torch import save_file


def main(out: Path, scenes: Path, mode: str) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ranks = Ranks.here()
    tokenizer = CaptionTokenizer.from_file(scenes / "tokenizer.json")
    model = without_dropout(tiny_laps(tokenizer=tokenizer, seed=ranks.rank))
    config = TrainConfig(
        epochs=2,
        batch_size=8,
        mini_batch_size=3,
        accumulation=2,
        save_every=1,
        learning_rate=1e-3,
        device="cpu",
        num_workers=0,
        progress=False,
    )
    if mode == "stopped" and ranks.rank == 1:
        tell_after(model, 3)
    try:
        trainer = Trainer(model, load(scenes, "train"), load(scenes, "dev"), out / "run", config)
        history = trainer.fit(resume=mode == "resumed")
        evaluation = laps.evaluate(model, load(scenes, "test"), progress=False, ranks=ranks)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            out / f"weights{ranks.rank}.safetensors",
        )
        found = {"history": history, "scores": evaluation.scores.tolist(), "metrics": evaluation.metrics}
    except TrainingStoppedError as error:
        found = {"stopped": str(error), "signal": error.signal_number}
    (out / f"{mode}{ranks.rank}.json").write_text(json.dumps(found))
    if ranks.size > 1:
        dist.destroy_process_group()


def tell_after(model: laps.LAPS, batches: int) -> None:
    """Send this process a SIGTERM in the forward pass of a batch."""
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += model.training
        if seen == 4 * batches:
            os.kill(os.getpid(), signal.SIGTERM)

    model.image_encoder.register_forward_pre_hook(count)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
