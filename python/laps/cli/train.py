"""``laps train``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _check
from ..errors import LapsValueError
from ._options import REGION_OPTIONS, add_caption_column, add_images, add_region_sizes, given
from ._ranks import on_ranks

if TYPE_CHECKING:
    from ..data import CaptionStream, RegionTransform, RetrievalData
    from ..distributed import Ranks
    from ..model import LAPS
    from ..train_config import TrainConfig

__all__ = ["add_train"]

DEFAULT_PRESET = "vit-base-224"


def add_train(parser: argparse.ArgumentParser) -> None:
    from ..config import PRESETS
    from ..heads import head_names
    from ..losses import CUTOFF
    from ..objective import MARGIN, NAMES
    from ._recipe import add_train_options

    parser.add_argument("data", type=Path, help="a data set with its splits: see laps data check --help")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    add_images(parser)
    add_caption_column(parser)
    parser.add_argument(
        "--train-split", default="train", metavar="NAME", help="what to learn from (default: train)"
    )
    parser.add_argument(
        "--dev-split",
        default="dev",
        metavar="NAME",
        help='chooses the best epoch; "none" for the last one (default: dev)',
    )
    parser.add_argument(
        "--dev-data", type=Path, metavar="DATA", help="where --dev-split is, if it is not in the same data"
    )
    parser.add_argument(
        "--epoch-length",
        type=int,
        metavar="N",
        help="the data is tar files, to be read from front to back; N captions are an epoch",
    )
    parser.add_argument(
        "--shuffle-buffer",
        type=int,
        default=1000,
        metavar="N",
        help="with --epoch-length: of how many captions one is drawn, in each worker (default: 1000)",
    )
    parser.add_argument(
        "--dense-captions",
        type=Path,
        metavar="FILE",
        help="a longer text for each training image, which guides training alone: .json, .csv, .tsv, .jsonl",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--preset", choices=sorted(PRESETS), help=f"model and recipe of the paper (default: {DEFAULT_PRESET})"
    )
    start.add_argument("--model", help="start from this saved model instead: a folder or hub id")
    parser.add_argument(
        "--image-checkpoint", help="a folder or hub id in place of the preset's image encoder"
    )
    parser.add_argument("--text-checkpoint", help="a folder or hub id in place of the preset's text encoder")
    add_region_sizes(parser, "the preset's", "the preset's")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the detector's labels, that of number 0 on the first line: regions then know what "
        "the text encoder knows of theirs",
    )
    parser.add_argument("--head", choices=head_names(), help="how pairs are scored (default: laps)")
    parser.add_argument(
        "--head-option",
        action="append",
        metavar="NAME=VALUE",
        help="an argument of the head, repeatable, VALUE in JSON (default: the preset's ratios)",
    )
    parser.add_argument("--loss", choices=NAMES, help="what scores are trained with (default: hinge)")
    parser.add_argument("--margin", type=float, metavar="X", help=f"of hinge and triplet (default: {MARGIN})")
    parser.add_argument(
        "--cutoff",
        type=float,
        metavar="X",
        help=f"of triplet: the distance beyond which no negative is drawn (default: {CUTOFF})",
    )
    add_train_options(parser.add_argument_group("recipe", "the defaults are the published recipe"))
    parser.set_defaults(command=on_ranks(_train))


def _train(ranks: Ranks, options: argparse.Namespace) -> int:
    from .._device import choose_device
    from .._train_source import PairSource
    from ..config import PRESETS
    from ..data import read_dense_captions
    from ..data.regions import read_labels, require_fit
    from ..model import LAPS
    from ..train import Trainer, TrainingStoppedError
    from ..train_config import TrainConfig
    from ._recipe import FROM_PRESET

    chosen = {f.name: getattr(options, f.name) for f in fields(TrainConfig) if hasattr(options, f.name)}
    if options.model is None:
        preset = PRESETS[options.preset or DEFAULT_PRESET]
        chosen = {name: getattr(preset, name) for name in FROM_PRESET} | chosen
    # What can be wrong is looked at before the weights are read, which takes long.
    config = TrainConfig(**chosen)
    choose_device("laps train", config.device)
    begun = (options.out / "last").exists()
    if begun and not options.resume:
        raise LapsValueError(
            _check.message("laps train", f"{options.out} holds a run already", "another folder, or --resume")
        )
    if options.dense_captions is None and "dense_weight" in chosen:
        raise LapsValueError(
            _check.message(
                "laps train",
                "--dense-weight is given alone",
                "--dense-captions too",
                chosen["dense_weight"],
            )
        )
    _refuse_with_model(options)
    saved = None if options.model is None else LAPS.from_pretrained(options.model)
    regions = _regions(options, saved)
    labels = None if options.labels is None else read_labels(options.labels)
    data, dev = _train_and_dev(options, config.on_error, regions is not None)
    # Where images may be skipped, the first may be one of them.
    if regions is not None and config.on_error == "raise":
        for part in (data, dev):
            if part is not None:
                require_fit(regions, part.image_paths[0], labels)
    dense = None
    if options.dense_captions is not None and data is not None:
        dense = read_dense_captions(options.dense_captions, data)
    model = saved or _new_model(options, config.seed, labels)
    train_data = _stream(options, config, model, dev) if data is None else data
    trainer = Trainer(model, train_data, dev, options.out, config, dense_captions=dense)
    if options.resume and not begun and ranks.main:
        print(f"laps: {options.out} holds no checkpoint yet: a new run", file=sys.stderr)
    try:
        history = trainer.fit(resume=options.resume)
    except TrainingStoppedError as error:
        words = str(error).replace("resume=True", "--resume")
        raise TrainingStoppedError(words, error.signal_number) from error
    skipped = sum(ranks.objects(trainer.source.skipped))
    if not ranks.main:
        return 0
    if skipped:
        source = trainer.source
        what = f"of {source.data.num_images} training images" if isinstance(source, PairSource) else "faults"
        print(f"laps: skipped {skipped} {what}", file=sys.stderr)
    best = max(history, key=lambda entry: entry.get("rsum", entry["epoch"]))
    dev_text = f", dev rSum {best['rsum']:.1f}" if "rsum" in best else ""
    print(f"best epoch {best['epoch'] + 1} of {len(history)}{dev_text}: {Path(options.out) / 'best'}")
    return 0


def _regions(options: argparse.Namespace, saved: LAPS | None) -> RegionTransform | None:
    """How the model's regions are read; None for a model of pixels."""
    from ..config import PRESETS
    from ..data import RegionTransform

    if saved is not None:
        return saved.transform if isinstance(saved.transform, RegionTransform) else None
    preset = PRESETS[options.preset or DEFAULT_PRESET]
    if preset.regions:
        return RegionTransform(**preset.region_sizes(options.num_regions, options.feature_dim))
    of_regions = given(options, REGION_OPTIONS)
    if of_regions:
        expected = "--preset region-36, which takes regions"
        got = options.preset or DEFAULT_PRESET
        raise LapsValueError(
            _check.message("laps train", f"{of_regions} with a preset of pixels", expected, got)
        )
    return None


