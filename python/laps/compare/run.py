"""Trains and evaluates every row with every seed, and goes on where an earlier call stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import _check
from .._files import write_atomically
from .._json_files import read_object
from .._laps import __version__
from .._train_source import describe_data
from ..data import CaptionTokenizer, RegionTransform, RetrievalData, load, make_scenes
from ..data.regions import require_fit
from ..demo import recipe
from ..errors import LapsError, LapsValueError
from ..evaluation import evaluate
from ..heads import build_head
from ..model import LAPS
from ..objective import Objective
from ..train import FREE_ON_RESUME, Trainer
from ..train_config import TrainConfig
from .settings import OPERATION, SMALL, START, Comparison, Row, Start
from .table import Table, published

__all__ = ["Result", "run"]

RESULT = "result.json"
# C and N of the heads that are built to be checked; all of ours take them.
PROBE = (96, 49)


@dataclass(frozen=True)
class Result:
    """What one row reached with one seed.

    Attributes:
        row: its name.
        seed: of the weights and the order.
        metrics: of :func:`laps.metrics.retrieval_metrics` on the test split.
        folds: the mean over folds, or None.
        steps: of the optimizer.
        seconds: of the training.
        parameters: of the head.
    """

    row: str
    seed: int
    metrics: dict[str, float]
    folds: dict[str, float] | None
    steps: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class _Run:
    """The options of the command that change no result."""

    out: Path
    device: str | None
    num_workers: int
    progress: bool


@dataclass(frozen=True)
class _Data:
    train: RetrievalData
    dev: RetrievalData
    test: RetrievalData
    # What tells their contents apart, wherever the files are; to hash them takes a while.
    described: list[dict[str, Any]]


def run(
    comparison: Comparison,
    out: str | Path,
    *,
    rows: Sequence[str] | None = None,
    device: str | None = None,
    num_workers: int = 4,
    progress: bool = True,
) -> Table:
    """Train and evaluate what is not there yet; ``out/table.{md,tex,csv,json}`` are written after every row.

    The rows of a seed see the same data in the same order for the same number of steps, from the same
    encoders; of the epochs each row's best by the dev split counts. Seed by seed, so that the first table is
    whole early. Several processes may share a folder if each has rows or seeds of its own.

    Args:
        comparison: of :func:`laps.compare.read`.
        out: folder; ``out/ROW/seed-N`` keeps each row's best model and its result, and while it trains a
            checkpoint of three times that size.
        rows: names of those to train; None for all. The table has all that are there.
        device: cpu, cuda, ..; None for a GPU if there is one.
        num_workers: processes that load images.
        progress: whether bars are shown.

    Raises:
        LapsValueError: a row that cannot be built, data that cannot be read, or a folder that holds a run
            with other settings or data.
        laps.train.TrainingStoppedError: a signal; the same call goes on from there.
    """
    options = _Run(Path(out), device, num_workers, progress)
    names = [row.name for row in comparison.rows]
    wanted = names if rows is None else [_check.choice(OPERATION, "rows", name, names) for name in rows]
    _check_rows(comparison)
    if comparison.scenes is None:
        # One set for all seeds.
        data = dict.fromkeys(comparison.seeds, _data(comparison, comparison.seeds[0], options))
    else:
        data = {seed: _data(comparison, seed, options) for seed in comparison.seeds}
    _results(comparison, data, options)
    for seed in comparison.seeds:
        for row in comparison.rows:
            if row.name in wanted and _finished(comparison, row, seed, data[seed], options) is None:
                print(f"seed {seed}: {row.name}", file=sys.stderr, flush=True)
                _train(comparison, row, seed, data[seed], options)
                Table(comparison, _results(comparison, data, options)).save(options.out)
    table = Table(comparison, _results(comparison, data, options))
    table.save(options.out)
    return table


def _check_rows(comparison: Comparison) -> None:
    """Build every head and loss once, so that what is wrong does not come out after hours."""
    known = published()
    backbone = comparison.published.get("backbone", "")
    sources = [data for protocol, data in comparison.published.items() if protocol != "backbone"]
    sizes = {"embed_dim": PROBE[0], "num_patches": PROBE[1]}
    if comparison.of_regions:
        sizes |= {"num_patches": comparison.region_options()["num_regions"], "num_prefix_tokens": 0}
    for row in comparison.rows:
        try:
            head = build_head(
                row.head,
                **sizes,
                **(recipe.HEAD_OPTIONS.get(row.head, {}) if comparison.model == SMALL else {})
                | dict(row.options),
            )
            Objective.for_head(head, comparison.loss_of(row))
        except LapsError as error:
            raise type(error)(f"{OPERATION}: row {row.name!r}: {error}") from error
        for data in sources:
            if row.published is not None and (data, backbone, row.published) not in known:
                raise LapsValueError(
                    _check.message(
                        OPERATION,
                        f"row {row.name!r} has no published figures",
                        "a method, data and backbone of published.csv",
                        f"{row.published}, {data}, {backbone}",
                    )
                )


def _results(comparison: Comparison, data: Mapping[int, _Data], options: _Run) -> list[Result]:
    """All that are there, of this process and of others."""
    found = [
        _finished(comparison, row, seed, data[seed], options)
        for seed in comparison.seeds
        for row in comparison.rows
    ]
    return [result for result in found if result is not None]


# ---- one row


def _train(comparison: Comparison, row: Row, seed: int, data: _Data, options: _Run) -> Result:
    folder = _folder(row.slug, seed, options)
    model = _model(comparison, row, seed, data, options)
    parameters = sum(p.numel() for p in model.head.parameters())
    # Not the order in which the encoders met the data already.
    config = comparison.train_config(
        seed + (comparison.start is not None),
        device=options.device,
        num_workers=options.num_workers,
        progress=options.progress,
    )
    history = _fit(model, data, folder, config)
    best = LAPS.from_pretrained(folder / "best")
    result = evaluate(
        best.to(model.device),
        data.test,
        num_workers=options.num_workers,
        folds=comparison.folds,
        progress=options.progress,
    )
    done = Result(
        row.name,
        seed,
        result.metrics,
        result.folds,
        history[-1]["step"],
        history[-1]["seconds"],
        parameters,
    )
    key = _key(comparison, row, data)
    write_atomically(
        folder / RESULT,
        json.dumps({"key": key, "laps": __version__, **asdict(done)}, indent=2) + "\n",
    )
    # With the optimizer's moments, three times the size of the model that is kept.
    shutil.rmtree(folder / "last", ignore_errors=True)
    return done


def _fit(model: LAPS, data: _Data, folder: Path, config: TrainConfig) -> list[dict[str, Any]]:
    return Trainer(model, data.train, data.dev, folder, config).fit(resume=True)


def _model(comparison: Comparison, row: Row, seed: int, data: _Data, options: _Run) -> LAPS:
    """The row's model before its training; its head and loss are its own."""
    if comparison.start is None:
        return _new(comparison, row.head, row.options, comparison.loss_of(row), seed, data)
    start = _start(comparison, comparison.start, seed, data, options)
    model = _new(comparison, row.head, row.options, comparison.loss_of(row), seed, data, start.tokenizer)
    model.image_encoder.load_state_dict(start.image_encoder.state_dict())
    model.text_encoder.load_state_dict(start.text_encoder.state_dict())
    return model


