"""Image files to the contents of shards. Nothing here knows of the manifest or of other ranks."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import _check
from .._modes import eval_mode
from .._workers import leave_signals, loading
from ..data import ImageDataset
from ..data.loading import batches_of
from ..errors import LapsError, LapsValueError
from ..model import LAPS
from .listing import ListedImage
from .records import RecordLayout
from .shards import ImageEntry, ShardContent
from .stopping import IndexingStoppedError

__all__ = ["EncodeOptions", "Encoded", "encode"]

# A shard is written when it has so many bytes, or when so many seconds' work would be lost without it.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0


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


class Encoded(NamedTuple):
    """A shard's content, if there is any, and what ended the work, if it did not come to its end."""

    layout: RecordLayout | None
    content: ShardContent | None
    failed: Exception | None


def encode(
    model: LAPS,
    images: Sequence[tuple[ListedImage, ImageEntry]],
    layout: RecordLayout | None,
    options: EncodeOptions,
    stopped: Sequence[int],
) -> Generator[Encoded, None, None]:
    """Encode images in their order, and yield a shard's content whenever there is enough for one.

    Whatever exception ends the work, what was encoded before comes out first, and the exception with it.

    Args:
        model: in eval mode while this runs.
        images: files, each with what the shard says of it.
        layout: of the index's records; None for that of the first features.
        options: how.
        stopped: of :func:`laps.index.stopping.stop_signals`; a number in it ends the work after the batch.

    What may end it: with ``on_error="raise"`` a LapsValueError that names an image that cannot be read, or
    whose features are not finite in what they are stored as; features that do not fit the layout; an
    IndexingStoppedError; what the encoder raises.
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
    held, since, seen = 0, time.monotonic(), 0
    failed: Exception | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        bar = stack.enter_context(_bar(len(images), options))
        try:
            # Within: a process that was killed may be noticed only as it is ended.
            with loading(loader) as batches:
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
                    if stopped:
                        break
                    late = time.monotonic() - since > options.shard_seconds
                    if parts and (held >= options.shard_bytes or late):
                        yield Encoded(layout, _joined(parts), None)
                        parts, held, since = [], 0, time.monotonic()
        except Exception as error:
            failed = _lost_worker(error) or error
    if stopped and failed is None:
        failed = IndexingStoppedError.after(stopped[0], seen, len(images))
    if any(len(part.images) for part in parts):
        yield Encoded(layout, _joined(parts), failed)
    elif failed is not None:
        yield Encoded(None, None, failed)


def _lost_worker(error: Exception) -> LapsError | None:
    """What to say of a loader's process that was killed, by the system for want of memory as a rule."""
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return None
    what = "a process that loads images was killed"
    return LapsError(_check.message("Index.add", what, "memory enough for num_workers", str(error)))


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


def _bar(total: int, options: EncodeOptions) -> tqdm[Any]:
    disable = None if options.progress else True
    return tqdm(total=total, desc=options.description, unit="image", disable=disable)
