"""One state of an index, open for reading; what writers do later does not change it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from ..errors import LapsError
from . import manifest
from .manifest import SHARDS, Manifest
from .shards import Bytes, ImageEntry, Shard, read_places

__all__ = ["Snapshot", "open_snapshot"]

# Files that the rest of the process may want.
SPARE_FILES = 128
# A writer that compacts removes shards: between manifest and shards there may be another commit.
ATTEMPTS = 20


class Snapshot:
    """The live images of one generation, in the order in which they were added, at positions 0..len - 1.

    Attributes:
        folder: of the index.
        manifest: what belongs to it.
        shards: open files, as in the manifest.
        number: (n,) int64, index into `shards` of each image.
        row: (n,) int64, its row there.
        keys: (n,) int64, ascending: an image's name for all generations, until it is compacted.
        vectors: (n, C) float32, the global vectors, unit norm.
    """

    def __init__(self, folder: Path, state: Manifest, known: Mapping[str, Shard] | None = None) -> None:
        """Open what `known`, by file name, does not hold already.

        Raises:
            LapsError: a damaged shard. FileNotFoundError: one that is gone.
        """
        self.folder, self.manifest = folder, state
        _make_room(len(state.shards))
        self.shards = []
        for entry in state.shards:
            shard = (known or {}).get(entry.file) or Shard(folder / SHARDS / entry.file, entry)
            self.shards.append(shard)
        number, row, vectors, places = [], [], [], []
        for i, (shard, entry) in enumerate(zip(self.shards, state.shards, strict=True)):
            live = np.setdiff1d(np.arange(len(shard)), np.array(entry.deleted, np.int64))
            number.append(np.full(len(live), i))
            row.append(live)
            embeddings = shard.embeddings()
            vectors.append(embeddings if len(live) == len(shard) else embeddings[live])
            places.append(shard.places(live))
        self.number = np.concatenate([np.empty(0, np.int64), *number])
        self.row = np.concatenate([np.empty(0, np.int64), *row])
        self._places = np.concatenate([np.empty((3, 0), np.int64), *places], axis=1)
        numbers = np.array([entry.number for entry in state.shards] or [0], np.int64)
        self.keys = (numbers[self.number] << 32) | self.row
        width = self.shards[0].embed_dim if self.shards else 0
        self.vectors = torch.from_numpy(np.concatenate([np.empty((0, width), np.float32), *vectors]))

    def __len__(self) -> int:
        return len(self.row)

    def image(self, position: int) -> ImageEntry:
        """What is known of the file."""
        return self.shards[int(self.number[position])].images[int(self.row[position])]

    def path_of(self, image: ImageEntry) -> str:
        """Where the file is, absolute."""
        return os.path.join(self.manifest.roots[image.root], image.path)

    def entries(self) -> Iterator[ImageEntry]:
        """Of all live images, by position."""
        for i, shard in enumerate(self.shards):
            images = shard.images
            yield from (images[row] for row in self.row[self.number == i].tolist())

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each absolute path."""
        return {self.path_of(image): position for position, image in enumerate(self.entries())}

    def read_records(self, positions: NDArray[np.int64], into: Bytes) -> None:
        """Checked records of images, ascending, into (len(positions), bytes) uint8.

        Raises:
            LapsError: naming shard and image: a record is damaged.
        """
        found = read_places(self._places[:, positions], into)
        if found is not None:
            position = positions[found[0]]
            raise self.shards[int(self.number[position])].damaged(int(self.row[position]), found[1])

    def expect(self, positions: NDArray[np.int64]) -> None:
        """Tell the system that the records of these images are read soon."""
        numbers, rows = self.number[positions], self.row[positions]
        for number in np.unique(numbers).tolist():
            self.shards[number].expect(rows[numbers == number].tolist())

    def embedding(self, positions: NDArray[np.int64]) -> Tensor:
        """(len(positions), C) float32, the global vectors of images."""
        return self.vectors[torch.from_numpy(positions)]


def open_snapshot(folder: Path, before: Snapshot | None = None) -> Snapshot:
    """The newest state; shards that `before` has open are not opened again.

    Raises:
        LapsError: no index, or a damaged one; the file is named.
    """
    known = {} if before is None else {shard.entry.file: shard for shard in before.shards}
    for attempt in range(ATTEMPTS):
        state = manifest.read(folder)
        if before is not None and state.generation == before.manifest.generation:
            return before
        try:
            return Snapshot(folder, state, known)
        except FileNotFoundError as error:
            if manifest.read(folder).generation == state.generation or attempt == ATTEMPTS - 1:
                raise LapsError(
                    _check.message(
                        "Index.open",
                        f"{error.filename} is missing",
                        "every shard of index.json; laps index check --repair leaves it out",
                    )
                ) from None
    raise AssertionError("unreachable")


def _make_room(files: int) -> None:
    """Raise the process's limit of open files where the shards, which stay open, need it.

    Raises:
        LapsError: the system allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise LapsError(
            _check.message(
                "Index.open", f"{files} shards are more files than may be open", "laps index compact", hard
            )
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
