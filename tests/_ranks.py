"""One rank of a process group, started by torchrun: ``python -m torch.distributed.run ... _ranks.py OUT``.

Each rank takes its rows of the joint batch; rank 0 writes losses, values and gradients of all cases to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _step_cases import HEADS, OBJECTIVES, SIZE, gradients, joint_batch, model_with
from laps.distributed import Ranks
from laps.step import TrainingStep

# Ranks may have different numbers of pairs.
UNEVEN = [0, 3, SIZE]


def cases() -> dict[str, dict[str, Any]]:
    """What differs from the default: LAPS, its own loss, even shares, at once."""
    # Random numbers, by which patches and triplets are drawn, are each rank's own.
    found: dict[str, dict[str, Any]] = {
        f"head {name}": {"head": name} for name in HEADS if not name.startswith("paper")
    }
    found |= {f"loss {name}": {"objective": name} for name in OBJECTIVES if name != "triplet"}
    found |= {
        "cached": {"mini_batch_size": 2},
        "cached, hrem": {"head": "hrem", "mini_batch_size": 2},
        "uneven": {"bounds": UNEVEN},
        "uneven, cached": {"bounds": UNEVEN, "mini_batch_size": 2},
        "uneven, tgdt": {"bounds": UNEVEN, "head": "tgdt"},
        "warm-up": {"call": {"warmup": 0.5}},
        "frozen": {"frozen": True, "mini_batch_size": 2},
    }
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks.here()
    results = {}
    for name, case in cases().items():
        bounds = case.get("bounds", [SIZE * rank // ranks.size for rank in range(ranks.size + 1)])
        batch = joint_batch(dense=True).part(*bounds[ranks.rank : ranks.rank + 2])
        model = model_with(case.get("head", "laps"), case.get("objective"))
        if case.get("frozen"):
            model.freeze_backbones()
        step = TrainingStep(model, mini_batch_size=case.get("mini_batch_size"))
        results[name] = gradients(step, batch, **case.get("call", {}))
    accumulated = accumulate(ranks)
    if ranks.main:
        torch.save({**results, "accumulated": accumulated}, out)
    everyone = ranks.objects(ranks.rank)
    first = ranks.on_main(lambda: "of rank 0")
    parts = [ranks.part(7).start, ranks.part(7).stop]
    told = ranks.objects({"objects": everyone, "on_main": first, "part": parts})
    if ranks.main:
        out.with_suffix(".json").write_text(json.dumps(told))
    dist.destroy_process_group()


def accumulate(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Two batches whose gradients are averaged; the ranks talk in the second alone."""
    step = TrainingStep(model_with("laps"))
    step.model.zero_grad()
    for number, (first, last) in enumerate([(0, 4), (4, 10)]):
        both = joint_batch().part(first, last)
        mine = ranks.part(len(both))
        step(both.part(mine.start, mine.stop), scale=0.5, sync=number == 1)
    return {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
