"""The synthetic scenes: captions are true and tell siblings apart, files depend on the seed alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laps import LapsTypeError, LapsValueError
from laps.data import load, make_scenes
from laps.data.scene_captions import (
    COLOR_WORDS,
    DIRECTION_WORDS,
    NUMBERS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
)
from laps.data.scene_drawing import PAINT
from laps.data.scene_facts import is_true
from laps.data.scene_objects import ATTRIBUTES
from PIL import Image

SIZE = 96
SMALL: dict[str, Any] = {"num_train": 10, "num_dev": 4, "num_test": 4, "workers": 1, "progress": False}

# Nothing that runs in the workers waits for a thread of this process.
FORK_WARNING = "ignore:This process .* is multi-threaded:DeprecationWarning"

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a set; no test writes to it."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, num_train=200, num_dev=53, num_test=120, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[Entry]:
    entries: list[Entry] = json.loads((scenes / "dataset.json").read_text())["images"]
    return entries


@pytest.fixture(scope="module")
def groups(images: list[Entry]) -> dict[int, list[Entry]]:
    result = defaultdict(list)
    for entry in images:
        result[entry["group"]].append(entry)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bag(objects: list[Entry]) -> Counter[tuple[str, str]]:
    """Which attribute values an image shows, and how often; not on which objects."""
    return Counter((name, item[name]) for item in objects for name in ATTRIBUTES)


def kind_of(facts: Entry) -> tuple[object, ...]:
    """What a caption speaks of: how many objects, relations, places, counts."""
    places = sum("location" in each for each in facts["entities"])
    counts = [(bool(count["of"]), count["number"] > 1) for count in facts["counts"]]
    return len(facts["entities"]), len(facts["relations"]), places, *counts


# ---- captions


def test_every_caption_is_true_of_its_image(images: list[Entry]) -> None:
    for entry in images:
        for sentence in entry["sentences"]:
            assert is_true(sentence["facts"], entry["objects"], SIZE), sentence["raw"]


def test_words_say_what_the_facts_say(images: list[Entry]) -> None:
    words_of = {
        "shape": SHAPE_WORDS,
        "color": COLOR_WORDS,
        "size": SIZE_WORDS,
        "texture": TEXTURE_WORDS,
    }
    meaning = {
        word: (name, value)
        for name, values in ATTRIBUTES.items()
        for value in values
        for word in words_of[name].get(value, (value,))
    }
    plurals = {"crosses": "cross"} | {f"{word}s": word for word in meaning if meaning[word][0] == "shape"}
    marks = {"stripes": "striped", "dots": "dotted", "checks": "checkered"}
    directions = {words: name for name, forms in DIRECTION_WORDS.items() for words in forms}
    direction = re.compile(rf"\b({'|'.join(sorted(directions, key=len, reverse=True))})\b")

    for sentence in (sentence for entry in images for sentence in entry["sentences"]):
        text, facts = sentence["raw"], sentence["facts"]
        told = [plurals.get(word, marks.get(word, word)) for word in sentence["tokens"]]
        said = Counter(meaning[word] for word in told if word in meaning)
        only = text.startswith("the only")
        # "The only red object is a square" counts what its one entity repeats.
        described = facts["entities"] + [count["of"] for count in facts["counts"] if not only]
        meant = Counter(pair for each in described for pair in each.items() if pair[0] != "location")
        assert said == meant, text

        names = [relation["name"] for relation in facts["relations"] if relation["name"] != "between"]
        assert [directions[match] for match in direction.findall(text)] == names, text
        assert ("between" in text) == any(each["name"] == "between" for each in facts["relations"])
        for location in (each["location"] for each in facts["entities"] if "location" in each):
            assert location in text.replace("center", "middle"), text
        for count in facts["counts"]:
            assert only or NUMBERS[count["number"]] in sentence["tokens"], text
            assert only or not count["of"] or count["exactly"] == ("exactly" in text), text


def test_most_captions_are_false_for_every_sibling(groups: dict[int, list[Entry]]) -> None:
    false = [
        [
            not is_true(sentence["facts"], sibling["objects"], SIZE)
            for sibling in group
            if sibling is not entry
        ]
        for group in groups.values()
        for entry in group
        for sentence in entry["sentences"]
    ]
    # Measured on 5,000 images: 0.935 of the (caption, sibling) pairs, 0.865 of the captions.
    assert np.mean([each for row in false for each in row]) > 0.9
    assert np.mean([all(row) for row in false]) > 0.82


def test_captions_vary(images: list[Entry]) -> None:
    sentences = [sentence for entry in images for sentence in entry["sentences"]]
    vocabulary = Counter(word for sentence in sentences for word in sentence["tokens"])
    lengths = [len(sentence["tokens"]) for sentence in sentences]

    assert 60 <= len(vocabulary) <= 100
    assert min(lengths) >= 2
    assert np.std(lengths) > 3
    assert len({sentence["raw"] for sentence in sentences}) > 0.99 * len(sentences)
    # Two of five captions at most come from one template, but two templates may claim the same kind of facts.
    kinds = [len({kind_of(sentence["facts"]) for sentence in entry["sentences"]}) for entry in images]
    assert min(kinds) >= 2
    assert np.mean(kinds) > 3.3
    for entry in images:
        texts = [sentence["raw"] for sentence in entry["sentences"]]
        assert len(set(texts)) == len(texts) == 5
        assert all(text.strip() == text and text for text in texts)
        assert [" ".join(sentence["tokens"]) for sentence in entry["sentences"]] == [
            text.replace(",", "") for text in texts
        ]


def test_who_knows_which_attribute_belongs_where_beats_a_bag_of_attributes(images: list[Entry]) -> None:
    shown = [entry["objects"] for entry in images if entry["split"] == "test"]
    bags = [bag(objects) for objects in shown]
    sentences = [s for entry in images if entry["split"] == "test" for s in entry["sentences"]][::5]
    truth, guess = [], []
    for facts in (sentence["facts"] for sentence in sentences):
        claimed = bag([dict.fromkeys(ATTRIBUTES) | entity for entity in facts["entities"]])
        for count in facts["counts"]:
            for pair in count["of"].items():
                claimed[pair] = max(claimed[pair], count["number"])
        needed = {pair: number for pair, number in claimed.items() if pair[1] is not None}
        # Each picks one of the images that it thinks fit: this is its expected R@1.
        truth.append(1 / sum(is_true(facts, objects, SIZE) for objects in shown))
        guess.append(1 / sum(all(each[pair] >= number for pair, number in needed.items()) for each in bags))

    assert np.mean(truth) > 0.75
    assert np.mean(guess) < 0.4


# ---- images and groups


def test_groups_have_four_images_of_one_split(groups: dict[int, list[Entry]]) -> None:
    sizes = {"train": 0, "val": 0, "test": 0}
    for group in groups.values():
        assert len({entry["split"] for entry in group}) == 1
        sizes[group[0]["split"]] += len(group)
        # 53 images of "val" leave one over.
        assert len(group) == 4 or (group[0]["split"], len(group)) == ("val", 1)
    assert sizes == {"train": 200, "val": 53, "test": 120}


def test_siblings_differ_by_the_recorded_edits_and_nothing_else(groups: dict[int, list[Entry]]) -> None:
    for group in groups.values():
        base = group[0]["objects"]
        assert group[0]["changed"] == []
        for entry in group:
            objects = [{**item, "at": index} for index, item in enumerate(base)]
            for edit in entry["changed"]:
                name = "at" if edit["attribute"] == "position" else edit["attribute"]
                if edit["kind"] == "change":
                    objects[edit["objects"][0]][name] = edit["to"]
                else:
                    one, other = (objects[index] for index in edit["objects"])
                    one[name], other[name] = other[name], one[name]
            for expected, item in zip(objects, entry["objects"], strict=True):
                assert all(item[name] == expected[name] for name in ATTRIBUTES)
                if all(item[name] == base[expected["at"]][name] for name in ("shape", "size")):
                    # Its own angle makes the box of another object at the same place a little different.
                    np.testing.assert_allclose(item["box"], base[expected["at"]]["box"], atol=0.12 * SIZE)


def test_every_image_has_a_sibling_with_the_same_bag_of_attributes(groups: dict[int, list[Entry]]) -> None:
    for group in (group for group in groups.values() if len(group) == 4):
        for entry in group:
            twins = [
                other
                for other in group
                if other is not entry and bag(other["objects"]) == bag(entry["objects"])
            ]
            assert twins
            assert all(twin["objects"] != entry["objects"] for twin in twins)


def test_boxes_lie_in_the_image_and_hardly_overlap(images: list[Entry]) -> None:
    for entry in images:
        assert 3 <= len(entry["objects"]) <= 6
        boxes = np.array([item["box"] for item in entry["objects"]])
        assert (boxes >= 0).all()
        assert (boxes <= SIZE).all()
        for one, other in combinations(boxes, 2):
            shared = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
            assert shared < 0.35 * min((box[2:] - box[:2]).prod() for box in (one, other))


def test_plain_objects_have_their_colour_at_the_middle_of_their_box(
    scenes: Path, images: list[Entry]
) -> None:
    paints = np.array(list(PAINT.values()), dtype=float)
    for entry in images[:100]:
        with Image.open(scenes / "images" / entry["filename"]) as image:
            assert image.size == (SIZE, SIZE)
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            pixels = np.asarray(image, dtype=float)
        for item in entry["objects"]:
            if item["texture"] == "plain" and item["shape"] != "ring":
                x0, y0, x1, y1 = item["box"]
                pixel = pixels[int((y0 + y1) / 2), int((x0 + x1) / 2)]
                assert list(PAINT)[int(np.abs(paints - pixel).sum(axis=1).argmin())] == item["color"]


def test_load_reads_all_splits(scenes: Path, images: list[Entry]) -> None:
    for split, number in (("train", 200), ("dev", 53), ("val", 53), ("test", 120)):
        data = load(scenes, split)
        assert data.num_images == number
        assert data.num_captions == 5 * number
    last = images[-1]
    assert data.image_paths[-1].name == last["filename"]
    assert [data.captions[index] for index in data.captions_of(119)] == [s["raw"] for s in last["sentences"]]


# ---- the truth of facts


def test_is_true_asks_for_different_objects_and_reads_places_generously() -> None:
    def item(shape: str, color: str, x: float, y: float) -> Any:
        box = [100 * x - 5, 100 * y - 5, 100 * x + 5, 100 * y + 5]
        return {"shape": shape, "color": color, "size": "small", "texture": "plain", "box": box}

    def facts(*entities: dict[str, str], relations: Any = (), counts: Any = ()) -> Any:
        return {"entities": list(entities), "relations": list(relations), "counts": list(counts)}

    objects = [item("star", "red", 0.2, 0.2), item("star", "blue", 0.5, 0.45), item("heart", "red", 0.8, 0.9)]
    red, star, heart = {"color": "red"}, {"shape": "star"}, {"shape": "heart"}

    def true(claim: Any) -> bool:
        return is_true(claim, objects, 100)

    assert true(facts(star, star))
    assert not true(facts(star, star, star))
    assert not true(facts({"shape": "star", "color": "red"}, {"shape": "star", "color": "red"}))
    for name, reverse in (("left of", "right of"), ("above", "below")):
        assert true(facts(star, heart, relations=[{"name": name, "entities": [0, 1]}]))
        assert true(facts(star, heart, relations=[{"name": reverse, "entities": [1, 0]}]))
        assert not true(facts(star, heart, relations=[{"name": reverse, "entities": [0, 1]}]))
    between = {"name": "between", "entities": [0, 1, 2]}
    assert true(facts(star, red, heart, relations=[between]))
    assert not true(facts(heart, star, star, relations=[between]))
    assert true(facts({**red, "location": "top left"}, {**red, "location": "bottom right"}))
    assert not true(facts({**heart, "location": "top"}))
    assert true(facts({**star, "location": "middle"}))
    for number, exactly, expected in ((2, True, True), (1, True, False), (1, False, True), (3, False, False)):
        assert true(facts(counts=[{"of": red, "number": number, "exactly": exactly}])) is expected


# ---- the same files


@pytest.mark.filterwarnings(FORK_WARNING)
def test_files_do_not_depend_on_workers_start_method_or_hash_seed(tmp_path: Path) -> None:
    make_scenes(tmp_path / "here", **SMALL)
    # The start method is the system's, here fork.
    make_scenes(tmp_path / "pool", **SMALL | {"workers": 2})
    script = (
        "import multiprocessing, sys; from laps.data import make_scenes\n"
        "multiprocessing.set_start_method('spawn')\n"
        "make_scenes(sys.argv[1], num_train=10, num_dev=4, num_test=4, workers=2)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "spawn")],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        timeout=120,
    )

    assert contents(tmp_path / "pool") == contents(tmp_path / "here")
    assert contents(tmp_path / "spawn") == contents(tmp_path / "here")


def test_scenes_depend_on_the_seed_and_not_on_how_many_follow(tmp_path: Path) -> None:
    make_scenes(tmp_path / "few", **SMALL)
    make_scenes(tmp_path / "more", **SMALL | {"num_train": 12})
    make_scenes(tmp_path / "other", **SMALL | {"seed": 1})
    few, more, other = (contents(tmp_path / name) for name in ("few", "more", "other"))
    shared = {name for name in few if name.endswith("jpg")}

    assert {name: more[name] for name in shared} == {name: few[name] for name in shared}
    assert all(other[name] != few[name] for name in shared)


@pytest.mark.parametrize(("image_size", "captions"), [(32, 1), (224, 12)])
def test_other_sizes_and_numbers_of_captions(tmp_path: Path, image_size: int, captions: int) -> None:
    file = make_scenes(tmp_path, **SMALL | {"image_size": image_size, "captions_per_image": captions})
    for entry in json.loads(file.read_text())["images"]:
        assert len({sentence["raw"] for sentence in entry["sentences"]}) == captions
        assert all(is_true(s["facts"], entry["objects"], image_size) for s in entry["sentences"])
        with Image.open(tmp_path / "images" / entry["filename"]) as image:
            assert image.size == (image_size, image_size)


def test_identifiers_count_through_the_file(images: list[Entry]) -> None:
    assert [entry["imgid"] for entry in images] == list(range(373))
    assert [s["sentid"] for entry in images for s in entry["sentences"]] == list(range(5 * 373))
    assert all(s["imgid"] == entry["imgid"] for entry in images for s in entry["sentences"])
    assert all(b["group"] - a["group"] in (0, 1) for a, b in pairwise(images))


# ---- the folder


def test_an_identical_set_is_reused_and_left_alone(tmp_path: Path) -> None:
    file = make_scenes(tmp_path, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    assert make_scenes(tmp_path, **SMALL | {"workers": 2}) == file
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_another_set_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_scenes(tmp_path, **SMALL)
    before = contents(tmp_path)
    message = r"holds other scenes \(expected num_test=8, seed=3, or another folder, got num_test=4, seed=0\)"
    with pytest.raises(LapsValueError, match=message):
        make_scenes(tmp_path, **SMALL | {"seed": 3, "num_test": 8})
    assert contents(tmp_path) == before


@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_broken_off_set_is_finished_by_the_same_call_only(tmp_path: Path) -> None:
    make_scenes(tmp_path / "whole", **SMALL)
    half = tmp_path / "half"
    make_scenes(half, **SMALL)
    (half / "dataset.json").rename(half / "unfinished.json")
    # An image that cannot be written: a folder has its name.
    (half / "images" / "train_000009.jpg").unlink()
    (half / "images" / "train_000009.jpg").mkdir()
    for workers in (1, 2):
        with pytest.raises(IsADirectoryError, match="train_000009"):
            make_scenes(half, **SMALL | {"workers": workers})
        assert not (half / "dataset.json").exists()
    with pytest.raises(LapsValueError, match="holds other scenes"):
        make_scenes(half, **SMALL | {"seed": 1})

    (half / "images" / "train_000009.jpg").rmdir()
    make_scenes(half, **SMALL)
    assert contents(half) == contents(tmp_path / "whole")


def test_a_set_that_lost_images_is_refused(tmp_path: Path) -> None:
    make_scenes(tmp_path, **SMALL)
    (tmp_path / "images" / "test_000001.jpg").unlink()
    with pytest.raises(LapsValueError, match=r"lacks 1 of its images, such as test_000001\.jpg"):
        make_scenes(tmp_path, **SMALL)


@pytest.mark.parametrize("content", ["", "[]", '{"images": []}', '{"scenes": 3}', "\xff"])
def test_a_foreign_dataset_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(LapsValueError, match=r"dataset\.json is no set of scenes"):
        make_scenes(tmp_path, **SMALL)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LapsValueError, match="holds something else"):
        make_scenes(tmp_path, **SMALL)
    with pytest.raises(LapsValueError, match=r"thesis\.tex is no folder"):
        make_scenes(tmp_path / "thesis.tex", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_train": -1}, "num_train is out of range"),
        ({"num_train": 0, "num_dev": 0, "num_test": 0}, "are all 0"),
        ({"image_size": 31}, "image_size is out of range"),
        ({"captions_per_image": 0}, "captions_per_image is out of range"),
        ({"seed": -1}, "seed is out of range"),
        ({"workers": 0}, "workers is out of range"),
    ],
)
def test_wrong_numbers_are_named(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    with pytest.raises(LapsValueError, match=message):
        make_scenes(tmp_path / "new", **SMALL | changed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changed", [{"num_test": 4.0}, {"seed": "0"}, {"progress": 1}])
def test_wrong_types_are_named(tmp_path: Path, changed: dict[str, object]) -> None:
    with pytest.raises(LapsTypeError, match=f"make_scenes: {next(iter(changed))} is no"):
        make_scenes(tmp_path, **SMALL | changed)


def test_progress_stays_out_of_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_scenes(tmp_path, **SMALL | {"progress": True})
    assert capfd.readouterr() == ("", "")