def _start(comparison: Comparison, start: Start, seed: int, data: _Data, options: _Run) -> LAPS:
    """The model whose encoders all rows of the seed go on from; trained once."""
    folder = _folder(START, seed, options)
    done = folder / "done.json"
    key = _digest({**_shared(comparison, data), "loss": dict(comparison.loss)})
    if not done.exists():
        print(f"seed {seed}: the encoders of all rows", file=sys.stderr, flush=True)
        config = comparison.train_config(
            seed,
            epochs=start.epochs,
            learning_rate=start.learning_rate,
            device=options.device,
            num_workers=options.num_workers,
            progress=options.progress,
        )
        model = _new(comparison, start.head, {}, comparison.loss, seed, data)
        _fit(model, data, folder, config)
        write_atomically(done, json.dumps({"key": key}) + "\n")
        shutil.rmtree(folder / "last", ignore_errors=True)
    _require_same(done, key)
    return LAPS.from_pretrained(folder / "best")


def _new(
    comparison: Comparison,
    head: str,
    head_options: Mapping[str, Any],
    loss: Mapping[str, Any],
    seed: int,
    data: _Data,
    tokenizer: CaptionTokenizer | None = None,
) -> LAPS:
    """A model with this head; its other weights depend on the seed alone."""
    if comparison.model == SMALL:
        tokenizer = tokenizer or CaptionTokenizer.train(data.train.captions, vocab_size=recipe.VOCABULARY)
        model = recipe.build_model(head, tokenizer, seed, head_options)
        model.objective = Objective.for_head(model.head, loss)
        return model
    torch.manual_seed(seed)
    return LAPS.from_preset(
        comparison.model, head=head, head_options=head_options, loss=loss, **comparison.region_options()
    )


