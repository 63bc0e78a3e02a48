"""The demo's comparison over several seeds: LAPS and a global-embedding model, trained alike on drawn scenes.

    python -m benchmarks.demo                # seeds 0, 1 and 2: about twelve minutes on two cores
    python -m benchmarks.demo --seeds 1      # one of them; what the file holds of the others stays

How it is measured. A seed decides the scenes, the first weights and the order of training. Everything else is
what `laps demo` does: a global embedding teaches the encoders, and both models go on from them with the same
data, order, number of steps, loss and optimizer, each with its own head; of the epochs the best by the
development scenes is evaluated on the test scenes. The result is written after every seed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laps.demo.measure import measure
from laps.demo.recipe import HEADS, Sizes, settings
from laps.demo.report import chance

from benchmarks import machine
from benchmarks.seeds import Command, run_seeds

RESULT = machine.RESULTS / "scenes.json"


def measure_seed(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Metrics of both heads, the share of look-alikes that each tells apart, and the time."""
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), seed=seed, sizes=sizes, progress=True)
    rsum = {head: measured.evaluations[head].metrics["rsum"] for head in HEADS}
    print("rSum: " + ", ".join(f"{head} {value:.1f}" for head, value in rsum.items()))
    return {
        "metrics": {head: measured.evaluations[head].metrics for head in HEADS},
        "lookalikes": measured.lookalikes,
        "chance": chance(measured.test),
        "pretraining": measured.pretrained.history,
        "history": {head: measured.trained[head].history for head in HEADS},
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, extremes and standard deviation (of a sample; None of a single value)."""
    return {
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
    }


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """The spread over the seeds of each head's rSum and look-alikes, and of the lead of LAPS in both."""
    numbers = {
        "rsum": {head: [seed["metrics"][head]["rsum"] for seed in seeds.values()] for head in HEADS},
        "lookalikes": {head: [seed["lookalikes"][head] for seed in seeds.values()] for head in HEADS},
    }
    result: dict[str, Any] = {}
    for name, values in numbers.items():
        lead = [ours - theirs for ours, theirs in zip(*values.values(), strict=True)]
        result[name] = {head: spread(each) for head, each in values.items()} | {"lead": spread(lead)}
    return result


def _measure(seed: int, sizes: Sizes, _picture: Path) -> dict[str, Any]:
    return measure_seed(seed, sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run_seeds(Command("demo", __doc__, RESULT, settings()), _measure, summary, argv)


if __name__ == "__main__":
    sys.exit(main())
