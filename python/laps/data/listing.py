"""One split as its files state it, and the step from there to images that exist on the disk."""

from __future__ import annotations

import os
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import _check
from ..errors import LapsValueError
from .containers import Presence, container_of
from .records import RetrievalData
from .regions import REGIONS_END

# Where the common archives of photographs unpack to, beside the annotations.
KNOWN_FOLDERS = {"f30k": "flickr30k-images", "flickr30k": "flickr30k-images", "coco": "coco-images"}

# How many of the things left out a warning names.
NAMED = 3

# Unicode's categories of what leaves no mark on paper by itself, and the fillers that count as letters.
BLANK_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}
BLANK_LETTERS = set("\u115f\u1160\u2800\u3164\uffa0")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: str.strip leaves zero-width spaces and their like."""
    return all(unicodedata.category(c) in BLANK_CATEGORIES or c in BLANK_LETTERS for c in text)


@dataclass
class Listing:
    """One split, with nothing looked up on the disk and nothing refused yet: `check` reads this too.

    Attributes:
        name: for messages, for example ``"dataset.json/test"``.
        place: where captions stand, with ``{}`` for `lines`, for example ``"pairs.csv:{}"``.
        image_folders: where the image files may be, best guess first.
        files: image i, relative to one of these folders, each once: "./a.jpg" and "a.jpg" are one image.
        captions, caption_to_image, lines: caption t, its image, and its line or entry (or all of its place).
        content: of the files, for messages: "image" or "region".
        faults: what could not be taken, each with its place: a caption that is no text, a sample of a shard.
    """

    name: str
    place: str
    image_folders: list[Path]
    files: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    caption_to_image: list[int] = field(default_factory=list)
    lines: list[int | str] = field(default_factory=list)
    content: str = "image"
    faults: list[str] = field(default_factory=list)
    _index: dict[str, int] = field(default_factory=dict)

    def add_image(self, file: str) -> int:
        """The image's number; a file that is named again, "./" in front or not, is the same image."""
        file = os.path.normpath(file)
        index = self._index.setdefault(file, len(self.files))
        if index == len(self.files):
            self.files.append(file)
        return index

    def add_member(self, path: Path) -> int:
        """The number of an image inside of a file, which is another one than all before."""
        self.files.append(str(path))
        return len(self.files) - 1

    def add_caption(self, image: int, caption: str, line: int | str) -> None:
        """Take a caption. Half of a surrogate pair, which JSON can hold and a text cannot, is a fault."""
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            place = self.place.replace("{}", str(line))
            got = f"{caption!r}: {error.reason}"
            self.faults.append(_check.message(place, "the caption is no text", "valid Unicode", got))
            return
        self.captions.append(caption.strip())
        self.caption_to_image.append(image)
        self.lines.append(line)

    def place_of(self, caption: int) -> str:
        """Where caption t stands, for messages."""
        return self.place.replace("{}", str(self.lines[caption]))

    def folder(self, images: Path | None) -> Path | None:
        """Where the image files are: `images`, or the first likely folder, if it holds any of them."""
        folders = self.image_folders if images is None else [images]
        there = (f for f in folders if f.is_dir() and any(_is_there(f / file) for file in self.files))
        return next(there, None)

    def paths(self, operation: str, images: Path | None) -> list[Path]:
        """The path of each image in `folder`; LapsValueError if there is none."""
        folders = self.image_folders if images is None else [images]
        if images is not None and not images.is_dir():
            raise LapsValueError(_check.message(operation, f"images {images} is missing", "a folder"))
        folder = self.folder(images)
        if folder is not None:
            return [folder / file for file in self.files]
        looked = ", ".join(str(folder) for folder in folders)
        otherwise = " (or a model of pixels for images)" if self.content == "region" else ""
        raise LapsValueError(
            _check.message(
                operation,
                f"no {self.content} of {self.name} was found, for example {self.files[0]}",
                f"the folder of the {self.content} files, given as images=...{otherwise}",
                f"none of them in {looked}",
            )
            if self.files
            else _check.message(operation, f"{self.name} lists no image", "at least one")
        )

    def accept_faults(self, operation: str, on_error: str) -> None:
        """Raise the first fault as LapsValueError, or, with "skip", warn of all of them once."""
        if not self.faults:
            return
        if on_error == "raise":
            more = f"; {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
            raise LapsValueError(f"{operation}: {self.faults[0]}{more}")
        shown = "; ".join(self.faults[:NAMED]) + ("; ..." if len(self.faults) > NAMED else "")
        warnings.warn(f"{operation}: {self.name}: left out {len(self.faults)}: {shown}", stacklevel=4)

    def resolve(self, operation: str, images: Path | None, on_missing: str, on_empty: str) -> RetrievalData:
        """The split as data. Raises LapsValueError for an empty caption or a missing file, if asked."""
        for caption, text in enumerate(self.captions):
            if on_empty == "raise" and is_blank(text):
                raise LapsValueError(
                    _check.message(operation, f"{self.place_of(caption)} has an empty caption", "text")
                )
        paths = self.paths(operation, images)
        if on_missing == "raise":
            self._refuse_missing(operation, paths)
        return RetrievalData(paths, self.captions, np.array(self.caption_to_image, np.int64), self.name)

    def _refuse_missing(self, operation: str, paths: list[Path]) -> None:
        missing = missing_files(paths)
        if not missing:
            return
        wanted = missing[0]
        place = next(
            (self.place_of(t) for t, i in enumerate(self.caption_to_image) if i == wanted), self.name
        )
        raise LapsValueError(
            _check.message(
                operation,
                f"{place} names {paths[wanted]}, which is missing",
                'every image file, or on_missing="keep"',
                f"{len(missing)} of {len(paths)} missing",
            )
        )


def _is_there(path: Path) -> bool:
    """Whether this is a file, a row of a file of regions, or an image inside of a container."""
    container = container_of(path)
    if container is not None:
        return container in Presence()
    return path.is_file() or (path.parent.name.endswith(REGIONS_END) and path.parent.is_file())


def missing_files(paths: list[Path]) -> list[int]:
    """Which of the files are missing. One listing per folder: asking per file is slow on network disks."""
    rows = {path.parent for path in paths if path.parent.name.endswith(REGIONS_END)}
    whole = {parent: parent.is_file() for parent in rows}
    present: dict[str, set[str]] = {}
    contained = Presence()
    missing = []
    for i, path in enumerate(paths):
        if path.parent in whole:
            missing += [] if whole[path.parent] else [i]
            continue
        container = container_of(path)
        if container is not None:
            missing += [] if container in contained else [i]
            continue
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in present[folder]:
            missing.append(i)
    return missing


def likely_folders(beside: Path, *names: str) -> list[Path]:
    """Where the images of a file in the folder `beside` may be, given the data set's names."""
    folders = [beside / "images"]
    for name in names:
        folders += [beside / name, beside / f"{name}-images"]
        if name in KNOWN_FOLDERS:
            folders += [beside / KNOWN_FOLDERS[name], beside.parent / KNOWN_FOLDERS[name]]
    return list(dict.fromkeys([*folders, beside.parent / "images", beside]))
