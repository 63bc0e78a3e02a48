"""The options of a training run; the defaults are the published recipe."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from . import _check
from .errors import LapsTypeError, LapsValueError

__all__ = ["LOGGERS", "ON_ERROR", "SCHEDULES", "TrainConfig"]

LOGGERS = ("tensorboard", "wandb", "trackio")
SCHEDULES = ("milestones", "one_cycle")
ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. The defaults are the published recipe.

    Attributes:
        epochs: passes over the captions.
        batch_size: pairs in a batch, over all ranks; they are each other's negatives.
        mini_batch_size: pairs that a rank encodes at once: less memory, about a third more time, the same
            gradients (GradCache). None: all of its share.
        accumulation: batches per optimizer step; their gradients are averaged. Negatives stay within a batch.
        learning_rate: of the projections and the head.
        backbone_lr_ratio: the backbones' learning rate over this one.
        weight_decay: of AdamW, for all parameters.
        schedule: ``"milestones"`` as published, or ``"one_cycle"`` for a short run from random weights: the
            learning rates rise evenly over the first tenth of all steps, then fall to 0 along a cosine.
        milestones, gamma: before these epochs (from 0) the learning rates are multiplied by gamma.
        warmup_epochs: 1 for the published warm-up in epoch 0 (all negatives, the loss scaled by the share of
            steps done), 0 for none.
        clip_norm: the gradient's largest norm, or None.
        augment: probability that a word of a training caption is masked, replaced or deleted; None: 0.2, or 0
            for a tokenizer without a mask token (CLIP's), with which only 0 is possible.
        dense_weight: what the loss of the images with their dense captions counts, >= 0, where the trainer is
            given dense captions.
        amp: bfloat16 autocast.
        freeze_backbones: train the projections and the head alone; False leaves to the model what it trains.
        gradient_checkpointing: less memory for more time in the backbones.
        compile: run the encoders through torch.compile.
        seed: of the order, the augmentation, the dropout; the weights are the caller's.
        device: None: CUDA if there is one.
        num_workers: processes that load images.
        on_error: ``"raise"`` or ``"skip"`` images that are missing or cannot be read and captions without
            tokens. What is left out is counted in a warning before the first epoch; of the training images
            the damaged ones are found as they are read.
        save_every: optimizer steps between checkpoints; one is also written after each epoch.
        log_every: optimizer steps between log entries.
        eval_batch_size: images or captions at once in evaluation.
        loggers: any of ``"tensorboard"``, ``"wandb"``, ``"trackio"``.
        progress: whether bars are shown.
    """

    epochs: int = 30
    batch_size: int = 128
    mini_batch_size: int | None = None
    accumulation: int = 1
    learning_rate: float = 2e-4
    backbone_lr_ratio: float = 0.1
    weight_decay: float = 1e-4
    schedule: str = "milestones"
    milestones: tuple[int, ...] = (9, 15, 20, 25)
    gamma: float = 0.3
    warmup_epochs: int = 1
    clip_norm: float | None = 2.0
    augment: float | None = None
    dense_weight: float = 1.0
    amp: bool = False
    freeze_backbones: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    device: str | None = None
    num_workers: int = 4
    on_error: str = "raise"
    save_every: int = 500
    log_every: int = 10
    eval_batch_size: int = 64
    loggers: tuple[str, ...] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        operation = "TrainConfig"
        for name in ("epochs", "batch_size", "accumulation", "save_every", "log_every", "eval_batch_size"):
            _check.count(operation, name, getattr(self, name))
        for name in ("seed", "num_workers", "warmup_epochs"):
            _check.count(operation, name, getattr(self, name), 0)
        for name in ("learning_rate", "backbone_lr_ratio", "weight_decay", "gamma", "dense_weight"):
            _check.number(operation, name, getattr(self, name), 0.0)
        if self.mini_batch_size is not None:
            _check.count(operation, "mini_batch_size", self.mini_batch_size)
        if self.augment is not None:
            _check.number(operation, "augment", self.augment, 0.0, 1.0)
        # Seeds of epochs and of torch are derived from it, and have 64 bits.
        if self.seed >= 2**32:
            raise LapsValueError(_check.message(operation, "seed is out of range", "below 2**32", self.seed))
        if self.warmup_epochs > 1:
            raise LapsValueError(
                _check.message(operation, "warmup_epochs is out of range", "0 or 1", self.warmup_epochs)
            )
        if self.clip_norm is not None:
            _check.number(operation, "clip_norm", self.clip_norm, 0.0, open_low=True)
        _check.choice(operation, "on_error", self.on_error, ON_ERROR)
        _check.choice(operation, "schedule", self.schedule, SCHEDULES)
        # JSON has no tuples; equal runs must compare equal.
        for name in ("milestones", "loggers"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise LapsTypeError(
                    _check.message(operation, f"{name} is no list", "a list", getattr(self, name))
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for epoch in self.milestones:
            _check.count(operation, "milestones", epoch, 0)
        for logger in self.loggers:
            _check.choice(operation, "loggers", logger, LOGGERS)

    def lr_scale(self, epoch: int, done: float) -> float:
        """What the learning rates are multiplied by.

        Args:
            epoch: the current one, from 0.
            done: share of all steps that are done with the one to be scaled, in (0, 1].
        """
        if self.schedule == "milestones":
            return float(self.gamma ** bisect_right(sorted(self.milestones), epoch))
        rise = 0.1
        if done < rise:
            return done / rise
        return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
