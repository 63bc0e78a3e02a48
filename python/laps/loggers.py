"""Where training values go: TensorBoard, Weights & Biases, trackio. Each is imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import _check
from .errors import LapsValueError
from .train_config import LOGGERS

__all__ = ["Logger", "open_loggers"]


class Logger(Protocol):
    """Something that takes named numbers of a step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the values."""

    def close(self) -> None:
        """Write what is still in memory."""


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # A run that was killed has logged steps after its last checkpoint: they are done, and logged, again.
        self.writer = writer(str(folder / "tensorboard"), purge_step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Tracker:
    """wandb, or trackio, which offers the same calls."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.module = _module(name, name)
        self.run = self.module.init(project="laps", name=folder.resolve().name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise LapsValueError(
            _check.message("loggers", f'"{package}" is not installed', f"pip install {package}")
        ) from None


def open_loggers(names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """A logger for each of the names, one of `LOGGERS`, of a run that has come to `step`.

    Raises:
        LapsValueError: a package that is not installed, or an unknown name.
    """
    loggers: list[Logger] = []
    for name in names:
        _check.choice("loggers", "name", name, LOGGERS)
        loggers.append(
            _TensorBoard(folder, step) if name == "tensorboard" else _Tracker(name, folder, config)
        )
    return loggers
