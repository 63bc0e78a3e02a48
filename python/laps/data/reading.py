"""Something done with each of many image files: in threads, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["with_each_image"]

T = TypeVar("T")


def with_each_image(
    function: Callable[[Path], T], paths: Sequence[Path], *, threads: int, progress: bool
) -> list[T]:
    """What `function` returns for each path, in order; the bar is shown on a terminal or in a notebook."""
    pool = ThreadPoolExecutor(threads)
    try:
        # Decoding releases the GIL.
        results = pool.map(function, paths)
        return list(
            tqdm(
                results,
                total=len(paths),
                desc="read images",
                unit="image",
                disable=None if progress else True,
            )
        )
    finally:
        # Ctrl-C must not wait for the images that are still queued.
        pool.shutdown(cancel_futures=True)
