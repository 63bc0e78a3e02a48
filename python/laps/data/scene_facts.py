"""What a caption of a synthetic scene claims, in a form that can be checked against any scene.

The claims are plain JSON, kept in dataset.json as "facts" beside each sentence. "A red square in the top left
corner, left of a circle" claims::

    {"entities": [{"color": "red", "shape": "square", "location": "top left"}, {"shape": "circle"}],
     "relations": [{"name": "left of", "entities": [0, 1]}],
     "counts": []}

and "exactly two red objects" has the count ``{"of": {"color": "red"}, "number": 2, "exactly": true}``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypedDict

Description = dict[str, str]
Place = tuple[float, float]


class ObjectEntry(TypedDict):
    """One object as dataset.json has it; the box is [x0, y0, x1, y1] in pixels."""

    shape: str
    color: str
    size: str
    texture: str
    box: list[float]


class Relation(TypedDict):
    """A relation between entities, given by their indices."""

    name: str
    entities: list[int]


class Count(TypedDict):
    """How many objects fit a description: at least, or exactly, that number."""

    of: Description
    number: int
    exactly: bool


class Facts(TypedDict):
    """All that one caption claims."""

    entities: list[Description]
    relations: list[Relation]
    counts: list[Count]


DIRECTIONS = ("left of", "right of", "above", "below")
# The middle and the corners first: where several hold, the first says most.
LOCATIONS = (
    "middle",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "left",
    "right",
    "top",
    "bottom",
)


def is_true(facts: Facts, objects: Sequence[ObjectEntry], image_size: int) -> bool:
    """Whether a caption is true of an image.

    It is if different objects can be found for all entities, such that each has its entity's attributes and
    location and all relations hold, and if all counts hold. Places are the centres of the boxes, and words
    for them are read generously ("left of" is any x that is smaller, a corner is a quarter of the image), so
    that a caption is called false only where nobody would call it true.

    Args:
        facts: what the caption claims, ``sentence["facts"]`` in dataset.json.
        objects: those of the image, ``image["objects"]`` in dataset.json.
        image_size: side of the image in pixels, as the boxes count them.

    Example:
        >>> from laps.data.scene_facts import is_true
        >>> red = {"shape": "star", "color": "red", "size": "small", "texture": "plain", "box": [2, 2, 9, 9]}
        >>> blue = red | {"color": "blue", "box": [20, 4, 27, 11]}
        >>> facts = {"entities": [{"color": "red"}, {"color": "blue"}], "counts": [],
        ...          "relations": [{"name": "left of", "entities": [0, 1]}]}
        >>> is_true(facts, [red, blue], 32), is_true(facts, [red | {"color": "blue"}, blue], 32)
        (True, False)
    """
    for count in facts["counts"]:
        number = sum(fits(each, count["of"]) for each in objects)
        if number < count["number"] or (count["exactly"] and number > count["number"]):
            return False
    places = [place(each, image_size) for each in objects]
    fitting = [
        [
            index
            for index, each in enumerate(objects)
            if fits(each, entity) and ("location" not in entity or lies(places[index], entity["location"]))
        ]
        for entity in facts["entities"]
    ]
    return any(
        len(set(chosen)) == len(chosen)
        and all(
            related(relation["name"], [places[chosen[entity]] for entity in relation["entities"]])
            for relation in facts["relations"]
        )
        for chosen in itertools.product(*fitting)
    )


def fits(item: ObjectEntry, description: Description) -> bool:
    """Whether the object has the attributes; its location is another matter."""
    return all(
        item[name] == value  # type: ignore[literal-required]
        for name, value in description.items()
        if name != "location"
    )


def place(item: ObjectEntry, image_size: int) -> Place:
    """The box's centre in shares of the image's side, y downwards."""
    x0, y0, x1, y1 = item["box"]
    return (x0 + x1) / (2 * image_size), (y0 + y1) / (2 * image_size)


def related(name: str, places: Sequence[Place], *, clearly: bool = False) -> bool:
    """Whether places are in a relation; `clearly` asks for what nobody would deny."""
    (ax, ay), (bx, by) = places[:2]
    if name == "between":
        cx, cy = places[2]
        length = math.hypot(cx - bx, cy - by)
        if length == 0:
            return False
        along = ((ax - bx) * (cx - bx) + (ay - by) * (cy - by)) / length**2
        aside = abs((ax - bx) * (cy - by) - (ay - by) * (cx - bx)) / length
        return 0.25 < along < 0.75 and aside < 0.12 if clearly else 0 < along < 1 and aside < 0.25
    across, along = (bx - ax, by - ay) if name in ("left of", "right of") else (by - ay, bx - ax)
    ahead = across if name in ("left of", "above") else -across
    return ahead > 0.12 and ahead > abs(along) if clearly else ahead > 0


def lies(where: Place, location: str, *, clearly: bool = False) -> bool:
    """Whether a place is at a location; `clearly` asks for what nobody would deny."""
    x, y = where
    if location == "middle":
        return max(abs(x - 0.5), abs(y - 0.5)) < (0.12 if clearly else 0.25)
    edge = 0.3 if clearly else 0.5
    sides = {"left": x < edge, "right": x > 1 - edge, "top": y < edge, "bottom": y > 1 - edge}
    return all(sides[side] for side in location.split())
