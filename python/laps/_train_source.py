"""What a run learns from, and in which order: known from seed and epoch, and entered at any batch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from . import _check
from ._workers import leave_signals, start_workers
from .data import Batch, CaptionDataset, CaptionStream, CaptionTokenizer, RetrievalData
from .data.dense import check_dense_captions
from .data.loading import batches_of
from .data.sampler import EpochSampler
from .data.usable import usable
from .distributed import Ranks
from .errors import LapsValueError
from .model import LAPS
from .train_config import TrainConfig

__all__ = ["PairSource", "Source", "StreamSource", "describe_data", "describe_texts"]

# The share of a caption's words that augmentation changes.
PUBLISHED_AUGMENT = 0.2


class Source(ABC):
    """Batches of a run, this rank's share of each.

    Attributes:
        dataset: what examples come from.
        steps_per_epoch: batches of an epoch, over all ranks.
        dense: whether batches have dense captions.
    """

    dataset: CaptionDataset | CaptionStream
    steps_per_epoch: int
    dense: bool = False

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks

    def loader(self, device: torch.device, **more: Any) -> DataLoader[Any]:
        """The loader of the whole run, whose workers outlive an epoch."""
        return DataLoader(
            self.dataset,
            batch_size=self.config.batch_size // self.ranks.size,
            drop_last=True,
            collate_fn=self.dataset.collate,
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals,
            # Without its own, the loader would draw its workers' seeds from the generator of the dropout.
            generator=torch.Generator().manual_seed(self.config.seed),
            **more,
        )

    @abstractmethod
    def batches(self, loader: DataLoader[Any], epoch: int, done: int) -> Iterator[Batch]:
        """The batches of an epoch of which some are done."""

    @property
    @abstractmethod
    def skipped(self) -> int:
        """How many images, or of a stream faults, were left out so far by this rank."""

    @abstractmethod
    def images(self, batch: Batch) -> list[str]:
        """What the images of a batch are called."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""


class PairSource(Source):
    """Captions and images that are read at random: an epoch has each caption once.

    Raises:
        LapsValueError: as :class:`laps.train.Trainer`.
    """

    dataset: CaptionDataset

    def __init__(
        self,
        data: RetrievalData,
        dense_captions: Sequence[str] | None,
        model: LAPS,
        tokenizer: CaptionTokenizer,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        super().__init__(config, ranks)
        # Before the first epoch, not in the midst of it. Reading all training images would take too long.
        self.data = usable("Trainer", data, tokenizer, on_error=config.on_error, read_images=False)
        if dense_captions is not None:
            dense_captions = check_dense_captions("Trainer", dense_captions, data, tokenizer)
            # What was left out was left out by its path.
            left = set(self.data.image_paths)
            paired = zip(data.image_paths, dense_captions, strict=True)
            dense_captions = [text for path, text in paired if path in left]
            self.dense = True
        _require_a_batch("captions", self.data.num_captions, config)
        self.dataset = CaptionDataset(
            self.data,
            tokenizer,
            model.transform,
            seed=config.seed,
            augment=augmentation(config, tokenizer),
            on_error=config.on_error,
            dense_captions=dense_captions,
        )
        self.sampler = EpochSampler(
            len(self.dataset),
            config.seed,
            batch_size=config.batch_size,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        self.steps_per_epoch = len(self.dataset) // config.batch_size

    def loader(self, device: torch.device, **more: Any) -> DataLoader[Any]:
        return super().loader(device, sampler=self.sampler, **more)

    def batches(self, loader: DataLoader[Any], epoch: int, done: int) -> Iterator[Batch]:
        self.dataset.set_epoch(epoch)
        self.sampler.start(epoch, done * self.config.batch_size)
        return batches_of(start_workers(loader))

    @property
    def skipped(self) -> int:
        return len(self.dataset.skipped_images)

    def images(self, batch: Batch) -> list[str]:
        return [str(self.data.image_paths[i]) for i in batch.image_ids.tolist()]

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"train_data": describe_data(self.data)}
        if self.dataset.dense_captions is not None:
            described["dense_captions"] = describe_texts(self.dataset.dense_captions)
        return described


class StreamSource(Source):
    """A stream of examples: an epoch has as many as it says.

    Raises:
        LapsValueError: dense captions; a stream that is divided among others than the ranks; an epoch of less
            than a batch.
    """

    dataset: CaptionStream

    def __init__(
        self,
        stream: CaptionStream,
        dense_captions: Sequence[str] | None,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        super().__init__(config, ranks)
        if dense_captions is not None:
            raise LapsValueError(
                _check.message("Trainer", "dense_captions with a stream", "train_data as RetrievalData")
            )
        if (stream.rank, stream.world_size) != (ranks.rank, ranks.size):
            raise LapsValueError(
                _check.message(
                    "Trainer",
                    "train_data is divided among other ranks",
                    f"rank {ranks.rank} of {ranks.size}",
                    f"{stream.rank} of {stream.world_size}",
                )
            )
        _require_a_batch("examples an epoch", stream.epoch_length, config)
        self.dataset = stream
        # Each worker ends with a batch that may not be whole, and is dropped.
        share, size = stream.epoch_length // ranks.size, config.batch_size // ranks.size
        workers = max(config.num_workers, 1)
        self.steps_per_epoch = sum(
            (share // workers + (worker < share % workers)) // size for worker in range(workers)
        )
        _require_a_batch("examples an epoch for each loader worker", share // workers * ranks.size, config)

    def batches(self, loader: DataLoader[Any], epoch: int, done: int) -> Iterator[Batch]:
        self.dataset.set_epoch(epoch)
        batches = batches_of(start_workers(loader))
        for _ in range(done):
            # A stream is entered at its beginning.
            next(batches)
        return batches

    @property
    def skipped(self) -> int:
        return self.dataset.skipped

    def images(self, batch: Batch) -> list[str]:
        return [f"image_id {number}" for number in batch.image_ids.tolist()]

    def describe(self) -> dict[str, Any]:
        stream = self.dataset
        names = [file.name for file in stream.shards]
        # The order depends on who reads what.
        readers = {"ranks": self.ranks.size, "workers": self.config.num_workers}
        settings = {
            name: getattr(stream, name) for name in ("epoch_length", "seed", "shuffle_buffer", "augment")
        }
        return {"train_data": {"shards": describe_texts(names), "count": len(names), **readers, **settings}}


def augmentation(config: TrainConfig, tokenizer: CaptionTokenizer) -> float:
    """The probability of caption augmentation: the published one, where there is a mask token for it."""
    if config.augment is not None:
        return config.augment
    return 0.0 if tokenizer.mask_id is None else PUBLISHED_AUGMENT


def describe_data(data: RetrievalData) -> dict[str, Any]:
    """What tells data sets apart: names and captions, not the folder, which may have moved."""
    content = hashlib.sha256()
    for path in data.image_paths:
        content.update(path.name.encode() + b"\n")
    for caption, image in zip(data.captions, data.caption_to_image.tolist(), strict=True):
        content.update(f"{image} {caption}\n".encode())
    counts = {"images": data.num_images, "captions": data.num_captions}
    return {"name": data.name, **counts, "content": content.hexdigest()[:16]}


def describe_texts(texts: Sequence[str]) -> str:
    """A digest of the texts, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _require_a_batch(what: str, number: int, config: TrainConfig) -> None:
    if number < config.batch_size:
        raise LapsValueError(
            _check.message(
                "Trainer", f"train_data has {number} {what}", f"at least batch_size={config.batch_size}"
            )
        )
