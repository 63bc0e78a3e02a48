"""Tar files of images and captions: their members in order, what each of them is, and where an image lies."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .. import _check
from ..errors import LapsValueError

__all__ = [
    "TAR_END",
    "Member",
    "TarIndex",
    "compression_of",
    "index_of",
    "is_compressed_tar",
    "known_index",
    "members_of",
    "read_image",
    "remember",
]

TAR_END = ".tar"
COMPRESSED_ENDS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# What a file of each compression begins with.
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXT_SUFFIXES = ("txt", "json")
# The most bytes of a member. A header may claim any number, and a sparse file has it at no cost.
MOST = {"image": 2**28, "text": 2**24}


def is_compressed_tar(path: Path) -> bool:
    """Whether the name is that of a compressed tar file."""
    return path.name.lower().endswith(COMPRESSED_ENDS)


def compression_of(start: bytes) -> str | None:
    """What a file with these first bytes is compressed by, or None."""
    return next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)


@dataclass(frozen=True)
class Member:
    """An image or a text of a tar file.

    Attributes:
        name: in the file, without "./" in front.
        key: what the members of a sample share.
        kind: "image" or "text".
        suffix: for example "txt".
        offset, size: where its bytes are.
        read: them, while the file's iterator stands at this member.
    """

    name: str
    key: str
    kind: str
    suffix: str
    offset: int
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class TarIndex:
    """Where the images of a tar file are: offset and size by name; `stamp` tells whether it has changed."""

    stamp: tuple[int, int]
    images: dict[str, tuple[int, int]]


def members_of(
    operation: str,
    file: Path,
    *,
    stream: bool = False,
    on_fault: Callable[[LapsValueError], None] | None = None,
) -> Iterator[Member]:
    """The images and texts of a tar file, in its order; other members are passed over.

    Args:
        operation: for messages.
        file: the tar file; with `stream` any file that can be read once, a pipe or a compressed one too.
        stream: read it front to back, without a step back.
        on_fault: what is told of a member that cannot be taken, which is then left out; None raises.

    Raises:
        LapsValueError: a file that is missing, damaged or ends early (with the last whole member), a name
            that leads out of the file or occurs twice, a member that is sparse or too large.
    """
    last = ""
    seen: set[str] = set()
    try:
        with (
            file.open("rb") as raw,
            tarfile.open(fileobj=raw, mode="r|*" if stream else "r:", tarinfo=_Header) as archive,
        ):
            for header in archive:
                # Else the archive keeps every header: a shard has many, and a stream has no end.
                archive.members = []  # type: ignore[attr-defined]
                try:
                    member = _member(operation, file, archive, header)
                    if member is not None and member.name in seen:
                        what = f"{file} has the member {member.name} twice"
                        raise LapsValueError(_check.message(operation, what, "each name once"))
                except LapsValueError as fault:
                    if on_fault is None:
                        raise
                    on_fault(fault)
                    member = None
                if member is not None:
                    seen.add(member.name)
                    yield member
                last = f" after {header.name!r}"
    except LapsValueError:
        raise
    # Compression has errors of its own, and damaged headers raise almost any.
    except Exception as error:
        compression = None if stream else _compression(file)
        if compression is not None:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{file} is compressed by {compression}, and can only be streamed",
                    "a tar file without compression, or laps train --epoch-length (CaptionStream)",
                )
            ) from error
        raise _damaged(operation, f"{file} cannot be read{last}", error) from error


def _compression(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return compression_of(stream.read(8))
    except OSError:
        return None


def _damaged(operation: str, what: str, error: Exception) -> LapsValueError:
    reason = " ".join(str(error).split()) or _check.name_of(error)
    return LapsValueError(_check.message(operation, what, "a whole tar file", reason))


class _Header(tarfile.TarInfo):
    """A member's header. Of one that is damaged or ends early, tarfile thinks that the archive ends there."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, at byte {archive.offset}") from None


def _member(operation: str, file: Path, archive: tarfile.TarFile, header: tarfile.TarInfo) -> Member | None:
    if not header.isreg():
        return None
    name = _name(operation, file, header.name)
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    kind = "image" if suffix in IMAGE_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None
    # Nothing before the dot: a hidden file, such as macOS leaves beside others.
    if kind is None or not stem:
        return None
    if header.sparse is not None or header.size > MOST[kind]:
        raise LapsValueError(
            _check.message(
                operation,
                f"{file}/{name} is sparse or too large",
                f"at most {MOST[kind]} bytes",
                f"{header.size} bytes",
            )
        )

    def read() -> bytes:
        try:
            content = archive.extractfile(header)
            return b"" if content is None else content.read()
        except Exception as error:
            raise _damaged(operation, f"{file}/{name} cannot be read", error) from error

    key = f"{folder}/{stem}" if folder else stem
    return Member(name, key, kind, suffix, header.offset_data, header.size, read)


def _name(operation: str, file: Path, name: str) -> str:
    """The name as the end of a path: joined to the file's own, it must not lead elsewhere."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise LapsValueError(
            _check.message(operation, f"{file} has the member {name!r}", "a name of UTF-8")
        ) from None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise LapsValueError(
            _check.message(
                operation,
                f"{file} has the member {name!r}",
                "a name inside of the file: no / in front, no ..",
            )
        )
    return "/".join(parts)


# ---- where images lie

# By file. A process that is forked has what this one has; to a spawned one it is carried: see containers.py.
_indices: dict[str, TarIndex] = {}


def index_of(operation: str, file: Path) -> TarIndex:
    """Where the images of a tar file are. Its headers are read once, and again if it has changed.

    Raises:
        LapsValueError: as `members_of`.
    """
    known = known_index(file)
    stamp = _stamp(operation, file)
    if known is None or known.stamp != stamp:
        images = {m.name: (m.offset, m.size) for m in members_of(operation, file) if m.kind == "image"}
        known = TarIndex(stamp, images)
        remember(file, known)
    return known


def known_index(file: Path) -> TarIndex | None:
    """The index of a file, if this process has read or been given it."""
    return _indices.get(os.path.abspath(file))


def remember(file: Path, index: TarIndex) -> None:
    """Keep the index of a file for `index_of`."""
    _indices[os.path.abspath(file)] = index


def read_image(operation: str, file: Path, name: str) -> bytes:
    """The bytes of an image. Any number of threads and processes may read at once.

    Raises:
        LapsValueError: no such member, or a file that is missing or damaged.
    """
    place = index_of(operation, file).images.get(name)
    if place is None:
        raise LapsValueError(
            _check.message(operation, f"{file}/{name} is missing", f"a member of {file.name}")
        )
    offset, size = place
    # Opened for each image, as other image files are: threads and processes share no position in it.
    with _opened(operation, file) as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise LapsValueError(
            _check.message(operation, f"{file}/{name} ends early", f"{size} bytes", len(content))
        )
    return content


def _stamp(operation: str, file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise LapsValueError(
            _check.message(operation, f"{file} cannot be read", "a tar file", error.strerror)
        ) from error
    return status.st_mtime_ns, status.st_size


def _opened(operation: str, file: Path) -> IO[bytes]:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise LapsValueError(
            _check.message(operation, f"{file} cannot be read", "a tar file", error.strerror)
        ) from error
