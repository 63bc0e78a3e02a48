"""Files that this process may not read, even if it is root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# linux/capability.h: the third version of the structures, and what passes over the permissions of files.
VERSION = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """The path's permission bits in the block, which hold for this thread though it be root's.

    Skips the test where root cannot give up what passes over them.
    """
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with _no_override():
            yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def _no_override() -> Iterator[None]:
    """Without the capabilities that permission bits do not stop; they are back after the block."""
    try:
        before = _capabilities()
        # Of the two structures the first has the capabilities 0 to 31.
        _set(before[0].effective & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH), before)
    # The system has no capabilities, or refuses to change them.
    except (AttributeError, OSError) as error:
        if os.geteuid() == 0:
            pytest.skip(f"root cannot give up its rights here: {error}")
        yield
        return
    try:
        yield
    finally:
        _set(before[0].effective, before)


def _capabilities() -> ctypes.Array[_Sets]:
    """Of this thread."""
    sets = (_Sets * 2)()
    _call("capget", sets)
    return sets


def _set(effective: int, others: ctypes.Array[_Sets]) -> None:
    """Change what counts now, and nothing of what may count again later."""
    sets = (_Sets * 2)(*others)
    sets[0].effective = effective
    _call("capset", sets)


def _call(name: str, sets: ctypes.Array[_Sets]) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(ctypes.byref(_Header(VERSION, 0)), sets) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
