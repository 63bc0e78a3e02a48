"""The image files of a folder, as they are on the disk now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import _check
from ..data import ImageTransform, RegionTransform
from ..errors import LapsValueError

__all__ = ["ListedImage", "Listing", "list_files", "list_folder"]

# What photographs are stored as; Pillow opens more, by programs that had better not run on any file.
PHOTOS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".heic",
        ".heif",
    }
)
REGIONS = frozenset({".npz"})


@dataclass(frozen=True)
class ListedImage:
    """A file: its absolute path, size in bytes, and time of its last change in ns."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class Listing:
    """Files, sorted by path, and what could not be looked at, in words.

    Attributes:
        images: the files.
        errors: what the system refused, with the path.
        unseen: folders below which there may be more.
    """

    images: list[ListedImage] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def list_folder(folder: Path, transform: ImageTransform | RegionTransform) -> Listing:
    """All image files below a folder, by their suffix; of a model of regions the ``.npz`` files.

    Links to folders are followed, each folder is visited once. Names that begin with a dot are left out.

    Raises:
        LapsValueError: no such folder.
    """
    suffixes = REGIONS if isinstance(transform, RegionTransform) else PHOTOS
    top = os.path.abspath(folder)
    if not os.path.isdir(top):
        raise LapsValueError(_check.message("Index.add", f"{folder} is missing", "a folder of images"))
    found = Listing()
    for entry in _walk(top, set(), found):
        if os.path.splitext(entry.name)[1].lower() in suffixes:
            _add(found, entry.path)
    found.images.sort(key=lambda image: image.path)
    return found


def list_files(paths: list[Path]) -> Listing:
    """These files, whatever their suffix, each once."""
    found = Listing()
    for path in sorted({os.path.abspath(path) for path in paths}):
        _add(found, path)
    return found


def _walk(folder: str, visited: set[tuple[int, int]], found: Listing) -> Iterator[os.DirEntry[str]]:
    """The files below a folder. A stack and no recursion: a folder may be deeper than Python's."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            found.errors.append(f"{here}: {error.strerror}")
            found.unseen.append(here)
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # False for a link that leads nowhere or to itself.
            if _is(entry.is_dir):
                folders.append(entry.path)
            elif _is(entry.is_file):
                yield entry
        waiting += reversed(folders)


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:
        return False


def _add(found: Listing, path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        found.errors.append(f"{path}: {error.strerror}")
        return
    found.images.append(ListedImage(path, status.st_size, status.st_mtime_ns))
