"""What changes an index, one commit after the other; the caller holds the folder's lock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from .. import _check
from ..distributed import Ranks
from ..errors import LapsError, LapsValueError
from ..model import LAPS
from . import manifest
from .encode import Encoded, EncodeOptions, encode
from .listing import ListedImage, Listing, is_gone
from .manifest import MANIFEST, Manifest
from .records import RecordLayout
from .shards import ImageEntry, ShardContent, ShardEntry, write_shard
from .snapshot import Snapshot
from .stopping import IndexingStoppedError, stop_signals

__all__ = [
    "Added",
    "Plan",
    "carry_out",
    "commit_pieces",
    "compact",
    "delete",
    "is_below",
    "plan",
    "write_piece",
]

# Where paths begin that are in no folder of the index.
TOP = "/"


@dataclass(frozen=True)
class Added:
    """What :meth:`laps.Index.add` did, in numbers of images; ``print`` says it in words.

    Attributes:
        added: new ones.
        updated: encoded again, because the file had changed.
        unchanged: in the index already.
        deleted: taken out, because the file is gone.
        skipped: what could not be read; a folder that could not be listed counts as one.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.added} added, {self.updated} updated, {self.unchanged} unchanged, "
            f"{self.deleted} deleted, {self.skipped} skipped"
        )


@dataclass(frozen=True)
class Piece:
    """A shard that is on the disk and in no manifest yet."""

    layout: RecordLayout
    entry: ShardEntry
    images: list[ImageEntry]


def write_piece(
    folder: Path, state: Manifest, layout: RecordLayout, content: ShardContent, rank: int = 0
) -> Piece:
    """Write a shard; `rank` is this process among those that write shards before the next commit.

    Raises:
        LapsError: the index was removed meanwhile. OSError: no space.
    """
    if not (folder / MANIFEST).exists():
        # To write would make the folder again, without a model.
        raise LapsError(_check.message("Index.add", f"{folder} was removed", "the index, to the end"))
    entry = write_shard(manifest.new_shard_path(folder, state.next_shard + rank), content)
    return Piece(layout, entry, content.images)


def commit_pieces(
    folder: Path,
    state: Manifest,
    pieces: Sequence[Piece],
    *,
    roots: Sequence[str],
    replaced: Iterable[tuple[str, int]] = (),
) -> Manifest:
    """Commit shards, ascending by number, and with them that they replace some rows of others (file, row).

    Raises:
        LapsError: the index was removed or changed meanwhile, or the shards' records differ in layout.
            OSError: no space; nothing has changed.
    """
    layout = state.layout or pieces[0].layout
    other = next((piece.layout for piece in pieces if piece.layout != layout), None)
    if other is not None:
        raise LapsError(_check.message("Index.add", "ranks have features of different shapes", layout, other))
    return manifest.commit(
        folder,
        state,
        layout=layout,
        roots=tuple(roots),
        shards=(*_without(state.shards, replaced), *(piece.entry for piece in pieces)),
        next_shard=pieces[-1].entry.number + 1,
    )


def delete(folder: Path, snapshot: Snapshot, positions: Iterable[int]) -> Manifest:
    """Commit that some images no longer count; their features stay until `compact`."""
    rows = [_row(snapshot, position) for position in positions]
    return manifest.commit(folder, snapshot.manifest, shards=_without(snapshot.manifest.shards, rows))


def _row(snapshot: Snapshot, position: int) -> tuple[str, int]:
    return snapshot.shards[int(snapshot.number[position])].entry.file, int(snapshot.row[position])


def _without(shards: Iterable[ShardEntry], rows: Iterable[tuple[str, int]]) -> tuple[ShardEntry, ...]:
    """The shards without some rows, and without those shards that have none left."""
    gone: dict[str, set[int]] = {}
    for file, row in rows:
        gone.setdefault(file, set()).add(row)
    changed = [
        replace(shard, deleted=tuple(sorted({*shard.deleted, *gone.get(shard.file, ())}))) for shard in shards
    ]
    return tuple(shard for shard in changed if len(shard.deleted) < shard.images)


