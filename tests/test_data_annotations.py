"""COCO's annotations, lists of ALBEF and BLIP, CLIP_benchmark's text files: read as they are published."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _refused import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from laps.data import RegionTransform, RetrievalData, check, load
from PIL import Image

# Image, captions: none, one and two, so that no reader can assume a number.
TRAIN = [
    ("COCO_train2014_000000000009.jpg", ["a boat", "a red boat"]),
    ("COCO_train2014_000000000025.jpg", []),
]
VAL = [("COCO_val2014_000000000042.jpg", ["a dog, asleep"]), ("COCO_val2014_000000000073.jpg", ["a cat"])]


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 9 % 256, len(name), sum(map(ord, name)) % 256)).save(folder / name)


def coco(rows: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """As cocodataset.org publishes it: ids are numbers, annotations come in any order."""
    images = [
        {"license": 3, "file_name": name, "coco_url": "http://x", "height": 8, "width": 8, "id": 900 + i}
        for i, (name, _) in enumerate(rows)
    ]
    annotations = [
        {"image_id": 900 + i, "id": 77 * t, "caption": f"{text}\n"}
        for i, (_, captions) in enumerate(rows)
        for t, text in enumerate(captions)
    ]
    return {
        "info": {"year": 2014, "description": "COCO"},
        "images": images,
        "licenses": [{"id": 3, "name": "CC"}],
        "annotations": annotations[::-1],
    }


def write_coco(root: Path, release: str = "2014") -> Path:
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", TRAIN), ("val", VAL)):
        (folder / f"captions_{split}{release}.json").write_text(json.dumps(coco(rows)))
        objects = {**coco(rows), "annotations": [{"image_id": 900, "bbox": [0, 0, 1, 1], "id": 1}]}
        (folder / f"instances_{split}{release}.json").write_text(json.dumps(objects))
        (folder / f"person_keypoints_{split}{release}.json").write_text(json.dumps(objects))
        write_images(root / f"{split}{release}", [name for name, _ in rows])
    return folder


def names(data: RetrievalData) -> list[str]:
    return [path.name for path in data.image_paths]


def pairs(data: RetrievalData) -> set[tuple[str, str]]:
    images = names(data)
    return {(images[i], text) for i, text in zip(data.caption_to_image, data.captions, strict=True)}


# ---- COCO


@pytest.mark.parametrize("release", ["2014", "2017"])
def test_a_folder_of_cocos_annotations_has_a_split_for_each_file_of_captions(
    tmp_path: Path, release: str
) -> None:
    folder = write_coco(tmp_path, release)
    for path in (tmp_path, folder):
        train, dev = load(path, "train"), load(path, "dev")
        assert names(train) == [name for name, _ in TRAIN]
        assert pairs(train) == {(name, text) for name, captions in TRAIN for text in captions}
        assert train.captions_of(1).size == 0
        assert pairs(dev) == {(name, text) for name, captions in VAL for text in captions}
        assert all(path.is_file() for path in train.image_paths + dev.image_paths)
    alone = load(folder / f"captions_val{release}.json", "val")
    assert pairs(alone) == pairs(load(folder, "val"))


def test_regions_of_a_detector_take_the_place_of_images_in_any_format(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    for name, _ in VAL:
        np.savez((tmp_path / "val2014" / name).with_suffix(".npz"), features=np.zeros((36, 4), np.float32))
    data = load(folder, "val", regions=True)
    assert [path.suffix for path in data.image_paths] == [".npz", ".npz"]
    assert RegionTransform(36, 4).open(data.image_paths[0]).shape == (36, 9)
    np.save(tmp_path / "dev_ims.npy", np.zeros((1, 36, 4), np.float32))
    (tmp_path / "dev_caps.txt").write_text("a cat\na dog\n")
    rows = load(tmp_path / "dev_ims.npy", "dev", regions=True)
    assert (rows.captions, rows.image_paths) == (["a cat", "a dog"], [tmp_path / "dev_ims.npy" / "0"])


def test_files_of_objects_are_no_captions_and_say_so(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    for name in ("instances_train2014.json", "person_keypoints_train2014.json"):
        refused(
            lambda name=name: load(folder / name, "train"),
            name,
            "annotations[0] has no caption",
            "instances_",
        )
    info = folder / "image_info_test2014.json"
    info.write_text(json.dumps({"images": coco(VAL)["images"]}))
    refused(lambda: load(info, "test"), "no annotations", "image_info_")
    assert sorted(load(folder, "val").captions) == ["a cat", "a dog, asleep"]


def test_clip_benchmarks_coco_splits_are_in_cocos_layout(tmp_path: Path) -> None:
    write_images(tmp_path / "val2014", [name for name, _ in VAL])
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(coco(VAL)))
    assert names(load(tmp_path, "test")) == [name for name, _ in VAL]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda c: c["images"].append({"id": 900, "file_name": "x.jpg"}),
            ("images[2]", "id 900", "another image"),
        ),
        (lambda c: c["annotations"].append({"image_id": 1, "caption": "x"}), ("annotations[2]", "absent")),
        (
            lambda c: c["annotations"].append({"image_id": 900, "caption": 3}),
            ("annotations[2]", "'caption'", "3"),
        ),
        (
            lambda c: c["annotations"].append({"image_id": [9], "caption": "x"}),
            ("annotations[2]", "'image_id'"),
        ),
        (lambda c: c["annotations"].append("a cat"), ("annotations[2]", "str")),
        (lambda c: c["annotations"].append({"image_id": 900, "caption": " "}), ("annotations[2]", "empty")),
        (lambda c: c["images"].append({"id": 5}), ("images[2]", "'file_name'")),
        (lambda c: c["images"].append({"id": None, "file_name": "x.jpg"}), ("images[2]", "'id'")),
        (lambda c: c.update(images={}), ("'images'", "list")),
    ],
)
def test_a_broken_file_of_coco_is_refused_with_the_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], parts: tuple[str, ...]
) -> None:
    file = write_coco(tmp_path) / "captions_val2014.json"
    content = coco(VAL)
    change(content)
    file.write_text(json.dumps(content))
    refused(lambda: load(file, "val"), str(file), *parts)


# ---- ALBEF, BLIP


def albef(folder: Path) -> Path:
    """A caption an entry for training, all captions of an image in one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    train = [
        {"image": f"flickr30k-images/{i}.jpg", "caption": f"caption {t} of {i}", "image_id": i}
        for i in (1, 2)
        for t in range(3)
    ]
    (folder / "flickr30k_train.json").write_text(json.dumps(train))
    for split, i in (("val", 3), ("test", 4)):
        entry = {"image": f"flickr30k-images/{i}.jpg", "caption": [f"caption {t} of {i}" for t in range(5)]}
        (folder / f"flickr30k_{split}.json").write_text(json.dumps([entry]))
    (folder / "vqa_val.json").write_text(json.dumps([{"image": "x.jpg", "question": "why?"}]))
    (folder / "answer_list.json").write_text('["yes", "no"]')
    return folder


