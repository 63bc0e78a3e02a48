"""Options that several commands have, and what they say of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "REGION_OPTIONS",
    "add_amp",
    "add_batch_size",
    "add_caption_column",
    "add_data",
    "add_device",
    "add_images",
    "add_num_workers",
    "add_quiet",
    "add_region_sizes",
    "given",
]

# Of commands that take regions too; without a value unless they were given.
REGION_OPTIONS = ("num_regions", "feature_dim", "labels")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="a data set: see laps data check --help")


def add_images(parser: argparse.ArgumentParser, where: str = "where it is not beside the captions") -> None:
    parser.add_argument("--images", type=Path, help=f"folder of the images or regions, {where}")


def add_caption_column(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-column",
        action="append",
        metavar="NAME",
        help="of tables: where the captions are, if their names do not tell; repeatable",
    )


def add_batch_size(parser: argparse.ArgumentParser, what: str, default: int) -> None:
    parser.add_argument(
        "--batch-size", type=int, default=default, metavar="N", help=f"{what} at once (default: {default})"
    )


def add_num_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")


def add_amp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in the encoders")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_region_sizes(parser: argparse.ArgumentParser, num_regions: str, feature_dim: str) -> None:
    """Of regions; the texts are the defaults."""
    parser.add_argument(
        "--num-regions",
        type=int,
        metavar="N",
        help=f"regions of an image, the first of its file (default: {num_regions})",
    )
    parser.add_argument(
        "--feature-dim", type=int, metavar="N", help=f"features of a region (default: {feature_dim})"
    )


def given(options: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of the options that were given, as they are written."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None)
