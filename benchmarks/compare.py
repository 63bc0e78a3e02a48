"""The comparisons on drawn scenes that come with laps, with the machine that ran them.

    python -m benchmarks.compare scenes             # eleven heads, three seeds: some two hours on two cores
    python -m benchmarks.compare scenes-ablation    # the thirteen rows of the paper's Table 4

The same as `laps compare NAME`, in the same folder (out/compare/NAME): what is trained there is not trained
again, so that either command may begin and the other end. Writes benchmarks/results/compare-NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from laps import compare

from benchmarks import machine

NAMES = ("scenes", "scenes-ablation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison to its end; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/compare/NAME)")
    parser.add_argument("--output", type=Path, help="(default: results/compare-NAME.json)")
    options = parser.parse_args(argv)
    table = compare.run(
        compare.read(options.name), options.out or Path("out/compare") / options.name, num_workers=0
    )
    output = options.output or machine.RESULTS / f"compare-{options.name}.json"
    machine.write(output, {"machine": machine.describe(), **table.to_dict()})
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
