"""Writes captions for the synthetic scenes: varied in wording and in what they tell, true, and telling apart.

A caption is drawn as facts and as words at once, so that :func:`laps.data.scene_facts.is_true` can say of
which images it is true. Most captions are chosen to be false for all siblings of their image's group.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .scene_facts import (
    DIRECTIONS,
    LOCATIONS,
    Count,
    Description,
    Facts,
    ObjectEntry,
    Relation,
    fits,
    is_true,
    lies,
    place,
    related,
)
from .scene_objects import ATTRIBUTES

Draft = tuple[str, Facts]

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "heart": ("heart",),
    "ring": ("ring", "ring", "hoop"),
}
PLURALS = {"cross": "crosses", "plus": "crosses", "rhombus": "diamonds"}
COLOR_WORDS: dict[str, tuple[str, ...]] = {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered",),
}
MARKS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
DIRECTION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
LOCATION_WORDS = {
    "middle": ("in the middle", "in the center"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPENINGS = ("", "", "there is ", "a picture of ", "the image shows ")

# How often each attribute is told, and how often one in which the group's images differ.
TOLD = {"shape": 0.88, "color": 0.75, "size": 0.35, "texture": 0.4}
TOLD_IF_EDITED = 0.9
# How much oftener an edited object is spoken of.
EDITED_WEIGHT = 4
# Share of the captions that are taken as they come, and how many others are tried for one that tells apart.
FREE = 0.1
TRIES = 24


@dataclass(frozen=True)
class Caption:
    """A caption, what it claims, and the template's name."""

    text: str
    facts: Facts
    template: str

    @property
    def tokens(self) -> list[str]:
        """The words without punctuation, as Karpathy's JSON has them."""
        return re.findall("[a-z]+", self.text)


def write_captions(
    rng: random.Random,
    objects: Sequence[ObjectEntry],
    siblings: Sequence[Sequence[ObjectEntry]],
    edited: set[tuple[int, str]],
    image_size: int,
    number: int,
) -> list[Caption]:
    """Different captions that are true of the objects and, most of them, of none of the siblings.

    Args:
        rng: decides on everything.
        objects: what the image shows.
        siblings: what the other images of its group show.
        edited: the objects' attributes in which the group's images differ, as (index, attribute).
        image_size: side of the image in pixels.
        number: of captions to write.
    """
    writer = _Writer(rng, objects, image_size, edited)
    captions: list[Caption] = []
    unused: list[str] = []
    while len(captions) < number:
        # A third caption from the same template has to wait until every other one had two.
        unused = unused or 2 * list(TEMPLATES)
        free, best, fewest = rng.random() < FREE, None, len(siblings) + 1
        for _ in range(TRIES):
            caption = writer.write(rng.choice(unused))
            # Other words for the same facts are no other caption.
            if caption is None or any(caption.facts == other.facts for other in captions):
                continue
            confusing = sum(is_true(caption.facts, sibling, image_size) for sibling in siblings)
            if confusing < fewest:
                best, fewest = caption, confusing
            if fewest == 0 or free:
                break
        if best is None:
            # Nothing left can be said of this image, such as what is between what.
            unused = []
        else:
            captions.append(best)
            unused.remove(best.template)
    return captions


