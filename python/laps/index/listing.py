"""The image files of a folder, as they are on the disk now."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import _check
from ..data import ImageTransform, RegionTransform
from ..errors import LapsValueError

__all__ = ["ListedImage", "Listing", "is_gone", "list_files", "list_folder"]

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
        folder: the absolute path of the folder that they are below; None for single files.
        images: the files.
        errors: what the system refused, with the path.
    """

    folder: str | None = None
    images: list[ListedImage] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def require_images(self, operation: str, source: object) -> None:
        """Raise LapsValueError, naming the source, if there is none."""
        if not self.images:
            got = f"{len(self.errors)} that cannot be read" if self.errors else None
            raise LapsValueError(
                _check.message(operation, f"{source} has no image files", "at least one", got)
            )


def list_folder(folder: Path, transform: ImageTransform | RegionTransform) -> Listing:
    """All image files below a folder, by their suffix; of a model of regions the ``.npz`` files.

    Links to folders are followed, each folder is visited once, by its own path if that is below here. Names
    that begin with a dot are left out.

    Raises:
        LapsValueError: no such folder, or a file.
    """
    suffixes = REGIONS if isinstance(transform, RegionTransform) else PHOTOS
    top = os.path.abspath(folder)
    if not os.path.isdir(top):
        state = "is a file" if os.path.exists(top) else "is missing"
        raise LapsValueError(_check.message("Index.add", f"{folder} {state}", "a folder of images"))
    found = Listing(top)
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


def is_gone(path: str) -> bool:
    """Whether there is certainly nothing at an absolute path any more, not even a link that leads nowhere.

    False where the system does not tell, and below a link to a folder that is not there: its disk may be one
    that is not mounted.
    """
    above = path
    while True:
        try:
            status = os.lstat(above)
        except (FileNotFoundError, NotADirectoryError):
            above = os.path.dirname(above)
        except OSError:
            return False
        else:
            return above != path and (not stat.S_ISLNK(status.st_mode) or os.path.exists(above))


def _walk(folder: str, visited: set[tuple[int, int]], found: Listing) -> Iterator[os.DirEntry[str]]:
    """The files below a folder. A stack and no recursion: a folder may be deeper than Python's."""
    waiting, links = [folder], list[str]()
    while waiting or links:
        # Links last: a new one must not rename what is here without it.
        here = (waiting or links).pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            found.errors.append(f"{here}: {error.strerror}")
            continue
        folders: list[str] = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_file():
                    yield entry
            except OSError as error:
                # A link to itself leads nowhere, as one does whose target is missing.
                if error.errno != errno.ELOOP:
                    found.errors.append(f"{entry.path}: {error.strerror}")
        waiting += reversed(folders)


def _add(found: Listing, path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        found.errors.append(f"{path}: {error.strerror}")
        return
    found.images.append(ListedImage(path, status.st_size, status.st_mtime_ns))
