"""Every format becomes the same images, captions and map; what is wrong is named with its file and line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _refused import refused
from hypothesis import given
from hypothesis import strategies as st
from laps import LapsError, LapsTypeError, LapsValueError
from laps.data import RetrievalData, check, load, read_caption_files, read_karpathy, read_pairs

# Image, its split, its captions: one, three and two, so that no reader can assume a number.
ROWS: list[tuple[str, str, list[str]]] = [
    ("a.jpg", "test", ["a cat"]),
    ("b.jpg", "train", ["two dogs", "dogs, running", 'the "big" dog']),
    ("c.jpg", "test", ["a house", "ein Häuschen\u2028am See"]),
    ("d.jpg", "restval", ["a boat"]),
    ("e.jpg", "val", ["a plane", "a bird"]),
]
TEST_CAPTIONS = ["a cat", "a house", "ein Häuschen\u2028am See"]


def write_images(folder: Path, names: list[str] | None = None) -> None:
    """Readers look whether image files are there, not into them."""
    for name in [row[0] for row in ROWS] if names is None else names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def karpathy(rows: list[tuple[str, str, list[str]]] = ROWS, **fields: Any) -> dict[str, Any]:
    return {
        **fields,
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": f" {text}\n"} for text in captions]}
            for name, split, captions in rows
        ],
    }


def write_karpathy(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dataset.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def write_caption_files(folder: Path, split: str, ids: list[str], captions: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def write_pairs(file: Path, rows: list[dict[str, str]]) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            delimiter = "\t" if file.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return file


def flat(rows: list[tuple[str, str, list[str]]] = ROWS) -> list[dict[str, str]]:
    return [{"caption": c, "image": i, "split": s} for i, s, captions in rows for c in captions]


def names(data: RetrievalData) -> list[str]:
    return [path.name for path in data.image_paths]


# ---- what is read


def as_karpathy(folder: Path) -> Path:
    write_karpathy(folder, karpathy(dataset="mine"))
    return folder


def as_caption_files(folder: Path) -> Path:
    for wanted, others in (("train", "restval"), ("test", ""), ("dev", "val")):
        rows = [(i, c) for i, s, captions in ROWS if s in (wanted, others) for c in captions]
        write_caption_files(folder, wanted, [str(ord(i[0])) for i, _ in rows], [c for _, c in rows])
    (folder / "id_mapping.json").write_text(json.dumps({str(ord(row[0][0])): row[0] for row in ROWS}))
    return folder


def as_pairs(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = [(i, "train" if s == "restval" else s, c) for i, s, c in ROWS]
        write_pairs(folder / f"all_of_it.{suffix}", flat(rows))
        return folder

    return write


def as_pairs_per_split(folder: Path) -> Path:
    for split, sources in (("train", ("train", "restval")), ("test", ("test",)), ("val", ("val",))):
        rows = [row for row in flat() if row["split"] in sources]
        write_pairs(folder / f"{split}.csv", [{"image": r["image"], "caption": r["caption"]} for r in rows])
    return folder


every_format = pytest.mark.parametrize(
    "write",
    [as_karpathy, as_caption_files, as_pairs("csv"), as_pairs("tsv"), as_pairs("jsonl"), as_pairs_per_split],
    ids=["karpathy", "caption_files", "csv", "tsv", "jsonl", "csv_per_split"],
)


@every_format
def test_every_format_gives_the_same_data(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write_images(tmp_path / "images")
    path = write(tmp_path)
    test, train, dev = (load(path, split) for split in ("test", "train", "dev"))
    assert (names(test), test.captions) == (["a.jpg", "c.jpg"], TEST_CAPTIONS)
    np.testing.assert_array_equal(test.caption_to_image, [0, 1, 1], strict=True)
    assert (names(train), train.caption_to_image.tolist()) == (["b.jpg", "d.jpg"], [0, 0, 0, 1])
    assert train.captions == ["two dogs", "dogs, running", 'the "big" dog', "a boat"]
    assert (names(dev), dev.captions) == (["e.jpg"], ["a plane", "a bird"])
    assert load(path, "val").captions == dev.captions
    assert all(path.is_file() for path in test.image_paths + train.image_paths)


@every_format
def test_an_unknown_split_is_refused_with_the_present_ones(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    write_images(tmp_path / "images")
    refused(lambda: load(write(tmp_path), "testall"), "no split 'testall'", "train", "test")


@every_format
def test_a_missing_image_is_named_with_its_caption_and_kept_if_asked(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "c.jpg").unlink()
    path = write(tmp_path)
    refused(lambda: load(path, "test"), str(tmp_path / "images" / "c.jpg"), "1 of 2 missing")
    assert names(load(path, "test", on_missing="keep")) == ["a.jpg", "c.jpg"]
    assert len(load(path, "train").captions) == 4
    refused(lambda: load(path, "test", on_missing="ignore"), "on_missing")


@pytest.mark.parametrize("place", ["images", "mine", "mine-images", "."])
def test_images_are_found_beside_the_file(tmp_path: Path, place: str) -> None:
    write_images(tmp_path / place)
    data = read_karpathy(write_karpathy(tmp_path, karpathy(dataset="mine")), "test")
    assert data.image_paths[0].resolve() == (tmp_path / place / "a.jpg").resolve()


def test_images_of_flickr30k_are_found_where_its_archive_unpacks(tmp_path: Path) -> None:
    write_images(tmp_path / "flickr30k-images")
    folder = as_caption_files(tmp_path / "f30k")
    assert load(folder, "test").image_paths[0] == tmp_path / "flickr30k-images" / "a.jpg"


def test_given_images_win_over_those_beside_the_file(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_images(tmp_path / "elsewhere")
    file = write_karpathy(tmp_path, karpathy())
    assert load(file, "test", images=tmp_path / "elsewhere").image_paths[0].parent.name == "elsewhere"
    refused(lambda: load(file, "test", images=tmp_path / "nowhere"), "nowhere is missing")


def test_the_error_lists_where_images_were_looked_for(tmp_path: Path) -> None:
    file = write_karpathy(tmp_path, karpathy(dataset="mine"))
    refused(lambda: load(file, "test"), str(tmp_path / "images"), str(tmp_path / "mine"), "a.jpg")
    (tmp_path / "empty").mkdir()
    refused(lambda: load(file, "test", images=tmp_path / "empty"), str(tmp_path / "empty"))


def test_karpathys_filepath_is_a_folder_inside_the_images(tmp_path: Path) -> None:
    content = karpathy()
    for entry in content["images"]:
        entry["filepath"] = "val2014"
    write_images(tmp_path / "images" / "val2014")
    data = read_karpathy(write_karpathy(tmp_path, content), "test")
    assert data.image_paths[0] == tmp_path / "images" / "val2014" / "a.jpg"


def test_an_image_without_captions_stays_a_distractor(tmp_path: Path) -> None:
    write_images(tmp_path)
    content = karpathy([("a.jpg", "test", []), ("b.jpg", "test", ["x"])])
    data = read_karpathy(write_karpathy(tmp_path, content), "test")
    assert (data.num_images, data.captions_of(0).tolist(), data.captions_of(1).tolist()) == (2, [], [0])


def test_one_id_per_image_means_equally_many_captions_each(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_caption_files(tmp_path, "test", ["2", "1"], ["b1", "b2", "b3", "a1", "a2", "a3"])
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg", "2": "b.jpg"}')
    data = read_caption_files(tmp_path, "test")
    assert (names(data), data.caption_to_image.tolist()) == (["b.jpg", "a.jpg"], [0, 0, 0, 1, 1, 1])


def test_one_id_per_caption_may_come_in_any_order(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_caption_files(tmp_path / "precomp", "test", ["7", "3", "007", "3"], ["b1", "a1", "b2", "a2"])
    (tmp_path / "id_mapping.json").write_text('{"3": "a.jpg", "7": "b.jpg"}')
    data = load(tmp_path / "precomp" / "test_caps.txt", "test")
    assert (names(data), data.caption_to_image.tolist()) == (["b.jpg", "a.jpg"], [0, 1, 0, 1])
    assert data.captions == ["b1", "a1", "b2", "a2"]


def test_pairs_without_a_split_column_are_the_split_of_their_file_name_or_all(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"image": "a.jpg", "caption": "a cat", "note": "x"}]
    assert read_pairs(write_pairs(tmp_path / "test.csv", rows), "test").captions == ["a cat"]
    file = write_pairs(tmp_path / "pairs.tsv", rows)
    assert read_pairs(file, "all").captions == ["a cat"]
    refused(lambda: read_pairs(file, "test"), "one of all")


def test_a_caption_in_quotes_may_span_lines(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = tmp_path / "test.csv"
    file.write_bytes(b'image,caption\r\na.jpg,"a cat,\r\nasleep"\r\nb.jpg,\r\n')
    refused(lambda: read_pairs(file, "test"), f"{file}:4 has an empty caption")
    file.write_bytes(b'image,caption\r\na.jpg,"a cat,\r\nasleep"\r\n')
    assert read_pairs(file, "test").captions == ["a cat,\r\nasleep"]


def test_absolute_image_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    write_images(tmp_path / "far")
    (tmp_path / "near" / "images").mkdir(parents=True)
    rows = [{"image": str(tmp_path / "far" / "a.jpg"), "caption": "a cat"}]
    assert read_pairs(write_pairs(tmp_path / "near" / "test.jsonl", rows), "test").image_paths == [
        tmp_path / "far" / "a.jpg"
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"images": [\n  {"filename": }\n]}', (":2 is malformed", "JSON")),
        ("[]", ("'images'", "list")),
        ({"pictures": []}, ("'images'", "only pictures")),
        ({"images": [{"split": "test", "sentences": []}]}, ("images[0]", "'filename'")),
        ({"images": [{"filename": "a.jpg", "sentences": []}]}, ("images[0]", "'split'")),
        ({"images": [{"filename": "a.jpg", "split": "test"}]}, ("images[0]", "'sentences'")),
        ({"images": ["a.jpg"]}, ("images[0]", "str")),
        (karpathy([("a.jpg", "test", [" "])]), ("images[0]", "empty caption")),
        (karpathy([*ROWS, ("b.jpg", "test", ["dogs"])]), ("mixed up", "train", "test", "b.jpg")),
        ({"images": [{"filename": "a.jpg", "split": "test", "sentences": ["a"]}]}, ("images[0]", "'raw'")),
        ({"images": []}, ("lists no image",)),
    ],
)
def test_a_broken_karpathy_file_is_refused(tmp_path: Path, content: Any, parts: tuple[str, ...]) -> None:
    write_images(tmp_path)
    file = write_karpathy(tmp_path, content)
    refused(lambda: read_karpathy(file, "test"), file.name, *parts)


def test_broken_caption_files_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_caption_files(tmp_path, "test", ["1", "2"], ["a", "b", "c"])
    refused(lambda: load(tmp_path, "test"), "2 ids and 3 captions")
    write_caption_files(tmp_path, "test", ["1", "2"], ["a", "b"])
    refused(lambda: load(tmp_path, "test"), "id_mapping.json is missing", str(tmp_path.parent))
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg"}')
    refused(lambda: load(tmp_path, "test"), "test_ids.txt:2", "id 2", "id_mapping.json")
    (tmp_path / "id_mapping.json").write_text('["a.jpg"]')
    refused(lambda: load(tmp_path, "test"), "maps no ids")
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg", "2": "b.jpg"}')
    write_caption_files(tmp_path, "test", ["1", "2"], ["a", " "])
    refused(lambda: load(tmp_path, "test"), "test_caps.txt:2 has an empty caption")
    write_caption_files(tmp_path, "test", ["1"], [])
    (tmp_path / "test_caps.txt").write_text("")
    refused(lambda: load(tmp_path, "test"), "1 ids and 0 captions")
    (tmp_path / "test_ids.txt").unlink()
    refused(lambda: load(tmp_path, "test"), "test_ids.txt cannot be read")


def test_ids_of_another_split_are_refused_also_where_their_number_divides_that_of_the_captions(
    tmp_path: Path,
) -> None:
    write_images(tmp_path)
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg", "2": "b.jpg"}')
    # One id per caption, of a split with half as many captions.
    write_caption_files(tmp_path, "test", ["1", "2", "01"], [f"caption {i}" for i in range(6)])
    refused(lambda: load(tmp_path, "test"), "test_ids.txt", "test_caps.txt", "line 3 repeats the id 01")


@pytest.mark.parametrize("again", ["./a.jpg", ".//a.jpg", "x/../a.jpg"])
def test_another_spelling_of_a_path_is_the_same_image(tmp_path: Path, again: str) -> None:
    write_images(tmp_path)
    rows = [{"image": "a.jpg", "caption": "a cat"}, {"image": again, "caption": "a black cat"}]
    data = read_pairs(write_pairs(tmp_path / "test.csv", rows), "test")
    assert (names(data), data.caption_to_image.tolist()) == (["a.jpg"], [0, 0])


def test_what_is_missing_or_empty_is_kept_if_asked(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    rows = [{"image": "a.jpg", "caption": "\u200b"}, {"image": "b.jpg", "caption": "a cat"}]
    file = write_pairs(tmp_path / "test.csv", rows)
    data = load(file, "test", on_missing="keep", on_empty="keep")
    assert (names(data), data.captions) == (["a.jpg", "b.jpg"], ["\u200b", "a cat"])
    refused(lambda: load(file, "test", on_missing="keep"), f"{file}:2 has an empty caption")
    refused(lambda: load(file, "test", on_empty="keep"), "b.jpg, which is missing")
    refused(lambda: load(file, "test", on_empty="skip"), "on_empty is unknown")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.csv", "picture,caption\na.jpg,x\n", ("no column of image files", "picture, caption")),
        ("p.csv", "image,caption\na.jpg,x\na.jpg\n", (":3 is malformed", "2 cells")),
        ("p.csv", 'image,caption\na.jpg,"x"y\n', (":2 is malformed",)),
        ("p.csv", 'image,caption\na.jpg,"x\n', (":2 is malformed",)),
        ("p.csv", "image,caption\na.jpg,x\n\n,y\n", (":4", "'image'")),
        ("p.csv", "image,caption\na.jpg, \n", (":2 has an empty caption",)),
        ("p.csv", "image,caption\n", ("lists no image",)),
        ("p.csv", "", ("lists no image",)),
        ("p.csv", "image,caption\na.jpg,\u200b \u2060\n", (":2 has an empty caption",)),
        ("p.csv", "image,caption,split\na.jpg,x,all\n./a.jpg,x,test\n", ("mixed up", "a.jpg")),
        ("p.csv", "image,caption,split\na.jpg,x,\n", (":2", "'split'")),
        ("p.csv", "image,caption,split\na.jpg,x,all\na.jpg,x,test\n", ("mixed up", "a.jpg")),
        ("p.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": \n', (":2 is malformed",)),
        ("p.jsonl", "[1]\n", (":1 is no object",)),
        ("p.jsonl", '{"image": "a.jpg"}\n', (":1 has no column of captions", "got image")),
        ("p.jsonl", '{"image": "a.jpg", "caption": null}\n', (":1", "'caption'", "None")),
        ("p.tsv", b"image\tcaption\na.jpg\t\xff\n", ("not UTF-8",)),
    ],
)
def test_a_broken_file_of_pairs_is_refused(
    tmp_path: Path, name: str, content: str | bytes, parts: tuple[str, ...]
) -> None:
    write_images(tmp_path)
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refused(lambda: load(file, "all"), *parts)


def test_a_folder_that_does_not_tell_its_data_is_refused(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "nowhere", "test"), "nowhere is missing")
    refused(lambda: load(tmp_path, "test"), "none of them")
    as_karpathy(tmp_path)
    write_images(tmp_path)
    write_pairs(tmp_path / "results.csv", flat())
    assert load(tmp_path, "test").captions == TEST_CAPTIONS
    as_caption_files(tmp_path)
    refused(lambda: load(tmp_path, "test"), "dataset.json", "_caps.txt")
    (tmp_path / "notes.txt").write_text("x")
    refused(lambda: load(tmp_path / "notes.txt", "test"), "no known format")


def test_two_files_of_pairs_may_not_hold_the_same_split(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_pairs(tmp_path / "train.csv", flat())
    write_pairs(tmp_path / "test.csv", flat())
    refused(lambda: load(tmp_path, "test"), "one file per split")


# ---- records


@given(st.data())
def test_selected_images_keep_their_captions(data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 8))
    to_image = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=20))
    captions = [f"caption {t}" for t in range(len(to_image))]
    whole = RetrievalData([Path(f"{i}.jpg") for i in range(images)], captions, np.array(to_image))
    chosen = data.draw(st.permutations(range(images)))[: data.draw(st.integers(1, images))]
    expected = {(f"{i}.jpg", captions[t]) for t, i in enumerate(to_image) if i in chosen}
    if not expected:
        refused(lambda: whole.select_images(chosen), "captions is empty")
        return
    part = whole.select_images(chosen)
    assert [path.name for path in part.image_paths] == [f"{i}.jpg" for i in chosen]
    pairs = zip(part.caption_to_image, part.captions, strict=True)
    assert {(part.image_paths[i].name, caption) for i, caption in pairs} == expected
    assert [int(re.sub(r"\D", "", caption)) for caption in part.captions] == sorted(
        t for t, i in enumerate(to_image) if i in chosen
    )
    for new, old in enumerate(chosen):
        assert [part.captions[t] for t in part.captions_of(new)] == [
            captions[t] for t in whole.captions_of(old)
        ]


@pytest.mark.parametrize(
    ("paths", "captions", "to_image", "error", "part"),
    [
        ([], ["x"], [0], LapsValueError, "image_paths is empty"),
        (["a"], [], [], LapsValueError, "captions is empty"),
        (["a"], ["x", "y"], [0], LapsValueError, "wrong shape"),
        (["a"], ["x"], [1], LapsValueError, "caption_to_image[0]"),
        (["a"], ["x"], [-1], LapsValueError, "caption_to_image[0]"),
        (["a"], ["x"], [0.0], LapsTypeError, "float64"),
    ],
)
def test_records_that_do_not_fit_are_refused(
    paths: list[str], captions: list[str], to_image: list[Any], error: type[LapsError], part: str
) -> None:
    with pytest.raises(error, match=re.escape(part)):
        RetrievalData([Path(path) for path in paths], captions, np.array(to_image), "mine/test")


def test_an_image_that_is_not_there_cannot_be_selected() -> None:
    data = RetrievalData([Path("a.jpg")], ["x"], np.array([0]))
    refused(lambda: data.captions_of(1), "no such image")
    refused(lambda: data.select_images([-1]), "no such image")
    refused(lambda: data.select_images([0, 0]), "given twice")


def test_quotation_marks_in_tab_separated_captions_stay(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    rows = [
        'a.jpg\t"Stop sign',
        "b.jpg\tx",
        'c.jpg\ta pipe of 12"',
        'd.jpg\t"Stop" sign',
        'e.jpg\t"all ""of"" it"',
    ]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(["image\tcaption", *rows, ""]))
    data = load(file, "all", images=tmp_path / "images")
    assert data.captions == ['"Stop sign', "x", 'a pipe of 12"', '"Stop" sign', 'all "of" it']


def test_tables_called_after_their_splits_are_one_data_set_and_case_is_folded(tmp_path: Path) -> None:
    write_images(tmp_path)
    for split, row in (("train", ROWS[1]), ("test", ROWS[0])):
        write_pairs(tmp_path / f"flickr_{split}.csv", [{"image": row[0], "caption": row[2][0]}])
    assert load(tmp_path, "train").captions == ["two dogs"]
    assert load(tmp_path, "test").captions == ["a cat"]
    named = [
        {"image": r[0], "caption": r[2][0], "split": s}
        for r, s in zip(ROWS[1::-1], ("Train", "TEST"), strict=True)
    ]
    file = write_pairs(tmp_path / "all.csv", named)
    assert load(file, "train").captions + load(file, "test").captions == ["two dogs", "a cat"]


def test_half_of_a_surrogate_pair_is_a_fault_with_its_line(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = tmp_path / "train.jsonl"
    lines = [r'{"image": "a.jpg", "caption": "a cat"}', r'{"image": "b.jpg", "caption": "half \ud800"}']
    file.write_text("\n".join(lines))
    message = refused(lambda: load(file, "train"), f"{file}:2", "no text", r"\ud800")
    assert message.isascii()
    assert len(check(file, progress=False).splits["train"].faults) == 1
    with pytest.warns(UserWarning, match=f"left out 1: {re.escape(str(file))}:2"):
        assert load(file, "train", on_error="skip").captions == ["a cat"]


def test_a_key_that_repeats_in_a_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"image": "a.jpg", "caption": "a", "caption": "b"}')
    refused(lambda: load(tmp_path / "train.jsonl", "train"), "train.jsonl:1", "'caption' twice")


def test_a_blank_line_at_the_end_of_captions_is_named(tmp_path: Path) -> None:
    write_caption_files(tmp_path, "test", ["0", "1"], ["a", "b", ""])
    refused(lambda: read_caption_files(tmp_path, "test"), "3 captions with the blank line at the end")
