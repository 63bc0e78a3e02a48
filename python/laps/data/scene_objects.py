"""One object of a synthetic scene: its attributes, its place, and its outline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "texture": TEXTURES}

# Of the disc of about the same area, in shares of the image's side. At 96 pixels a small object is 16 pixels
# wide: one patch of a ViT-B/16.
RADIUS = {"small": 0.085, "large": 0.145}


def _polygon(angles: list[float], radii: list[float]) -> list[Point]:
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]


def _regular(corners: int, radius: float, turn: float = 0.0) -> list[Point]:
    return _polygon([math.tau * (i + turn) / corners for i in range(corners)], [radius] * corners)


def _heart() -> list[Point]:
    steps = [math.tau * i / 40 for i in range(40)]
    return [
        (
            1.1 * math.sin(t) ** 3,
            -0.075 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 0.1,
        )
        for t in steps
    ]


# Outlines around the origin, of about the area of the unit disc, y downwards.
OUTLINES: dict[str, list[Point]] = {
    "circle": _regular(48, 1.0),
    "square": _regular(4, 1.25, 0.5),
    "triangle": [(x, y + 0.22) for x, y in _regular(3, 1.36)],
    "star": _polygon([math.pi * i / 5 for i in range(10)], [1.32, 0.6] * 5),
    "cross": [
        (x * sx, y * sy)
        for sx, sy, corner in ((1, -1, 1), (1, 1, -1), (-1, 1, 1), (-1, -1, -1))
        for x, y in [(0.4, 1.15), (0.4, 0.4), (1.15, 0.4)][::corner]
    ],
    "diamond": [(0.0, -1.35), (0.98, 0.0), (0.0, 1.35), (-0.98, 0.0)],
    "heart": _heart(),
    "ring": _regular(48, 1.08),
}
HOLE = _regular(36, 0.46)


@dataclass(frozen=True)
class SceneObject:
    """One object: four attributes that captions speak of, and a place with a little variety."""

    shape: str
    color: str
    size: str
    texture: str
    x: float  # the centre, in shares of the image's side, y downwards
    y: float
    angle: float  # radians
    stretch: float  # of the radius

    @property
    def radius(self) -> float:
        """In shares of the image's side."""
        return RADIUS[self.size] * self.stretch

    @cached_property
    def loops(self) -> list[list[Point]]:
        """The outline, and after it that of a ring's hole, in shares of the image's side."""
        sine, cosine = math.sin(self.angle) * self.radius, math.cos(self.angle) * self.radius
        return [
            [(self.x + cosine * x - sine * y, self.y + sine * x + cosine * y) for x, y in loop]
            for loop in [OUTLINES[self.shape], *([HOLE] if self.shape == "ring" else [])]
        ]

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) around the outline, in shares of the image's side."""
        xs, ys = zip(*self.loops[0], strict=True)
        return min(xs), min(ys), max(xs), max(ys)


Scene = tuple[SceneObject, ...]
