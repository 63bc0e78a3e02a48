"""``laps explain``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from ._options import add_device

__all__ = ["add_explain"]


def add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", type=Path, help="an image file; for a model of regions a.npz, or test_ims.npy/3"
    )
    parser.add_argument("caption", help="a sentence, in quotes")
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="folder or hub id of a model")
    parser.add_argument(
        "-o", "--out", type=Path, help="the page (.html), data (.json) or arrays (.npz) to write"
    )
    add_device(parser)
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from .._device import choose_device
    from .._files import require_writable
    from ..explanation import check_suffix, explain
    from ..model import LAPS

    if options.out is not None:
        if options.out.is_dir():
            raise LapsValueError(_check.message("laps explain", f"--out {options.out} is a folder", "a file"))
        check_suffix(options.out)
        require_writable(options.out)
    device = choose_device("laps explain", options.device)
    why = explain(LAPS.from_pretrained(options.model).to(device), options.image, options.caption)
    if options.out is not None:
        why.save(options.out)
    at = why.attribution
    print(f"score {why.score:.3f}; {at.kept.sum()} of {at.kept.size} patches kept")
    widest = max(len(word.text) for word in why.words)
    for word in why.words:
        print(f"  {word.share:6.3f}  {word.text:{widest}}  {why.token_names[word.token]}")
    if why.cut_off:
        print(f"too long, the model did not see: {why.cut_off}")
    if options.out is not None:
        print(f"Wrote {options.out}")
    return 0
