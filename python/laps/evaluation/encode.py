"""Features of a data set: each image and each caption encoded once, kept in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import _check
from .._precision import wide
from .._workers import leave_signals, loading
from ..data import CaptionTokenizer, ImageDataset, ImageTransform, RegionTransform, RetrievalData
from ..data.loading import batches_of
from ..errors import LapsValueError
from ..features import ImageFeatures, TextFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CaptionStore", "RetrievalModel", "encode_captions", "encode_images"]

# Tokens, padding included, of the captions that are handed out at once: 64 MiB at C=512.
TOKENS_AT_ONCE = 2**15


class RetrievalModel(Protocol):
    """What evaluation needs of a model; :class:`laps.LAPS` is one."""

    transform: ImageTransform | RegionTransform

    @property
    def tokenizer(self) -> CaptionTokenizer | None: ...
    @property
    def device(self) -> torch.device: ...
    def encode_image(self, pixel_values: Tensor) -> ImageFeatures: ...
    def encode_text(self, input_ids: Tensor, lengths: Tensor) -> TextFeatures: ...
    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...
    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class CaptionStore:
    """Features of B_t captions without padding.

    Attributes:
        embedding: (B_t, C).
        lengths: (B_t,) int64.
        words: (sum of lengths, C), or None for a head that needs only `embedding`.
        starts: (B_t,) int64: the words of caption t begin at ``starts[t]``.
    """

    embedding: Tensor
    lengths: Tensor
    words: Tensor | None
    starts: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    @classmethod
    def cat(cls, parts: Sequence[CaptionStore]) -> Self:
        """The captions of all parts, in order."""
        words = [part.words for part in parts if part.words is not None]
        tokens = torch.tensor([int(part.lengths.sum()) for part in parts])
        before = tokens.cumsum(0) - tokens
        return cls(
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat(words) if words else None,
            torch.cat([part.starts + first for part, first in zip(parts, before, strict=True)]),
        )

    def embeddings_only(self) -> Self:
        """The same captions without their words."""
        return type(self)(self.embedding, self.lengths, None, self.starts)

    def take(self, captions: Tensor, device: torch.device) -> TextFeatures:
        """Some captions, padded with zeros to the longest of them, on `device` and in float32 at least."""
        lengths, words = self.lengths[captions], None
        if self.words is not None:
            step = torch.arange(int(lengths.max()))
            real = step < lengths[:, None]
            padded = self.words[torch.where(real, self.starts[captions][:, None] + step, 0)]
            words = wide(padded.to(device)).masked_fill_(~real.to(device)[..., None], 0)
        return TextFeatures(wide(self.embedding[captions].to(device)), lengths, words)

    def blocks(self, captions: Tensor, most: int) -> Iterator[Tensor]:
        """Positions in `captions`, longest caption first, in blocks of at most `most` captions.

        A block also has at most 32,768 tokens with its padding, but one caption at least.
        """
        order = torch.argsort(self.lengths[captions], descending=True, stable=True)
        first = 0
        while first < len(order):
            longest = int(self.lengths[captions[order[first]]])
            size = max(1, min(most, TOKENS_AT_ONCE // longest))
            yield order[first : first + size]
            first += size


def encode_images(
    model: RetrievalModel,
    data: RetrievalData,
    *,
    part: slice = slice(None),
    batch_size: int,
    num_workers: int,
    amp: bool,
    dtype: torch.dtype | None,
    progress: bool,
    embeddings_only: bool = False,
) -> ImageFeatures:
    """The images of `data`, or a part of them, on the CPU, in `dtype` (None: as the model gives them).

    With `embeddings_only` all else of the features is dropped as it comes.

    Raises:
        LapsValueError: an image that cannot be read, or whose features are not finite; with its path.
    """
    paths, first = data.image_paths[part], part.start or 0
    dataset = ImageDataset(paths, model.transform)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=dataset.collate,
        pin_memory=model.device.type == "cuda",
        worker_init_fn=leave_signals,
        # The default would draw from torch's generator, and so change a training that evaluates in between.
        generator=torch.Generator(),
    )
    kept: dict[str, Tensor] = {}
    with _bar(len(paths), "images", progress) as bar, loading(loader) as batches:
        for indices, pixel_values in batches_of(batches):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=amp):
                features = model.encode_image(pixel_values.to(model.device, non_blocking=True))
            if embeddings_only:
                features = ImageFeatures(features.embedding)
            for name, tensor in _tensors(features.to(dtype=dtype)).items():
                if name not in kept:
                    # All at once: to join the batches at the end would take the memory twice.
                    kept[name] = torch.empty((len(paths), *tensor.shape[1:]), dtype=tensor.dtype)
                broken = ~tensor.isfinite().flatten(1).all(dim=1).cpu()
                if broken.any():
                    index = int(indices[broken][0])
                    _refuse(f"image {first + index} ({paths[index]})", name, tensor.dtype)
                kept[name][indices] = tensor.cpu()
            bar.update(len(indices))
    return ImageFeatures(**kept)


def encode_captions(
    model: RetrievalModel,
    data: RetrievalData,
    *,
    part: slice = slice(None),
    batch_size: int,
    amp: bool,
    dtype: torch.dtype | None,
    progress: bool,
    embeddings_only: bool = False,
) -> CaptionStore:
    """The captions of `data`, or a part of them, on the CPU, in `dtype` (None: as the model gives them).

    With `embeddings_only` their words are dropped as they come.

    They are encoded in order of length, so that a batch has little padding.

    Raises:
        LapsValueError: a caption without words, or whose features are not finite (its text is named); the
            model has no tokenizer, or its encoder changes the lengths.
    """
    if model.tokenizer is None:
        raise LapsValueError(_check.message("evaluate", "the model has no tokenizer", "a CaptionTokenizer"))
    texts, first_caption = data.captions[part], part.start or 0
    tokens = model.tokenizer.encode(texts)
    order = torch.argsort(tokens.lengths, descending=True, stable=True)
    starts = torch.empty_like(tokens.lengths)
    starts[order] = tokens.lengths[order].cumsum(0) - tokens.lengths[order]
    embedding: Tensor | None = None
    words: Tensor | None = None
    with _bar(len(texts), "captions", progress) as bar:
        for batch in torch.split(order, batch_size):
            lengths = tokens.lengths[batch]
            input_ids = tokens.input_ids[batch, : int(lengths.max())].to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=amp):
                features = model.encode_text(input_ids, lengths).to(dtype=dtype)
            if not torch.equal(features.lengths.cpu(), lengths):
                raise LapsValueError(
                    _check.message("evaluate", "encode_text changes the lengths", "those of the tokens")
                )
            if embedding is None:
                embedding = torch.empty(
                    (len(texts), features.embedding.shape[1]), dtype=features.embedding.dtype
                )
            _refuse_captions(data, first_caption + batch, "embedding", features.embedding)
            embedding[batch] = features.embedding.cpu()
            if features.words is not None and not embeddings_only:
                if words is None:
                    size = (int(tokens.lengths.sum()), features.words.shape[2])
                    words = torch.empty(size, dtype=features.words.dtype)
                real = torch.arange(features.words.shape[1]) < lengths[:, None]
                packed = features.words[real.to(features.words.device)]
                _refuse_captions(data, first_caption + batch.repeat_interleave(lengths), "words", packed)
                # Consecutive in `order`, hence consecutive in `words`.
                first = int(starts[batch[0]])
                words[first : first + len(packed)] = packed.cpu()
            bar.update(len(batch))
    assert embedding is not None  # data has a caption at least
    return CaptionStore(embedding, tokens.lengths, words, starts)


def _tensors(features: ImageFeatures) -> dict[str, Tensor]:
    named = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: value for name, value in named.items() if value is not None}


def _refuse_captions(data: RetrievalData, captions: Tensor, name: str, rows: Tensor) -> None:
    """Refuse rows, each of one of the captions, that are not finite."""
    broken = ~rows.isfinite().all(dim=1).cpu()
    if broken.any():
        index = int(captions[broken][0])
        _refuse(f"caption {index} ({data.captions[index]!r})", name, rows.dtype)


def _refuse(what: str, name: str, dtype: torch.dtype) -> None:
    raise LapsValueError(
        _check.message(
            "evaluate",
            f"{what}: its {name} features are not finite in {_check.name_of(dtype)}",
            "finite features",
        )
    )


def _bar(total: int, unit: str, progress: bool) -> tqdm[Any]:
    # None: shown on a terminal and in a notebook, not in a log file.
    return tqdm(total=total, desc=f"encode {unit}", unit=unit, disable=None if progress else True)
