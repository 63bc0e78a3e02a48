"""The command ``laps``."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, _check
from .errors import LapsError, LapsValueError

if TYPE_CHECKING:
    from .data import CaptionStream, RegionTransform, RetrievalData
    from .distributed import Ranks
    from .model import LAPS
    from .train_config import TrainConfig

__all__ = ["main"]

DEFAULT_PRESET = "vit-base-224"
# Of `laps train`, for presets whose input is regions, and of `laps data check`.
REGION_OPTIONS = ("num_regions", "feature_dim", "labels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 1 where a check found faults; 2 for an error, of which standard error has one line; 128 + n where
    signal n ended the work: 130 for Ctrl-C, 143 for SIGTERM, 141 for a reader that went away.
    """
    # A terminal that cannot show a letter shows another; it does not end the work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        command: Callable[[argparse.Namespace], int] | None = getattr(options, "command", None)
        if command is None:
            parser.print_help()
            return 2
        status = command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads on (`laps info | head -1`); Python would complain once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (LapsError, OSError) as error:
        print(f"laps: {error}", file=sys.stderr)
        number: int | None = getattr(error, "signal_number", None)
        return 2 if number is None else 128 + number
    except KeyboardInterrupt:
        print("laps: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


# ---- commands; each imports what it needs, so that the others start fast


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    run(options.out, seed=options.seed, open_browser=options.open)
    return 0


def _train(options: argparse.Namespace) -> int:
    from ._launch import started_ranks

    with started_ranks(getattr(options, "device", None)) as ranks:
        return _train_on(ranks, options)


def _train_on(ranks: Ranks, options: argparse.Namespace) -> int:
    from ._device import choose_device
    from ._train_options import FROM_PRESET
    from ._train_source import PairSource
    from .config import PRESETS
    from .data import read_dense_captions
    from .data.regions import read_labels, require_fit
    from .model import LAPS
    from .train import Trainer
    from .train_config import TrainConfig

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
    train_data = _stream(options, config, model) if data is None else data
    trainer = Trainer(model, train_data, dev, options.out, config, dense_captions=dense)
    if options.resume and not begun and ranks.main:
        print(f"laps: {options.out} holds no checkpoint yet: a new run", file=sys.stderr)
    history = trainer.fit(resume=options.resume)
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
    from .config import PRESETS
    from .data import RegionTransform

    if saved is not None:
        return saved.transform if isinstance(saved.transform, RegionTransform) else None
    preset = PRESETS[options.preset or DEFAULT_PRESET]
    if preset.regions:
        return RegionTransform(**preset.region_sizes(options.num_regions, options.feature_dim))
    given = _given(options, REGION_OPTIONS)
    if given:
        expected = "--preset region-36, which takes regions"
        got = options.preset or DEFAULT_PRESET
        raise LapsValueError(_check.message("laps train", f"{given} with a preset of pixels", expected, got))
    return None


def _given(options: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of the options that were given, as they are written."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None)


def _stream(options: argparse.Namespace, config: TrainConfig, model: LAPS) -> CaptionStream:
    """The shards of `laps train --epoch-length`."""
    from ._train_source import augmentation
    from .data import CaptionStream

    assert model.tokenizer is not None  # the trainer would refuse it; `_train_on` makes it first
    return CaptionStream(
        options.data,
        model.tokenizer,
        model.transform,
        epoch_length=options.epoch_length,
        seed=config.seed,
        shuffle_buffer=options.shuffle_buffer,
        augment=augmentation(config, model.tokenizer),
        on_error=config.on_error,
    )


def _train_and_dev(
    options: argparse.Namespace, on_error: str, regions: bool
) -> tuple[RetrievalData | None, RetrievalData | None]:
    """Both splits, with nothing left out yet; refused if they share images, as the dev recall would lie.

    The first is None where it is a stream.
    """
    from .data import load

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
        load(path, name, images=options.images, regions=regions, on_missing=keep, on_empty=keep)
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
    given = _given(options, new)
    if options.model is not None and given:
        raise LapsValueError(
            _check.message("laps train", f"{given} with --model", "a --preset", "a saved model")
        )


def _new_model(options: argparse.Namespace, seed: int, labels: list[str] | None) -> LAPS:
    import torch

    from .model import LAPS

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


def _explain(options: argparse.Namespace) -> int:
    from ._device import choose_device
    from ._files import require_writable
    from .explanation import check_suffix, explain
    from .model import LAPS

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


def _convert(options: argparse.Namespace) -> int:
    from .conversion import convert

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


def _eval(options: argparse.Namespace) -> int:
    from ._launch import started_ranks

    with started_ranks(options.device) as ranks:
        return _eval_on(ranks, options)


def _eval_on(ranks: Ranks, options: argparse.Namespace) -> int:
    import torch

    from ._device import choose_device
    from ._files import require_writable
    from .data import RegionTransform, load
    from .evaluation import evaluate
    from .model import LAPS

    # What can be wrong is looked at before the model is loaded and the data scored, which takes long.
    for path in (options.json, options.csv):
        if path is not None and ranks.main:
            require_writable(path)
    device = choose_device("laps eval", options.device)
    model = LAPS.from_pretrained(options.model).to(device)
    regions = isinstance(model.transform, RegionTransform)
    data = load(options.data, options.split, images=options.images, regions=regions)
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


def _encode(options: argparse.Namespace) -> int:
    from ._device import choose_device
    from .index import Index
    from .model import LAPS

    device = choose_device("laps encode", options.device)
    given = None if options.model is None else LAPS.from_pretrained(options.model).to(device)
    if (options.out / "index.json").exists():
        index = Index.open(options.out, model=given, device=str(device))
        if options.storage not in (None, index.storage):
            expected = f"{index.storage}, or a new index"
            raise LapsValueError(
                _check.message(
                    "laps encode", f"{options.out} has another --storage", expected, options.storage
                )
            )
    elif given is None:
        raise LapsValueError(
            _check.message("laps encode", f"{options.out} is no index yet", "--model, to make one")
        )
    else:
        # Before the model is copied: an index without images helps nobody.
        if not options.images.is_dir():
            raise LapsValueError(_check.message("laps encode", f"{options.images} is missing", "a folder"))
        index = Index.create(options.out, given, storage=options.storage or "float16")
    done = index.add(
        options.images,
        prune=options.prune,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        on_error=options.on_error,
        amp=options.amp,
        progress=not options.quiet,
    )
    print(f"{done}: {len(index)} images, {index.nbytes / 1e6:.1f} MB in {options.out}")
    return 0


def _search(options: argparse.Namespace) -> int:
    from ._files import require_writable, write_atomically
    from .index import Index
    from .index.page import page
    from .index.terminal import picture_lines

    queries: list[str | Path] = [*options.query, *(options.image or ())]
    if not queries:
        raise LapsValueError(_check.message("laps search", "nothing to search for", "a sentence, or --image"))
    if options.html is not None:
        require_writable(options.html)
    index = Index.open(options.index, device=options.device)
    results = index.search(queries, options.k, candidates=options.candidates)
    if options.html is not None:
        write_atomically(options.html, page(results))
    if options.json:
        print(json.dumps([hits.to_dict() for hits in results], indent=1))
        return 0
    # Its colours are noise anywhere else.
    pictures = options.thumbnails and sys.stdout.isatty()
    for hits in results:
        print(repr(hits) if len(results) > 1 else hits)
        for hit in hits if pictures else ():
            print(f"{hit.rank}", *picture_lines(hit.path), sep="\n")
    if options.html is not None:
        print(f"Wrote {options.html}")
    return 0


def _index_check(options: argparse.Namespace) -> int:
    from .index import Index

    checked = Index.check(options.index, repair=options.repair, progress=not options.quiet)
    print(checked)
    return 0 if checked.ok else 1


def _index_compact(options: argparse.Namespace) -> int:
    from .index import Index

    index = Index.open(options.index)
    print(f"freed {index.compact(progress=not options.quiet) / 1e6:.1f} MB; {len(index)} images")
    return 0


def _index_delete(options: argparse.Namespace) -> int:
    from .index import Index

    index = Index.open(options.index)
    print(f"deleted {index.delete(options.paths)}; {len(index)} images")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from .data import CaptionTokenizer, RegionTransform, check
    from .data.regions import read_labels

    given = _given(options, REGION_OPTIONS)
    if given and not options.regions:
        raise LapsValueError(_check.message("laps data check", f"{given} without --regions", "both or none"))
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
        images=options.images,
        transform=transform,
        tokenizer=tokenizer,
        max_length=options.max_length,
    )
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)
    return 0 if report.ok else 1


