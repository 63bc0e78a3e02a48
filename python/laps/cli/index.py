"""``laps encode``, ``laps search`` and ``laps index``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _check
from .._index_options import CANDIDATE_BYTES, CANDIDATES, ON_ERROR, STORAGES
from ..errors import LapsValueError
from ._options import add_amp, add_batch_size, add_device, add_num_workers, add_quiet
from ._ranks import on_ranks

if TYPE_CHECKING:
    from ..distributed import Ranks
    from ..index import Index
    from ..index.listing import Listing
    from ..model import LAPS

__all__ = ["add_encode", "add_index", "add_search"]


def add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="DIR", help="folder of images, with all below it")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="INDEX", help="the index's folder")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="folder or hub id; needed for a new index, which keeps a copy"
    )
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        help="what features are kept in, of a new index (default: float16)",
    )
    parser.add_argument("--prune", action="store_true", help="also delete images of DIR that are gone")
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="skip",
        help="what to do with images that cannot be read (default: skip)",
    )
    add_batch_size(parser, "images", 32)
    add_num_workers(parser)
    add_device(parser)
    add_amp(parser)
    add_quiet(parser)
    parser.set_defaults(command=on_ranks(_encode))


def _encode(ranks: Ranks, options: argparse.Namespace) -> int:
    from .._device import choose_device
    from ..index import Index
    from ..model import LAPS

    device = choose_device("laps encode", options.device)
    given: LAPS | None = None
    if options.model is not None:
        given = ranks.together(lambda: LAPS.from_pretrained(options.model).to(device))
    # The others open what rank 0 has made, and leave the listing to it.
    new = ranks.together(lambda: _new(options, given) if ranks.main else None)
    index = ranks.together(
        lambda: new.index if new else Index.open(options.out, model=given, device=str(device))
    )
    if options.storage not in (None, index.storage):
        expected = f"{index.storage}, or a new index"
        raise LapsValueError(
            _check.message("laps encode", f"{options.out} has another --storage", expected, options.storage)
        )
    done = index.add(
        new.listing if new else options.images,
        prune=options.prune,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        on_error=options.on_error,
        amp=options.amp,
        progress=not options.quiet,
        ranks=ranks,
    )
    if ranks.main:
        print(f"{done}: {len(index)} images, {index.nbytes / 1e6:.1f} MB in {options.out}")
    if not len(index):
        raise LapsValueError(
            _check.message("laps encode", f"{options.out} is empty", f"images in {options.images}", str(done))
        )
    return 0


@dataclass(frozen=True)
class _New:
    """An index that was just made, and what goes into it."""

    index: Index
    listing: Listing


def _new(options: argparse.Namespace, model: LAPS | None) -> _New | None:
    """The index, if it has to be made."""
    from ..index import Index
    from ..index.listing import list_folder
    from ..index.manifest import MANIFEST

    if (options.out / MANIFEST).exists():
        return None
    if model is None:
        raise LapsValueError(
            _check.message("laps encode", f"{options.out} is no index yet", "--model, to make one")
        )
    # Before anything is made: an index without images helps nobody.
    listing = list_folder(options.images, model.transform)
    listing.require_images("laps encode", options.images)
    return _New(Index.create(options.out, model, storage=options.storage or "float16"), listing)


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="a folder that laps encode has made")
    parser.add_argument("query", nargs="*", help="a sentence, in quotes; or several")
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE", help="find what is like this image; repeatable"
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="hits of a query (default: 10)")
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help=f"images that the model's head scores (default: as many as have {CANDIDATE_BYTES >> 20} MiB of "
        f"features, and at least {CANDIDATES})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the images")
    parser.add_argument("--thumbnails", action="store_true", help="draw the images, on a terminal")
    add_device(parser)
    parser.set_defaults(command=_search)


def _search(options: argparse.Namespace) -> int:
    from .._files import require_writable, write_atomically
    from ..index import Index
    from ..index.page import page
    from ..index.terminal import picture_lines

    queries: list[str | Path] = [*options.query, *(options.image or ())]
    if not queries:
        raise LapsValueError(_check.message("laps search", "nothing to search for", "a sentence, or --image"))
    if options.html is not None:
        require_writable(options.html)
    index = Index.open(options.index, device=options.device)
    results = index.search(queries, options.k, candidates=options.candidates)
    if options.html is not None:
        write_atomically(options.html, page(results))
    if options.json:
        print(json.dumps([hits.to_dict() for hits in results], indent=1))
        return 0
    # Its colours are noise anywhere else.
    pictures = options.thumbnails and sys.stdout.isatty()
    for hits in results:
        print(repr(hits) if len(results) > 1 else hits)
        for hit in hits if pictures else ():
            print(f"{hit.rank}", *picture_lines(hit.path), sep="\n")
    if options.html is not None:
        print(f"Wrote {options.html}")
    return 0


def add_index(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="read all of it; status 1 if anything is damaged")
    check.add_argument(
        "--repair", action="store_true", help="leave damaged images out; laps encode adds them again"
    )
    compact = commands.add_parser("compact", help="free what deleted images take, join small shards")
    delete = commands.add_parser("delete", help="take images out")
    for command, function in (
        (check, _index_check),
        (compact, _index_compact),
        (delete, _index_delete),
    ):
        command.add_argument("index", type=Path, metavar="INDEX", help="a folder that laps encode has made")
        command.set_defaults(command=function)
    for command in (check, compact):
        add_quiet(command)
    delete.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="image files or folders of them")


def _index_check(options: argparse.Namespace) -> int:
    from ..index import Index

    checked = Index.check(options.index, repair=options.repair, progress=not options.quiet)
    print(checked)
    return 0 if checked.ok else 1


def _index_compact(options: argparse.Namespace) -> int:
    from ..index import Index

    index = Index.open(options.index)
    print(f"freed {index.compact(progress=not options.quiet) / 1e6:.1f} MB; {len(index)} images")
    return 0


def _index_delete(options: argparse.Namespace) -> int:
    from ..index import Index

    index = Index.open(options.index)
    print(f"deleted {index.delete(options.paths)}; {len(index)} images")
    return 0
