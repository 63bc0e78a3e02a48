"""Small pictures in a terminal with 24-bit colours: two pixels in each letter's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .page import thumbnail

__all__ = ["picture_lines"]

# Pixels of the longer side: at most so many columns, and half as many lines.
SIDE = 24


def picture_lines(path: Path) -> list[str]:
    """An image as lines of upper half blocks; none for a file that cannot be read.

    Example:
        >>> import pathlib, tempfile, PIL.Image
        >>> from laps.index.terminal import picture_lines
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "red.png"
        >>> PIL.Image.new("RGB", (64, 32), "red").save(path)
        >>> len(picture_lines(path))
        6
    """
    picture = thumbnail(path, SIDE)
    if picture is None:
        return []
    pixels = np.asarray(picture)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
    return [
        "".join(
            f"\x1b[38;2;{t[0]};{t[1]};{t[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for t, b in zip(top.tolist(), bottom.tolist(), strict=True)
        )
        + "\x1b[0m"
        for top, bottom in zip(pixels[::2], pixels[1::2], strict=True)
    ]
