"""The approximate search over global vectors: a graph (HNSW) by usearch, for indexes of many images.

It is derived, and may be removed: the exact product of all vectors answers instead, only later. A damaged one
is an error, and the next writer builds it anew. A graph covers some shards; images that came later are
compared exactly, and those that were deleted are left out.
"""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from .._files import atomic_path, write_atomically
from ..errors import LapsError
from .checksum import checksum
from .manifest import json_checksum
from .snapshot import Snapshot

__all__ = [
    "EXACT_BELOW",
    "FILE",
    "DamagedGraphError",
    "Graph",
    "best",
    "build_graph",
    "is_installed",
    "is_late",
    "load_graph",
    "remove_graph",
]

# Below so many images the exact product takes a few milliseconds.
EXACT_BELOW = 50_000
# Of the images, how many may be outside of the graph before it is built anew.
LATE = 0.2
FILE = "graph.json"
CONNECTIVITY, EXPANSION_ADD = 32, 200
# The nearest that are looked at, beside those that are asked for: what costs time, and what gives recall.
EXPANSION = 2


class DamagedGraphError(LapsError):
    """A file of the graph is damaged or cannot be read; it is named."""


@dataclass(frozen=True)
class Graph:
    """A loaded graph.

    Attributes:
        index: of usearch; its keys are those of :class:`Snapshot`.
        shards: the numbers of the shards that it covers.
    """

    index: Any
    shards: frozenset[int]

    def outside(self, snapshot: Snapshot) -> NDArray[np.int64]:
        """Positions of the images that it does not cover."""
        return np.flatnonzero(~np.isin(snapshot.keys >> 32, list(self.shards)))


def is_installed() -> bool:
    """Whether a graph can be built here."""
    return importlib.util.find_spec("usearch") is not None


def _usearch(operation: str) -> Any:
    try:
        import usearch.index
    except ImportError:
        raise LapsError(
            _check.message(operation, "usearch is not installed", 'pip install "laps-rs[search]"')
        ) from None
    return usearch.index


def build_graph(folder: Path, snapshot: Snapshot, *, progress: bool = False) -> Graph:
    """Build the graph of all live images and keep it in the index; the caller holds the folder's lock.

    Raises:
        LapsError: usearch is not installed. OSError: no space.
    """
    index = _new(_usearch("Index.build_graph"), snapshot.vectors.shape[1])
    index.add(
        snapshot.keys.astype(np.uint64),
        snapshot.vectors.numpy(),
        threads=torch.get_num_threads(),
        log="graph" if progress else False,
    )
    name = f"graph-{secrets.token_hex(4)}.usearch"
    with atomic_path(folder / name) as temporary:
        index.save(str(temporary))
        content = np.fromfile(temporary, np.uint8)
    values = {
        "file": name,
        "nbytes": len(content),
        "file_checksum": checksum(content),
        "embed_dim": snapshot.vectors.shape[1],
        "shards": [entry.file for entry in snapshot.manifest.shards],
    }
    write_atomically(folder / FILE, json.dumps({"checksum": json_checksum(values), **values}) + "\n")
    _remove_files(folder, but=name)
    return Graph(index, frozenset(entry.number for entry in snapshot.manifest.shards))


def remove_graph(folder: Path) -> None:
    """Remove the graph, damaged or not; the caller holds the folder's lock."""
    (folder / FILE).unlink(missing_ok=True)
    _remove_files(folder, but=None)


def _remove_files(folder: Path, *, but: str | None) -> None:
    for path in folder.iterdir():
        if re.fullmatch(r"graph-[0-9a-f]{8}\.usearch", path.name) and path.name != but:
            path.unlink(missing_ok=True)


def load_graph(folder: Path, snapshot: Snapshot) -> Graph | None:
    """The graph of the index; None where there is none that fits, or no usearch.

    Raises:
        DamagedGraphError: it is damaged, or cannot be read (the file is named).
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text())
        if values.pop("checksum") != json_checksum(values):
            raise ValueError("the checksum does not fit")
        path = folder / values["file"]
        content = np.fromfile(path, np.uint8)
        if len(content) != values["nbytes"] or checksum(content) != values["file_checksum"]:
            raise ValueError("the checksum does not fit")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not is_installed():
        return None
    covered = {int(file.split("-")[0]): file for file in values["shards"]}
    present = {entry.number: entry.file for entry in snapshot.manifest.shards}
    both = covered.keys() & present.keys()
    # Other files of the same numbers: the index is one that was put back from a backup.
    if not both or any(covered[number] != present[number] for number in both):
        return None
    index = _new(_usearch("Index.search"), values["embed_dim"])
    index.load(content.tobytes())
    return Graph(index, frozenset(covered))


def is_late(graph: Graph | None, snapshot: Snapshot) -> bool:
    """Whether too many images are outside of the graph, or too many of its own are deleted."""
    if graph is None:
        return True
    outside = len(graph.outside(snapshot))
    deleted = len(graph.index) - (len(snapshot) - outside)
    return outside + deleted > LATE * len(snapshot)


def best(
    snapshot: Snapshot, graph: Graph | None, query: Tensor, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The images whose global vectors have the highest products with a query's.

    Args:
        snapshot: of the index.
        graph: None for the exact product of all.
        query: (C,) float32.
        count: how many.

    Returns:
        Positions, and their exact products, both (min(count, n),), the highest first, of equal ones the
        lower position.
    """
    if graph is None:
        products = snapshot.vectors @ query
        chosen = _highest(products, count)
        return _ordered(chosen, products[torch.from_numpy(chosen)])
    outside = graph.outside(snapshot)
    inside = len(snapshot) - len(outside)
    deleted, wanted = len(graph.index) - inside, min(count, inside)
    found, asked = np.empty(0, np.int64), wanted + min(deleted, wanted)
    while wanted:
        asked = min(asked, len(graph.index))
        graph.index.expansion_search = EXPANSION * asked
        keys = graph.index.search(query.numpy(), asked).keys.astype(np.int64)
        places = np.searchsorted(snapshot.keys, keys).clip(max=len(snapshot) - 1)
        # What was deleted still is in the graph.
        found = places[snapshot.keys[places] == keys][:wanted]
        if len(found) == wanted or asked == len(graph.index):
            break
        asked *= 2
    positions = np.sort(np.concatenate([found, outside]))
    products = snapshot.embedding(positions) @ query
    chosen = _highest(products, count)
    return _ordered(positions[chosen], products[torch.from_numpy(chosen)])


def _highest(products: Tensor, count: int) -> NDArray[np.int64]:
    """Indices of the highest, ascending; of equal ones at the border, those with the lower index."""
    if count >= len(products):
        return np.arange(len(products))
    lowest = products.topk(count).values[-1]
    above, equal = (products > lowest).nonzero()[:, 0], (products == lowest).nonzero()[:, 0]
    return torch.cat([above, equal[: count - len(above)]]).sort().values.numpy()


def _ordered(positions: NDArray[np.int64], products: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    order = products.argsort(descending=True, stable=True)
    return positions[order.numpy()], products[order].numpy()


def _new(library: Any, width: int) -> Any:
    # float16 in the graph: it only nominates, and its products are computed anew.
    return library.Index(
        ndim=width,
        metric="ip",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
    )


def _damaged(path: Path, error: Exception) -> DamagedGraphError:
    expected = (
        "the graph as it was written; laps encode and Index.build_graph() make it anew, laps index check "
        "--repair removes it"
    )
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return DamagedGraphError(_check.message("Index", f"{path} is damaged", expected, reason))
