"""The report's pictures: patches and heat maps as PNG, learning curves as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ScalarT = TypeVar("ScalarT", bound=np.generic)

__all__ = ["curves", "file_uri", "heat_map", "kept_patches", "png_uri"]

# Pixels: three times a scene, so that its patches have sharp edges on any screen.
SIDE = 288
# Orange of Okabe and Ito's palette, told apart from grey under every form of colour blindness.
HEAT = np.array([230.0, 159.0, 0.0])


def file_uri(path: Path) -> str:
    """A JPEG file as it is, as a data URI."""
    return _uri("jpeg", path.read_bytes())


def png_uri(image: Image.Image) -> str:
    """An image as a data URI, without loss."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return _uri("png", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def kept_patches(image: Image.Image, kept: NDArray[np.bool_]) -> Image.Image:
    """The image with every patch that is not in the (G, G) mask turned to a dark grey."""
    pixels = _enlarged(image)
    grey = np.broadcast_to(0.35 * pixels.mean(-1, keepdims=True) + 20, pixels.shape)
    return _image(np.where(_on_pixels(kept)[..., None], pixels, grey))


def heat_map(image: Image.Image, weights: NDArray[np.float32]) -> Image.Image:
    """The image in grey; a patch is the more orange the nearer its weight, of (G, G), is to the largest."""
    pixels = _enlarged(image)
    grey = np.broadcast_to(0.7 * pixels.mean(-1, keepdims=True), pixels.shape)
    largest = float(weights.max())
    share = _on_pixels(weights / largest if largest > 0 else weights)[..., None]
    return _image((1 - 0.75 * share) * grey + 0.75 * share * HEAT)


def _enlarged(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)


def _on_pixels(grid: NDArray[ScalarT]) -> NDArray[ScalarT]:
    """Values of (G, G) patches as values of pixels, whether or not G divides their number."""
    patch = np.arange(SIDE) * len(grid) // SIDE
    return grid[np.ix_(patch, patch)]


def _image(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


# ---- curves


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
