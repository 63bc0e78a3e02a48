"""The report's pictures: files as they are, learning curves as SVG."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

__all__ = ["curves", "file_uri"]


def file_uri(path: Path) -> str:
    """A JPEG file as it is, as a data URI."""
    return _uri("jpeg", path.read_bytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def curves(title: str, series: Mapping[str, Sequence[float]], *, decimals: int = 0) -> str:
    """Values per epoch as an SVG that takes its colours from the page: a line per name, its points labelled.

    Args:
        title: above the drawing.
        series: values of epochs 1, 2, ... by name; the page styles them as classes ``line-0``, ``line-1``.
        decimals: of the labels.
    """
    width, height, left, right, top, bottom = 360, 220, 34, 34, 34, 26
    values = [value for line in series.values() for value in line]
    low, high = min([0.0, *values]), 1.1 * max([1e-9, *values])
    epochs = max(len(line) for line in series.values())

    def x(epoch: int) -> float:
        return left + (width - left - right) * (epoch / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<text x="{left}" y="16" class="title">{escape(title)}</text>',
        f'<path d="M{left} {top}V{height - bottom}H{width - right}" class="axis"/>',
    ]
    for epoch in range(epochs):
        parts.append(f'<text x="{x(epoch):.1f}" y="{height - 8}" class="tick">{epoch + 1}</text>')
    # The label goes to the side of the line that the other line is not on.
    means = {name: sum(line) / len(line) for name, line in series.items()}
    for number, (name, line) in enumerate(series.items()):
        points = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in enumerate(line))
        parts.append(f'<polyline points="{points}" class="line-{number}"/>')
        offset = -8 if means[name] == max(means.values()) else 17
        for epoch, value in enumerate(line):
            parts.append(f'<circle cx="{x(epoch):.1f}" cy="{y(value):.1f}" r="3" class="dot-{number}"/>')
            at = f'x="{x(epoch):.1f}" y="{y(value) + offset:.1f}"'
            parts.append(f'<text {at} class="tick">{value:.{decimals}f}</text>')
    return "".join([*parts, "</svg>"])