def _stream(
    options: argparse.Namespace, config: TrainConfig, model: LAPS, dev: RetrievalData | None
) -> CaptionStream:
    """The shards of `laps train --epoch-length`; refused if the dev split's are among them."""
    from .._train_source import augmentation
    from ..data import CaptionStream
    from ..data.containers import container_of

    assert model.tokenizer is not None  # the trainer would refuse it; `_train` makes it first
    stream = CaptionStream(
        options.data,
        model.tokenizer,
        model.transform,
        epoch_length=options.epoch_length,
        split=options.train_split,
        seed=config.seed,
        shuffle_buffer=options.shuffle_buffer,
        augment=augmentation(config, model.tokenizer),
        on_error=config.on_error,
    )
    containers = {container_of(path) for path in ([] if dev is None else dev.image_paths)}
    files = {os.path.realpath(container.file) for container in containers if container is not None}
    shared = [file for file in stream.shards if os.path.realpath(file) in files]
    if shared:
        raise LapsValueError(
            _check.message(
                "laps train",
                f"--dev-split {options.dev_split} is streamed too",
                "other shards than those of --train-split",
                f"{len(shared)} in both, {shared[0]} for example",
            )
        )
    return stream


def _train_and_dev(
    options: argparse.Namespace, on_error: str, regions: bool
) -> tuple[RetrievalData | None, RetrievalData | None]:
    """Both splits, with nothing left out yet; refused if they share images, as the dev recall would lie.

    The first is None where it is a stream.
    """
    from ..data import load

    keep = "keep" if on_error == "skip" else "raise"
    streamed = options.epoch_length is not None
    if streamed and options.dense_captions is not None:
        raise LapsValueError(
            _check.message("laps train", "--dense-captions with --epoch-length", "one of them")
        )
    if streamed and options.dev_data is None and options.dev_split != "none":
        raise LapsValueError(
            _check.message(
                "laps train", "--epoch-length without --dev-data", "--dev-data, or --dev-split none"
            )
        )
    dev_data = options.dev_data or options.data
    wanted = [] if streamed else [(options.data, options.train_split)]
    wanted += [] if options.dev_split == "none" else [(dev_data, options.dev_split)]
    found = [
        load(
            path,
            name,
            images=options.images,
            regions=regions,
            on_missing=keep,
            on_empty=keep,
            on_error=on_error,
            caption_column=options.caption_column,
        )
        for path, name in wanted
    ]
    if streamed:
        return None, found[0] if found else None
    data, *others = found
    sets = [{os.path.abspath(path) for path in part.image_paths} for part in (data, *others)]
    shared = sorted(set.intersection(*sets)) if others else []
    if shared:
        raise LapsValueError(
            _check.message(
                "laps train",
                f"--train-split {options.train_split} and --dev-split {options.dev_split} share images",
                "splits without common images, or --dev-split none",
                f"{len(shared)} in both, {shared[0]} for example",
            )
        )
    return data, others[0] if others else None


def _refuse_with_model(options: argparse.Namespace) -> None:
    new = (
        "image_checkpoint",
        "text_checkpoint",
        "head",
        "head_option",
        "loss",
        "margin",
        "cutoff",
        *REGION_OPTIONS,
    )
    of_new = given(options, new)
    if options.model is not None and of_new:
        raise LapsValueError(
            _check.message("laps train", f"{of_new} with --model", "a --preset", "a saved model")
        )


def _new_model(options: argparse.Namespace, seed: int, labels: list[str] | None) -> LAPS:
    import torch

    from ..model import LAPS

    loss = {
        name: value
        for name, value in (("name", options.loss), ("margin", options.margin), ("cutoff", options.cutoff))
        if value is not None
    }
    torch.manual_seed(seed)
    return LAPS.from_preset(
        options.preset or DEFAULT_PRESET,
        image_checkpoint=options.image_checkpoint,
        text_checkpoint=options.text_checkpoint,
        head=options.head or "laps",
        head_options=dict(_name_and_value(pair) for pair in options.head_option or ()),
        loss=loss,
        num_regions=options.num_regions,
        feature_dim=options.feature_dim,
        labels=labels,
    )


def _name_and_value(pair: str) -> tuple[str, Any]:
    name, sign, value = pair.partition("=")
    if not sign:
        raise LapsValueError(_check.message("laps train", "--head-option is no pair", "NAME=VALUE", pair))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