def _make_scenes(options: argparse.Namespace) -> int:
    from .data import make_scenes

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


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from . import compare

    if options.config is None:
        for name, path in compare.configs().items():
            print(f"{name:16} {path}")
        return 0
    comparison = compare.read(options.config, data=options.data, images=options.images, labels=options.labels)
    if options.seeds:
        comparison = replace(comparison, seeds=tuple(options.seeds))
    out = options.out or Path("out/compare") / Path(options.config).stem
    table = compare.run(
        comparison,
        out,
        rows=options.rows,
        device=options.device,
        num_workers=options.num_workers,
        progress=not options.quiet,
    )
    print(table)
    print(f"tables: {out}/table.md, .tex, .csv, .json")
    return 0


def _heads_list(options: argparse.Namespace) -> int:
    from . import heads

    print("\n".join(heads.head_names()))
    return 0


def _info(options: argparse.Namespace) -> int:
    from ._info import info

    print(info())
    return 0


# ---- arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of `laps train` fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="laps", description="Fine-grained image-text retrieval (LAPS, CVPR 2024).")
    parser.add_argument("--version", action="version", version=f"laps {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    demo = commands.add_parser("demo", help="draw scenes, train on them, evaluate, search; writes a report")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (default: out/demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--open", action="store_true", help="show the report in a browser")
    demo.set_defaults(command=_demo)

    _add_train(commands.add_parser("train", help="train a model on a data set"))
    _add_eval(commands.add_parser("eval", help="recall of a trained model on a split"))
    _add_compare(
        commands.add_parser("compare", help="train and evaluate several heads alike; writes their table")
    )

    _add_convert(commands.add_parser("convert", help="a checkpoint of the published code as a model of laps"))

    why = commands.add_parser("explain", help="why an image and a caption have their score")
    why.add_argument(
        "image", type=Path, help="an image file; for a model of regions a.npz, or test_ims.npy/3"
    )
    why.add_argument("caption", help="a sentence, in quotes")
    why.add_argument("--model", required=True, metavar="PATH_OR_ID", help="folder or hub id of a model")
    why.add_argument(
        "-o", "--out", type=Path, help="the page (.html), data (.json) or arrays (.npz) to write"
    )
    why.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")
    why.set_defaults(command=_explain)

    data = commands.add_parser("data", help="look at data sets, or make one")
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    check = data_commands.add_parser("check", help="missing images, empty captions, split leaks, counts")
    check.add_argument(
        "path",
        type=Path,
        help="a data set: a file or folder of captions, of parquet files, of save_to_disk, or shards, with "
        "braces too (shards/{00000..00009}.tar); docs/data.md has the formats",
    )
    check.add_argument(
        "--images", type=Path, help="folder of the images or regions, where it is not beside the captions"
    )
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
    _add_sizes(check, "36", "2048")
    check.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the detector's labels, a line each: also find regions whose label has no name",
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_data_check)
    scenes = data_commands.add_parser("make-scenes", help="drawn scenes with captions, in Karpathy's format")
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--train", type=int, default=4000, help="images (default: 4000)")
    scenes.add_argument("--dev", type=int, default=500, help="images (default: 500)")
    scenes.add_argument("--test", type=int, default=500, help="images (default: 500)")
    scenes.add_argument("--size", type=int, default=96, help="pixels (default: 96)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(command=_make_scenes)

    _add_encode(
        commands.add_parser("encode", help="make a folder of images an index, or bring it up to date")
    )
    _add_search(commands.add_parser("search", help="find images of an index by a sentence"))
    _add_index(commands.add_parser("index", help="check, compact or delete from an index"))

    heads = commands.add_parser("heads", help="similarity heads")
    heads_commands = heads.add_subparsers(metavar="COMMAND", required=True)
    heads_commands.add_parser("list", help="their names").set_defaults(command=_heads_list)

    commands.add_parser("info", help="versions and backends").set_defaults(command=_info)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    from ._train_options import add_train_options
    from .config import PRESETS
    from .heads import head_names
    from .losses import CUTOFF
    from .objective import MARGIN, NAMES

    parser.add_argument("data", type=Path, help="a data set with its splits: see laps data check --help")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--images", type=Path, help="folder of the images or regions, where it is not beside the captions"
    )
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
    _add_sizes(parser, "the preset's", "the preset's")
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
    parser.set_defaults(command=_train)


