"""What a file is that was taken for one of ``torch.save``, told by its bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

from .. import _check
from ..data.tar_files import compression_of
from ..errors import LapsValueError

__all__ = ["refuse_other_kinds"]

EXPECTED = "a file of torch.save"
# What files begin with.
IMAGES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF"}
LFS_POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"
TAR, TAR_PLACE = b"ustar", 257
LOOKED_AT = 512
# A pickle without its tensors. Those of the published code have a tenth of a megabyte, with Adam's state less
# than one.
MOST_PICKLE = 2**24


def refuse_other_kinds(operation: str, path: Path) -> None:
    """Refuse what no reader of checkpoints should be given.

    Raises:
        LapsValueError: naming the file: it is of another kind, which is named; or a zip file whose entries
            are compressed, as those of `torch.save` never are, overlap, or have too large a pickle.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(LOOKED_AT)
    kind = _kind(start, path.stat().st_size)
    if kind is not None:
        raise LapsValueError(_check.message(operation, f"{path} is {kind}", EXPECTED))
    if start.startswith(ZIP):
        _check_zip(operation, path)


def _kind(start: bytes, size: int) -> str | None:
    """What these first bytes are of, if of no checkpoint."""
    if not start:
        return "empty"
    if start.startswith(LFS_POINTER):
        return "a pointer of Git LFS: git lfs pull gets the file itself"
    for magic, name in IMAGES.items():
        if start.startswith(magic):
            return f"an image ({name})"
    compression = compression_of(start)
    if compression is not None:
        return f"compressed by {compression}"
    if start[TAR_PLACE:].startswith(TAR):
        return "an old tar file"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header <= size - 8:
        return "a safetensors file: its name has to end in .safetensors"
    # The end may be in the midst of a letter.
    text = start.decode("utf-8", errors="ignore").strip()
    if len(text.encode()) >= len(start.strip()) - 3 and text and (text.isprintable() or _is_lines(text)):
        page = text.lower().startswith(("<!doctype html", "<html", "<head", "<?xml"))
        return "a web page: the download went wrong" if page else "a text file"
    return None


def _is_lines(text: str) -> bool:
    return all(line.expandtabs().isprintable() for line in text.splitlines())


def _check_zip(operation: str, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # What zipfile raises on damaged files is not all its own.
    except Exception as error:
        raise LapsValueError(
            _check.message(operation, f"{path} cannot be read", EXPECTED, f"a damaged zip file: {error}")
        ) from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise LapsValueError(_check.message(operation, f"{path} is a TorchScript archive", EXPECTED))
    if "data.pkl" not in names:
        raise LapsValueError(_check.message(operation, f"{path} is a zip file of something else", EXPECTED))
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        what = f"{path} has compressed entries, which torch.save does not make"
        raise LapsValueError(_check.message(operation, what, EXPECTED, compressed[0]))
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise LapsValueError(_check.message(operation, f"{path} has entries that overlap", EXPECTED))
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > MOST_PICKLE:
            what = f"{path}: {entry.filename} is too large"
            raise LapsValueError(
                _check.message(operation, what, f"at most {MOST_PICKLE} bytes", entry.file_size)
            )