def test_lists_of_albef_are_read_from_a_folder_of_them(tmp_path: Path) -> None:
    folder = albef(tmp_path / "annotation")
    write_images(tmp_path / "flickr30k-images", [f"{i}.jpg" for i in range(1, 5)])
    for path in (folder, tmp_path):
        train, test = load(path, "train"), load(path, "test")
        assert (names(train), train.caption_to_image.tolist()) == (["1.jpg", "2.jpg"], [0, 0, 0, 1, 1, 1])
        assert (names(test), test.captions) == (["4.jpg"], [f"caption {t} of 4" for t in range(5)])
    assert load(folder / "flickr30k_val.json", "dev").num_captions == 5
    report = check(tmp_path, progress=False)
    assert report.ok
    assert {name: (s.images, s.captions) for name, s in report.splits.items()} == {
        "test": (1, 5),
        "train": (2, 6),
        "val": (1, 5),
    }


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"caption": "x"}, ("entry 1", "'image'")),
        ({"image": "a.jpg"}, ("entry 1", "'caption'", "only image")),
        ({"image": "a.jpg", "caption": ["x", 3]}, ("entry 1", "'caption'", "3")),
        ({"image": "a.jpg", "caption": {"words": "x"}}, ("entry 1", "'caption'", "words")),
        ({"image": 7, "caption": "x"}, ("entry 1", "'image'", "7")),
        ("a.jpg", ("entry 1", "str")),
        ({"image": "a.jpg", "caption": [""]}, ("entry 1", "empty caption")),
    ],
)
def test_a_broken_list_is_refused_with_the_entry(tmp_path: Path, entry: Any, parts: tuple[str, ...]) -> None:
    write_images(tmp_path, ["a.jpg"])
    file = tmp_path / "set_train.json"
    file.write_text(json.dumps([{"image": "a.jpg", "caption": "a cat"}, entry]))
    refused(lambda: load(file, "train"), str(file), *parts)


def test_one_image_in_two_files_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    for split in ("train", "test"):
        (tmp_path / f"x_{split}.json").write_text(json.dumps([{"image": "a.jpg", "caption": "a cat"}]))
    refused(lambda: load(tmp_path, "test"), "mixed up", "a.jpg", "train", "test")


# ---- CLIP_benchmark


def test_text_files_of_clip_benchmark_are_read_quoted_and_unquoted(tmp_path: Path) -> None:
    """The published ones are pandas' csv under another name; by hand they come without quotation marks."""
    write_images(tmp_path, ["1.jpg", "2.jpg"])
    rows = [
        ("1.jpg", "a cat"),
        ("1.jpg", 'a dog, a "big" one'),
        ("2.jpg", "two cats ."),
        ("2.jpg", "x.jpg, y"),
    ]
    with (tmp_path / "flickr30k_test_karpathy.txt").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("image", "caption"), *rows])
    plain = "image,caption\r\n" + "".join(f"{image},{text}\r\n" for image, text in rows) + "\r\n"
    (tmp_path / "flickr30k_val_karpathy.txt").write_bytes(plain.replace("1.jpg,", "3.jpg,").encode())
    write_images(tmp_path, ["3.jpg"])
    test = load(tmp_path / "flickr30k_test_karpathy.txt", "test")
    assert (names(test), test.caption_to_image.tolist()) == (["1.jpg", "2.jpg"], [0, 0, 1, 1])
    assert test.captions == [text for _, text in rows]
    refused(lambda: load(tmp_path, "test"), "mixed up", "2.jpg")
    (tmp_path / "flickr30k_val_karpathy.txt").write_text("image,caption\n3.jpg,a bird, or two\n")
    assert load(tmp_path, "val").captions == ["a bird, or two"]
    assert load(tmp_path, "test").captions == test.captions


