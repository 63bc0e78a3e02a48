"""`laps.functional.max_sim` beside the package maxsim-cpu on the same arrays.

    python -m benchmarks.max_sim            # writes benchmarks/results/max_sim.json
    python -m benchmarks.max_sim --quick    # fewer repetitions, no file

MaxSim is the score of late-interaction retrieval: the sum over query tokens of the largest inner product with
a document's tokens. maxsim-cpu scores one query against documents of one length, so that is what both do: 32
query tokens of 128 numbers, the sizes of its own README, over several document lengths. Both run on all
cores, in turns; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import laps
import numpy as np
import torch

from benchmarks import machine
from benchmarks.head import in_turns

QUERY_TOKENS = 32
DIM = 128
# (documents, tokens each): about the same work, from passages to pages.
SHAPES = ((4000, 64), (2000, 128), (1000, 256), (1000, 512), (500, 1024))


def unit(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Random unit vectors in float32: maxsim-cpu expects normalised input."""
    values = generator.standard_normal(shape, dtype=np.float32)
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    return values


def measure(documents: int, tokens: int, repetitions: int) -> dict[str, Any]:
    """Both implementations at one shape; raises where their scores differ."""
    maxsim_cpu = importlib.import_module("maxsim_cpu")
    generator = np.random.default_rng(0)
    query, docs = unit(generator, QUERY_TOKENS, DIM), unit(generator, documents, tokens, DIM)
    queries, lengths = query[None], np.array([QUERY_TOKENS])
    calls: dict[str, Callable[[], Any]] = {
        "maxsim_cpu": lambda: maxsim_cpu.maxsim_scores(query, docs),
        "laps": lambda: laps.functional.max_sim(docs, queries, lengths),
    }
    difference = float(np.abs(np.asarray(calls["maxsim_cpu"]()) - calls["laps"]()[:, 0]).max())
    if difference > 1e-4:
        raise AssertionError(
            f"the scores differ by {difference:.1e} at {documents} documents of {tokens} tokens"
        )
    seconds = {name: statistics.median(all_s) for name, all_s in in_turns(calls, repetitions).items()}
    flops = 2 * documents * tokens * QUERY_TOKENS * DIM
    result = {
        "documents": documents,
        "tokens": tokens,
        "query_tokens": QUERY_TOKENS,
        "dim": DIM,
        "median_s": seconds,
        "flops_per_s": {name: flops / value for name, value in seconds.items()},
        "difference": difference,
    }
    print(
        f"  {documents:>5} x {tokens:>4}   maxsim-cpu {1e3 * seconds['maxsim_cpu']:7.2f} ms   "
        f"laps {1e3 * seconds['laps']:7.2f} ms   {seconds['maxsim_cpu'] / seconds['laps']:5.2f} x   "
        f"difference {difference:.0e}",
        flush=True,
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.max_sim", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--repetitions", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds, no file")
    parser.add_argument("--output", type=Path, help="the JSON to write (default: results/max_sim.json)")
    options = parser.parse_args(argv)
    try:
        version = importlib.metadata.version("maxsim-cpu")
    except ImportError:
        print(
            "max_sim: left out, for there is no maxsim-cpu here "
            "(pip install maxsim-cpu, on Linux x86-64 and Python 3.10 to 3.13)"
        )
        return 0

    cores = machine.describe()["cores"]
    torch.set_num_threads(cores)
    print(
        f"\nmax_sim beside maxsim-cpu {version}: documents x tokens, "
        f"{QUERY_TOKENS} query tokens x {DIM}, {cores} cores"
    )
    result = {
        "machine": machine.describe() | {"maxsim_cpu": version},
        "shapes": [measure(*shape, 3 if options.quick else options.repetitions) for shape in SHAPES],
    }
    if options.output or not options.quick:
        machine.write(options.output or machine.RESULTS / "max_sim.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
