"""Draws lots for the synthetic scenes: objects without heavy overlap, and groups of hard distractors.

A group holds images that differ by small edits of one base scene. Every one of them has a sibling with the
same attributes bound to other objects or places, which a bag of attributes cannot tell apart.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import reduce

from .scene_objects import ATTRIBUTES, Scene, SceneObject

GROUP_SIZE = 4
# Of two radii, between centres: outlines reach a third beyond the radius, but only with their tips.
SPACING = 1.13
# Of the image's side, around every object.
MARGIN = 0.01


# ---- edits


@dataclass(frozen=True)
class Swap:
    """Two objects exchange one attribute, or their places."""

    first: int
    second: int
    attribute: str

    def __call__(self, scene: Scene) -> Scene:
        """The scene after the edit."""
        names = ("x", "y") if self.attribute == "position" else (self.attribute,)
        one, other = scene[self.first], scene[self.second]
        objects = list(scene)
        objects[self.first] = replace(one, **{name: getattr(other, name) for name in names})
        objects[self.second] = replace(other, **{name: getattr(one, name) for name in names})
        return tuple(objects)

    def touched(self) -> set[tuple[int, str]]:
        """The (object, attribute) pairs that it may change."""
        names = ATTRIBUTES if self.attribute == "position" else (self.attribute,)
        return {(index, name) for index in (self.first, self.second) for name in names}

    def to_json(self) -> dict[str, object]:
        """What `changed` in dataset.json says of it."""
        return {"kind": "swap", "objects": [self.first, self.second], "attribute": self.attribute}


@dataclass(frozen=True)
class Change:
    """One object gets another value of one attribute."""

    index: int
    attribute: str
    value: str

    def __call__(self, scene: Scene) -> Scene:
        """The scene after the edit."""
        objects = list(scene)
        objects[self.index] = replace(objects[self.index], **{self.attribute: self.value})  # type: ignore[arg-type]
        return tuple(objects)

    def touched(self) -> set[tuple[int, str]]:
        """The (object, attribute) pairs that it may change."""
        return {(self.index, self.attribute)}

    def to_json(self) -> dict[str, object]:
        """What `changed` in dataset.json says of it."""
        return {"kind": "change", "objects": [self.index], "attribute": self.attribute, "to": self.value}


Edit = Swap | Change


def _swaps(scene: Scene) -> list[Swap]:
    """Every swap that shows."""
    edits = []
    for second, other in enumerate(scene):
        for first, one in enumerate(scene[:second]):
            differing = [name for name in ATTRIBUTES if getattr(one, name) != getattr(other, name)]
            # Where one attribute differs, swapping it is swapping the places.
            for name in differing + (["position"] if len(differing) > 1 else []):
                edits.append(Swap(first, second, name))
    return edits


def _random_change(rng: random.Random, scene: Scene) -> Change:
    index, name = rng.randrange(len(scene)), rng.choice(tuple(ATTRIBUTES))
    others = [value for value in ATTRIBUTES[name] if value != getattr(scene[index], name)]
    return Change(index, name, rng.choice(others))


# ---- groups


def make_group(rng: random.Random) -> list[tuple[Scene, list[Edit]]]:
    """Four different scenes, and for each the edits that lead to it from the first.

    Half of the groups are a base, a swap of one attribute (or of the places) of two objects, a change of one
    attribute of one object, and both. The other half are a base and three different swaps of it.
    """
    while True:
        base = _make_scene(rng)
        swaps = _swaps(base)
        if len(swaps) < GROUP_SIZE - 1:
            continue
        paths: list[list[Edit]]
        if rng.random() < 0.5:
            swap, change = rng.choice(swaps), _random_change(rng, base)
            # The swap comes last: the fourth scene then differs from the second in one attribute too.
            paths = [[], [swap], [change], [change, swap]]
        else:
            paths = [[]]
            paths += [[swap] for swap in rng.sample(swaps, GROUP_SIZE - 1)]
        scenes = [reduce(lambda scene, edit: edit(scene), path, base) for path in paths]
        if len(set(scenes)) == GROUP_SIZE and all(_fits(scene) for scene in scenes):
            return list(zip(scenes, paths, strict=True))


def _make_scene(rng: random.Random) -> Scene:
    """Three to six objects of few colours and shapes, so that many share some."""
    number = rng.randint(3, 6)
    while True:
        palette = {
            name: rng.sample(values, min(len(values), rng.randint(2, 4)))
            for name, values in ATTRIBUTES.items()
        }
        objects: list[SceneObject] = []
        for _ in range(number):
            placed = _place(rng, palette, objects)
            if placed is None:
                break
            objects.append(placed)
        else:
            return tuple(objects)


def _place(
    rng: random.Random, palette: dict[str, list[str]], others: list[SceneObject]
) -> SceneObject | None:
    shape, color, size, texture = (rng.choice(palette[name]) for name in ATTRIBUTES)
    angle, stretch = rng.uniform(-0.2, 0.2), rng.uniform(0.94, 1.06)
    for _ in range(30):
        x, y = rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.92)
        candidate = SceneObject(shape, color, size, texture, x, y, angle, stretch)
        if _fits((*others, candidate)):
            return candidate
    return None


def _fits(scene: Scene) -> bool:
    """Whether every object lies within the image and apart from every other."""
    for index, one in enumerate(scene):
        if min(one.box) < MARGIN or max(one.box) > 1 - MARGIN:
            return False
        for other in scene[:index]:
            if math.hypot(one.x - other.x, one.y - other.y) < SPACING * (one.radius + other.radius):
                return False
    return True