def test_a_text_file_without_header_loses_no_line(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "x_test.txt").write_text("a.jpg,one\na.jpg,two\n")
    assert load(tmp_path / "x_test.txt", "test").captions == ["one", "two"]


def test_a_broken_text_file_is_refused_with_the_line(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    file = tmp_path / "x_test.txt"
    file.write_text("image,caption\na.jpg,one\nno image here\n")
    refused(lambda: load(file, "test"), f"{file}:3 is malformed", "no image here")
    file.write_text("image,caption\na.jpg,one\na.jpg, \n")
    refused(lambda: load(file, "test"), f"{file}:3 has an empty caption")
    file.write_bytes(b"image,caption\na.jpg,one\xff\n")
    refused(lambda: load(file, "test"), "not UTF-8", str(file))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)),
        min_size=1,
        max_size=8,
    )
)
def test_any_captions_come_back_from_a_text_file_as_csv_writers_leave_it(
    rows: list[tuple[int, str]],
) -> None:
    import tempfile

    rows = [(i, text.strip()) for i, text in rows if text.strip()]
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), [f"{i}.jpg" for i in range(4)])
        file = Path(folder) / "x_test.txt"
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([("image", "caption"), *((f"{i}.jpg", text) for i, text in rows)])
        if rows:
            data = load(file, "test", on_empty="keep")
            assert [
                (names(data)[i], c) for i, c in zip(data.caption_to_image, data.captions, strict=True)
            ] == [(f"{i}.jpg", text) for i, text in rows]


# ---- which format


def test_a_folder_of_two_formats_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    (folder / "dataset_coco.json").write_text(json.dumps({"images": []}))
    refused(
        lambda: load(folder, "val"), "dataset_coco.json", "captions_train2014.json", "captions_val2014.json"
    )
    (folder / "dataset_coco.json").unlink()
    (folder / "coco_karpathy_val.json").write_text('[{"image": "a.jpg", "caption": "x"}]')
    refused(lambda: check(folder, progress=False), "coco_karpathy_val.json", "captions_train2014.json")


def test_two_files_of_one_split_are_refused_with_both(tmp_path: Path) -> None:
    folder = albef(tmp_path)
    (folder / "coco_karpathy_train.json").write_text('[{"image": "a.jpg", "caption": "x"}]')
    refused(lambda: load(folder, "train"), "coco_karpathy_train.json", "flickr30k_train.json")


def test_a_folder_of_nothing_known_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "notes.json").write_text("{}")
    refused(lambda: load(tmp_path, "test"), "none of them in: a.jpg, b.jpg, notes.json")


def test_the_ground_truth_files_of_blip_are_passed_over(tmp_path: Path) -> None:
    image = tmp_path / "images" / "a.jpg"
    image.parent.mkdir()
    image.write_bytes(b"")
    for split in ("train", "val", "test"):
        image.with_name(f"{split}.jpg").write_bytes(b"")
        entries = [{"image": f"{split}.jpg", "caption": [f"{split} caption"]}]
        (tmp_path / f"coco_karpathy_{split}.json").write_text(json.dumps(entries))
        truth = {"annotations": [{"image_id": 0, "caption": "x", "id": 0}], "images": [{"id": 0}]}
        for name in (f"coco_karpathy_{split}_gt.json", f"coco_{split}_truth.json"):
            (tmp_path / name).write_text(json.dumps(truth))
    assert load(tmp_path, "test").captions == ["test caption"]


def test_equal_names_in_the_folder_of_each_split_are_different_images(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.jpg").write_bytes(split.encode())
        content = {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "caption": split}],
        }
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    assert load(tmp_path, "train").image_paths == [tmp_path / "train2017" / "1.jpg"]
    assert load(tmp_path, "val").image_paths == [tmp_path / "val2017" / "1.jpg"]
    refused(lambda: load(tmp_path, "train", images=tmp_path / "val2017"), "mixed up", "1.jpg")


def test_what_is_wrong_with_a_file_called_as_cocos_is_said(tmp_path: Path) -> None:
    file = tmp_path / "captions_train.json"
    file.write_text(json.dumps({"images": [], "annotations": []}))
    refused(lambda: load(tmp_path, "train"), "lists no image")
    file.write_text(json.dumps({"images": [{"id": 1}], "annotations": []}))
    refused(lambda: load(tmp_path, "train"), "images[0] has no usable 'file_name'")
