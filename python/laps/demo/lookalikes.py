"""What is really true of the test images, and which of them are told apart by one attribute alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import RetrievalData
from ..data.scene_facts import Facts, ObjectEntry, is_true

__all__ = ["QUERIES", "Lookalike", "Query", "TestScenes", "rank_accuracy"]


@dataclass(frozen=True)
class Query:
    """A sentence to search with, and what it claims."""

    text: str
    facts: Facts


def _facts(*entities: dict[str, str], relation: str = "") -> Facts:
    relations = [{"name": relation, "entities": [0, 1]}] if relation else []
    return {"entities": list(entities), "relations": relations, "counts": []}  # type: ignore[typeddict-item]


# From colours, which are learnt first, to sizes, textures and shapes. Not every set has an image of each.
QUERIES = (
    Query("a purple object and a green object", _facts({"color": "purple"}, {"color": "green"})),
    Query("a pink shape above a blue shape", _facts({"color": "pink"}, {"color": "blue"}, relation="above")),
    Query("a large yellow star", _facts({"size": "large", "color": "yellow", "shape": "star"})),
    Query("a dotted square", _facts({"texture": "dotted", "shape": "square"})),
    Query(
        "a red circle and a blue square",
        _facts({"color": "red", "shape": "circle"}, {"color": "blue", "shape": "square"}),
    ),
    Query("a cyan heart", _facts({"color": "cyan", "shape": "heart"})),
)


@dataclass(frozen=True)
class Lookalike:
    """Caption `caption` is true of image `image`, and false of image `other`, which differs in one thing."""

    caption: int
    image: int
    other: int


class TestScenes:
    """The annotations of the test split, in the order of its images and captions.

    Args:
        file: dataset.json, as :func:`laps.data.make_scenes` wrote it.
        data: its split "test".
    """

    # Else pytest would look for tests in it.
    __test__ = False

    def __init__(self, file: Path, data: RetrievalData) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {entry["filename"]: entry for entry in content["images"]}
        ordered = [entries[path.name] for path in data.image_paths]
        self.image_size: int = content["scenes"]["image_size"]
        self.objects: list[list[ObjectEntry]] = [entry["objects"] for entry in ordered]
        self.groups: list[int] = [entry["group"] for entry in ordered]
        self.facts: list[Facts] = [sentence["facts"] for entry in ordered for sentence in entry["sentences"]]
        self.caption_to_image = data.caption_to_image

    def true_images(self, facts: Facts) -> list[int]:
        """The images of which this is true."""
        return [
            image for image, objects in enumerate(self.objects) if is_true(facts, objects, self.image_size)
        ]

    def lookalikes(self) -> list[Lookalike]:
        """Every caption with every image of its image's group of which it is false."""
        siblings: dict[int, list[int]] = {}
        for image, group in enumerate(self.groups):
            siblings.setdefault(group, []).append(image)
        return [
            Lookalike(caption, image, other)
            for caption, image in enumerate(self.caption_to_image.tolist())
            for other in siblings[self.groups[image]]
            if not is_true(self.facts[caption], self.objects[other], self.image_size)
        ]


def rank_accuracy(scores: NDArray[np.float32], pairs: list[Lookalike]) -> float:
    """Percentage of look-alikes that score below the image that the caption is of; ties count as failures."""
    caption, image, other = np.array([(pair.caption, pair.image, pair.other) for pair in pairs]).T
    return float(100 * np.mean(scores[image, caption] > scores[other, caption]))
