"""Training: the published recipe as defaults, a loop that fits a page, and runs that survive being killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import _check
from ._device import choose_device
from ._files import atomic_folder, recover_folder, write_atomically
from ._folder_lock import locked_folder
from ._json_files import read_object
from ._train_source import PairSource, Source, StreamSource, describe_data
from ._workers import end_workers
from .checkpoint import generator_states, load_checkpoint, save_checkpoint
from .data import Batch, CaptionStream, CaptionTokenizer, RetrievalData
from .data.usable import usable
from .distributed import Ranks
from .errors import LapsError, LapsValueError
from .evaluation import evaluate
from .loggers import Logger, open_loggers
from .model import LAPS
from .step import TrainingStep
from .train_config import TrainConfig

__all__ = ["TrainConfig", "Trainer", "TrainingStoppedError"]

# What may differ between a run and its continuation without changing what is learned.
FREE_ON_RESUME = {
    "num_workers",
    "save_every",
    "log_every",
    "loggers",
    "progress",
    "eval_batch_size",
    "device",
    "mini_batch_size",
}


class TrainingStoppedError(LapsError):
    """Training ended early: on a signal (what was learned is saved), or because the loss is not finite.

    Attributes:
        signal_number: the signal; None where the loss or its gradient was not finite.
    """

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopNow(BaseException):
    """Raised by a signal handler, anywhere: an Exception would pass for a fault of the image that is read."""


@dataclass
class Progress:
    """How far a run is; what a checkpoint keeps beside tensors."""

    epoch: int = 0
    batch: int = 0  # of this epoch, the next to be done
    step: int = 0  # optimizer steps of the whole run
    loss_sum: float = 0.0  # over the batches of this epoch
    best_rsum: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry for each epoch that is done

    @classmethod
    def read(cls, values: Mapping[str, Any], folder: Path) -> Progress:
        """What the checkpoint in `folder` holds. Raises LapsValueError that names what is wrong with it."""
        own = asdict(cls())
        for name in sorted(own.keys() | values.keys()):
            if name not in own or not _alike(values.get(name), own[name]):
                got = repr(values[name]) if name in values else "nothing"
                raise LapsValueError(
                    _check.message(
                        "Trainer",
                        f"{folder / 'state.json'}: progress.{name} is broken",
                        "what a run writes",
                        got[:80],
                    )
                )
        return cls(**values)


def _alike(value: object, own: object) -> bool:
    """Whether a value from a file is of the type of one of `Progress`."""
    if isinstance(own, list):
        return isinstance(value, list) and all(
            isinstance(entry, dict) and _alike(entry.get("epoch"), 0) for entry in value
        )
    return isinstance(value, (int, float) if isinstance(own, float) else int) and not isinstance(value, bool)


class Trainer:
    """Trains a model on captions and images, keeps the best by the **dev** split's rSum.

    The folder of a run holds ``config.json`` (the options), ``last/`` (a checkpoint to resume from),
    ``best/`` (``LAPS.from_pretrained`` reads it) and ``log.jsonl``. On the CPU a run that was killed and
    resumed ends with the same weights, bit for bit, as one that was not.

    Where there is a process group (``torchrun``) all its ranks build a trainer alike and train one model:
    each encodes its share of every batch, see :class:`laps.step.TrainingStep`; rank 0 writes the folder,
    which all ranks read to resume. Without dropout, what is learned does not depend on how many they are.

    Args:
        model: with a tokenizer. It is trained in place.
        train_data: what to learn from: data that is read at random, or a :class:`laps.data.CaptionStream` of
            this rank, made with the model's tokenizer and transform; its own `seed`, `augment` and `on_error`
            count then. A stream is resumed by reading it again up to where it was.
        dev_data: what to choose the best epoch by; None: the last epoch counts as the best.
        folder: of the run.
        config: options; None for the published recipe.
        dense_captions: a longer text for each image of `train_data`, in its order, of
            :func:`laps.data.read_dense_captions`; or None. The images are then also trained with these, by
            the same loss. It guides training alone: evaluation knows the captions and nothing else.

    Raises:
        LapsValueError: a batch size that the ranks cannot share, the model has no tokenizer, a missing image,
            a damaged dev image or a caption without tokens (unless ``on_error="skip"``, which leaves them out
            and warns with the numbers), fewer captions than one batch, or the folder holds another run.

    Source: section "Loss and recipe". Dense captions: in the spirit of SEPS (arXiv 2511.01390) and D2S-VSE,
    without their use at test time.
    """

    def __init__(
        self,
        model: LAPS,
        train_data: RetrievalData | CaptionStream,
        dev_data: RetrievalData | None,
        folder: str | Path,
        config: TrainConfig | None = None,
        *,
        dense_captions: Sequence[str] | None = None,
    ) -> None:
        self.config = config or TrainConfig()
        if model.tokenizer is None:
            raise LapsValueError(
                _check.message("Trainer", "model has no tokenizer", "LAPS(..., tokenizer=...)")
            )
        self.ranks = Ranks.here()
        if self.config.batch_size % self.ranks.size:
            raise LapsValueError(
                _check.message(
                    "Trainer",
                    "the ranks cannot share a batch",
                    f"a multiple of {self.ranks.size} for batch_size",
                    self.config.batch_size,
                )
            )
        self.device = choose_device("Trainer", self.config.device)
        self.source: Source
        if isinstance(train_data, CaptionStream):
            self.source = StreamSource(train_data, dense_captions, self.config, self.ranks)
        else:
            self.source = PairSource(
                train_data, dense_captions, model, model.tokenizer, self.config, self.ranks
            )
        if dev_data is not None:
            dev_data = usable(
                "Trainer",
                dev_data,
                model.tokenizer,
                on_error=self.config.on_error,
                read_images=True,
                open_file=model.transform.open,
                progress=self.config.progress and self.ranks.main,
            )
        self.model, self.tokenizer, self.dev_data = model, model.tokenizer, dev_data
        self.folder = Path(folder)
        self.progress = Progress()
        self._stop_signal: int | None = None
        self._saved = True  # whether the last checkpoint, if any, has all that was learned

    # ---- the run

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the last epoch.

        Args:
            resume: go on from ``folder/last`` if it is there, else start.

        Returns:
            One dictionary per epoch: epoch, loss, seconds, and the dev metrics.

        Raises:
            LapsValueError: the folder holds a run and `resume` is False, or a run with other options (named),
                a broken file (named), or another process trains in it now.
            TrainingStoppedError: SIGTERM or Ctrl-C (what was learned is saved), or a loss that is not finite.
            OSError: a checkpoint could not be written; the one before it is still there.
        """
        config = self.config
        self.model.to(self.device)
        if config.freeze_backbones:
            self.model.freeze_backbones()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing()
        if config.compile:
            self.model.image_encoder.compile()
            self.model.text_encoder.compile()
        optimizer = torch.optim.AdamW(
            self.model.parameter_groups(config.learning_rate, config.backbone_lr_ratio),
            weight_decay=config.weight_decay,
        )
        with contextlib.ExitStack() as stack:
            self.ranks.on_main(lambda: stack.enter_context(locked_folder("Trainer", self.folder)))
            self._open_folder(optimizer, resume)
            return self._run(optimizer)

    def _run(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """The epochs that are left."""
        config, loader = self.config, self.source.loader(self.device)
        names = config.loggers if self.ranks.main else ()
        loggers = open_loggers(names, self.folder, asdict(config), self.progress.step)
        # Here, because it takes the weights as they are, and what is frozen as it is.
        step = TrainingStep(
            self.model, mini_batch_size=config.mini_batch_size, ranks=self.ranks, amp=config.amp
        )
        try:
            with self._signals():
                while self.progress.epoch < config.epochs:
                    self._run_epoch(loader, step, optimizer, loggers)
        except StopNow:
            self._stop_if_asked()
            raise
        finally:
            for logger in loggers:
                logger.close()
            end_workers(loader._iterator)
        return self.progress.history

    def _run_epoch(
        self,
        loader: DataLoader[Any],
        step: TrainingStep,
        optimizer: torch.optim.Optimizer,
        loggers: list[Logger],
    ) -> None:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        self.model.train()
        optimizer.zero_grad(set_to_none=True)

        with self._bar() as bar:
            for batch in self._batches(loader, optimizer):
                self._saved = False
                # The last group of an epoch may be a smaller one.
                first = progress.batch - progress.batch % config.accumulation
                size = min(config.accumulation, self.source.steps_per_epoch - first)
                ends_group = progress.batch + 1 == first + size
                loss, values = self._forward(step, batch, scale=1 / size, sync=ends_group)
                if ends_group:
                    values["gradient_norm"] = self._clip_gradient(batch)
                progress.batch += 1
                progress.loss_sum += float(loss)
                if not ends_group:
                    continue
                self._set_learning_rates(optimizer)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.step += 1
                bar.update(progress.batch - bar.n)
                bar.set_postfix(loss=f"{progress.loss_sum / progress.batch:.3f}", refresh=False)
                if progress.step % config.log_every == 0:
                    self._log(loggers, values, lr=optimizer.param_groups[0]["lr"])
                # All ranks stop together: one that was told later has not heard of it yet.
                self._stop_signal = self.ranks.largest(self._stop_signal or 0, self.device) or None
                # At the end of an epoch too: a run may be killed in its evaluation, which can be long.
                last = progress.batch == self.source.steps_per_epoch
                if last or self._stop_signal is not None or progress.step % config.save_every == 0:
                    started = self._save(optimizer, started)
                    self._stop_if_asked()

        entry: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step}
        entry["loss"] = progress.loss_sum / self.source.steps_per_epoch
        metrics = self._evaluate()
        entry |= metrics
        self._log(loggers, {"epoch/loss": entry["loss"]} | {f"dev/{name}": metrics[name] for name in metrics})
        progress.seconds, started = progress.seconds + time.perf_counter() - started, time.perf_counter()
        progress.history.append(entry | {"seconds": round(progress.seconds, 3)})
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self._save(optimizer, started)
        self._write_log()
        if progress.epoch < config.epochs:
            self._stop_if_asked()

    def _batches(self, loader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> Iterator[Batch]:
        """The batches of the epoch that are left."""
        batches = self.source.batches(loader, self.progress.epoch, self.progress.batch)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError:
                # The signal that asks the run to stop may have gone to all its processes and have ended a
                # fork server, without which workers end too.
                if self._stop_signal is not None and self.progress.batch % self.config.accumulation == 0:
                    self._save(optimizer, time.perf_counter())
                self._stop_if_asked()
                raise
            if batch is None:
                return
            yield batch

    def _set_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """For the step that follows; computed and not counted, so that a resumed run has the same."""
        config, progress = self.config, self.progress
        # The batches of this step are done, so the very first step learns already.
        batches = progress.epoch * self.source.steps_per_epoch + progress.batch
        scale = config.lr_scale(progress.epoch, batches / (config.epochs * self.source.steps_per_epoch))
        for group, ratio in zip(optimizer.param_groups, (1.0, config.backbone_lr_ratio), strict=False):
            group["lr"] = config.learning_rate * ratio * scale

    def _forward(
        self, step: TrainingStep, batch: Batch, *, scale: float, sync: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch, and its gradient; stops the run, before any weight is touched, where the loss
        is not finite."""
        progress, config = self.progress, self.config
        warmup = None
        if progress.epoch < config.warmup_epochs:
            warmup = (progress.batch + 1) / self.source.steps_per_epoch
        moved = batch.to(self.device, non_blocking=True)
        loss, values = step(moved, warmup=warmup, dense_weight=config.dense_weight, scale=scale, sync=sync)
        self._require_finite("loss", loss, batch)
        return loss, values

    def _clip_gradient(self, batch: Batch) -> Tensor:
        """Bring the gradient down to the largest allowed norm; returns the norm that it had."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # A finite loss can have an infinite gradient, which would ruin all weights at once.
        self._require_finite("gradient's norm", norm, batch)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return norm

    def _require_finite(self, what: str, value: Tensor, batch: Batch) -> None:
        """Stop the run, and say where, if `value` is not finite."""
        progress = self.progress
        if not math.isfinite(float(value)):
            shares = self.ranks.objects((self.source.images(batch), batch.caption_ids.tolist()))
            images = [image for share, _ in shares for image in share]
            captions = [caption for _, share in shares for caption in share]
            report = {
                "epoch": progress.epoch,
                "batch": progress.batch,
                "images": images,
                "captions": captions,
            }
            if self.ranks.main:
                write_atomically(self.folder / "bad_batch.json", json.dumps(report, indent=1))
            where = f"epoch {progress.epoch}, batch {progress.batch}"
            raise TrainingStoppedError(
                f"Trainer: the {what} is {float(value)} in {where} (expected a finite number); "
                f"its images and captions, {images[0]} first, are listed in "
                f"{self.folder / 'bad_batch.json'}; no weight was changed by it"
            )

    def _evaluate(self) -> dict[str, Any]:
        """Dev metrics; the model is kept if it is the best so far."""
        progress = self.progress
        metrics: dict[str, Any] = {}
        if self.dev_data is not None:
            # Evaluation must not shift the random numbers of training: a resumed run would differ.
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                metrics = evaluate(
                    self.model,
                    self.dev_data,
                    batch_size=self.config.eval_batch_size,
                    num_workers=self.config.num_workers,
                    device=self.device,
                    amp=self.config.amp,
                    progress=self.config.progress,
                    ranks=self.ranks,
                ).metrics
        rsum = metrics.get("rsum", math.inf)
        if rsum > progress.best_rsum or self.dev_data is None:
            progress.best_rsum, progress.best_epoch = rsum, progress.epoch
            self.ranks.on_main(self._save_best)
        return metrics

    def _save_best(self) -> None:
        with atomic_folder(self.folder / "best") as folder:
            self.model.save_pretrained(folder)

    # ---- files

    def _open_folder(self, optimizer: torch.optim.Optimizer, resume: bool) -> None:
        """Start a run in an empty folder, or restore the one that is there."""
        self.progress = Progress()
        # Seeds have 32 bits. Ranks draw other numbers for their dropout.
        torch.manual_seed(self.config.seed + (self.ranks.rank << 32))
        if self.ranks.on_main(lambda: self._prepare_folder(resume)):
            last = self.folder / "last"
            values = self.ranks.together(
                lambda: load_checkpoint(last, self.model, optimizer, self.ranks.rank)
            )
            self.progress = Progress.read(values, last)
            # A run may be killed between its checkpoint and its log.
            self._write_log()

    def _prepare_folder(self, resume: bool) -> bool:
        """Whether there is a run to go on with; else the folder is made ready for one."""
        recover_folder(self.folder / "last")
        exists = (self.folder / "last").exists()
        if exists and not resume:
            raise LapsValueError(
                _check.message(
                    "Trainer", f"{self.folder} holds a run already", "another folder, or resume=True"
                )
            )
        if exists:
            self._check_same_run()
        else:
            self._refuse_foreign_folder()
            write_atomically(self.folder / "config.json", json.dumps(self._description(), indent=1))
        return exists

    def _refuse_foreign_folder(self) -> None:
        """A run that was killed before its first checkpoint may start again; nothing else is overwritten."""
        path = self.folder / "config.json"
        try:
            ours = not path.exists() or {"train", "model"} <= json.loads(path.read_text()).keys()
        except (ValueError, AttributeError):
            ours = False
        if not ours or (self.folder / "model.safetensors").exists():
            raise LapsValueError(
                _check.message(
                    "Trainer", f"{self.folder} holds something else, a model perhaps", "a new folder"
                )
            )

    def _description(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        options = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        described: dict[str, Any] = {
            "train": {name: value for name, value in options.items() if name not in FREE_ON_RESUME},
            "model": self.model.config.to_dict(),
            "tokenizer": _describe_tokenizer(self.tokenizer),
            "transform": self.model.transform.to_dict(),
            **self.source.describe(),
            "dev_data": None if self.dev_data is None else describe_data(self.dev_data),
        }
        if not self.source.dense:
            # Without these it changes nothing.
            del described["train"]["dense_weight"]
        plain: dict[str, Any] = json.loads(json.dumps(described))
        return plain

    def _check_same_run(self) -> None:
        path = self.folder / "config.json"
        before = dict(_leaves(read_object("Trainer", path, "the options of the run")))
        now = dict(_leaves(self._description()))
        changed = [
            f"{name}: {before.get(name)} before, {now.get(name)} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not name.endswith(".transformers_version")
        ]
        if changed:
            raise LapsValueError(
                _check.message(
                    "Trainer", f"{self.folder} was trained with other options", "the same", "; ".join(changed)
                )
            )

    def _save(self, optimizer: torch.optim.Optimizer, started: float) -> float:
        """Write the checkpoint; returns the time from which the next one counts."""
        now = time.perf_counter()
        self.progress.seconds += now - started
        several = self.ranks.size > 1
        generators = self.ranks.objects(generator_states(self.device)) if several else ()
        last, progress = self.folder / "last", asdict(self.progress)
        # All wait: one that went on to stop would have the others ended while the checkpoint is written.
        self.ranks.on_main(lambda: save_checkpoint(last, self.model, optimizer, progress, generators))
        self._saved = True
        return now

    def _write_log(self) -> None:
        if not self.ranks.main:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in self.progress.history)
        write_atomically(self.folder / "log.jsonl", lines)

    # ---- around the loop

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.source.steps_per_epoch,
            initial=self.progress.batch,
            desc=f"epoch {self.progress.epoch + 1}/{self.config.epochs}",
            unit="batch",
            disable=None if self.config.progress and self.ranks.main else True,
        )

    def _log(self, loggers: list[Logger], values: dict[str, Any], **more: float) -> None:
        numbers = {name: float(value) for name, value in (values | more).items()}
        for logger in loggers:
            logger.log(numbers, self.progress.step)

    def _stop_if_asked(self) -> None:
        if self._stop_signal is not None:
            last = self.folder / "last"
            left = f"the checkpoint is {last}; resume=True goes on from there"
            raise TrainingStoppedError(
                f"Trainer: {signal.Signals(self._stop_signal).name} after step {self.progress.step}; "
                + (left if last.exists() else "there is no checkpoint yet"),
                self._stop_signal,
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C end the run after the current step, with a checkpoint.

        At once where nothing is left to save: before the first step, and in an evaluation, which is long.
        """
        self._stop_signal, self._saved = None, True
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self._stop_signal is not None:
                # The second one: the user does not want to wait.
                raise KeyboardInterrupt
            self._stop_signal = number
            if self._saved:
                raise StopNow

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _describe_tokenizer(tokenizer: CaptionTokenizer) -> dict[str, Any]:
    content = hashlib.sha256(tokenizer.backend.to_str().encode())
    return {"content": content.hexdigest()[:16], "max_length": tokenizer.max_length}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries, under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
