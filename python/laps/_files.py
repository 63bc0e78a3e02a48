"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed.

Whatever interrupts a write (an exception, a full disk, SIGKILL, a power cut), what stood at the path before
is still there and complete. A process that is killed leaves its temporary file or folder behind; the next
write to the same path removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import _check
from .errors import LapsValueError

__all__ = ["atomic_folder", "atomic_path", "recover_folder", "require_writable", "write_atomically"]

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Replace the file at `path` by `data` (text is written as UTF-8); see :func:`atomic_path`.

    What is no regular file (``/dev/stdout``, a pipe) is written to as it is.

    Returns:
        `path`, as a Path.

    Raises:
        OSError: naming `path`: no space, no permission. The old file is untouched.
        LapsValueError: `path` is a folder.

    Example:
        >>> import tempfile
        >>> from laps._files import write_atomically
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(folder + "/results/a.txt", "done").read_text()
        'done'
    """
    content = data.encode() if isinstance(data, str) else data
    if _is_stream(path):
        Path(path).write_bytes(content)
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return Path(path)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out now whether :func:`write_atomically` could write to `path`: a file beside it comes and goes.

    Missing parent folders are made, as they would be then.

    Raises:
        OSError, LapsValueError: what writing would raise.
    """
    if _is_stream(path):
        # Not opened: the reader of a pipe would see its end.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    else:
        with _temporary(_target(path), path, folder=False):
            pass


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether something other than a regular file or a folder is there: to replace it would destroy it."""
    # /dev/stdout may lead to a regular file, which others are writing to.
    inside = os.path.abspath(path).startswith(("/dev/", "/proc/")) and not os.path.isdir(path)
    return os.path.exists(path) and (inside or not (os.path.isfile(path) or os.path.isdir(path)))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block that file replaces the one at `path`.

    Missing parent folders are made. A symbolic link is followed, and an existing file's permission bits are
    kept. If the block raises, the temporary file is removed, nothing is replaced, and the error goes on.

    Raises:
        OSError: as the block raises it; where it names no file or the temporary one, it names `path` instead.
        LapsValueError: `path` is a folder, a device or a pipe, or the block left no file.
    """
    target = _target(path)
    if _is_stream(path):
        raise LapsValueError(_check.message("atomic_path", f"{path} is no regular file", "a file's path"))
    with _temporary(target, path, folder=False) as temporary:
        yield temporary
        if not temporary.is_file():
            raise LapsValueError(_check.message("atomic_path", f"{path} was not written", "a file"))
        if target.exists():
            shutil.copymode(target, temporary)
        _sync(temporary)
        os.replace(temporary, target)
    _sync(target.parent)


def _target(path: str | os.PathLike[str]) -> Path:
    """The file itself, where `path` is a symbolic link. Raises LapsValueError for a folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise LapsValueError(_check.message("atomic_path", f"{path} is a folder", "a file's path"))
    return target


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; at the end of the block it takes the place of `path`.

    Linux exchanges the two in one step. Where the file system cannot, the old folder is first renamed aside
    and removed last; a process killed between these two renames leaves nothing at `path`, and
    :func:`recover_folder`, which every later call begins with, puts the old one back.

    Raises:
        OSError: as the block raises it; where it names no file, it names `path`.
        LapsValueError: `path` is a file.
    """
    target = Path(os.path.realpath(path))
    if target.is_file():
        raise LapsValueError(_check.message("atomic_folder", f"{path} is a file", "a folder's path"))
    recover_folder(target)
    with _temporary(target, path, folder=True) as temporary:
        yield temporary
        for parent, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(parent, name))
            _sync(Path(parent))
        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            _replace_in_two_steps(temporary, target)
        _sync(target.parent)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Put back the folder at `path` if a killed :func:`atomic_folder` had moved it aside; else do nothing.

    To be called before such a folder is read.
    """
    target = Path(os.path.realpath(path))
    aside = _aside(target)
    if aside.exists() and not target.exists():
        os.rename(aside, target)


# ---- the temporary file or folder


@contextlib.contextmanager
def _temporary(target: Path, path: str | os.PathLike[str], *, folder: bool) -> Iterator[Path]:
    """A new file or folder beside `target`, removed at the end if it is still there.

    The lock tells a later call whether its owner still lives; the system drops it with the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        else:
            # Not tempfile: its files are readable by their owner only, and so would be the result.
            temporary.touch(exist_ok=False)
        with _locked(temporary):
            yield temporary
    except OSError as error:
        hidden = str(temporary)
        named = hidden if error.filename is None else os.fspath(error.filename)
        if not isinstance(named, str) or not named.startswith(hidden):
            raise
        # Anew and not changed: a second file name, once set, is printed even if it is None.
        raise OSError(error.errno, error.strerror, str(path) + named.removeprefix(hidden)) from error
    finally:
        _remove(temporary)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # A file system without locks (some network ones) only loses the removal of abandoned files.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of `target` left: temporary names on which nobody holds the lock."""
    prefix = f".{target.name}."
    for entry in target.parent.iterdir():
        token = entry.name.removeprefix(prefix).removesuffix(".tmp")
        if entry.name != f"{prefix}{token}.tmp" or len(token) != 8:
            continue
        # It may vanish meanwhile, or its owner holds the lock: both are OSErrors.
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(entry)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- replacing a folder


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system does not offer it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    aside = _aside(target)
    _remove(aside)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        recover_folder(target)
        raise
    _remove(aside)
