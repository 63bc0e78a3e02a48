"""Draws a scene with Pillow: a varied background, faint clutter, textured objects with clean edges."""

from __future__ import annotations

import itertools
import math
import random

from PIL import Image, ImageChops, ImageDraw

from .scene_objects import Scene, SceneObject

Color = tuple[int, int, int]

# Told apart at 16 pixels, and lighter or more saturated than every background.
PAINT: dict[str, Color] = {
    "red": (214, 34, 42),
    "orange": (250, 134, 16),
    "yellow": (252, 221, 44),
    "green": (42, 158, 62),
    "cyan": (52, 208, 222),
    "blue": (40, 76, 214),
    "purple": (126, 48, 168),
    "pink": (244, 100, 176),
}
# Two tints each, blended in soft clouds.
BACKGROUNDS: tuple[tuple[Color, Color], ...] = (
    ((238, 233, 222), (222, 214, 200)),
    ((224, 230, 234), (204, 213, 220)),
    ((230, 226, 232), (213, 206, 216)),
    ((224, 231, 222), (204, 214, 202)),
    ((212, 212, 210), (190, 190, 190)),
    ((66, 70, 76), (48, 51, 57)),
    ((74, 66, 62), (54, 48, 46)),
    ((56, 68, 66), (42, 52, 52)),
)
SUPERSAMPLING = 3
GRAIN = 9


def draw(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB image of (size, size) pixels; `rng` decides on background and clutter only."""
    light, dark = rng.choice(BACKGROUNDS)
    # Images of a group share objects, not backgrounds: nothing but the objects tells what an image shows.
    canvas = _background(light, dark, size, rng)
    canvas = canvas.resize((size * SUPERSAMPLING, size * SUPERSAMPLING), Image.Resampling.NEAREST)
    _scribble(canvas, dark, rng)
    for each in scene:
        _paint(canvas, each)
    return canvas.reduce(SUPERSAMPLING)


# ---- background


def _background(light: Color, dark: Color, size: int, rng: random.Random) -> Image.Image:
    clouds = Image.frombytes("L", (4, 4), rng.randbytes(16)).resize((size, size), Image.Resampling.BICUBIC)
    plain = Image.composite(
        Image.new("RGB", (size, size), light), Image.new("RGB", (size, size), dark), clouds
    )
    noise = Image.frombytes("L", (size, size), rng.randbytes(size * size)).point(
        lambda value: value * GRAIN // 255
    )
    return ImageChops.add(plain, Image.merge("RGB", (noise, noise, noise)), offset=-(GRAIN // 2))


def _scribble(canvas: Image.Image, color: Color, rng: random.Random) -> None:
    """Faint strokes and specks a little darker or lighter than the background."""
    pen, size = ImageDraw.Draw(canvas), canvas.width
    for _ in range(rng.randint(3, 7)):
        shade = rng.choice((-22, -14, 16, 26))
        ink = (color[0] + shade, color[1] + shade, color[2] + shade)
        x, y, angle = rng.random() * size, rng.random() * size, rng.random() * math.tau
        bend, points = rng.uniform(-0.5, 0.5), []
        for _ in range(rng.randint(3, 7)):
            points.append((x, y))
            x, y, angle = x + 0.06 * size * math.cos(angle), y + 0.06 * size * math.sin(angle), angle + bend
        pen.line(points, fill=ink, width=max(1, round(size * rng.uniform(0.006, 0.014))), joint="curve")
    for _ in range(rng.randint(4, 12)):
        x, y, radius = rng.random() * size, rng.random() * size, size * rng.uniform(0.004, 0.01)
        shade = rng.choice((-22, 26))
        pen.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=(color[0] + shade, color[1] + shade, color[2] + shade),
        )


# ---- objects


def _paint(canvas: Image.Image, item: SceneObject) -> None:
    paint = PAINT[item.color]
    pixels = [[(x * canvas.width, y * canvas.width) for x, y in loop] for loop in item.loops]
    left, top = (math.floor(min(point[axis] for point in pixels[0])) for axis in (0, 1))
    right, bottom = (math.ceil(max(point[axis] for point in pixels[0])) + 1 for axis in (0, 1))

    stencil = Image.new("L", (right - left, bottom - top))
    pen = ImageDraw.Draw(stencil)
    for loop, value in zip(pixels, (255, 0), strict=False):
        pen.polygon([(x - left, y - top) for x, y in loop], fill=value)
    filled = Image.new("RGB", stencil.size, paint)
    _texture(filled, item, canvas.width)
    canvas.paste(filled, (left, top), stencil)

    edge = _mix(paint, (0, 0, 0), 0.45)
    pen = ImageDraw.Draw(canvas)
    for loop in pixels:
        pen.line([*loop, *loop[:2]], fill=edge, width=max(2, round(0.011 * canvas.width)), joint="curve")


def _texture(tile: Image.Image, item: SceneObject, canvas_size: int) -> None:
    """Marks over the tile: light ones on dark paint, dark ones on light paint."""
    if item.texture == "plain":
        return
    paint = PAINT[item.color]
    light = 0.3 * paint[0] + 0.59 * paint[1] + 0.11 * paint[2] > 155
    ink = _mix(paint, (20, 20, 30), 0.72) if light else _mix(paint, (255, 255, 255), 0.85)
    # Fewer marks on small objects, or a mark would be thinner than a pixel and a half.
    step = 2 * item.radius * canvas_size / (2.4 if item.size == "small" else 3.4)
    pen, (width, height) = ImageDraw.Draw(tile), tile.size
    rows, columns = math.ceil(height / step) + 1, math.ceil(width / step) + 1
    # A mark at the middle of the tile, and from there every `step`.
    x0, y0 = width / 2 - step * (columns // 2), height / 2 - step * (rows // 2)
    if item.texture == "striped":
        for column in range(-rows, columns + rows):
            low, high = x0 + step * column - height / 2, x0 + step * column + height / 2
            pen.polygon([(low, height), (high, 0), (high + step / 2, 0), (low + step / 2, height)], fill=ink)
        return
    for row, column in itertools.product(range(rows), range(columns)):
        x, y = x0 + step * column, y0 + step * row
        if item.texture == "dotted":
            radius = 0.29 * step
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        else:
            half = step / 2
            pen.rectangle((x, y, x + half - 1, y + half - 1), fill=ink)
            pen.rectangle((x + half, y + half, x + step - 1, y + step - 1), fill=ink)


def _mix(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
