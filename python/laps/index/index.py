"""An index of images that sentences are answered from: :class:`Index`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch

from .. import _check
from .._device import choose_device
from .._folder_lock import LOCK, locked_folder
from .._index_options import ON_ERROR, STORAGES
from .._modes import eval_mode
from ..distributed import Ranks
from ..errors import LapsError, LapsTypeError, LapsValueError
from ..model import LAPS
from . import checking, graph, manifest, writing
from .checking import Checked
from .encode import SHARD_BYTES, SHARD_SECONDS, EncodeOptions
from .fingerprint import fingerprint
from .hits import Hit, HitLists, Hits
from .listing import Listing, list_files, list_folder
from .manifest import MANIFEST, MODEL, SHARDS
from .model_copy import load_copy, restore_copy
from .search import by_embedding, by_head
from .snapshot import Snapshot, open_snapshot
from .writing import Added

__all__ = ["Index"]


class Index:
    """A folder of images, searched by sentences: features on the disk, global vectors in memory.

    ``Index.create(folder, model)`` makes an empty one, ``Index.open(folder)`` opens one. An open index is one
    state: other processes may add, delete and compact meanwhile, and it goes on with what it has; `refresh`
    looks for news. One process at a time writes. What was committed survives whatever ends the process.

    Attributes:
        folder: of the index.
        exact_below: from so many images on, candidates come from an approximate search (usearch, which the
            extra ``search`` installs), once there is its graph, which `add` and `compact` build.

    Example::

        index = laps.Index.create("photos.index", laps.LAPS.from_pretrained("runs/f30k/best"))
        index.add("photos")
        print(index.search("two dogs on a beach", k=5))
    """

    def __init__(
        self, folder: Path, snapshot: Snapshot, model: LAPS | None, device: str | None, exact_below: int
    ) -> None:
        self.folder = folder
        self.exact_below = exact_below
        self._snapshot, self._model, self._device = snapshot, model, device
        # A model that was given may be what mends the copy in the index.
        self._restores = False
        self._graph: tuple[int, graph.Graph | None] | None = None

    # ---- opening

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: LAPS,
        *,
        storage: str = "float16",
        exact_below: int = graph.EXACT_BELOW,
    ) -> Index:
        """An empty index, with a copy of the model in it.

        Args:
            folder: missing or empty.
            model: what encodes images and sentences, now and later; it needs a tokenizer.
            storage: what features are kept in. ``"float16"``: 220 kB an image for a ViT-B/16 at 224 pixels
                and C=512; ``"int8"``: tokens with a scale each, 120 kB; ``"float32"``: 440 kB.
            exact_below: see :class:`Index`.

        Raises:
            LapsValueError: the folder holds something, or is in use; a model without tokenizer.
            LapsTypeError: no model. OSError: the folder cannot be written to.
        """
        operation, place = "Index.create", _path("Index.create", "folder", folder)
        storage = _check.choice(operation, "storage", storage, STORAGES)
        exact_below = _check.count(operation, "exact_below", exact_below, 0)
        _require(operation, "model", model, LAPS, "laps.LAPS")
        if model.tokenizer is None:
            raise LapsValueError(
                _check.message(operation, "the model has no tokenizer", "LAPS(..., tokenizer=...)")
            )
        _refuse_foreign(operation, place)
        with locked_folder(operation, place):
            _refuse_foreign(operation, place)
            model.save_pretrained(place / MODEL)
            state = manifest.commit(place, None, storage=storage, model=fingerprint(model))
        return cls(place, Snapshot(place, state), model, None, exact_below)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        model: LAPS | None = None,
        device: str | None = None,
        exact_below: int = graph.EXACT_BELOW,
    ) -> Index:
        """The index that is kept in a folder, in its newest state.

        Args:
            folder: of :meth:`create`.
            model: in place of the copy in the index, where that has an encoder of your own, or where the copy
                is damaged (`add` then puts it back); the same weights.
            device: where to encode and score; None: where `model` is, for the copy the GPU if there is one.
            exact_below: see :class:`Index`.

        Raises:
            LapsError: no index there; a damaged file (it is named); another model than the index was made
                with.
            LapsTypeError: `model` is no LAPS.
        """
        operation, place = "Index.open", _path("Index.open", "folder", folder)
        exact_below = _check.count(operation, "exact_below", exact_below, 0)
        chosen = None if device is None else choose_device(operation, device)
        if model is not None:
            _require(operation, "model", model, LAPS, "laps.LAPS")
        snapshot = open_snapshot(place)
        if model is not None:
            if fingerprint(model) != snapshot.manifest.model:
                expected = "the model that the index was made with, or a new index"
                raise LapsValueError(
                    _check.message(operation, f"{folder} was made with another model", expected)
                )
            if chosen is not None:
                model.to(chosen)
        index = cls(place, snapshot, model, device, exact_below)
        index._restores = model is not None
        return index

    @staticmethod
    def check(folder: str | Path, *, repair: bool = False, progress: bool = True) -> Checked:
        """Read every byte of an index, and tell what is damaged.

        Args:
            folder: of the index, which need not open.
            repair: leave damaged images out, so that the rest can be searched, and remove a damaged graph;
                `add` encodes and builds them again. A damaged copy of the model stays: see `open`.
            progress: show a progress bar.

        Raises:
            LapsError: no index there, or its ``index.json`` is damaged. To repair: a file that the system
                refuses to read (it is named), which may be whole; nothing is changed then.
        """
        operation, place = "Index.check", _path("Index.check", "folder", folder)
        progress = _check.flag(operation, "progress", progress)
        if not _check.flag(operation, "repair", repair):
            return checking.check(place, progress=progress)
        # To lock would make the folder.
        manifest.read(place)
        with locked_folder(operation, place):
            return checking.check(place, repair=True, progress=progress)

    def refresh(self) -> bool:
        """Go on to the newest state; whether there was a newer one."""
        before = self._snapshot
        self._snapshot = open_snapshot(self.folder, before)
        return self._snapshot is not before

    # ---- looking

    def __len__(self) -> int:
        return len(self._snapshot)

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, images={len(self)}, storage={self.storage!r})"

    @property
    def paths(self) -> list[Path]:
        """The absolute paths of all images, in the order in which they were added."""
        return [Path(path) for path in self._snapshot.positions]

    @property
    def storage(self) -> str:
        """What features are kept in."""
        return self._snapshot.manifest.storage

    @property
    def nbytes(self) -> int:
        """Bytes of all shards on the disk, deleted images included."""
        return sum(shard.nbytes for shard in self._snapshot.manifest.shards)

    @property
    def model(self) -> LAPS:
        """The model, which is loaded at first use, and compared with what the index was made with.

        To compare takes about a second for a gigabyte of weights.

        Raises:
            LapsError: the copy in the index is missing, damaged, or another model.
        """
        if self._model is None:
            device = choose_device("Index.open", self._device)
            self._model = load_copy(self.folder, self._snapshot.manifest.model).to(device)
        return self._model

    # ---- searching

    @overload
    def search(  # type: ignore[overload-overlap]
        self, query: str | Path, k: int = ..., *, candidates: int | None = ..., approximate: bool | None = ...
    ) -> Hits: ...
    @overload
    def search(
        self,
        query: Sequence[str | Path],
        k: int = ...,
        *,
        candidates: int | None = ...,
        approximate: bool | None = ...,
    ) -> HitLists: ...
    def search(
        self,
        query: str | Path | Sequence[str | Path],
        k: int = 10,
        *,
        candidates: int | None = None,
        approximate: bool | None = None,
    ) -> Hits | HitLists:
        """The images that fit a sentence best, or that are most like an image.

        A sentence: its global vector nominates `candidates` images, and the model's head scores these as in
        :meth:`laps.LAPS.similarity`. An image (a ``Path``; a string always is a sentence): by global vectors
        alone, for heads score images with sentences only.

        Args:
            query: a string or a Path, or several.
            k: how many hits, at most.
            candidates: how many images the head scores; at least `k` are. None: as many as have 32 MiB of
                features, and at least 500. As many as there are images give the ranking of
                :meth:`laps.LAPS.rank`, up to the rounding of the storage.
            approximate: True to nominate by the graph, False by the exact product with all global vectors,
                None by the graph from `exact_below` images on, if there is one.

        Returns:
            The hits of the query, best first; for several queries a list of them.

        Raises:
            LapsValueError: a sentence without words, an image that cannot be read, `k` or `candidates` < 1.
            LapsTypeError: an argument of another type. LapsError: damaged features (shard and image are
                named), a damaged graph or copy of the model; ``approximate=True`` without a graph, or without
                usearch.
        """
        operation = "Index.search"
        k = _check.count(operation, "k", k)
        if candidates is not None:
            candidates = _check.count(operation, "candidates", candidates)
        if approximate is not None:
            approximate = _check.flag(operation, "approximate", approximate)
        if isinstance(query, (str, Path)):
            return self._search(query, k, candidates, approximate)
        if not isinstance(query, Sequence) or not all(isinstance(each, (str, Path)) for each in query):
            expected = "a sentence, the Path of an image, or a list of them"
            raise LapsTypeError(
                _check.message(operation, "query has the wrong type", expected, _check.name_of(query))
            )
        return HitLists(self._search(each, k, candidates, approximate) for each in query)

    @torch.inference_mode()
    def _search(self, query: str | Path, k: int, candidates: int | None, approximate: bool | None) -> Hits:
        snapshot, model = self._snapshot, self.model
        with eval_mode(model):
            if isinstance(query, Path):
                vector = model.encode_files([query]).embedding[0]
                if not len(snapshot):
                    return Hits(query)
                found = by_embedding(snapshot, self._nominating(snapshot, approximate), vector, k)
            else:
                texts = model.encode_captions([query])
                if not len(snapshot):
                    return Hits(query)
                nominating = self._nominating(snapshot, approximate)
                found = by_head(model, snapshot, nominating, texts, k, candidates)
        ranked = zip(*(values.tolist() for values in found), strict=True)
        return Hits(
            query,
            (
                Hit(rank, score, global_score, Path(snapshot.path_of(snapshot.image(position))))
                for rank, (position, score, global_score) in enumerate(ranked, 1)
            ),
        )

    def _nominating(self, snapshot: Snapshot, approximate: bool | None) -> graph.Graph | None:
        """The graph, if it is to be used."""
        if approximate is False or (approximate is None and len(snapshot) < self.exact_below):
            return None
        found = self._loaded_graph(snapshot)
        if found is None and approximate:
            raise LapsError(
                _check.message(
                    "Index.search", "approximate=True without a graph", "usearch, and Index.build_graph()"
                )
            )
        return found

    def _loaded_graph(self, snapshot: Snapshot) -> graph.Graph | None:
        """The graph of the index, which is loaded once for each state."""
        generation = snapshot.manifest.generation
        if self._graph is None or self._graph[0] != generation:
            self._graph = generation, graph.load_graph(self.folder, snapshot)
        return self._graph[1]

    # ---- writing

    def add(
        self,
        source: str | Path | Iterable[str | Path] | Listing,
        *,
        prune: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        on_error: str = "skip",
        amp: bool = False,
        progress: bool = True,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
        ranks: Ranks | None = None,
    ) -> Added:
        """Bring the index up to date with a folder, or with some files.

        New files are encoded, and those again whose size or time has changed; what is in the index as it is
        on the disk is left alone. So the same call goes on from where an interrupted one stopped. A changed
        file that cannot be read now keeps its old features.

        Args:
            source: a folder, with all that is below it (by suffix; names that begin with a dot are left out,
                links are followed); or paths of image files; or what was listed of either already
                (:mod:`laps.index.listing`).
            prune: also delete images of this folder whose file is gone. What the system does not let be seen
                is spared, and what is below a link to a folder that is not there.
            batch_size: images per call of the encoder.
            num_workers: processes that read images.
            on_error: ``"skip"`` warns of an image that cannot be read and goes on, ``"raise"`` stops there.
            amp: encode under bfloat16 autocast.
            progress: show a progress bar, on a terminal or in a notebook.
            shard_bytes: write a shard, and commit it, whenever it has so many bytes.
            shard_seconds: or after so many seconds.
            ranks: of a process group (:meth:`laps.distributed.Ranks.here`), in which all call this with the
                same arguments, on an index that all have opened in a folder that all see: each encodes its
                share. What ends one ends all.

        Returns:
            How many images were added, updated and so on, by all ranks.

        Raises:
            LapsTypeError: an argument of another type.
            LapsValueError: no such folder or file, or one without images for an empty index; to prune, and
                the folder has no image any more, though the index has some of it; another process
                writes; with ``on_error="raise"`` an image that cannot be read. All until then is kept.
            IndexingStoppedError: SIGINT or SIGTERM came; all until then is kept.
            LapsError: the index was removed meanwhile. OSError: no space.
        """
        operation = "Index.add"
        options = EncodeOptions(
            storage=self.storage,
            batch_size=_check.count(operation, "batch_size", batch_size),
            num_workers=_check.count(operation, "num_workers", num_workers, 0),
            on_error=_check.choice(operation, "on_error", on_error, ON_ERROR),
            amp=_check.flag(operation, "amp", amp),
            progress=_check.flag(operation, "progress", progress),
            shard_bytes=_check.count(operation, "shard_bytes", shard_bytes),
            shard_seconds=_check.number(operation, "shard_seconds", shard_seconds, 0.0),
        )
        prune, ranks = _check.flag(operation, "prune", prune), Ranks() if ranks is None else ranks
        _require(operation, "ranks", ranks, Ranks, "laps.distributed.Ranks")
        model = ranks.together(lambda: self.model)
        if ranks.size > 1:
            text = f"encode images (rank 0 of {ranks.size})"
            options = replace(options, description=text, progress=options.progress and ranks.main)
        with contextlib.ExitStack() as writing_here:

            def plan() -> writing.Plan:
                """What there is to do; rank 0 holds the folder from here to the end."""
                listing = _listed(operation, source, model, prune=prune, on_error=on_error)
                writing_here.enter_context(self._writing(operation))
                if not len(self):
                    listing.require_images(operation, listing.folder or source)
                if self._restores:
                    restore_copy(self.folder, model, self._snapshot.manifest.model)
                    self._restores = False
                return writing.plan(self.folder, self._snapshot, listing, prune=prune)

            added = writing.carry_out(self.folder, ranks.on_main(plan), model, options, ranks)
            self.refresh()
            if ranks.main:
                self._keep_graph(options.progress)
        return added

    def delete(self, paths: Iterable[str | Path]) -> int:
        """Take images out, by their paths or those of folders; `compact` frees what their features take.

        Returns:
            How many there were.

        Raises:
            LapsValueError: a path that is not in the index; nothing is deleted then. Another process writes.
        """
        operation = "Index.delete"
        if isinstance(paths, (str, Path)):
            raise LapsTypeError(_check.message(operation, "paths is one path", "a list of paths", str(paths)))
        wanted = [os.path.abspath(path) for path in _paths(operation, "paths", paths)]
        with self._writing(operation):
            known = self._snapshot.positions
            found: set[int] = set()
            for path in wanted:
                if path in known:
                    found.add(known[path])
                    continue
                below = [position for each, position in known.items() if writing.is_below(each, path)]
                if not below:
                    raise LapsValueError(
                        _check.message(operation, f"{path} is not in the index", "an image, or its folder")
                    )
                found.update(below)
            if found:
                writing.delete(self.folder, self._snapshot, found)
        return len(found)

    def compact(self, *, shard_bytes: int = SHARD_BYTES, progress: bool = True) -> int:
        """Free what deleted images take, and join small shards; images that were joined move to the end.

        Other processes that have the index open keep what they read from; its space is free when they close.

        Returns:
            How many bytes less there are on the disk.

        Raises:
            LapsError: damaged features (shard and image are named); nothing has changed.
                LapsValueError: another process writes.
        """
        operation = "Index.compact"
        shard_bytes = _check.count(operation, "shard_bytes", shard_bytes)
        progress = _check.flag(operation, "progress", progress)
        with self._writing(operation):
            before = self.nbytes
            writing.compact(self.folder, self._snapshot, shard_bytes)
            self.refresh()
            self._keep_graph(progress)
        return before - self.nbytes

    def build_graph(self, *, progress: bool = True) -> None:
        """Build the graph of the approximate search anew, whatever the number of images.

        Raises:
            LapsError: usearch is not installed. LapsValueError: another process writes, or there are no
                images.
        """
        operation = "Index.build_graph"
        with self._writing(operation):
            if not len(self):
                raise LapsValueError(_check.message(operation, "the index is empty", "images", 0))
            self._build_graph(_check.flag(operation, "progress", progress))

    def _build_graph(self, progress: bool) -> None:
        built = graph.build_graph(self.folder, self._snapshot, progress=progress)
        self._graph = self._snapshot.manifest.generation, built

    def _keep_graph(self, progress: bool) -> None:
        """Build the graph where there are enough images and it is missing or late, or where it is damaged."""
        enough = len(self) >= self.exact_below and graph.is_installed()
        if not (enough or (self.folder / graph.FILE).exists()):
            return
        try:
            found = self._loaded_graph(self._snapshot)
            late = enough and graph.is_late(found, self._snapshot)
        except graph.DamagedGraphError:
            late = True
        if late and len(self) and graph.is_installed():
            self._build_graph(progress)
        elif late:
            graph.remove_graph(self.folder)

    @contextlib.contextmanager
    def _writing(self, operation: str) -> Iterator[None]:
        """The folder's lock, and its newest state before and after; what killed writers left is removed."""
        # To lock would make the folder.
        manifest.read(self.folder)
        with locked_folder(operation, self.folder):
            self.refresh()
            manifest.remove_orphans(self.folder, self._snapshot.manifest)
            try:
                yield
            finally:
                # What ended the work, the loss of the folder for example, is what is to be told.
                with contextlib.suppress(LapsError):
                    self.refresh()
                    manifest.remove_orphans(self.folder, self._snapshot.manifest)