# ---- data and folders


def _data(comparison: Comparison, seed: int, options: _Run) -> _Data:
    """The splits; scenes are drawn into the folder of their seed."""
    source, images = comparison.data, comparison.images
    if comparison.scenes is not None:
        sizes = comparison.scenes
        source = make_scenes(
            options.out / "scenes" / f"seed-{seed}",
            num_train=sizes.train,
            num_dev=sizes.dev,
            num_test=sizes.test,
            seed=seed,
            progress=options.progress,
        )
    assert source is not None
    read = partial(load, source, images=images, regions=comparison.of_regions)
    train, dev, test = (read(name) for name in ("train", "dev", "test"))
    if comparison.of_regions:
        chosen = comparison.region_options()
        labels = chosen.pop("labels")
        for part in (train, dev, test):
            require_fit(RegionTransform(**chosen), part.image_paths[0], labels)
    data = _Data(train, dev, test, [describe_data(part) for part in (train, dev, test)])
    if comparison.folds is not None and comparison.folds > data.test.num_images:
        raise LapsValueError(
            _check.message(
                OPERATION, "folds", f"at most {data.test.num_images} test images", comparison.folds
            )
        )
    return data


def _finished(comparison: Comparison, row: Row, seed: int, data: _Data, options: _Run) -> Result | None:
    """The result that is there already, or None."""
    folder = _folder(row.slug, seed, options)
    if not (folder / RESULT).exists():
        return None
    values = _require_same(folder / RESULT, _key(comparison, row, data))
    try:
        result = Result(**{field.name: values[field.name] for field in fields(Result)})
    except KeyError as error:
        raise LapsValueError(
            _check.message(OPERATION, f"{folder / RESULT} lacks {error}", "a result of laps compare")
        ) from None
    # Of a process that was killed between the two.
    shutil.rmtree(folder / "last", ignore_errors=True)
    return replace(result, row=row.name)


def _require_same(path: Path, key: str) -> dict[str, Any]:
    values = read_object(OPERATION, path, "a result of laps compare")
    if values.pop("key", None) != key:
        raise LapsValueError(
            _check.message(
                OPERATION, f"{path.parent} holds a run with other settings", "another --out, or remove it"
            )
        )
    return values


def _shared(comparison: Comparison, data: _Data) -> dict[str, Any]:
    """What the encoders that rows start from depend on, but the seed."""
    train = asdict(comparison.train_config(0))
    # It weighs dense captions, and a comparison has none.
    unused = {*FREE_ON_RESUME, "dense_weight"}
    return {
        "model": comparison.model,
        "train": {name: value for name, value in train.items() if name not in unused},
        "start": comparison.start and asdict(comparison.start),
        "data": data.described,
        # Nothing of pixels: what was trained on them before there were regions keeps its key.
        **({"regions": comparison.region_options()} if comparison.of_regions else {}),
    }


def _key(comparison: Comparison, row: Row, data: _Data) -> str:
    """Of all that the row's result depends on but the seed."""
    return _digest(
        {
            **_shared(comparison, data),
            "start loss": dict(comparison.loss) if comparison.start else None,
            "folds": comparison.folds,
            "head": row.head,
            "options": dict(row.options),
            "loss": comparison.loss_of(row),
        }
    )


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _folder(name: str, seed: int, options: _Run) -> Path:
    return options.out / name / f"seed-{seed}"
