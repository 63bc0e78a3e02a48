"""What a model keeps of images and of captions: everything that does not depend on the other side."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _check
from .errors import LapsTypeError, LapsValueError

__all__ = ["ImageFeatures", "TextFeatures"]

FeaturesT = TypeVar("FeaturesT", "ImageFeatures", "TextFeatures")
Span = tuple[int, int, str]
Index = int | slice | Tensor | Sequence[int]


def _tensors(features: Any) -> dict[str, Tensor]:
    named = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _check_sizes(operation: str, features: Any) -> None:
    sizes = {name: len(tensor) for name, tensor in _tensors(features).items()}
    if len(set(sizes.values())) != 1:
        raise LapsValueError(_check.message(operation, "the tensors differ in number", "equal", sizes))


def _rows(operation: str, index: object, size: int) -> slice | Tensor:
    """An index as torch takes it, with an integer as the slice of that one item.

    Raises:
        IndexError: an integer out of range, which also ends a loop over features. LapsTypeError: no index.
    """
    if isinstance(index, slice):
        return index
    rows = torch.empty(0)
    # To torch a tuple is an index of several axes.
    if not isinstance(index, tuple):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            rows = torch.as_tensor(index)
    if isinstance(index, list) and not index:
        rows = rows.long()
    flag = rows.dim() == 0 and rows.dtype == torch.bool
    if flag or rows.is_floating_point() or rows.is_complex() or rows.dim() > 1:
        raise LapsTypeError(
            _check.message(
                operation,
                "the index chooses no items",
                "an integer, a slice, or a list or 1-d tensor of integers or flags",
                repr(index),
            )
        )
    if rows.dim() == 1:
        return rows
    number = int(rows)
    if not -size <= number < size:
        raise IndexError(_check.message(operation, "index out of range", f"{-size}..{size - 1}", number))
    return slice(number % size, number % size + 1)


def _chosen(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]


def _to(features: FeaturesT, device: torch.device | str | None, dtype: torch.dtype | None) -> FeaturesT:
    moved: dict[str, Any] = {}
    for name, tensor in _tensors(features).items():
        if tensor.is_floating_point():
            moved[name] = tensor.to(device=device, dtype=dtype)
        # Lengths of captions stay on the CPU, where the head reads them without waiting for the device.
    return replace(features, **moved)


def _detached(features: FeaturesT) -> FeaturesT:
    without: dict[str, Any] = {name: tensor.detach() for name, tensor in _tensors(features).items()}
    return replace(features, **without)


def _joined(operation: str, parts: Sequence[FeaturesT], name: str) -> Any:
    values = [getattr(part, name) for part in parts]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise LapsValueError(
            _check.message(operation, f"some parts have {name} and some have none", "all or none")
        )
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]


def _check_parts(operation: str, parts: Sequence[object]) -> None:
    if not parts:
        raise LapsValueError(_check.message(operation, "parts is empty", "at least one part"))


@dataclass
class ImageFeatures:
    """Everything about B_v images that no caption changes.

    Attributes:
        embedding: (B_v, C), unit norm: the image as one vector, for global-embedding search.
        patches: (B_v, N, C) raw patch features, or None for a head that needs only `embedding`.
        prefix: (B_v, P, C) prefix tokens, or None.
        logits: (B_v, N, N_c) aggregation logits, or None.
        self_scores: (B_v, N), a_i of section LPS: cosine of each patch with the mean of the image, or None.
        keep_prob: (B_v, N), the score net's keep probability (paper variant), or None.

    ``features[2:5]`` or ``features[indices]`` are features of some of the images, ``features[3]`` those of
    one: B_v is then 1, and the first axis stays. ``len(features)`` is B_v.
    """

    embedding: Tensor
    patches: Tensor | None = None
    prefix: Tensor | None = None
    logits: Tensor | None = None
    self_scores: Tensor | None = None
    keep_prob: Tensor | None = None

    def __post_init__(self) -> None:
        _check_sizes("ImageFeatures", self)

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, index: Index) -> ImageFeatures:
        chosen = _rows("ImageFeatures", index, len(self))
        return ImageFeatures(**{name: _chosen(tensor, chosen) for name, tensor in _tensors(self).items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ImageFeatures:
        """The same features elsewhere, or stored in another floating dtype."""
        return _to(self, device, dtype)

    def detach(self) -> ImageFeatures:
        """The same numbers without a graph behind them."""
        return _detached(self)

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The features of all parts, in order. Raises LapsValueError where they do not fit."""
        operation = "ImageFeatures.cat"
        _check_parts(operation, parts)
        return ImageFeatures(**{f.name: _joined(operation, parts, f.name) for f in fields(ImageFeatures)})


@dataclass
class TextFeatures:
    """Everything about B_t captions that no image changes.

    Attributes:
        embedding: (B_t, C), unit norm: the caption as one vector.
        lengths: (B_t,) int64 on the CPU, the number of real tokens of each caption.
        words: (B_t, L, C) raw word-piece features, padded; or None for a head that needs only `embedding`.
        spans: per caption its words as (first piece, past the last piece, text), or None.

    ``features[2:5]`` or ``features[indices]`` are features of some of the captions, ``features[3]`` those of
    one: B_t is then 1, and the first axis stays. ``len(features)`` is B_t.
    """

    embedding: Tensor
    lengths: Tensor
    words: Tensor | None = None
    spans: list[list[Span]] | None = None

    def __post_init__(self) -> None:
        _check_sizes("TextFeatures", self)
        if self.spans is not None and len(self.spans) != len(self):
            raise LapsValueError(
                _check.message("TextFeatures", "spans does not fit", f"{len(self)} lists", len(self.spans))
            )

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, index: Index) -> TextFeatures:
        rows = _rows("TextFeatures", index, len(self))
        chosen: dict[str, Any] = {n: _chosen(tensor, rows) for n, tensor in _tensors(self).items()}
        if self.words is not None:
            chosen["words"] = chosen["words"][
                :, : int(chosen["lengths"].max()) if len(chosen["lengths"]) else 0
            ]
        if self.spans is not None:
            chosen["spans"] = [self.spans[i] for i in _chosen(torch.arange(len(self)), rows).tolist()]
        return TextFeatures(**chosen)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """The same features elsewhere, or stored in another floating dtype; the lengths stay on the CPU."""
        return _to(self, device, dtype)

    def detach(self) -> TextFeatures:
        """The same numbers without a graph behind them."""
        return _detached(self)

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """The features of all parts, in order, padded to the longest. Raises LapsValueError on a misfit."""
        operation = "TextFeatures.cat"
        _check_parts(operation, parts)
        longest = max((part.words.shape[1] for part in parts if part.words is not None), default=0)
        padded = [
            part
            if part.words is None
            else replace(
                part, words=torch.nn.functional.pad(part.words, (0, 0, 0, longest - part.words.shape[1]))
            )
            for part in parts
        ]
        return TextFeatures(**{f.name: _joined(operation, padded, f.name) for f in fields(TextFeatures)})
