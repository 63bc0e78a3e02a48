"""From a query's features to the best images: candidates by global vectors, then the head's exact scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _check
from .._index_options import CANDIDATE_BYTES, CANDIDATES
from ..errors import LapsError
from ..features import ImageFeatures, TextFeatures
from ..model import LAPS
from .graph import Graph, best
from .snapshot import Snapshot

__all__ = ["Found", "by_embedding", "by_head", "default_candidates"]

# Records that are held at once: they and what they unpack to stay in the processor's cache, or nearly so.
RECORDS_ON_CPU, RECORDS_ON_GPU = 4 * 2**20, 256 * 2**20

# Positions, scores and global scores, best first.
Found = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def by_embedding(snapshot: Snapshot, graph: Graph | None, query: torch.Tensor, k: int) -> Found:
    """The k images whose global vectors are nearest to a query's (C,)."""
    positions, products = best(snapshot, graph, query.float().cpu(), k)
    return positions, products, products


def by_head(
    model: LAPS,
    snapshot: Snapshot,
    graph: Graph | None,
    texts: TextFeatures,
    k: int,
    candidates: int | None,
) -> Found:
    """The k best of the candidates for one caption, by the head's score; equal ones in the index's order.

    Args:
        model: of the index.
        snapshot: of the index.
        graph: what nominates; None for the exact product.
        texts: of one caption.
        k: how many are wanted.
        candidates: how many the global vectors nominate; None for :func:`default_candidates`.

    Raises:
        LapsError: a damaged record (shard and image are named); a score that is not finite.
    """
    candidates = default_candidates(snapshot) if candidates is None else candidates
    nominated, products = best(snapshot, graph, texts.embedding[0].float().cpu(), max(k, candidates))
    order = nominated.argsort()
    positions, products = nominated[order], products[order]
    scores = _scores(model, snapshot, positions, texts)
    if not bool(scores.isfinite().all()):
        at = int(positions[int((~scores.isfinite()).nonzero()[0])])
        path = snapshot.path_of(snapshot.image(at))
        raise LapsError(_check.message("Index.search", f"the score of {path} is not finite", "a number"))
    ranked = scores.argsort(descending=True, stable=True)[:k].numpy()
    return positions[ranked], scores.numpy()[ranked], products[ranked]


def default_candidates(snapshot: Snapshot) -> int:
    """As many images as `CANDIDATE_BYTES` of features belong to, and at least `CANDIDATES`."""
    layout = snapshot.manifest.layout
    return max(CANDIDATES, CANDIDATE_BYTES // layout.nbytes if layout and layout.nbytes else 0)


def _scores(
    model: LAPS, snapshot: Snapshot, positions: NDArray[np.int64], texts: TextFeatures
) -> torch.Tensor:
    """(len(positions),) float32 on the CPU, of one caption with images in ascending order."""
    layout = snapshot.manifest.layout
    size = 0 if layout is None else layout.nbytes
    if layout is None or not size:
        vectors = snapshot.embedding(positions).to(model.device)
        return model.similarity(ImageFeatures(vectors), texts)[:, 0].float().cpu()
    on_gpu = model.device.type == "cuda"
    step = max(1, (RECORDS_ON_GPU if on_gpu else RECORDS_ON_CPU) // size)
    held = torch.empty(min(step, len(positions)), size, dtype=torch.uint8, pin_memory=on_gpu)
    buffers: dict[str, torch.Tensor] = {}
    snapshot.expect(positions)
    found = []
    for first in range(0, len(positions), step):
        part = positions[first : first + step]
        records = held[: len(part)]
        snapshot.read_records(part, records.numpy())
        fields = layout.unpack(records.to(model.device), buffers)
        features = ImageFeatures(snapshot.embedding(part).to(model.device), **fields)
        found.append(model.similarity(features, texts)[:, 0].float().cpu())
    return torch.cat(found) if found else torch.empty(0)