def _add_sizes(parser: argparse.ArgumentParser, num_regions: str, feature_dim: str) -> None:
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


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", help="a YAML file, or the name of a comparison of laps; without it: their names"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/compare/CONFIG)")
    parser.add_argument("--data", type=Path, help="a data set, in place of the config's")
    parser.add_argument(
        "--images", type=Path, help="folder of the images or regions, in place of the config's"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="of regions: names of the detector's labels, a line each"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the config's")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="train these alone")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(command=_compare)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="model_best.pth, its folder, or the same weights as .safetensors"
    )
    parser.add_argument("out", type=Path, help="the model's folder, new or empty")
    for side, base in (("image", "ViT-base or a Swin"), ("text", "BERT-base")):
        parser.add_argument(
            f"--{side}-config",
            type=Path,
            metavar="JSON",
            help=f"config.json of a {side} encoder that is no {base}",
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


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a saved model: a folder or hub id")
    parser.add_argument("data", type=Path, help="a data set: see laps data check --help")
    parser.add_argument("--split", default="test", metavar="NAME", help="what to evaluate on (default: test)")
    parser.add_argument(
        "--images", type=Path, help="folder of the images or regions, where it is not beside the captions"
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
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images or captions at once (default: 64)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in the encoders")
    parser.add_argument("--half-features", action="store_true", help="hold features in float16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(command=_eval)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="DIR", help="folder of images, with all below it")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="INDEX", help="the index's folder")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="folder or hub id; needed for a new index, which keeps a copy"
    )
    parser.add_argument(
        "--storage",
        choices=("float16", "int8", "float32"),
        help="what features are kept in, of a new index (default: float16)",
    )
    parser.add_argument("--prune", action="store_true", help="also delete images of DIR that are gone")
    parser.add_argument(
        "--on-error",
        choices=("skip", "raise"),
        default="skip",
        help="what to do with images that cannot be read (default: skip)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images at once (default: 32)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in the encoder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(command=_encode)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="a folder that laps encode has made")
    parser.add_argument("query", nargs="*", help="a sentence, in quotes; or several")
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE", help="find what is like this image; repeatable"
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="hits of a query (default: 10)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=500,
        metavar="N",
        help="images that the model's head scores (default: 500)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the images")
    parser.add_argument("--thumbnails", action="store_true", help="draw the images, on a terminal")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.set_defaults(command=_search)


def _add_index(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="read all of it; status 1 if anything is damaged")
    check.add_argument(
        "--repair", action="store_true", help="leave damaged images out; laps encode adds them again"
    )
    compact = commands.add_parser("compact", help="free what deleted images take, join small shards")
    delete = commands.add_parser("delete", help="take images out")
    for command, function in (
        (check, _index_check),
        (compact, _index_compact),
        (delete, _index_delete),
    ):
        command.add_argument("index", type=Path, metavar="INDEX", help="a folder that laps encode has made")
        command.set_defaults(command=function)
    for command in (check, compact):
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    delete.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="image files or folders of them")


def _name_and_value(pair: str) -> tuple[str, Any]:
    name, sign, value = pair.partition("=")
    if not sign:
        raise LapsValueError(_check.message("laps train", "--head-option is no pair", "NAME=VALUE", pair))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
