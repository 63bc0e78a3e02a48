"""``laps compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._options import add_device, add_images, add_num_workers, add_quiet

__all__ = ["add_compare"]


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", help="a YAML file, or the name of a comparison of laps; without it: their names"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/compare/CONFIG)")
    parser.add_argument("--data", type=Path, help="a data set, in place of the config's")
    add_images(parser, "in place of the config's")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="of regions: names of the detector's labels, a line each"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the config's")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="train these alone")
    add_device(parser)
    add_num_workers(parser)
    add_quiet(parser)
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from .. import compare
    from ..train import TrainingStoppedError

    if options.config is None:
        for name, path in compare.configs().items():
            print(f"{name:16} {path}")
        return 0
    comparison = compare.read(options.config, data=options.data, images=options.images, labels=options.labels)
    if options.seeds:
        comparison = replace(comparison, seeds=tuple(options.seeds))
    out = options.out or Path("out/compare") / Path(options.config).stem
    try:
        table = compare.run(
            comparison,
            out,
            rows=options.rows,
            device=options.device,
            num_workers=options.num_workers,
            progress=not options.quiet,
        )
    except TrainingStoppedError as error:
        words = str(error).replace("resume=True", "the same command")
        raise TrainingStoppedError(words, error.signal_number) from error
    print(table)
    print(f"tables: {out}/table.md, .tex, .csv, .json")
    return 0