class _Writer:
    """Draws captions of one image; a template gives None where it has nothing to say."""

    def __init__(
        self,
        rng: random.Random,
        objects: Sequence[ObjectEntry],
        image_size: int,
        edited: set[tuple[int, str]],
    ) -> None:
        self.rng, self.objects, self.edited = rng, objects, edited
        self.places = [place(each, image_size) for each in objects]

    def write(self, template: str) -> Caption | None:
        """A caption from the template of that name."""
        draft = TEMPLATES[template](self)
        return None if draft is None else Caption(*draft, template)

    # ---- parts

    def pick(self, number: int) -> list[int]:
        """Different objects in random order, edited ones oftener."""
        spoken_of = {index for index, _ in self.edited}
        draws = [
            (self.rng.random() ** (1 / (EDITED_WEIGHT if index in spoken_of else 1)), index)
            for index in range(len(self.objects))
        ]
        return [index for _, index in sorted(draws, reverse=True)[:number]]

    def describe(self, index: int, *, without: str = "") -> Description:
        """Some of the object's attributes, at least one."""
        attributes = [name for name in ATTRIBUTES if name != without]
        told = [
            name
            for name in attributes
            if self.rng.random() < (TOLD_IF_EDITED if (index, name) in self.edited else TOLD[name])
        ]
        item: dict[str, object] = dict(self.objects[index])
        return {name: str(item[name]) for name in told or attributes[:1]}

    def noun(self, description: Description, number: int = 1) -> str:
        """Such as "large red square with stripes", without an article."""
        choose = self.rng.choice
        middle = (
            [choose(COLOR_WORDS.get(description["color"], (description["color"],)))]
            if "color" in description
            else []
        )
        marks = []
        if "texture" in description:
            texture = description["texture"]
            if texture in MARKS and self.rng.random() < 0.3:
                marks = [MARKS[texture]]
            else:
                middle.insert(self.rng.randint(0, len(middle)), choose(TEXTURE_WORDS[texture]))
        size = [choose(SIZE_WORDS[description["size"]])] if "size" in description else []
        noun = choose(SHAPE_WORDS[description["shape"]] if "shape" in description else ("object", "shape"))
        if number > 1:
            noun = PLURALS.get(noun, noun + "s")
        return " ".join([*size, *middle, noun, *marks])

    def phrase(self, description: Description) -> str:
        """The same with its article."""
        noun = self.noun(description)
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    def direction(self, one: int, other: int) -> str | None:
        """The one direction in which the first object clearly lies from the other."""
        pair = [self.places[one], self.places[other]]
        return next((name for name in DIRECTIONS if related(name, pair, clearly=True)), None)

    # ---- templates

    def listing(self) -> Draft:
        """A red square, a blue circle and a star."""
        entities = [self.describe(index) for index in self.pick(self.rng.choice((2, 2, 3)))]
        phrases = [self.phrase(entity) for entity in entities]
        text = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        return self.rng.choice(OPENINGS) + text, _facts(entities)

    def pair(self) -> Draft | None:
        """A red square left of a blue circle."""
        one, other = self.pick(2)
        direction = self.direction(one, other)
        if direction is None:
            return None
        entities = [self.describe(one), self.describe(other)]
        (a, b), words = map(self.phrase, entities), self.rng.choice(DIRECTION_WORDS[direction])
        text = self.rng.choice(
            (f"{self.rng.choice(OPENINGS)}{a} {words} {b}", f"{a} is {words} {b}", f"{words} {b} is {a}")
        )
        return text, _facts(entities, [{"name": direction, "entities": [0, 1]}])

    def chain(self) -> Draft | None:
        """A red square is left of a blue circle and below a star."""
        chosen = self.pick(3)
        first, second = (self.direction(chosen[0], other) for other in chosen[1:])
        if first is None or second is None:
            return None
        entities = [self.describe(index) for index in chosen]
        a, b, c = map(self.phrase, entities)
        near, far = (self.rng.choice(DIRECTION_WORDS[name]) for name in (first, second))
        text = self.rng.choice((f"{a} is {near} {b} and {far} {c}", f"{near} {b} and {far} {c} there is {a}"))
        return text, _facts(
            entities, [{"name": first, "entities": [0, 1]}, {"name": second, "entities": [0, 2]}]
        )

    def between(self) -> Draft | None:
        """A red square between a blue circle and a star."""
        chosen = self.pick(len(self.objects))
        for triple in itertools.permutations(chosen, 3):
            if related("between", [self.places[index] for index in triple], clearly=True):
                entities = [self.describe(index) for index in triple]
                a, b, c = map(self.phrase, entities)
                text = self.rng.choice(
                    (f"{self.rng.choice(OPENINGS)}{a} between {b} and {c}", f"between {b} and {c} is {a}")
                )
                return text, _facts(entities, [{"name": "between", "entities": [0, 1, 2]}])
        return None

    def located(self) -> Draft | None:
        """A red square in the top left corner, alone or with another one."""
        entities, parts = [], []
        for index in self.pick(self.rng.choice((1, 2))):
            places = [name for name in LOCATIONS if lies(self.places[index], name, clearly=True)]
            if not places:
                return None
            entity = self.describe(index)
            words = self.rng.choice(LOCATION_WORDS.get(places[0], (f"in the {places[0]} corner",)))
            entities.append({**entity, "location": places[0]})
            parts.append((self.phrase(entity), words))
        if len(parts) == 1 and self.rng.random() < 0.5:
            return f"{parts[0][1]} {self.rng.choice(('is', 'there is'))} {parts[0][0]}", _facts(entities)
        text = " and ".join(f"{phrase} {words}" for phrase, words in parts)
        return self.rng.choice(OPENINGS) + text, _facts(entities)

    def counted(self) -> Draft | None:
        """Exactly two red squares and a star."""
        one, other = self.pick(2)
        theirs: dict[str, object] = dict(self.objects[other])
        item: dict[str, object] = dict(self.objects[one])
        shared = [name for name in ATTRIBUTES if item[name] == theirs[name]]
        if not shared:
            return None
        told = self.rng.sample(shared, self.rng.randint(1, len(shared)))
        if "shape" in shared and self.rng.random() < 0.7:
            told.append("shape")
        description = {name: str(item[name]) for name in ATTRIBUTES if name in told}
        number = sum(fits(each, description) for each in self.objects)
        exactly = self.rng.random() < 0.5
        text = f"{'exactly ' if exactly else ''}{NUMBERS[number]} {self.noun(description, number)}"
        others = [
            index for index in self.pick(len(self.objects)) if not fits(self.objects[index], description)
        ]
        entities = [self.describe(index) for index in others[:1]]
        if entities:
            text += f" and {self.phrase(entities[0])}"
        opening = self.rng.choice(OPENINGS).replace("there is", "there are")
        return opening + text, _facts(
            entities, [], [{"of": description, "number": number, "exactly": exactly}]
        )

    def total(self) -> Draft:
        """Four objects, one of them a red square."""
        number = len(self.objects)
        entity = self.describe(self.pick(1)[0])
        words, phrase = f"{NUMBERS[number]} {self.rng.choice(('objects', 'shapes'))}", self.phrase(entity)
        text = self.rng.choice(
            (f"{words}, one of them {phrase}", f"there are {words} and one of them is {phrase}")
        )
        return text, _facts([entity], [], [{"of": {}, "number": number, "exactly": True}])

    def only(self) -> Draft | None:
        """The only red object is a square."""
        index = self.pick(1)[0]
        item: dict[str, object] = dict(self.objects[index])
        unique = [
            name
            for name in ATTRIBUTES
            if sum(fits(each, {name: str(item[name])}) for each in self.objects) == 1
        ]
        if not unique:
            return None
        name = self.rng.choice(unique)
        known, entity = {name: str(item[name])}, self.describe(index, without=name)
        text = f"the only {self.noun(known)} is {self.phrase(entity)}"
        return text, _facts([{**known, **entity}], [], [{"of": known, "number": 1, "exactly": True}])


def _facts(
    entities: list[Description],
    relations: Sequence[Relation] = (),
    counts: Sequence[Count] = (),
) -> Facts:
    return {"entities": entities, "relations": list(relations), "counts": list(counts)}


TEMPLATES: dict[str, Callable[[_Writer], Draft | None]] = {
    "listing": _Writer.listing,
    "pair": _Writer.pair,
    "chain": _Writer.chain,
    "between": _Writer.between,
    "located": _Writer.located,
    "counted": _Writer.counted,
    "total": _Writer.total,
    "only": _Writer.only,
}
