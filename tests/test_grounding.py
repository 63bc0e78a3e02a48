"""Phrases with boxes, as they are published, and whether maps point at them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import laps
import numpy as np
import PIL.Image
import pytest
from _models import CAPTIONS, bert_tokenizer, tiny_laps
from hypothesis import given
from hypothesis import strategies as st
from laps.data.phrases import Phrase, read_flickr_entities, read_refcoco, read_scene_words
from laps.grounding import GroundingResult, evaluate_grounding, is_within, overlap, phrase_map, pointed_at

pytestmark = pytest.mark.usefixtures("one_thread")


def peak(row: int, column: int) -> np.ndarray[Any, Any]:
    values = np.zeros((4, 4))
    values[row, column] = 1.0
    return values


def test_pointing_is_at_the_centre_of_a_patch() -> None:
    # 4 x 4 patches on 80 x 40 pixels: the patch in row 1, column 2 has its centre at (50, 15).
    point = pointed_at(peak(1, 2), (80, 40))
    assert point == (50, 15)
    for box, hit in (
        ((49, 14, 51, 16), True),
        ((50, 15, 60, 20), True),
        ((40, 10, 50, 15), False),
        ((0, 0, 80, 14), False),
    ):
        assert is_within(point, [box]) == hit, box
    assert is_within(point, [(0, 0, 1, 1), (49, 14, 51, 16)])


def test_overlap_counts_areas() -> None:
    # The patch covers (40..60, 10..20).
    assert overlap(peak(1, 2), [(40, 10, 60, 20)], (80, 40)) == 1.0
    assert overlap(peak(1, 2), [(50, 10, 70, 20)], (80, 40)) == pytest.approx(1 / 3)
    assert overlap(peak(1, 2), [(0, 20, 80, 40)], (80, 40)) == 0.0
    assert overlap(np.zeros((4, 4)), [(0, 0, 80, 40)], (80, 40)) == 0.0
    two = peak(1, 2) + 0.6 * peak(1, 1)
    assert overlap(two, [(20, 10, 60, 20)], (80, 40)) == 1.0
    assert overlap(two, [(20, 10, 60, 20)], (80, 40), threshold=0.7) == pytest.approx(0.5)


@given(
    values=st.lists(st.floats(0, 1), min_size=16, max_size=16),
    box=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.integers(1, 40)),
)
def test_overlap_is_a_share(values: list[float], box: tuple[int, int, int, int]) -> None:
    x, y, wide, high = box
    found = overlap(np.array(values).reshape(4, 4), [(x, y, x + wide, y + high)], (32, 32))
    assert 0 <= found <= 1


# ---- readers


def test_every_word_that_names_an_attribute(tmp_path: Path) -> None:
    file = laps.data.make_scenes(
        tmp_path / "s", num_train=4, num_dev=4, num_test=8, workers=1, progress=False
    )
    phrases = read_scene_words(file)
    assert phrases == read_scene_words(tmp_path / "s")
    entries = {e["filename"]: e for e in json.loads(file.read_text())["images"] if e["split"] == "test"}
    assert {p.image.name for p in phrases} == set(entries)
    for phrase in phrases:
        assert phrase.image.exists()
        entry = entries[phrase.image.name]
        assert phrase.caption in {s["raw"] for s in entry["sentences"]}
        named = [o for o in entry["objects"] if tuple(o["box"]) in phrase.boxes]
        assert len({o[phrase.category] for o in named}) == 1
        others = [o for o in entry["objects"] if tuple(o["box"]) not in phrase.boxes]
        assert not {o[phrase.category] for o in named} & {o[phrase.category] for o in others}
    assert {"color", "shape"} <= {phrase.category for phrase in phrases}
    said = {phrase.text for phrase in phrases if phrase.category == "shape"}
    assert any(text.endswith("s") for text in said) or said, "plurals count"
    with pytest.raises(laps.LapsValueError, match="no words with boxes in the split 'dev'"):
        read_scene_words(file, "dev")


ENTITIES = """[/EN#1/people A man] in [/EN#2/clothing a blue shirt] is standing on [/EN#3/other a ladder] .
[/EN#1/people A worker] , [/EN#0/notvisual who] [/EN#4/other/vehicles waits] .
"""
ANNOTATION = """<annotation><filename>36979.jpg</filename>
<size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>60</ymax></bndbox></object>
<object><name>1</name><name>2</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>
<object><name>3</name><scene>0</scene><nobndbox>1</nobndbox></object>
</annotation>"""


@pytest.fixture
def entities(tmp_path: Path) -> Path:
    for folder in ("Sentences", "Annotations", "flickr30k-images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "test.txt").write_text("36979\n")
    (tmp_path / "Sentences" / "36979.txt").write_text(ENTITIES)
    (tmp_path / "Annotations" / "36979.xml").write_text(ANNOTATION)
    return tmp_path


def test_flickr30k_entities_as_published(entities: Path) -> None:
    phrases = read_flickr_entities(entities)
    man, shirt, worker = phrases
    assert man.caption == "A man in a blue shirt is standing on a ladder ."
    assert (man.text, man.category) == ("A man", "people")
    # Corners count from 1 and belong to the box.
    assert man.boxes == ((10.0, 20.0, 30.0, 60.0), (0.0, 0.0, 5.0, 5.0))
    assert (shirt.text, shirt.boxes) == ("a blue shirt", ((0.0, 0.0, 5.0, 5.0),))
    assert (worker.text, worker.start) == ("A worker", 0)
    assert man.image == entities / "flickr30k-images" / "36979.jpg"
    assert read_flickr_entities(entities, images="/photos")[0].image == Path("/photos/36979.jpg")


def test_broken_entities_are_named(entities: Path) -> None:
    with pytest.raises(laps.LapsValueError, match=r"val\.txt cannot be read"):
        read_flickr_entities(entities, "val")
    (entities / "Sentences" / "36979.txt").write_text("[/EN#1/people A man")
    with pytest.raises(laps.LapsValueError, match=r"36979\.txt has a phrase that is not closed"):
        read_flickr_entities(entities)
    (entities / "Annotations" / "36979.xml").write_text("<annotation>")
    with pytest.raises(laps.LapsValueError, match=r"36979\.xml cannot be read"):
        read_flickr_entities(entities)


REFS = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 0,
        "image_id": 581857,
        "split": "testA",
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["left"], "raw": "left", "sent_id": 1, "sent": "left"},
        ],
        "category_id": 1,
    },
    {"ann_id": 1, "image_id": 581857, "split": "train", "sentences": [{"sent": "a dog"}]},
]
INSTANCES = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640}],
    "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [10.5, 20.0, 30.0, 40.0]}],
}


@pytest.fixture
def refcoco(tmp_path: Path) -> Path:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=0))
    return tmp_path


def test_refcoco_as_published(refcoco: Path) -> None:
    lady, left = read_refcoco(refcoco, "testA", images="/coco")
    assert (lady.caption, lady.text, left.text) == ("the lady", "the lady", "left")
    assert lady.boxes == ((10.5, 20.0, 40.5, 60.0),)
    assert lady.image == Path("/coco/COCO_train2014_000000581857.jpg")
    with pytest.raises(laps.LapsValueError, match="no expressions in the split 'testC'"):
        read_refcoco(refcoco, "testC", images="/coco")
    with pytest.raises(laps.LapsValueError, match=r"names what .* has not"):
        read_refcoco(refcoco, "train", images="/coco")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile-was-here",)


def test_a_pickle_runs_nothing(refcoco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(refcoco)
    for content in (pickle.dumps([Hostile()]), b"no pickle", pickle.dumps({1: 2})):
        (refcoco / "refs(unc).p").write_bytes(content)
        with pytest.raises(laps.LapsError, match=r"refs\(unc\)\.p"):
            read_refcoco(refcoco, "testA", images="/coco")
    assert not (refcoco / "hostile-was-here").exists()


@pytest.mark.parametrize(
    ("start", "end", "boxes"),
    [(2, 2, ((0, 0, 1, 1),)), (0, 99, ((0, 0, 1, 1),)), (0, 2, ()), (0, 2, ((0, 0, 0, 1),))],
)
def test_phrases_without_sense_are_refused(start: int, end: int, boxes: Any) -> None:
    with pytest.raises(laps.LapsValueError, match="Phrase"):
        Phrase(Path("a.jpg"), "a dog", start, end, boxes)


# ---- models


@pytest.fixture(scope="module")
def model() -> laps.LAPS:
    return tiny_laps(tokenizer=bert_tokenizer())


def test_a_phrase_has_the_maps_of_its_words(model: laps.LAPS) -> None:
    caption = "the large blue square left of a green star"
    why = laps.explain(model, PIL.Image.new("RGB", (40, 40), "red"), caption)
    start = caption.index("blue")
    values = phrase_map(why, start, start + len("blue square"))
    assert values is not None
    blue, square = (next(w for w in why.words if w.text == text) for text in ("blue", "square"))
    np.testing.assert_allclose(values, why.on_grid(blue.patch_shares + square.patch_shares))
    gradient = phrase_map(why, start, start + 4, kind="gradient")
    assert gradient is not None
    np.testing.assert_allclose(gradient, why.on_grid(blue.map))
    whole = phrase_map(why, 0, len(caption))
    assert whole is not None
    special = sum(w.patch_shares.sum() for w in why.words if w.is_special)
    assert whole.sum() == pytest.approx(why.attribution.patch_shares.sum() - special)


def test_a_model_is_measured(model: laps.LAPS, tmp_path: Path) -> None:
    phrases = []
    for number, caption in enumerate(CAPTIONS):
        file = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file)
        everywhere = Phrase(file, caption, 0, 1, ((0, 0, 60, 40),), "all")
        nowhere = Phrase(file, caption, 0, 1, ((0, 0, 1, 1),), "corner")
        phrases += [everywhere, nowhere]
    result = evaluate_grounding(model, phrases, progress=False)
    assert result.hits.tolist() == [True, False] * 3
    assert result.phrases == tuple(phrases)
    assert result.images.tolist() == [0, 0, 1, 1, 2, 2]
    assert [is_within(tuple(p), ((0, 0, 60, 40),)) for p in result.points] == [True] * 6
    assert result.summary("all")["pointing"] == 100
    assert result.summary("all")["chance"] == 100
    assert result.summary("corner")["pointing_high"] == 0
    assert result.summary()["phrases"] == 6
    assert "corner" in result.table()
    with pytest.raises(laps.LapsValueError, match="no phrase is of 'x'"):
        result.summary("x")
    with pytest.raises(laps.LapsValueError, match="phrases is empty"):
        evaluate_grounding(model, [])


def test_what_was_cut_off_is_counted(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    short = laps.data.CaptionTokenizer(tokenizer.backend, max_length=4)
    file = tmp_path / "a.png"
    PIL.Image.new("RGB", (40, 40)).save(file)
    caption = "a red circle red"
    phrases = [Phrase(file, caption, 2, 5, ((0, 0, 9, 9),)), Phrase(file, caption, 13, 16, ((0, 0, 9, 9),))]
    result = evaluate_grounding(tiny_laps(tokenizer=short), phrases, progress=False)
    assert (len(result.hits), result.skipped) == (1, 1)
    assert "1 phrases were cut off" in result.table()


def test_intervals_know_that_phrases_share_images() -> None:
    hits = np.tile(np.repeat([True, False], 10), 5)

    def width(images: np.ndarray[Any, Any]) -> float:
        zeros = np.zeros(100)
        phrases = tuple(Phrase(Path(f"{i}.jpg"), "a", 0, 1, ((0, 0, 1, 1),)) for i in images)
        at = GroundingResult(phrases, np.zeros((100, 2)), hits, zeros, zeros).summary()
        return at["pointing_high"] - at["pointing_low"]

    assert width(np.arange(100) // 10) > 1.5 * width(np.arange(100))


def test_the_benchmark_writes_what_its_table_is_made_from(tmp_path: Path) -> None:
    from benchmarks import grounding, tables

    file = tmp_path / "grounding.json"
    tiny = {"train": 16, "dev": 4, "test": 4, "pretraining-epochs": 1, "epochs": 1, "batch-size": 16}
    sizes = [text for name, value in tiny.items() for text in (f"--{name}", str(value))]
    for seed in ("1", "0"):
        assert grounding.main(["--seeds", seed, "--output", str(file), *sizes]) == 0
    result = json.loads(file.read_text())
    assert list(result["seeds"]) == ["0", "1"]
    for seed in result["seeds"].values():
        ours, theirs = (seed["forms"][form]["shares"]["all"] for form in grounding.FORMS)
        assert ours["phrases"] == theirs["phrases"] > 0
        assert seed["lead"]["mean"] == pytest.approx(ours["pointing"] - theirs["pointing"])
        assert seed["lead"]["low"] <= seed["lead"]["mean"] <= seed["lead"]["high"]
        for form in grounding.FORMS:
            at = seed["misses"]["forms"][form]
            assert sum(at["places"].values()) == pytest.approx(100)
            assert at["places"]["right"] == pytest.approx(seed["forms"][form]["shares"]["all"]["pointing"])
    assert result["summary"]["low"] <= result["summary"]["lead"] <= result["summary"]["high"]
    assert "| 1 |" in tables.grounding_table(result)
    assert "| 1 | LAPS |" in tables.misses_table(result)
