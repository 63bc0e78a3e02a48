"""What `laps compare` is asked for: a YAML file, checked before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .. import _check
from ..config import PRESETS
from ..data.regions import read_labels
from ..errors import LapsError, LapsTypeError, LapsValueError
from ..heads import head_names
from ..objective import Objective
from ..train_config import TrainConfig

__all__ = [
    "LAYOUTS",
    "SMALL",
    "START",
    "Comparison",
    "Regions",
    "Row",
    "Scenes",
    "Start",
    "configs",
    "read",
]

OPERATION = "laps compare"
# The model of `laps demo`.
SMALL = "small"
# "retrieval" has the columns of the paper's Table 1, "ablation" those of Table 4.
LAYOUTS = ("retrieval", "ablation")
# The folder of what all rows start from.
START = "start"
# Theirs to set, not the file's.
OURS = ("seed", "progress", "device", "num_workers")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: as the table prints it.
        head: name of the similarity head.
        options: of the head.
        loss: of :class:`laps.objective.Objective`, over the comparison's.
        published: the method's name in ``published.csv``, or None.
    """

    name: str
    head: str = "laps"
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    published: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "head"):
            if not isinstance(getattr(self, name), str):
                raise _wrong(f"{name} of a row is no string", "a string", getattr(self, name))
        for name in ("options", "loss"):
            if not isinstance(getattr(self, name), Mapping):
                raise _wrong(f"{name} of row {self.name!r} is no mapping", "name: value", getattr(self, name))

    @property
    def slug(self) -> str:
        """The name of the row's folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes as data, other ones for each seed: numbers of images."""

    train: int = 2000
    dev: int = 200
    test: int = 500


@dataclass(frozen=True)
class Start:
    """A training whose encoders all rows start from: the head, and what differs from `train`."""

    head: str = "vse"
    epochs: int = 2
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Regions:
    """What a detector found, as input of all rows, where that is not what the preset says.

    Attributes:
        num_regions, feature_dim: of an image and of a region; None for the preset's.
        labels: a file with the names of the detector's labels, or None; see
            :meth:`laps.LAPS.from_preset`.
    """

    num_regions: int | None = None
    feature_dim: int | None = None
    labels: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_regions", "feature_dim"):
            if getattr(self, name) is not None:
                _check.count(OPERATION, f"{name} of regions", getattr(self, name))
        if self.labels is not None and not isinstance(self.labels, (str, Path)):
            raise _wrong("labels of regions are no file", "a path", _check.name_of(self.labels))


@dataclass(frozen=True)
class Comparison:
    """Heads that are trained and evaluated alike.

    Attributes:
        title: of the table.
        rows: what is compared.
        model: a preset's name, or ``"small"``, the model of `laps demo`.
        data: a data set as :func:`laps.data.load` reads it, with the splits train, dev and test; or None.
            With a preset of regions its regions are read.
        images: folder of its images or regions, or None.
        regions: other ones than the preset's, or None.
        scenes: drawn ones instead of `data`, or None.
        seeds: each is a training of every row.
        train: of :class:`laps.train_config.TrainConfig`, the same for all rows: the budget.
        loss: of all rows; empty for each head's own.
        start: where the encoders come from, or None for the preset's.
        folds: also the mean over so many folds of the test images (COCO 1K: 5), or None.
        layout: ``"retrieval"`` or ``"ablation"``.
        published: the data set (or data sets, ``{"all": .., "folds": ..}``) and backbone in
            ``published.csv`` that published figures are of.
    """

    title: str
    rows: tuple[Row, ...]
    model: str = "vit-base-224"
    data: Path | None = None
    images: Path | None = None
    regions: Regions | None = None
    scenes: Scenes | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    train: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    folds: int | None = None
    layout: str = "retrieval"
    published: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise _wrong("rows is empty", "at least one", 0)
        names = [row.slug for row in self.rows] + [START, "scenes"]
        twice = sorted({name for name in names if not name or names.count(name) > 1})
        if twice:
            raise _wrong("names of rows", "letters or digits, different and not start or scenes", twice)
        for row in self.rows:
            _check.choice(OPERATION, f"head of row {row.name!r}", row.head, head_names())
            Objective.from_options(self.loss_of(row))
        _check.choice(OPERATION, "model", self.model, [SMALL, *sorted(PRESETS)])
        _check.choice(OPERATION, "layout", self.layout, LAYOUTS)
        if self.regions is not None and not self.of_regions:
            raise _wrong("regions with a model of pixels", "model: region-36", self.model)
        if self.scenes is not None and self.of_regions:
            raise _wrong("scenes have pixels", "data with regions, or a model of pixels", self.model)
        if (self.data is None) == (self.scenes is None):
            expected = "one of them (on the command line: --data)"
            raise _wrong("data and scenes", expected, "both" if self.data else "none")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise _wrong("seeds", "different integers, at least one", list(self.seeds))
        for seed in self.seeds:
            _check.count(OPERATION, "seeds", seed, 0)
        for name in OURS:
            if name in self.train:
                raise _wrong(f"train has {name}", "an option of the command", self.train[name])
        if "dense_weight" in self.train:
            raise _wrong(
                "train has dense_weight",
                "nothing that weighs dense captions, of which a comparison has none",
                self.train["dense_weight"],
            )
        if self.folds is not None:
            _check.count(OPERATION, "folds", self.folds, 2)
        unknown = sorted(set(self.published) - {"all", "folds", "backbone"})
        if unknown or not all(isinstance(value, str) for value in self.published.values()):
            raise _wrong("published", "all, folds and backbone, as strings", dict(self.published))
        self.train_config(0)

    @property
    def of_regions(self) -> bool:
        """Whether the models' input is regions of a detector."""
        return self.model != SMALL and PRESETS[self.model].regions

    def region_options(self) -> dict[str, Any]:
        """Keyword arguments of :meth:`laps.LAPS.from_preset` that say which regions; of pixels none."""
        if not self.of_regions:
            return {}
        chosen = self.regions or Regions()
        sizes = PRESETS[self.model].region_sizes(chosen.num_regions, chosen.feature_dim)
        return {**sizes, "labels": None if chosen.labels is None else read_labels(chosen.labels)}

    def loss_of(self, row: Row) -> dict[str, Any]:
        """Keyword arguments of the row's objective; empty where the head's own is meant."""
        return {**self.loss, **row.loss}

    def train_config(self, seed: int, **changes: Any) -> TrainConfig:
        """The options of a training."""
        try:
            return TrainConfig(**{**self.train, **changes}, seed=seed)
        except TypeError as error:
            if isinstance(error, LapsError):
                raise
            raise LapsTypeError(
                _check.message(OPERATION, "train has an unknown option", _names(TrainConfig), error)
            ) from None


