"""Image files to the contents of shards. Nothing here knows of the manifest or of other ranks."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import _check
from .._modes import eval_mode
from .._workers import end_workers, leave_signals, start_workers
from ..data import ImageDataset
from ..data.loading import batches_of
from ..errors import LapsError, LapsValueError
from ..model import LAPS
from .listing import ListedImage
from .records import RecordLayout
from .shards import ImageEntry, ShardContent

__all__ = ["EncodeOptions", "IndexingStoppedError", "encode"]

# A shard is written when it has so many bytes, or when so many seconds' work would be lost without it.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0


class IndexingStoppedError(LapsError):
    """A signal ended the work early; what was encoded until then is in the index.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[IndexingStoppedError], tuple[str, int]]:
        # It travels to the other ranks.
        return type(self), (str(self), self.signal_number)


@dataclass(frozen=True)
class EncodeOptions:
    """How images are read and encoded; see :meth:`laps.Index.add`."""

    storage: str
    batch_size: int = 32
    num_workers: int = 0
    on_error: str = "skip"
    amp: bool = False
    progress: bool = True
    description: str = "encode images"
    shard_bytes: int = SHARD_BYTES
    shard_seconds: float = SHARD_SECONDS


def encode(
    model: LAPS,
    images: Sequence[tuple[ListedImage, ImageEntry]],
    layout: RecordLayout | None,
    options: EncodeOptions,
) -> Iterator[tuple[RecordLayout, ShardContent]]:
    """Encode images in their order, and yield a shard's content whenever there is enough for one.

    Whatever ends the work, what was encoded before comes out first.

    Args:
        model: in eval mode while this runs.
        images: files, each with what the shard says of it.
        layout: of the index's records; None for that of the first features.
        options: how.

    Raises:
        LapsValueError: with ``on_error="raise"``, naming it: an image that cannot be read, or whose features
            are not finite in what they are stored as. Features that do not fit the layout.
        IndexingStoppedError: SIGINT or SIGTERM came, in the main thread of the process.
    """
    dataset = ImageDataset(
        [Path(file.path) for file, _ in images], model.transform, on_error=options.on_error
    )
    loader = DataLoader(
        dataset,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        collate_fn=dataset.collate,
        pin_memory=model.device.type == "cuda",
        worker_init_fn=leave_signals,
        generator=torch.Generator(),
    )
    parts: list[_Part] = []
    held, since, failed = 0, time.monotonic(), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stopped = stack.enter_context(_stop_signals())
        bar = stack.enter_context(_bar(len(images), options))
        batches = start_workers(loader)
        stack.callback(end_workers, batches)
        seen = 0
        try:
            for indices, pixels in batches_of(batches):
                if len(indices):
                    with (
                        torch.inference_mode(),
                        torch.autocast(model.device.type, torch.bfloat16, enabled=options.amp),
                    ):
                        features = model.encode_image(pixels.to(model.device, non_blocking=True))
                    layout = layout or RecordLayout.of(features, options.storage)
                    records, finite = layout.pack(features)
                    parts.append(
                        _kept(dataset, images, indices, features.embedding, records, finite, options)
                    )
                    held += parts[-1].nbytes
                seen = min(seen + options.batch_size, len(images))
                bar.update(seen - bar.n)
                late = time.monotonic() - since > options.shard_seconds
                if layout is not None and parts and (held >= options.shard_bytes or late):
                    yield layout, _joined(parts)
                    parts, held, since = [], 0, time.monotonic()
                if stopped:
                    break
        except LapsError as error:
            failed = error
        if layout is not None and any(len(part.images) for part in parts):
            yield layout, _joined(parts)
    if failed is not None:
        raise failed
    if stopped:
        name = signal.Signals(stopped[0]).name
        raise IndexingStoppedError(
            f"Index.add: {name} after {seen} of {len(images)} images; what is done is kept, and the same "
            "call goes on from there",
            stopped[0],
        )


@dataclass(frozen=True)
class _Part:
    """A batch of a shard."""

    images: list[ImageEntry]
    embedding: Tensor
    records: Tensor

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + self.records.nbytes


def _kept(
    dataset: ImageDataset,
    images: Sequence[tuple[ListedImage, ImageEntry]],
    indices: Tensor,
    embedding: Tensor,
    records: Tensor,
    finite: Tensor,
    options: EncodeOptions,
) -> _Part:
    """A batch without the images whose features cannot be stored."""
    for index in indices[~finite].tolist():
        message = _check.message(
            "Index.add",
            f"{images[index][0].path}: its features are not finite in {options.storage}",
            'finite features, or storage="float32"',
        )
        if options.on_error == "raise":
            raise LapsValueError(message)
        warnings.warn(f"skipped: {message}", stacklevel=2)
    entries = [images[index][1] for index in indices[finite].tolist()]
    return _Part(entries, embedding.float().cpu()[finite], records[finite])


def _joined(parts: list[_Part]) -> ShardContent:
    return ShardContent(
        images=[image for part in parts for image in part.images],
        embedding=np.concatenate([part.embedding.numpy() for part in parts]),
        records=np.concatenate([part.records.numpy() for part in parts]),
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM, instead of what else they do, put their number into.

    A second signal of a kind has its usual effect: whoever cannot wait for the batch need not.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for each in (signal.SIGTERM, signal.SIGINT):
        before[each] = signal.signal(each, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(total: int, options: EncodeOptions) -> tqdm[Any]:
    disable = None if options.progress else True
    return tqdm(total=total, desc=options.description, unit="image", disable=disable)
