"""One seed of the demo without its report: scenes on the disk, both trainings, both evaluations."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..data import RetrievalData, load, make_scenes
from ..data.phrases import read_scene_words
from ..errors import LapsValueError
from ..evaluation import Evaluation, evaluate
from ..grounding import GroundingResult, evaluate_grounding
from .lookalikes import TestScenes, rank_accuracy
from .recipe import HEADS, PRETRAINING_HEAD, TITLES, Sizes, Trained, train

__all__ = ["Measured", "measure"]

# Scenes whose words are asked what they point at: five captions each, a few seconds.
GROUNDED = 200


@dataclass
class Measured:
    """What a seed gave, by head where it is a dictionary.

    Attributes:
        seed, sizes: what was asked for.
        file: dataset.json.
        test, scenes: its split "test", and the annotations of that.
        pretrained: what the encoders of both models started from.
        trained, evaluations: the models, and what they reach on `test`.
        lookalikes: percentage of look-alikes told apart, see :func:`laps.demo.lookalikes.rank_accuracy`.
        grounding: what the word maps of LAPS point at, on the first of the test scenes.
        seconds: per phase.
        cpu_seconds: of this process and its workers.
    """

    seed: int
    sizes: Sizes
    file: Path
    test: RetrievalData
    scenes: TestScenes
    pretrained: Trained
    trained: dict[str, Trained] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    lookalikes: dict[str, float] = field(default_factory=dict)
    grounding: GroundingResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def measure(out: Path, *, seed: int, sizes: Sizes, progress: bool) -> Measured:
    """Draw the scenes of a seed, train encoders, and from there both models, and evaluate them.

    `out` keeps the scenes only.

    Raises:
        LapsValueError: ``out/scenes`` holds something else.
        KeyboardInterrupt: Ctrl-C or SIGTERM while training.
    """
    cpu, seconds = _cpu_seconds(), dict[str, float]()
    with timed(seconds, "scenes", "drawing scenes"):
        file = _draw(out / "scenes", sizes, seed, progress)
    train_data, dev_data, test = (load(file, split) for split in ("train", "dev", "test"))
    learn = partial(train, sizes=sizes, seed=seed, progress=progress)
    with timed(seconds, "pretrain", "training: the encoders of both models"), _scratch(out) as folder:
        start = learn(PRETRAINING_HEAD, train_data, dev_data, folder)
    measured = Measured(seed, sizes, file, test, TestScenes(file, test), start, seconds=seconds)
    pairs = measured.scenes.lookalikes()
    for head in HEADS:
        with timed(seconds, f"train {head}", f"training: {TITLES[head]}"), _scratch(out) as folder:
            trained = learn(head, train_data, dev_data, folder, start=start.model)
        with timed(seconds, f"evaluate {head}", f"evaluating: {TITLES[head]}"):
            result = evaluate(trained.model, test, progress=progress)
        measured.trained[head], measured.evaluations[head] = trained, result
        measured.lookalikes[head] = rank_accuracy(result.scores, pairs)
    with timed(seconds, "grounding", "asking what the words point at"):
        words = read_scene_words(file, "test")
        scenes = set(test.image_paths[:GROUNDED])
        model, chosen = measured.trained["laps"].model, [word for word in words if word.image in scenes]
        if chosen:
            measured.grounding = evaluate_grounding(model, chosen, progress=progress)
    measured.cpu_seconds = _cpu_seconds() - cpu
    return measured


def _draw(folder: Path, sizes: Sizes, seed: int, progress: bool) -> Path:
    """The scenes in `folder`; those of an earlier demo with another seed or other sizes make room."""
    draw = partial(
        make_scenes,
        folder,
        num_train=sizes.train,
        num_dev=sizes.dev,
        num_test=sizes.test,
        seed=seed,
        progress=progress,
    )
    try:
        return draw()
    except LapsValueError:
        if not _remove_scenes(folder):
            raise
        return draw()


def _remove_scenes(folder: Path) -> bool:
    """Remove what `make_scenes` wrote, and nothing else; whether there was any."""
    ours = [file for name in ("dataset.json", "unfinished.json") if (file := folder / name).is_file()]
    if not ours:
        return False
    images = folder / "images"
    ours += [file for file in images.glob("*.jpg") if re.fullmatch(r"(train|val|test)_\d{6}", file.stem)]
    for file in ours:
        file.unlink()
    # Not empty: something else is in there, and make_scenes says so.
    with suppress(OSError):
        images.rmdir()
    return True


@contextmanager
def timed(seconds: dict[str, float], phase: str, title: str) -> Iterator[None]:
    """Print the title and note the seconds of the block."""
    print(title, flush=True)
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for a training, gone afterwards: what matters of it is in memory by then."""
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out) as folder:
        yield Path(folder)


def _cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
