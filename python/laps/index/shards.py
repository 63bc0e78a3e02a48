"""One shard: a safetensors file of some hundred images that never changes once it is there.

Tensors: ``checksums`` (n,) uint32 of the records, ``embedding`` (n, C) float32, ``records`` (n, bytes) uint8
(see :mod:`laps.index.records`). The metadata's ``images`` is a JSON list of (root, path, size, mtime in ns).

Files are read with pread and not mapped: what was checked is then what is scored, and a file that shrinks
meanwhile or a disk that fails is an error and not the end of the process (SIGBUS).
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _check, _laps
from .._files import atomic_path
from ..errors import LapsError
from .checksum import checksum

__all__ = [
    "ImageEntry",
    "Shard",
    "ShardContent",
    "ShardEntry",
    "UnreadableShardError",
    "read_places",
    "write_shard",
]

Bytes = NDArray[np.uint8]
DTYPES = {"checksums": ("U32", np.uint32), "embedding": ("F32", np.float32), "records": ("U8", np.uint8)}


class UnreadableShardError(LapsError):
    """The system refused to read a shard, which may be whole."""


class ImageEntry(NamedTuple):
    """An image as it was when it was encoded: its root's number, its path from there, size, mtime in ns."""

    root: int
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ShardContent:
    """What a shard is made of: n images.

    Attributes:
        images: of the files.
        embedding: (n, C) float32.
        records: (n, bytes) uint8.
    """

    images: list[ImageEntry]
    embedding: NDArray[np.float32]
    records: Bytes


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard.

    Attributes:
        file: its name.
        images: n.
        nbytes: of the file.
        header_checksum, embedding_checksum: of the file's header, and of the tensors in front of the records.
        deleted: rows that no longer count, ascending.
    """

    file: str
    images: int
    nbytes: int
    header_checksum: int
    embedding_checksum: int
    deleted: tuple[int, ...] = field(default=())

    @property
    def number(self) -> int:
        """Shards have ascending numbers, none twice."""
        return int(self.file.split("-")[0])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"deleted": list(self.deleted)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardEntry:
        """The reverse of `to_dict`."""
        return cls(**values | {"deleted": tuple(values["deleted"])})


def write_shard(path: Path, content: ShardContent) -> ShardEntry:
    """Write a shard, whole or not at all, and tell what the manifest has to say of it.

    Raises:
        OSError: no space, no permission.
    """
    arrays: dict[str, NDArray[Any]] = {
        "checksums": np.array([checksum(record) for record in content.records], np.uint32),
        "embedding": np.ascontiguousarray(content.embedding, np.float32),
        "records": np.ascontiguousarray(content.records),
    }
    header: dict[str, Any] = {
        "__metadata__": {"format": "laps-index-shard", "images": json.dumps(content.images)}
    }
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        header[name] = {
            "dtype": DTYPES[name][0],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    # Padded: the data begin at a multiple of 8, as safetensors wants it.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    front = struct.pack("<Q", len(text)) + text
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(front)
        for array in arrays.values():
            file.write(memoryview(array.reshape(-1)).cast("B"))
    return ShardEntry(
        file=path.name,
        images=len(content.images),
        nbytes=len(front) + start,
        header_checksum=checksum(front),
        embedding_checksum=checksum(arrays["checksums"].tobytes() + arrays["embedding"].tobytes()),
    )


class Shard:
    """A shard that is open for reading, until nobody holds it; it may be removed from the folder meanwhile.

    Raises:
        LapsError: naming the file: it has another size than when it was written, or a damaged header.
        UnreadableShardError: the system refused to read it. FileNotFoundError: it is gone.
    """

    def __init__(self, path: Path, entry: ShardEntry) -> None:
        self.path, self.entry = path, entry
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(error) from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size != entry.nbytes:
            raise self.broken("the shard was cut off or replaced", f"{entry.nbytes} bytes", size)
        front = self._read(0, 8)
        length = min(struct.unpack("<Q", front.tobytes())[0], size - 8)
        front = np.concatenate([front, self._read(8, length)])
        if checksum(front) != entry.header_checksum:
            raise self.broken("the shard's header is damaged", "the checksum of when it was written")
        header = json.loads(front[8:].tobytes())
        self._images: str = header["__metadata__"]["images"]
        self._start: dict[str, int] = {name: 8 + length + header[name]["data_offsets"][0] for name in DTYPES}
        self.embed_dim: int = header["embedding"]["shape"][1]
        self.record_bytes: int = header["records"]["shape"][1]
        self._checksums: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return self.entry.images

    @cached_property
    def images(self) -> list[ImageEntry]:
        """All of the shard, the deleted ones too."""
        return [ImageEntry(*values) for values in json.loads(self._images)]

    def embeddings(self) -> NDArray[np.float32]:
        """(n, C) float32. Raises LapsError: they are damaged."""
        front = self._read(self._start["checksums"], 4 * len(self) + 4 * len(self) * self.embed_dim)
        if checksum(front) != self.entry.embedding_checksum:
            raise self.broken("the shard's global vectors are damaged", "the checksum of when it was written")
        self._checksums = front[: 4 * len(self)].copy().view(np.uint32)
        return front[4 * len(self) :].view(np.float32).reshape(len(self), self.embed_dim)

    def expect(self, rows: Sequence[int]) -> None:
        """Tell the system that these records are read soon: a disk can fetch them side by side."""
        for row in rows:
            os.posix_fadvise(self._file, self._offset(row), self.record_bytes, os.POSIX_FADV_WILLNEED)

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(3, len(rows)): file descriptor, offset and checksum of records, as `read_places` wants them."""
        if self._checksums is None:
            self.embeddings()
        assert self._checksums is not None
        offsets = self._start["records"] + rows * self.record_bytes
        return np.stack([np.full_like(rows, self._file), offsets, self._checksums[rows].astype(np.int64)])

    def read_record(self, row: int, into: Bytes) -> None:
        """A record into (bytes,) uint8. Raises LapsError, naming the image too: it is damaged."""
        found = read_places(self.places(np.array([row])), into[None])
        if found is not None:
            raise self.damaged(row, found[1])

    def damaged(self, row: int, problem: int) -> LapsError:
        """What to raise of a record that `read_places` has refused."""
        if problem > 0:
            return self._unreadable(OSError(problem, os.strerror(problem)))
        if problem == 0:
            size = os.fstat(self._file).st_size
            return self.broken("the shard ends early", f"{self.entry.nbytes} bytes", size)
        return self.broken(
            f"the features of {self.images[row].path!r} (row {row}) are damaged",
            "the checksum of when they were written",
        )

    def broken(self, what: str, expected: object, got: object = None) -> LapsError:
        """What to raise of this file."""
        hint = f"{expected}; laps index check --repair leaves it out"
        return LapsError(_check.message("Index", f"{self.path}: {what}", hint, got))

    def _unreadable(self, error: OSError) -> UnreadableShardError:
        reason = error.strerror or type(error).__name__
        return UnreadableShardError(
            _check.message("Index", f"{self.path}: the shard cannot be read", "a readable file", reason)
        )

    def _offset(self, row: int) -> int:
        return self._start["records"] + row * self.record_bytes

    def _read(self, start: int, size: int) -> Bytes:
        found = np.empty(size, np.uint8)
        self._fill(start, found)
        return found

    def _fill(self, start: int, into: Bytes) -> None:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._file, [into[done:]], start + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if not got:
                raise self.broken("the shard ends early", f"{self.entry.nbytes} bytes", start + done)
            done += got


def read_places(places: NDArray[np.int64], into: Bytes) -> tuple[int, int] | None:
    """Read records into (n, bytes) uint8, side by side, and hold them to their checksums.

    Args:
        places: (3, n) int64, of :meth:`Shard.places`.
        into: contiguous.

    Returns:
        None, or the first that is damaged, and why: the system's error number, 0 where the file ends before
        it does, -1 where it is not what was written.
    """
    files, offsets, checksums = places
    return _laps.read_records(files, offsets, checksums, torch.get_num_threads(), into)