def _refuse_foreign(operation: str, folder: Path) -> None:
    """Refuse a folder that holds anything but what a killed `create` left."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise LapsValueError(_check.message(operation, f"{folder} is a file", "a folder's path"))
    found = sorted(path.name for path in folder.iterdir())
    if MANIFEST in found:
        raise LapsValueError(
            _check.message(operation, f"{folder} holds an index already", "another folder, or Index.open")
        )
    temporary = f".{MANIFEST}."
    foreign = [n for n in found if n not in (LOCK, MODEL, SHARDS) and not n.startswith(temporary)]
    if foreign:
        raise LapsValueError(
            _check.message(operation, f"{folder} is not empty", "a missing or empty folder", foreign[0])
        )


def _listed(
    operation: str,
    source: str | Path | Iterable[str | Path] | Listing,
    model: LAPS,
    *,
    prune: bool,
    on_error: str,
) -> Listing:
    """The files of a source."""
    if isinstance(source, Listing):
        listing = source
    elif not isinstance(source, (str, Path)):
        listing = list_files(_paths(operation, "source", source))
    elif os.path.isdir(source):
        listing = list_folder(Path(source), model.transform)
    elif os.path.exists(source):
        listing = list_files([Path(source)])
    else:
        raise LapsValueError(_check.message(operation, f"{source} is missing", "a folder or an image file"))
    if listing.folder is None and prune:
        raise LapsValueError(_check.message(operation, "prune without a folder", "a folder", str(source)))
    if listing.errors and on_error == "raise":
        raise LapsValueError(
            _check.message(operation, listing.errors[0], "files and folders that can be read")
        )
    for error in listing.errors:
        warnings.warn(f"skipped: {error}", stacklevel=2)
    return listing


def _require(operation: str, argument: str, value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise LapsTypeError(
            _check.message(operation, f"{argument} has the wrong type", name, _check.name_of(value))
        )


def _path(operation: str, argument: str, value: object) -> Path:
    if not isinstance(value, (str, Path)):
        raise LapsTypeError(
            _check.message(operation, f"{argument} is no path", "str or Path", _check.name_of(value))
        )
    if "\0" in str(value):
        raise LapsValueError(_check.message(operation, f"{argument} is no path", "no NUL in it", repr(value)))
    return Path(value)


def _paths(operation: str, argument: str, values: object) -> list[Path]:
    if not isinstance(values, Iterable):
        raise LapsTypeError(
            _check.message(operation, f"{argument} has the wrong type", "paths", _check.name_of(values))
        )
    return [_path(operation, f"{argument}[{n}]", value) for n, value in enumerate(values)]
