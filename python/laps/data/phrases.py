"""Phrases of captions and the boxes that they name: the drawn scenes, Flickr30k Entities, RefCOCO."""

from __future__ import annotations

import io
import pickle
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .parsers import field_of, json_of, text_of
from .scene_captions import COLOR_WORDS, PLURALS, SHAPE_WORDS, SIZE_WORDS, TEXTURE_WORDS
from .scene_objects import ATTRIBUTES

__all__ = ["Box", "Phrase", "read_flickr_entities", "read_refcoco", "read_scene_words"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Phrase:
    """Some words of a caption, and where in the image is what they name.

    Attributes:
        image: the file.
        caption: the sentence.
        start, end: the phrase is ``caption[start:end]``.
        boxes: (x0, y0, x1, y1) in pixels of the image; being in one of them is right.
        category: what kind of thing the phrase names, for a table; may be empty.

    Raises:
        LapsValueError: an empty phrase, no box, or a box without area.
    """

    image: Path
    caption: str
    start: int
    end: int
    boxes: tuple[Box, ...]
    category: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(box, (tuple, list)) and len(box) == 4 for box in self.boxes):
            raise LapsTypeError(
                _check.message("Phrase", "boxes is no list of boxes", "((x0, y0, x1, y1), ...)", self.boxes)
            )
        if not 0 <= self.start < self.end <= len(self.caption):
            raise LapsValueError(
                _check.message("Phrase", "start and end are no part of the caption", "0 <= start < end", self)
            )
        # Written so that NaN is no box.
        if not self.boxes or not all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in self.boxes):
            raise LapsValueError(
                _check.message(
                    "Phrase", "boxes has none, or one without area", "x0 < x1, y0 < y1", self.boxes
                )
            )

    @property
    def text(self) -> str:
        """The words themselves."""
        return self.caption[self.start : self.end]


# ---- the drawn scenes


def _forms(attribute: str, value: str) -> set[str]:
    words: dict[str, dict[str, tuple[str, ...]]] = {
        "shape": SHAPE_WORDS,
        "color": COLOR_WORDS,
        "size": SIZE_WORDS,
        "texture": TEXTURE_WORDS,
    }
    forms = {value, *words[attribute].get(value, ())}
    if attribute == "shape":
        forms |= {PLURALS.get(form, f"{form}s") for form in forms}
    return forms


# What a word says of an object: {"violet": ("color", "purple"), ...}.
SAID = {
    form: (attribute, value)
    for attribute, values in ATTRIBUTES.items()
    for value in values
    for form in _forms(attribute, value)
}


def read_scene_words(file: str | Path, split: str = "test") -> list[Phrase]:
    """Every word of :func:`laps.data.make_scenes` that names a shape, a colour, a size or a texture.

    Right are the boxes of all objects of the image that have it, and the category is the attribute. Words
    that fit no object ("no red star") are left out.

    Args:
        file: the data set's ``dataset.json``, or its folder.
        split: as in the file.

    Raises:
        LapsValueError: a file that cannot be read, has no objects, or has no such split.
    """
    operation = "read_scene_words"
    file = Path(file)
    file = file / "dataset.json" if file.is_dir() else file
    entries = field_of(
        operation, str(file), json_of(operation, text_of(operation, file), file), "images", list
    )
    phrases = []
    for number, entry in enumerate(entries):
        place = f"{file}: images[{number}]"
        if field_of(operation, place, entry, "split") != split:
            continue
        image = file.parent / "images" / field_of(operation, place, entry, "filename")
        objects = field_of(operation, place, entry, "objects", list)
        for sentence in field_of(operation, place, entry, "sentences", list):
            caption = field_of(operation, place, sentence, "raw")
            for word in re.finditer("[a-z]+", caption.lower()):
                attribute, value = SAID.get(word.group(), ("", ""))
                boxes = tuple(tuple(each["box"]) for each in objects if each.get(attribute) == value != "")
                if boxes:
                    phrases.append(Phrase(image, caption, *word.span(), boxes, attribute))
    return _some(operation, phrases, f"{file} has no words with boxes in the split {split!r}")


# ---- Flickr30k Entities


def read_flickr_entities(
    folder: str | Path, split: str = "test", *, images: str | Path | None = None
) -> list[Phrase]:
    """The phrases of Flickr30k Entities that have boxes (Plummer et al., 2015).

    Args:
        folder: of the published data: ``Sentences/<id>.txt``, ``Annotations/<id>.xml``, and ``<split>.txt``
            with the ids.
        split: ``"train"``, ``"val"`` or ``"test"``.
        images: the folder of ``<id>.jpg``; None: ``flickr30k-images`` or ``images`` in `folder`.

    Raises:
        LapsValueError: a file that is missing or not in this format; it is named.
    """
    operation = "read_flickr_entities"
    folder = Path(folder)
    if images is None:
        images = next((f for n in ("flickr30k-images", "images") if (f := folder / n).is_dir()), folder)
    phrases: list[Phrase] = []
    for name in text_of(operation, folder / f"{split}.txt").split():
        boxes = _entity_boxes(operation, folder / "Annotations" / f"{name}.xml")
        sentences = folder / "Sentences" / f"{name}.txt"
        for line in text_of(operation, sentences).splitlines():
            if not line.strip():
                continue
            caption, marks = _unmarked(operation, sentences, line)
            for start, end, entity, kinds in marks:
                if entity in boxes:
                    image = Path(images) / f"{name}.jpg"
                    phrases.append(Phrase(image, caption, start, end, tuple(boxes[entity]), kinds))
    return _some(operation, phrases, f"{folder} has no phrases with boxes in the split {split!r}")


