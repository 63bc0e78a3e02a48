"""Benchmarks that train on drawn scenes, seed by seed, into one file that keeps what it has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laps.demo.recipe import Sizes

from benchmarks import machine

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Command:
    """A benchmark: its module's name and docstring, the file of its results, and what they depend on."""

    name: str
    description: str
    result: Path
    settings: dict[str, Any]


def run_seeds(
    command: Command,
    measure: Callable[[int, Sizes, Path], dict[str, Any]],
    summary: Callable[[dict[str, Any]], dict[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """Measure the seeds that the command line asks for; the file is written after every one.

    `measure` takes the seed, the sizes, and where a picture of the result belongs (a path that ends in .png).
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command.name}", description=command.description.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default: 0 1 2)")
    parser.add_argument(
        "--output", type=Path, default=command.result, help=f"(default: results/{command.result.name})"
    )
    for name, value in asdict(Sizes()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="(default: %(default)s)"
        )
    options = parser.parse_args(argv)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})

    # As JSON has it, to be compared with what the file holds.
    wanted = json.loads(json.dumps({"sizes": asdict(sizes), **command.settings}))
    seeds = earlier(options.output, wanted)
    for seed in options.seeds:
        print(f"\nseed {seed}", flush=True)
        seeds[str(seed)] = measure(seed, sizes, options.output.with_suffix(".png"))
        seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
        machine.write(
            options.output,
            {"machine": machine.describe(), "settings": wanted, "seeds": seeds, "summary": summary(seeds)},
        )
    return 0


def earlier(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The seeds that the file holds, if they were measured with the same settings."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    seeds: dict[str, Any] = found["seeds"] if found["settings"] == wanted else {}
    return seeds
