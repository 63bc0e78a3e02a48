"""``laps data``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from ._options import REGION_OPTIONS, add_caption_column, add_images, add_region_sizes, given

__all__ = ["add_data_commands"]


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="missing images, empty captions, split leaks, counts")
    check.add_argument(
        "path",
        type=Path,
        help="a data set: a file or folder of captions, of parquet files, of save_to_disk, or shards, with "
        "braces too (shards/{00000..00009}.tar); docs/data.md has the formats",
    )
    add_images(check)
    add_caption_column(check)
    check.add_argument(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="a tokenizer.json, a folder or a hub id: also find captions that are too long or without tokens",
    )
    check.add_argument(
        "--max-length", type=int, metavar="N", help="the most tokens of a caption (default: the tokenizer's)"
    )
    check.add_argument(
        "--regions", action="store_true", help="the data are regions of a detector: .npz files or *_ims.npy"
    )
    add_region_sizes(check, "36", "2048")
    check.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the detector's labels, a line each: also find regions whose label has no name",
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_data_check)
    scenes = commands.add_parser("make-scenes", help="drawn scenes with captions, in Karpathy's format")
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--train", type=int, default=4000, help="images (default: 4000)")
    scenes.add_argument("--dev", type=int, default=500, help="images (default: 500)")
    scenes.add_argument("--test", type=int, default=500, help="images (default: 500)")
    scenes.add_argument("--size", type=int, default=96, help="pixels (default: 96)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(command=_make_scenes)


def _data_check(options: argparse.Namespace) -> int:
    from ..data import CaptionTokenizer, RegionTransform, check
    from ..data.regions import read_labels

    of_regions = given(options, REGION_OPTIONS)
    if of_regions and not options.regions:
        raise LapsValueError(
            _check.message("laps data check", f"{of_regions} without --regions", "both or none")
        )
    sizes = ("num_regions", "feature_dim")
    chosen = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    if options.labels is not None:
        chosen["num_labels"] = len(read_labels(options.labels))
    transform = RegionTransform(**chosen) if options.regions else None
    tokenizer = None
    if options.tokenizer is not None:
        is_file = Path(options.tokenizer).is_file()
        read = CaptionTokenizer.from_file if is_file else CaptionTokenizer.from_pretrained
        tokenizer = read(options.tokenizer)
    elif options.max_length is not None:
        raise LapsValueError(
            _check.message("laps data check", "--max-length counts tokens", "a --tokenizer too")
        )
    report = check(
        options.path,
        caption_column=options.caption_column,
        images=options.images,
        transform=transform,
        tokenizer=tokenizer,
        max_length=options.max_length,
    )
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)
    return 0 if report.ok else 1


def _make_scenes(options: argparse.Namespace) -> int:
    from ..data import make_scenes

    path = make_scenes(
        options.folder,
        num_train=options.train,
        num_dev=options.dev,
        num_test=options.test,
        image_size=options.size,
        seed=options.seed,
    )
    print(path)
    return 0
