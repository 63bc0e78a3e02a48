"""Reads everything of an index, and tells what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..errors import LapsError
from ..model import LAPS
from . import manifest
from .fingerprint import fingerprint
from .graph import load_graph
from .manifest import MODEL, SHARDS, Manifest
from .shards import Shard, ShardEntry
from .snapshot import Snapshot

__all__ = ["Checked", "check"]


@dataclass(frozen=True)
class Checked:
    """What was found; ``print`` says it in words.

    Attributes:
        images: that count.
        shards: files of features.
        problems: a sentence for each damage, with the file's name.
        lost: images whose features are damaged.
    """

    images: int
    shards: int
    problems: tuple[str, ...]
    lost: int

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems

    def __str__(self) -> str:
        summary = f"{self.images} images in {self.shards} shards: "
        return "\n".join([*self.problems, summary + ("all is whole" if self.ok else f"{self.lost} lost")])


def check(folder: Path, *, progress: bool = True) -> tuple[Checked, Manifest]:
    """What is damaged, and the manifest without that; nothing is changed.

    Raises:
        LapsError: no index there, or a damaged manifest.
    """
    state = manifest.read(folder)
    problems, kept, lost = [], [], 0
    bar = tqdm(state.shards, desc="check shards", unit="shard", disable=None if progress else True)
    for entry in bar:
        live = entry.images - len(entry.deleted)
        whole, said = _checked(folder, entry)
        problems += said
        if whole is not None:
            kept.append(whole)
            live -= len(whole.deleted) - len(entry.deleted)
            lost += len(whole.deleted) - len(entry.deleted)
        else:
            lost += live
    problems += _derived(folder, state)
    images = sum(entry.images - len(entry.deleted) for entry in state.shards)
    remaining = tuple(entry for entry in kept if len(entry.deleted) < entry.images)
    return (
        Checked(images, len(state.shards), tuple(problems), lost),
        replace(state, shards=remaining),
    )


def _checked(folder: Path, entry: ShardEntry) -> tuple[ShardEntry | None, list[str]]:
    """A shard without its damaged rows, None for one that is lost as a whole; and what is to be said."""
    try:
        shard = Shard(folder / SHARDS / entry.file, entry)
        shard.embeddings()
    except (LapsError, OSError) as error:
        return None, [str(error)]
    problems, broken = [], []
    record = np.empty(shard.record_bytes, np.uint8)
    for row in range(len(shard)):
        try:
            shard.read_record(row, record)
        except LapsError as error:
            if row not in entry.deleted:
                broken.append(row)
                problems.append(str(error))
    return replace(entry, deleted=tuple(sorted({*entry.deleted, *broken}))), problems


def _derived(folder: Path, state: Manifest) -> Iterator[str]:
    """Damage of the model and of the graph."""
    try:
        if fingerprint(LAPS.from_pretrained(folder / MODEL)) != state.model:
            yield f"Index: {folder / MODEL} is not the model that the index was made with"
    except LapsError as error:
        yield str(error)
    try:
        load_graph(folder, Snapshot(folder, replace(state, shards=())))
    except LapsError as error:
        yield str(error)
