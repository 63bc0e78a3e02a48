"""What this installation of laps is and can do, for bug reports and for choosing a backend."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from . import _cuda, _laps, functional

__all__ = ["Info", "info"]


class Info(Mapping[str, object]):
    """A read-only dictionary that prints as a short report."""

    def __init__(self, entries: Mapping[str, object]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> object:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        width = max(len(key) for key in self._entries)
        rows = (f"{key:<{width}}  {_text(value)}" for key, value in self._entries.items())
        return "\n".join(rows)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value) or "none"
    return str(value)


def info() -> Info:
    """Versions, instruction set, threads and backends of this installation.

    Returns:
        An :class:`Info`: a mapping with the keys ``version``, ``simd`` (the instruction set in use: the
        widest, or the one of ``simd_available`` that the environment variable ``LAPS_SIMD`` names), the
        other entries of the native build, ``torch``, ``numpy``, ``python``, ``platform``, ``threads`` (that
        a call uses now), ``cores``, ``backends`` (name to whether it is available, or why not) and
        ``default_backend``.

    Raises:
        LapsValueError: ``LAPS_SIMD`` names no instruction set that this processor offers, or
            ``LAPS_BACKEND`` no backend.

    Example:
        >>> import laps, torch
        >>> report = laps.info()
        >>> report["backends"]["native"]
        True
    """
    entries: dict[str, object] = {"version": _laps.__version__}
    entries.update(_laps.build_info())
    entries.update(
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        backends={
            "native": True,
            "torch": True,
            "cuda": _cuda.state(),
        },
        default_backend=functional.default_backend("info"),
    )
    return Info(entries)
