"""The manifest, ``index.json``: what belongs to an index. To replace it is the one step that commits."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import _check
from .._files import write_atomically
from .._index_options import STORAGES
from .._json_files import read_object
from ..errors import LapsError, LapsValueError
from .checksum import checksum
from .records import RecordLayout
from .shards import ShardEntry

__all__ = [
    "MANIFEST",
    "MODEL",
    "SHARDS",
    "Manifest",
    "commit",
    "json_checksum",
    "new_shard_path",
    "read",
    "remove_orphans",
]

MANIFEST, MODEL, SHARDS = "index.json", "model", "shards"
FORMAT, VERSION = "laps-index", 1
SHARD_NAME = re.compile(r"\d{6,}-[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """One state of an index.

    Attributes:
        storage: one of :data:`laps.index.STORAGES`.
        model: fingerprint of the model.
        generation: counts the commits.
        layout: of the records; None until there is a shard.
        roots: absolute paths of the folders that the images' paths begin at.
        shards: ascending by number.
        next_shard: the number of the next one.
    """

    storage: str
    model: str
    generation: int = 0
    layout: RecordLayout | None = None
    roots: tuple[str, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    next_shard: int = 0

    def to_json(self) -> str:
        """With a checksum of all of it."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "generation": self.generation,
            "storage": self.storage,
            "model": self.model,
            "layout": None if self.layout is None else self.layout.to_list(),
            "roots": list(self.roots),
            "next_shard": self.next_shard,
            "shards": [shard.to_dict() for shard in self.shards],
        }
        return json.dumps({"checksum": json_checksum(values), **values}, indent=1) + "\n"


def json_checksum(values: dict[str, Any]) -> int:
    """Of an object of JSON, whatever the order of its keys."""
    return checksum(json.dumps(values, sort_keys=True).encode())


def read(folder: Path) -> Manifest:
    """The newest state of the index in a folder.

    Raises:
        LapsValueError: no index there, one of a newer version, or a damaged manifest; with its path.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise LapsValueError(
            _check.message("Index.open", f"{folder} holds no index", "a folder that laps encode has made")
        )
    values = read_object("Index.open", path, "the manifest of an index")
    if values.get("format") != FORMAT:
        raise LapsValueError(_check.message("Index.open", f"{path} is no manifest of an index", FORMAT))
    if values.get("version") != VERSION:
        expected = f"version {VERSION}, or a newer laps"
        raise LapsValueError(
            _check.message("Index.open", f"{path} has another version", expected, values.get("version"))
        )
    stored = values.pop("checksum", None)
    try:
        if stored != json_checksum(values):
            raise ValueError("the checksum does not fit")
        layout = values["layout"]
        return Manifest(
            storage=_check.choice("Index.open", "storage", values["storage"], STORAGES),
            model=str(values["model"]),
            generation=int(values["generation"]),
            layout=None if layout is None else RecordLayout.from_list(layout),
            roots=tuple(values["roots"]),
            shards=tuple(ShardEntry.from_dict(shard) for shard in values["shards"]),
            next_shard=int(values["next_shard"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LapsValueError(
            _check.message("Index.open", f"{path} is damaged", "a manifest as it was written", error)
        ) from error


def commit(folder: Path, before: Manifest | None, **changes: Any) -> Manifest:
    """Replace the manifest by the next generation, and return that; the caller holds the folder's lock.

    Args:
        folder: of the index.
        before: what the changes are relative to; None for a new index (`changes` are then all there is).
        changes: attributes of :class:`Manifest`.

    Raises:
        LapsError: the folder was removed, or another writer came between. OSError: no space.
    """
    if before is None:
        after = Manifest(**changes)
    else:
        # Not only against users: on a file system without locks there may be two writers.
        now = read(folder) if (folder / MANIFEST).exists() else None
        if now is None or now.generation != before.generation:
            got = "none" if now is None else f"generation {now.generation}"
            raise LapsError(
                _check.message(
                    "Index",
                    f"{folder} was removed or changed by another process",
                    f"generation {before.generation}",
                    got,
                )
            )
        after = replace(before, generation=before.generation + 1, **changes)
    write_atomically(folder / MANIFEST, after.to_json())
    return after


def new_shard_path(folder: Path, number: int) -> Path:
    """A path that no earlier shard had, whatever became of it."""
    return folder / SHARDS / f"{number:06}-{secrets.token_hex(4)}.safetensors"


def remove_orphans(folder: Path, manifest: Manifest) -> None:
    """Remove shards that are not in the manifest: of a writer that was killed, or compacted away."""
    shards = folder / SHARDS
    own = {shard.file for shard in manifest.shards}
    for path in shards.iterdir() if shards.is_dir() else ():
        # What a killed write_shard left beside its place ends in .tmp.
        name = re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"\1", path.name)
        if SHARD_NAME.fullmatch(name) and path.name not in own:
            path.unlink(missing_ok=True)
