"""Reads everything of an index, tells what is damaged, and leaves that out if it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .. import _check
from ..errors import LapsError
from . import manifest
from .graph import DamagedGraphError, load_graph, remove_graph
from .manifest import SHARDS, Manifest
from .model_copy import copy_damage
from .shards import Shard, ShardEntry, UnreadableShardError
from .snapshot import ATTEMPTS, Snapshot

__all__ = ["Checked", "check"]


@dataclass(frozen=True)
class Checked:
    """What was found; ``print`` says it in words.

    Attributes:
        images: that count.
        shards: files of features.
        problems: a sentence for each damage, with the file's name.
        lost: images whose features are damaged, or cannot be read.
        repaired: whether these, and a damaged graph, were left out.
    """

    images: int
    shards: int
    problems: tuple[str, ...]
    lost: int
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged."""
        return not self.problems

    def __str__(self) -> str:
        found = "all is whole" if self.ok else f"{self.lost} lost"
        if self.repaired and self.lost:
            found += "; they were left out, and laps encode adds them again"
        return "\n".join([*self.problems, f"{self.images} images in {self.shards} shards: {found}"])


@dataclass(frozen=True)
class _Damage:
    """Of a shard: what is wrong with it as a whole, or with some rows."""

    whole: str | None = None
    rows: tuple[tuple[int, str], ...] = ()


def check(folder: Path, *, repair: bool = False, progress: bool = True) -> Checked:
    """What is damaged.

    Args:
        folder: of the index.
        repair: leave damaged images out, and remove a damaged graph; the caller holds the folder's lock then.
        progress: show a progress bar.

    Raises:
        LapsError: no index there, or a damaged manifest; to repair, a shard that the system refuses to read.
    """
    state, found = _read_all(folder, repair, progress)
    problems, kept, lost = [], [], 0
    for entry in state.shards:
        damage, live = found[entry.file], entry.images - len(entry.deleted)
        if damage.whole is not None:
            problems.append(damage.whole)
            lost += live
            continue
        broken = {row: said for row, said in damage.rows if row not in entry.deleted}
        problems += broken.values()
        lost += len(broken)
        if len(broken) < live:
            kept.append(replace(entry, deleted=tuple(sorted({*entry.deleted, *broken}))))
    if repair and tuple(kept) != state.shards:
        after = manifest.commit(folder, state, shards=tuple(kept))
        manifest.remove_orphans(folder, after)
    problems += _derived(folder, state, repair)
    images = sum(entry.images - len(entry.deleted) for entry in state.shards)
    return Checked(images, len(state.shards), tuple(problems), lost, repair)


def _read_all(folder: Path, repair: bool, progress: bool) -> tuple[Manifest, dict[str, _Damage]]:
    """A state of the index, and what is wrong with each of its shards, by file name."""
    found: dict[str, _Damage] = {}
    for attempt in range(ATTEMPTS):
        state = manifest.read(folder)
        for entry in tqdm(state.shards, "check shards", unit="shard", disable=None if progress else True):
            # Shards never change: what was read for an earlier state counts.
            if entry.file in found:
                continue
            try:
                found[entry.file] = _damage(folder, entry, repair)
            except FileNotFoundError as error:
                # A writer may have compacted it away meanwhile.
                newer = manifest.read(folder).generation != state.generation
                if newer and attempt < ATTEMPTS - 1:
                    break
                what = f"{error.filename} is missing"
                found[entry.file] = _Damage(_check.message("Index", what, "every shard of index.json"))
        else:
            return state, found
    raise AssertionError("unreachable")


def _damage(folder: Path, entry: ShardEntry, repair: bool) -> _Damage:
    """What is wrong with a shard. Raises FileNotFoundError, and to repair UnreadableShardError."""
    rows = []
    try:
        shard = Shard(folder / SHARDS / entry.file, entry)
        shard.embeddings()
        record = np.empty(shard.record_bytes, np.uint8)
        for row in range(len(shard)):
            try:
                shard.read_record(row, record)
            except UnreadableShardError:
                raise
            except LapsError as error:
                rows.append((row, str(error)))
    except UnreadableShardError as error:
        if repair:
            raise UnreadableShardError(
                f"{error}; nothing was repaired, for it may be whole: if it is lost, remove that file first"
            ) from error
        return _Damage(str(error))
    except LapsError as error:
        return _Damage(str(error))
    return _Damage(rows=tuple(rows))


def _derived(folder: Path, state: Manifest, repair: bool) -> Iterator[str]:
    """Damage of the model and of the graph."""
    model = copy_damage(folder, state.model)
    if model is not None:
        yield model
    try:
        load_graph(folder, Snapshot(folder, replace(state, shards=())))
    except DamagedGraphError as error:
        if repair:
            remove_graph(folder)
        yield str(error)
