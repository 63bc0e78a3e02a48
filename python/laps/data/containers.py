"""Images that lie inside of a file of many: where their paths lead, and their bytes.

Everything in laps names an image by a path. Of an image inside of something it is that thing's path, joined
with the image's name or number there:

- ``shard.tar/000123.jpg``, a member of a tar file;
- ``train.parquet/17``, a row, from 0, of a parquet file;
- ``folder/17``, a row of a data set that the library datasets saved there;
- ``dataset-82594f7508b88fa5/17``, a row of one that :func:`laps.data.from_dataset` was given.

What is read once (a tar file's index, an open data set) is kept for the process. Forked loader workers have
it too; to spawned ones :func:`carried` takes what they could not, or not cheaply, read themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import hub_rows, tar_files
from .tar_files import TAR_END

__all__ = ["Container", "Presence", "carried", "container_of", "content_of", "restore"]

OPERATION = "open_image"


class Container(NamedTuple):
    """A file of many images, its kind ("tar", "parquet", "saved" or "memory"), and an image's name in it."""

    kind: str
    file: Path
    name: str


def container_of(path: Path) -> Container | None:
    """Where an image's path leads, or None for a file of its own. Whether the image exists is not asked."""
    text = str(path)
    end = text.find(TAR_END + "/")
    while end >= 0:
        file = text[: end + len(TAR_END)]
        # A folder may be called so, where someone has unpacked it.
        if not os.path.isdir(file):
            return Container("tar", Path(file), text[len(file) + 1 :])
        end = text.find(TAR_END + "/", end + 1)
    head, name = os.path.split(text)
    if not name.isascii() or not name.isdigit():
        return None
    kind = _kind_of_rows(head)
    return None if kind is None else Container(kind, Path(head), name)


def content_of(path: Path) -> bytes | None:
    """The bytes of the image at `path` if it lies inside of a container, None for a file of its own.

    Raises:
        LapsValueError: the container is missing or damaged, or has no such image; with the path.
    """
    container = container_of(path)
    if container is None:
        return None
    if container.kind == "tar":
        return tar_files.read_image(OPERATION, container.file, container.name)
    return hub_rows.row_image(OPERATION, container.kind, container.file, int(container.name))


class Presence:
    """Whether images are there, as far as is known without opening a data set; asks a container once."""

    def __init__(self) -> None:
        self._there: dict[Path, tuple[bool, tar_files.TarIndex | None]] = {}

    def __contains__(self, container: Container) -> bool:
        kind, file, name = container
        if file not in self._there:
            index = tar_files.known_index(file) if kind == "tar" else None
            self._there[file] = (kind == "memory" or file.exists(), index)
        there, index = self._there[file]
        return there and (index is None or name in index.images)


def carried(paths: Iterable[Path]) -> dict[str, Any]:
    """What a spawned process needs to open these images, for `restore` there."""
    tars: dict[str, Any] = {}
    datasets: dict[str, Any] = {}
    for path in paths:
        container = container_of(path)
        if container is None:
            continue
        file = str(container.file)
        if container.kind == "tar" and file not in tars:
            tars[file] = tar_files.known_index(container.file)
        elif container.kind == "memory":
            datasets[file] = hub_rows.in_memory(container.file)
    return {"tars": {file: index for file, index in tars.items() if index is not None}, "datasets": datasets}


def restore(state: dict[str, Any]) -> None:
    """Take what `carried` has from another process."""
    for file, index in state["tars"].items():
        tar_files.remember(Path(file), index)
    for name, rows in state["datasets"].items():
        hub_rows.keep_in_memory(Path(name), rows)


def _kind_of_rows(head: str) -> str | None:
    if hub_rows.in_memory(Path(head)) is not None:
        return "memory"
    if head.endswith(hub_rows.PARQUET_END) and not os.path.isdir(head):
        return "parquet"
    return "saved" if hub_rows.is_saved(Path(head)) else None
