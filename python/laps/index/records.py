"""How the features of one image lie in a shard: a record, which is read and checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import _check, _laps
from ..errors import LapsValueError
from ..features import ImageFeatures
from .checksum import ROW

__all__ = ["Field", "RecordLayout"]

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
# Vectors of C numbers, which int8 stores with a scale for each; all else is small, and stays in float16.
VECTORS = ("patches", "prefix")


@dataclass(frozen=True)
class Field:
    """A tensor of :class:`laps.features.ImageFeatures`, per image.

    Attributes:
        name: of the attribute.
        dtype: "float16", "float32", or "int8": then a float32 scale for each vector precedes the numbers.
        shape: without the images' axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def scales(self) -> int:
        """How many scales there are."""
        return math.prod(self.shape[:-1]) if self.dtype == "int8" else 0

    @property
    def nbytes(self) -> int:
        """Of the scales and the numbers, up to a multiple of 8."""
        size = 4 * self.scales + math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return -(-size // 8) * 8


@dataclass(frozen=True)
class RecordLayout:
    """What a record of uint8 holds, field after field; its length is a multiple of 512, padded with zeros.

    Of a head that needs only `embedding`, which is kept apart, there is no field and no byte.
    """

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, features: ImageFeatures, storage: str) -> RecordLayout:
        """The layout for features like these in one of :data:`laps.index.STORAGES`."""
        found = []
        for field in fields(ImageFeatures):
            value = getattr(features, field.name)
            if field.name != "embedding" and value is not None:
                dtype = "float16" if storage == "int8" and field.name not in VECTORS else storage
                found.append(Field(field.name, dtype, tuple(value.shape[1:])))
        return cls(tuple(found))

    @property
    def nbytes(self) -> int:
        """Of a record."""
        return -(-sum(field.nbytes for field in self.fields) // ROW) * ROW

    def to_list(self) -> list[dict[str, Any]]:
        """As JSON has it."""
        return [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in self.fields]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> RecordLayout:
        """The reverse of `to_list`. KeyError, TypeError, ValueError: it is none."""
        found = tuple(Field(v["name"], v["dtype"], tuple(int(n) for n in v["shape"])) for v in values)
        known = [field.name for field in fields(ImageFeatures)]
        if any(field.dtype not in DTYPES or field.name not in known for field in found):
            raise ValueError("fields that this version of laps does not know")
        return cls(found)

    def pack(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Features of B images to records, on the CPU.

        Returns:
            Records (B, nbytes) uint8, and (B,) bool: which images are finite in what they are stored as.

        Raises:
            LapsValueError: features of another layout.
        """
        own = RecordLayout.of(features, "float32")
        if [(f.name, f.shape) for f in own.fields] != [(f.name, f.shape) for f in self.fields]:
            got = {f.name: f.shape for f in own.fields}
            expected = {f.name: f.shape for f in self.fields}
            raise LapsValueError(
                _check.message("Index.add", "the model's features do not fit the index", expected, got)
            )
        records = torch.zeros(len(features), self.nbytes, dtype=torch.uint8)
        finite = features.embedding.isfinite().flatten(1).all(1).cpu()
        start = 0
        for field in self.fields:
            values = getattr(features, field.name).detach().float()
            if field.dtype == "int8":
                scale = values.abs().amax(-1, keepdim=True) / 127
                values = (values / scale.masked_fill(scale == 0, 1)).round()
                finite &= scale.isfinite().flatten(1).all(1).cpu()
                _view(records, start, torch.float32, field.shape[:-1]).copy_(scale[..., 0])
            stored = values.to(DTYPES[field.dtype])
            if field.dtype != "int8":
                finite &= stored.isfinite().flatten(1).all(1).cpu()
            at = start + 4 * field.scales
            _view(records, at, stored.dtype, field.shape).copy_(stored)
            start += field.nbytes
        return records, finite

    def unpack(self, records: Tensor, into: dict[str, Tensor]) -> dict[str, Tensor]:
        """Records (B, nbytes) uint8 to the fields in float32, on the records' device.

        Args:
            records: of the shards, checked.
            into: buffers that an earlier call with at least as many records has left; made where missing.
                The fields are views of them.
        """
        found, start = {}, 0
        for field in self.fields:
            if field.name not in into:
                into[field.name] = torch.empty((len(records), *field.shape), device=records.device)
            values = found[field.name] = into[field.name][: len(records)]
            if records.device.type == "cpu":
                width = field.shape[-1] if field.shape else 1
                flat = values.view(len(records), math.prod(field.shape))
                threads = torch.get_num_threads()
                _laps.unpack_records(records, start, field.dtype, max(1, width), threads, flat)
            else:
                at = start + 4 * field.scales
                values.copy_(_view(records, at, DTYPES[field.dtype], field.shape))
                if field.dtype == "int8":
                    values.mul_(_view(records, start, torch.float32, field.shape[:-1])[..., None])
            start += field.nbytes
        return found


def _view(records: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A part of every record as (B, *shape) of a dtype, in the same memory."""
    part = records[:, start : start + math.prod(shape) * dtype.itemsize]
    # Not unflatten, which refuses the empty shape of a scale for each image.
    return part.view(dtype).view(len(records), *shape)
