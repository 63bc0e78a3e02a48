"""The options of :class:`laps.train.TrainConfig` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from ..config import PRESETS
from ..train_config import LOGGERS, ON_ERROR, SCHEDULES, TrainConfig

__all__ = ["FROM_PRESET", "add_train_options"]

# What a preset has its own value of.
FROM_PRESET = ("learning_rate", "backbone_lr_ratio", "batch_size")
HELP = {
    "epochs": "passes over the captions",
    "batch_size": "pairs in a batch, of all processes together; they are each other's negatives",
    "mini_batch_size": "pairs that are encoded at once, for batches larger than the memory (GradCache)",
    "accumulation": "batches per optimizer step; their gradients are averaged",
    "learning_rate": "of the projections and the head",
    "backbone_lr_ratio": "learning rate of the backbones over --learning-rate",
    "weight_decay": "of AdamW",
    "schedule": "learning rates fall at --milestones, or rise and fall once, for a run from random weights",
    "milestones": "epochs, from 0, before which the learning rates are multiplied by --gamma",
    "gamma": "factor at each of the --milestones",
    "warmup_epochs": "0 or 1: in the first epoch all negatives count, and the loss rises from 0",
    "clip_norm": 'largest norm of the gradient; "none": any',
    "augment": 'probability that a word of a training caption is masked, replaced or deleted; "none" for 0',
    "dense_weight": "what the loss with the --dense-captions counts",
    "amp": "bfloat16 autocast",
    "freeze_backbones": "train the projections and the head alone",
    "gradient_checkpointing": "less memory for more time in the backbones",
    "compile": "run the encoders through torch.compile",
    "seed": "of the order, the augmentation, the dropout and the new weights",
    "device": "cpu, cuda, cuda:1, ...",
    "num_workers": "processes that load images",
    "on_error": "what to do about images that cannot be read and captions without words",
    "save_every": "optimizer steps between checkpoints; one is also written after each epoch",
    "log_every": "optimizer steps between entries for the loggers",
    "eval_batch_size": "images or captions at once in the evaluation of the dev split",
    "loggers": "where training values go",
    "progress": "progress bars",
}
# Where the default is no value, or does not say it.
DEFAULTS = {
    "clip_norm": "2.0",
    "augment": "0.2, or none for CLIP's tokenizer, which has no mask token",
    "device": "cuda if there is one, else cpu",
    "mini_batch_size": "all",
    "loggers": "none",
}
CHOICES = {"schedule": SCHEDULES, "on_error": ON_ERROR, "loggers": LOGGERS}


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def probability_or_none(text: str) -> float:
    return 0.0 if text == "none" else float(text)


TYPES: dict[str, Callable[[str], Any]] = {
    "device": str,
    "augment": probability_or_none,
    "clip_norm": number_or_none,
    "loggers": str,
    "mini_batch_size": int,
    "milestones": int,
}


def add_train_options(group: argparse._ArgumentGroup) -> None:
    """One option for each field of TrainConfig; one that is not given is not set in what is parsed."""
    for field in fields(TrainConfig):
        name, default = field.name, field.default
        assert default is not MISSING
        common: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": f"{HELP[name]} (default: {_default(name, default)})",
        }
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        kind = common["type"] = TYPES.get(name, type(default))
        if name in CHOICES:
            common["choices"] = CHOICES[name]
        else:
            common["metavar"] = "N" if kind is int else "X"
        if isinstance(default, tuple):
            common["nargs"] = "*"
        group.add_argument(flag, **common)


def _default(name: str, default: object) -> str:
    if name in FROM_PRESET:
        return _of_presets(name, default)
    if name in DEFAULTS:
        return DEFAULTS[name]
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _of_presets(name: str, default: object) -> str:
    """Such as ``"from the preset: 64 for clip-vit-base-224 and clip-vit-large-224; else 128"``."""
    presets: dict[Any, list[str]] = {}
    for preset, values in PRESETS.items():
        presets.setdefault(getattr(values, name), []).append(preset)
    others = [f"{value} for {' and '.join(names)}" for value, names in presets.items() if value != default]
    return f"from the preset: {', '.join(others)}; else {default}" if others else str(default)