def configs() -> dict[str, Path]:
    """The comparisons that come with laps, by name."""
    folder = Path(str(resources.files(__package__) / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(
    source: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    labels: str | Path | None = None,
) -> Comparison:
    """A comparison from a YAML file, or from the name of one that comes with laps.

    Args:
        source: the file or the name. Paths in a file are relative to its folder.
        data: in place of the file's.
        images: in place of the file's.
        labels: in place of those of the file's regions.

    Raises:
        LapsValueError, LapsTypeError: no such file, no YAML, an unknown name, or a value out of its range.
    """
    known = configs()
    path = known.get(str(source), Path(source))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        expected = f"a YAML file, or one of {', '.join(known)}"
        reason = " ".join(str(error).split())
        raise LapsValueError(
            _check.message(OPERATION, f"{source} cannot be read", expected, reason)
        ) from None
    try:
        return _comparison(values, path.parent, {"data": data, "images": images}, labels)
    except LapsError as error:
        raise type(error)(f"{path}: {error}") from error


def _comparison(
    values: object, folder: Path, paths: Mapping[str, str | Path | None], labels: str | Path | None
) -> Comparison:
    given = _mapping("the file", values, Comparison)
    rows = given.get("rows", [])
    if not isinstance(rows, list):
        raise _wrong("rows is no list", "a list", _check.name_of(rows))
    given["rows"] = tuple(_built(f"rows[{i}]", row, Row) for i, row in enumerate(rows))
    for name, kind in (("scenes", Scenes), ("start", Start), ("regions", Regions)):
        if given.get(name) is not None:
            given[name] = _built(name, given[name], kind)
    regions = given.get("regions")
    if labels is not None:
        given["regions"] = replace(regions or Regions(), labels=Path(labels))
    elif regions is not None and regions.labels is not None:
        given["regions"] = replace(regions, labels=folder / str(regions.labels))
    for name, path in paths.items():
        if path is not None:
            given[name] = Path(path)
        elif given.get(name) is not None:
            given[name] = folder / str(given[name])
    for name in ("train", "loss", "published"):
        if not isinstance(given.get(name, {}), Mapping):
            raise _wrong(f"{name} is no mapping", "name: value", _check.name_of(given[name]))
    seeds = given.get("seeds", (0, 1, 2))
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise _wrong("seeds is no list", "integers", seeds)
    given["seeds"] = tuple(seeds)
    if "title" not in given:
        raise _wrong("title is missing", "the table's", "none")
    return Comparison(**given)


def _mapping(place: str, values: object, kind: type) -> dict[str, Any]:
    """The values, if all their names are fields of `kind`."""
    known = [each.name for each in fields(kind)]
    if not isinstance(values, dict):
        raise _wrong(f"{place} is no mapping", ", ".join(known), _check.name_of(values))
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise _wrong(f"{place} has unknown names", ", ".join(known), ", ".join(unknown))
    return dict(values)


def _built(place: str, values: object, kind: type) -> Any:
    given = _mapping(place, values, kind)
    try:
        return kind(**given)
    except LapsError:
        # A LapsTypeError is a TypeError, and says itself what is wrong.
        raise
    except TypeError:
        raise _wrong(f"{place} lacks a name", _names(kind), ", ".join(given)) from None


def _names(kind: type) -> str:
    return ", ".join(each.name for each in fields(kind))


def _wrong(what: str, expected: str, got: object) -> LapsValueError:
    return LapsValueError(_check.message(OPERATION, what, expected, got))