# ---- files


@dataclass(frozen=True)
class Plan:
    """What has to be done to bring an index up to date.

    Attributes:
        state: of the index, what is gone already taken out.
        roots: of the index's images and the new ones.
        wanted: files to encode, each with what its shard is to say of it.
        replaced: file and row of those that are in the index already, by their path.
        done: without what is to be encoded.
    """

    state: Manifest
    roots: list[str]
    wanted: list[tuple[ListedImage, ImageEntry]]
    replaced: dict[str, tuple[str, int]]
    done: Added


def plan(folder: Path, snapshot: Snapshot, listing: Listing, *, prune: bool) -> Plan:
    """Compare the newest state of an index with a listing, and commit what is gone; see `laps.Index.add`.

    Args:
        folder: of the index.
        snapshot: its newest state.
        listing: the files as they are.
        prune: whether to delete what is below the folder that was listed and certainly gone.

    Raises:
        LapsValueError: to prune, but there is no image at all below that folder any more.
    """
    state, known = snapshot.manifest, snapshot.positions
    entries = list(snapshot.entries())
    gone = _gone(known, listing, listing.folder) if prune and listing.folder is not None else []
    if gone:
        state = delete(folder, snapshot, gone)
    wanted = [
        image
        for image in listing.images
        if image.path not in known or not _is_same(image, entries[known[image.path]])
    ]
    roots = list(state.roots)
    return Plan(
        state=state,
        roots=roots,
        wanted=[(image, _entry(image, roots, listing.folder)) for image in wanted],
        replaced={image.path: _row(snapshot, known[image.path]) for image in wanted if image.path in known},
        done=Added(
            unchanged=len(listing.images) - len(wanted), deleted=len(gone), skipped=len(listing.errors)
        ),
    )


def _gone(known: Mapping[str, int], listing: Listing, source: str) -> list[int]:
    """Positions of the images below a folder whose files are gone.

    Not all that was not listed: the system may not have let it be seen, or it was added by its path.
    """
    there = {image.path for image in listing.images}
    unlisted = [path for path in known if path not in there and is_below(path, source)]
    gone = [known[path] for path in unlisted if is_gone(path)]
    if gone and not listing.images:
        expected = f"a folder whose disk is mounted; laps index delete INDEX {source} takes all of it out"
        raise LapsValueError(
            _check.message("Index.add", f"prune, but {source} has no image any more", expected)
        )
    return gone


def carry_out(folder: Path, plan: Plan, model: LAPS, options: EncodeOptions, ranks: Ranks) -> Added:
    """Encode what a plan wants, each rank its share, and commit it; every rank calls this.

    In rounds: each rank writes a shard, and rank 0 commits all of these at once. What ends one ends all, the
    others when they have written their shard of this round; what was encoded is kept.
    """
    state, added, updated = plan.state, 0, 0
    mine = plan.wanted[ranks.part(len(plan.wanted))]
    with (
        stop_signals() as stopped,
        contextlib.closing(encode(model, mine, state.layout, options, stopped)) as encoded,
    ):
        while True:
            piece, failed = _next_piece(folder, state, encoded, ranks)
            if piece is None and failed is None and stopped:
                # Its own share is done, that of others is not.
                failed = IndexingStoppedError.after(stopped[0], len(mine), len(mine))
            outcomes = ranks.objects((piece, _told(failed, ranks)))
            pieces = [each for each, _ in outcomes if each is not None]
            if pieces:
                paths = [
                    os.path.join(plan.roots[image.root], image.path)
                    for each in pieces
                    for image in each.images
                ]
                replaced = [plan.replaced[path] for path in paths if path in plan.replaced]
                state = ranks.on_main(
                    partial(commit_pieces, folder, state, pieces, roots=plan.roots, replaced=replaced)
                )
                updated += len(replaced)
                added += len(paths) - len(replaced)
            # This rank's own first, for its traceback.
            failure = failed or next((each for _, each in outcomes if each is not None), None)
            if failure is not None:
                raise failure
            if not pieces:
                break
    return replace(
        plan.done,
        added=added,
        updated=updated,
        skipped=plan.done.skipped + len(plan.wanted) - added - updated,
    )


