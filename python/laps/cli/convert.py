"""``laps convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_convert"]


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="model_best.pth, its folder, or the same weights as .safetensors"
    )
    parser.add_argument("out", type=Path, help="the model's folder, new or empty")
    for side, encoder, base in (
        ("image", "an image encoder", "ViT-base or Swin"),
        ("text", "a text encoder", "BERT-base"),
    ):
        parser.add_argument(
            f"--{side}-config",
            type=Path,
            metavar="JSON",
            help=f"config.json of {encoder} that is no {base}",
        )
    words = parser.add_mutually_exclusive_group()
    words.add_argument(
        "--tokenizer",
        default="bert-base-uncased",
        metavar="PATH_OR_ID",
        help="a tokenizer.json, BERT's vocab.txt, a folder or a hub id (default: bert-base-uncased)",
    )
    words.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_const",
        const=None,
        help="the model takes token ids alone",
    )
    for name, default in (("selection", "ViT 0.5, Swin 0.8"), ("aggregation", "ViT 0.4, Swin 0.6")):
        parser.add_argument(
            f"--{name}-ratio",
            type=float,
            metavar="X",
            help=f"of a file that has no options (default: as published, {default})",
        )
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    from ..conversion import convert

    done = convert(
        options.source,
        options.out,
        image_config=options.image_config,
        text_config=options.text_config,
        tokenizer=options.tokenizer,
        selection_ratio=options.selection_ratio,
        aggregation_ratio=options.aggregation_ratio,
    )
    print(done)
    return 0