# [/EN#283585/people A man]; several categories have slashes between them.
MARK = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]+)\]")


def _unmarked(operation: str, file: Path, line: str) -> tuple[str, list[tuple[int, int, str, str]]]:
    """The sentence, and per marked phrase: start, end, the entity's number, its categories."""
    text, marks, done = "", [], 0
    for mark in MARK.finditer(line):
        text += line[done : mark.start()]
        words = mark.group(3)
        marks.append((len(text), len(text) + len(words), mark.group(1), mark.group(2)))
        text += words
        done = mark.end()
    text += line[done:]
    if "[/EN#" in text:
        raise LapsValueError(
            _check.message(operation, f"{file} has a phrase that is not closed", "[/EN#1/people A man]", line)
        )
    return text, marks


def _entity_boxes(operation: str, file: Path) -> dict[str, list[Box]]:
    """The boxes of each entity; one may have several, one box may be of several, and some have none."""
    try:
        # No external entities: Python's parser fetches none.
        root = ElementTree.fromstring(text_of(operation, file))
        found: dict[str, list[Box]] = {}
        for item in root.iter("object"):
            place = item.find("bndbox")
            if place is None:
                continue
            x0, y0, x1, y1 = (float(place.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in item.iter("name"):
                # Corners count from 1, and belong to the box.
                found.setdefault((name.text or "").strip(), []).append((x0 - 1, y0 - 1, x1, y1))
    except (ElementTree.ParseError, ValueError) as error:
        raise LapsValueError(
            _check.message(operation, f"{file} cannot be read", "an annotation of Flickr30k Entities", error)
        ) from error
    return found


# ---- RefCOCO


def read_refcoco(
    folder: str | Path, split: str = "val", *, images: str | Path, split_by: str = "unc"
) -> list[Phrase]:
    """The expressions of RefCOCO, RefCOCO+ or RefCOCOg, each a phrase of its own (Yu et al., 2016).

    Args:
        folder: of one data set: ``refs(<split_by>).p`` and ``instances.json``. The pickle is read without
            running anything: one that names a class or a function is refused.
        split: such as ``"val"``, ``"testA"``, ``"testB"``, ``"test"``.
        images: the folder of COCO's train2014.
        split_by: ``"unc"``, ``"google"`` or ``"umd"``.

    Raises:
        LapsValueError: a file that is missing or not in this format; it is named.
    """
    operation = "read_refcoco"
    folder = Path(folder)
    file = folder / "instances.json"
    instances = json_of(operation, text_of(operation, file), file)
    names = {
        field_of(operation, f"{file}: images", entry, "id", int): field_of(
            operation, f"{file}: images", entry, "file_name"
        )
        for entry in field_of(operation, str(file), instances, "images", list)
    }
    boxes: dict[int, Box] = {}
    for entry in field_of(operation, str(file), instances, "annotations", list):
        x, y, wide, high = field_of(operation, f"{file}: annotations", entry, "bbox", list)
        boxes[field_of(operation, f"{file}: annotations", entry, "id", int)] = (x, y, x + wide, y + high)
    refs = folder / f"refs({split_by}).p"
    phrases: list[Phrase] = []
    for number, ref in enumerate(_plain_pickle(operation, refs)):
        place = f"{refs}: [{number}]"
        if field_of(operation, place, ref, "split") != split:
            continue
        image = names.get(field_of(operation, place, ref, "image_id", int))
        box = boxes.get(field_of(operation, place, ref, "ann_id", int))
        if image is None or box is None:
            raise LapsValueError(
                _check.message(operation, f"{place} names what {file} has not", "its image_id and ann_id")
            )
        for sentence in field_of(operation, place, ref, "sentences", list):
            text = field_of(operation, place, sentence, "sent")
            phrases.append(Phrase(Path(images) / image, text, 0, len(text), (box,), split))
    return _some(operation, phrases, f"{refs} has no expressions in the split {split!r}")


class _Plain(pickle.Unpickler):
    """Lists, dictionaries, strings and numbers: nothing that a pickle could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _plain_pickle(operation: str, file: Path) -> Sequence[object]:
    expected = "a pickled list of plain values"
    try:
        # Python 2 wrote it.
        values = _Plain(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise LapsValueError(
            _check.message(operation, f"{file} cannot be read", expected, error.strerror)
        ) from error
    except Exception as error:  # Whatever a broken pickle leads to.
        raise LapsValueError(_check.message(operation, f"{file} cannot be read", expected, error)) from error
    if not isinstance(values, list):
        raise LapsTypeError(
            _check.message(operation, f"{file} holds no list", expected, _check.name_of(values))
        )
    return values


def _some(operation: str, phrases: list[Phrase], problem: str) -> list[Phrase]:
    if not phrases:
        raise LapsValueError(_check.message(operation, problem, "at least one"))
    return phrases


def by_pair(phrases: Sequence[Phrase]) -> Iterator[tuple[Path, str, list[Phrase]]]:
    """The phrases of each image and caption together, in the order of their first."""
    groups: dict[tuple[Path, str], list[Phrase]] = {}
    for phrase in phrases:
        groups.setdefault((phrase.image, phrase.caption), []).append(phrase)
    for (image, caption), own in groups.items():
        yield image, caption, own
