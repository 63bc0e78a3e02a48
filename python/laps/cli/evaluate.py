"""``laps eval``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _check
from ._options import (
    add_amp,
    add_batch_size,
    add_caption_column,
    add_data,
    add_device,
    add_images,
    add_num_workers,
    add_quiet,
)
from ._ranks import on_ranks

if TYPE_CHECKING:
    from ..data import RetrievalData
    from ..distributed import Ranks

__all__ = ["add_eval"]


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a saved model: a folder or hub id")
    add_data(parser)
    parser.add_argument("--split", default="test", metavar="NAME", help="what to evaluate on (default: test)")
    add_images(parser)
    add_caption_column(parser)
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="of the listing: skip leaves out captions that are no text and malformed samples of shards, and "
        "says how many; a listed image that cannot be read is always an error, as recall among fewer images "
        "is another number (default: raise)",
    )
    parser.add_argument(
        "--folds", type=int, metavar="N", help="also the mean over N folds of the images; 5 for COCO 1K"
    )
    parser.add_argument("--rerank", type=int, metavar="K", help="also the two-stage form with K candidates")
    parser.add_argument(
        "--scoring",
        choices=("head", "global"),
        default="head",
        help="by the model's head, or by one vector per image and per caption (default: head)",
    )
    add_batch_size(parser, "images or captions", 64)
    add_num_workers(parser)
    add_device(parser)
    add_amp(parser)
    parser.add_argument("--half-features", action="store_true", help="hold features in float16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the result here")
    add_quiet(parser)
    parser.set_defaults(command=on_ranks(_eval))


def _eval(ranks: Ranks, options: argparse.Namespace) -> int:
    import torch

    from .._device import choose_device
    from .._files import require_writable
    from ..data import RegionTransform
    from ..evaluation import evaluate
    from ..model import LAPS

    # What can be wrong is looked at before the model is loaded and the data scored, which takes long.
    for path in (options.json, options.csv):
        if path is not None and ranks.main:
            require_writable(path)
    device = choose_device("laps eval", options.device)
    model = LAPS.from_pretrained(options.model).to(device)
    regions = isinstance(model.transform, RegionTransform)
    data = _loaded(ranks, options, regions)
    result = evaluate(
        model,
        data,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
        amp=options.amp,
        feature_dtype=torch.float16 if options.half_features else None,
        folds=options.folds,
        rerank=options.rerank,
        scoring=options.scoring,
        progress=not options.quiet,
        ranks=ranks,
    )
    if not ranks.main:
        return 0
    print(result.table())
    if options.json is not None:
        result.save_json(options.json)
    if options.csv is not None:
        result.save_csv(options.csv)
    return 0


def _loaded(ranks: Ranks, options: argparse.Namespace, regions: bool) -> RetrievalData:
    """The split; rank 0 says what was left out of it, as a line of the command's own."""
    from ..data import load

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = load(
            options.data,
            options.split,
            images=options.images,
            regions=regions,
            on_error=options.on_error,
            caption_column=options.caption_column,
        )
    for warning in caught:
        if not str(warning.message).startswith("load: "):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif ranks.main:
            print(f"laps: {_check.printable(str(warning.message))}", file=sys.stderr)
    return data