def _next_piece(
    folder: Path, state: Manifest, encoded: Iterator[Encoded], ranks: Ranks
) -> tuple[Piece | None, Exception | None]:
    """This rank's next shard, and what ended its work; neither once it has done its share."""
    layout, content, failed = next(encoded, Encoded(None, None, None))
    if layout is None or content is None:
        return None, failed
    try:
        return write_piece(folder, state, layout, content, ranks.rank), failed
    except (LapsError, OSError) as error:
        return None, error


def _told(failed: Exception | None, ranks: Ranks) -> Exception | None:
    """What the other ranks raise: some exceptions cannot travel."""
    if failed is None or isinstance(failed, (LapsError, OSError)):
        return failed
    got = f"{type(failed).__name__}: {failed}"
    return LapsError(_check.message("Index.add", f"rank {ranks.rank} failed", "no error of any rank", got))


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder's, or that of something in it; both are absolute."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _is_same(image: ListedImage, entry: ImageEntry) -> bool:
    return (image.size, image.mtime_ns) == (entry.size, entry.mtime_ns)


def _entry(image: ListedImage, roots: list[str], source: str | None) -> ImageEntry:
    """What a shard says of a file; its root is added to `roots` where it is missing."""
    root = next((n for n, each in enumerate(roots) if each != TOP and is_below(image.path, each)), None)
    if root is None:
        place = source if source is not None and is_below(image.path, source) else TOP
        if place not in roots:
            roots.append(place)
        root = roots.index(place)
    path = image.path.removeprefix(roots[root].rstrip("/") + "/")
    return ImageEntry(root, path, image.size, image.mtime_ns)


# ---- compaction


def compact(folder: Path, snapshot: Snapshot, shard_bytes: int) -> Manifest:
    """Write shards with deleted images anew without these, and join small shards; one commit.

    Raises:
        LapsError: damaged features (shard and image are named); nothing has changed.
    """
    state = snapshot.manifest
    small = [shard for shard in state.shards if 2 * shard.nbytes < shard_bytes]
    chosen = {shard.file for shard in state.shards if shard.deleted}
    chosen |= {shard.file for shard in small} if len(small) > 1 else set()
    if not chosen:
        return state
    written: list[ShardEntry] = []
    for content in _live(snapshot, chosen, shard_bytes):
        path = manifest.new_shard_path(folder, state.next_shard + len(written))
        written.append(write_shard(path, content))
    kept = [shard for shard in state.shards if shard.file not in chosen]
    return manifest.commit(
        folder, state, shards=(*kept, *written), next_shard=state.next_shard + len(written)
    )


def _live(snapshot: Snapshot, files: set[str], shard_bytes: int) -> Iterator[ShardContent]:
    """The live images of some shards, in pieces of a shard's size."""
    numbers = [i for i, shard in enumerate(snapshot.shards) if shard.entry.file in files]
    positions = np.flatnonzero(np.isin(snapshot.number, numbers))
    size = snapshot.shards[numbers[0]].record_bytes
    step = max(1, shard_bytes // (size + snapshot.vectors.shape[1] * 4))
    for first in range(0, len(positions), step):
        part = positions[first : first + step]
        records = np.empty((len(part), size), np.uint8)
        snapshot.read_records(part, records)
        yield ShardContent(
            images=[snapshot.image(position) for position in part.tolist()],
            embedding=snapshot.embedding(part).numpy(),
            records=records,
        )
