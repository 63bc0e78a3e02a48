"""Where words of drawn scenes miss what they name, and what patch selection could change of that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from laps import LAPS, explain
from laps.data.images import open_image
from laps.data.phrases import Box, Phrase, by_pair
from laps.explanation import Explanation
from laps.grounding import is_within, phrase_map, pointed_at
from numpy.typing import NDArray
from PIL.Image import Image

__all__ = ["PLACES", "draw", "measure"]

# Where the centre of a word's brightest patch can be: in a box of what the word names, in another object's
# box, in neither but next to a patch in the right box, or none of these.
PLACES = ("right", "another object", "beside it", "elsewhere")
# Of the picture: words of as many scenes.
ROWS = 2


@dataclass(frozen=True)
class Question:
    """An image with a caption, and what its words ask.

    Attributes:
        picture, caption: the pair.
        phrases: words of the caption that name something.
        objects: the boxes of everything that is drawn.
        grid: rows and columns of the patches.
    """

    picture: Image
    caption: str
    phrases: Sequence[Phrase]
    objects: Sequence[Box]
    grid: tuple[int, int]

    @property
    def patch(self) -> tuple[float, float]:
        """Width and height of a patch in pixels."""
        return self.picture.width / self.grid[1], self.picture.height / self.grid[0]

    @property
    def on_objects(self) -> NDArray[np.bool_]:
        """(rows, columns), whether the centre of each patch is in an object's box."""
        (rows, columns), (width, height) = self.grid, self.patch
        centres = [((j + 0.5) * width, (i + 0.5) * height) for i in range(rows) for j in range(columns)]
        return np.array([is_within(centre, self.objects) for centre in centres]).reshape(self.grid)

    def place(self, values: NDArray[Any], phrase: Phrase) -> str:
        """Which of PLACES the highest value of a map is."""
        x, y = pointed_at(values, self.picture.size)
        if is_within((x, y), phrase.boxes):
            return PLACES[0]
        if is_within((x, y), self.objects):
            return PLACES[1]
        width, height = self.patch
        around = [(x + i * width, y + j * height) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return PLACES[2 if any(is_within(each, phrase.boxes) for each in around) else 3]

    def maps(self, why: Explanation) -> Iterator[tuple[Phrase, NDArray[Any]]]:
        """The map of each phrase, but of those that were cut off."""
        for phrase in self.phrases:
            values = phrase_map(why, phrase.start, phrase.end)
            if values is not None:
                yield phrase, values


def questions(words: Sequence[Phrase], file: Path, grid: tuple[int, int]) -> Iterator[Question]:
    """The pairs that words of a data set of scenes belong to."""
    objects = {
        file.parent / "images" / entry["filename"]: [tuple(each["box"]) for each in entry["objects"]]
        for entry in json.loads(file.read_text())["images"]
    }
    for image, caption, phrases in by_pair(words):
        question = Question(open_image(image), caption, phrases, objects[image], grid)
        # Too small for the centre of any patch: nothing could be kept.
        if question.on_objects.any():
            yield question


def measure(models: Mapping[str, LAPS], words: Sequence[Phrase], file: Path) -> dict[str, Any]:
    """Counts for a model "laps" and others, all in percent.

    Returns:
        For each model ``places``, the share of the words in each of PLACES; ``dropped``, of words whose
        brightest patch LAPS drops for this pair; ``objects_only``, of words that would point right if exactly
        the patches on objects were kept. And what LAPS keeps: ``kept`` of the patches on ``objects`` and of
        the others, ``background``, and the share of all patches that are on objects, ``covered``.
    """
    places: dict[str, Counter[str]] = {form: Counter() for form in models}
    dropped, ideal, patches, kept = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    side = int(models["laps"].head.num_patches ** 0.5)
    for question in questions(words, file, (side, side)):
        on_objects = question.on_objects
        whys = {form: explain(model, question.picture, question.caption) for form, model in models.items()}
        own = whys["laps"].on_grid(whys["laps"].attribution.kept).astype(np.bool_)
        for name, where in (("objects", on_objects), ("background", ~on_objects)):
            patches[name] += int(where.sum())
            kept[name] += int((where & own).sum())
        for form, model in models.items():
            for phrase, values in question.maps(whys[form]):
                places[form][question.place(values, phrase)] += 1
                dropped[form] += not own.flat[values.argmax()]
            why = explain(model, question.picture, question.caption, mask=on_objects)
            for phrase, values in question.maps(why):
                ideal[form] += question.place(values, phrase) == PLACES[0]

    def percent(count: int, total: int) -> float:
        return 100 * count / max(total, 1)

    total = {form: sum(places[form].values()) for form in models}
    return {
        "forms": {
            form: {
                "places": {place: percent(places[form][place], total[form]) for place in PLACES},
                "dropped": percent(dropped[form], total[form]),
                "objects_only": percent(ideal[form], total[form]),
            }
            for form in models
        },
        "kept": {name: percent(kept[name], patches[name]) for name in patches},
        "covered": percent(patches["objects"], sum(patches.values())),
    }


def draw(models: Mapping[str, LAPS], words: Sequence[Phrase], file: Path, path: Path) -> None:
    """Words beside what they name, with selection and without, and right if the objects alone are kept.

    Nothing is written where there are no such words.
    """
    from laps import plot
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    side = int(models["laps"].head.num_patches ** 0.5)
    found: list[tuple[Phrase, list[Explanation]]] = []
    for question in questions(words, file, (side, side)):
        if found and question.phrases[0].image == found[-1][0].image:
            continue
        pair = (question.picture, question.caption)
        whys = [explain(model, *pair) for model in models.values()]
        whys.append(explain(models["laps"], *pair, mask=question.on_objects))
        for phrase, _ in question.maps(whys[0]):
            maps = [phrase_map(why, phrase.start, phrase.end) for why in whys]
            where = [question.place(values, phrase) for values in maps if values is not None]
            if where == [PLACES[2], PLACES[2], PLACES[0]]:
                found.append((phrase, whys))
                break
        if len(found) == ROWS:
            break
    titles = ["LAPS: what it keeps", "LAPS", "without selection", "LAPS, objects alone kept"]
    if not found:
        return
    figure, axes = pyplot.subplots(
        len(found), 4, figsize=(10, 2.9 * len(found)), squeeze=False, layout="constrained"
    )
    for row, (phrase, whys) in zip(axes, found, strict=True):
        plot.selection(whys[0], row[0])
        for ax, why in zip(row[1:], whys, strict=True):
            word = next(
                i for i, each in enumerate(why.words) if each.text == phrase.text and not each.is_special
            )
            plot.word_map(why, word, ax, colorbar=False)
        for ax, title in zip(row, titles, strict=True):
            ax.set_title(title, fontsize="medium")
            for x0, y0, x1, y1 in phrase.boxes:
                scale = side / whys[0].picture.width if whys[0].picture else 1.0
                ax.add_patch(
                    Rectangle(
                        (x0 * scale, y0 * scale),
                        (x1 - x0) * scale,
                        (y1 - y0) * scale,
                        fill=False,
                        edgecolor="white",
                        linewidth=1.5,
                        linestyle="--",
                    )
                )
        row[0].set_ylabel(f"“{phrase.text}”", fontsize="large")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
