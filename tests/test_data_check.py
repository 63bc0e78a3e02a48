"""The check finds what was put into a data set to be found, and says so in a text and as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import sys
import termios
from pathlib import Path

import pytest
from laps import LapsValueError
from laps.data import CaptionTokenizer, CheckReport, check
from PIL import Image

Entry = tuple[str, str, list[str]]

SOUND: list[Entry] = [
    ("a.jpg", "train", ["a red square", "a square"]),
    ("b.jpg", "train", ["a green square"]),
    ("c.jpg", "train", ["a blue square", "the blue square", "blue"]),
    ("d.jpg", "val", ["a white square"]),
    ("e.jpg", "test", ["a black square"]),
]
COLOURS = dict(
    zip("abcdefgh", ("red", "green", "blue", "white", "black", "cyan", "gold", "pink"), strict=True)
)


def write(folder: Path, entries: list[Entry]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, _, _ in entries:
        Image.new("RGB", (20, 10), COLOURS[name[0]]).save(folder / "images" / name)
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}
        for name, split, captions in entries
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder


def quiet(path: Path, **options: object) -> CheckReport:
    return check(path, progress=False, **options)  # type: ignore[arg-type]


def test_sound_data_is_ok_and_counted(tmp_path: Path) -> None:
    report = quiet(write(tmp_path, SOUND))
    assert report.ok
    assert list(report.splits) == ["train", "val", "test"]
    train = report.splits["train"]
    assert (train.images, train.captions) == (3, 6)
    assert train.captions_per_image == {"min": 1, "median": 2, "max": 3}
    text = str(report)
    assert text.startswith(f"{tmp_path}: ok\ntrain: 3 images, 6 captions; per image 1 to 3, median 2\n")
    assert "were not checked: no tokenizer" in text


def test_missing_and_unreadable_images_are_listed_with_paths(tmp_path: Path) -> None:
    images = write(tmp_path, SOUND) / "images"
    (images / "a.jpg").unlink()
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:400])
    report = quiet(tmp_path)
    train = report.splits["train"]
    assert not report.ok
    assert not train.ok
    assert report.splits["test"].ok
    assert train.missing == [str(images / "a.jpg")]
    assert list(train.unreadable) == [str(images / "b.jpg")]
    assert "cannot be read" in train.unreadable[str(images / "b.jpg")]
    text = str(report)
    assert text.startswith(f"{tmp_path}: problems found")
    assert (
        f"  missing images: 1\n    {images / 'a.jpg'}\n  unreadable images: 1\n    {images / 'b.jpg'}: "
        in text
    )


def test_converted_modes_are_counted_and_no_problem(tmp_path: Path) -> None:
    images = write(tmp_path, SOUND) / "images"
    Image.new("CMYK", (8, 8)).save(images / "a.jpg")
    Image.new("L", (8, 8)).save(images / "b.jpg")
    Image.new("L", (9, 9)).save(images / "c.jpg")
    report = quiet(tmp_path)
    assert report.ok
    assert report.splits["train"].converted == {"CMYK": 1, "L": 2}
    assert "converted to RGB: 1 of mode CMYK, 2 of mode L" in str(report)


def test_empty_captions_are_problems_and_long_ones_are_not(tmp_path: Path) -> None:
    entries = [*SOUND, ("f.jpg", "test", [" ", "\u200b", "a very, very long caption"])]
    tokenizer = CaptionTokenizer.train(
        [text for *_, captions in entries for text in captions], vocab_size=200
    )
    write(tmp_path, entries)
    place = f"{tmp_path / 'dataset.json'}: images[5]"
    assert quiet(tmp_path).splits["test"].empty_captions == [place, place]
    report = quiet(tmp_path, tokenizer=tokenizer, max_length=6)
    assert report.splits["test"].empty_captions == [place, place]
    assert report.splits["test"].long_captions == [(place, 8)]
    assert "captions above 6 tokens, which get truncated: 1" in str(report)
    assert quiet(write(tmp_path, SOUND), tokenizer=tokenizer, max_length=4).ok
    assert quiet(tmp_path, tokenizer=tokenizer).max_length == 512


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff\u2060 \u00ad", "\u200e\u0301", "\u2800\u3164", "\x00\x07"]
)
def test_a_caption_in_which_nothing_is_visible_is_empty_without_a_tokenizer_too(
    tmp_path: Path, text: str
) -> None:
    report = quiet(
        write(tmp_path, [*SOUND, ("f.jpg", "test", [text, "\u200bx", "\u72ac", "\U0001f600", "?"])])
    )
    assert not report.ok
    assert report.splits["test"].empty_captions == [f"{tmp_path / 'dataset.json'}: images[5]"]


def test_a_caption_that_only_the_tokenizer_makes_empty_is_a_problem(tmp_path: Path) -> None:
    # BERT's rules drop the replacement character.
    write(tmp_path, [*SOUND, ("f.jpg", "test", ["\ufffd"])])
    tokenizer = CaptionTokenizer.train(["a red square"], vocab_size=60)
    assert quiet(tmp_path).ok
    report = quiet(tmp_path, tokenizer=tokenizer)
    assert not report.ok
    assert report.splits["test"].empty_captions == [f"{tmp_path / 'dataset.json'}: images[5]"]


def test_data_without_images_or_without_captions_is_not_ok(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"images": []}')
    report = quiet(tmp_path)
    assert not report.ok
    assert str(report).startswith(f"{tmp_path}: problems found\nno images and no captions\n")
    report = quiet(write(tmp_path, [*SOUND, ("f.jpg", "dev2", [])]))
    assert [name for name, split in report.splits.items() if not split.ok] == ["dev2"]
    assert not report.ok
    assert "\ndev2: 1 images, 0 captions; per image 0 to 0, median 0\n  no captions\n" in str(report)
    # A file without rows, beside one that has some, and by itself.
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    shutil.copy(tmp_path / "images" / "a.jpg", pairs)
    (pairs / "train.csv").write_text("image,caption\na.jpg,x\n")
    (pairs / "val.csv").write_text("image,caption\n")
    for report in (quiet(pairs), quiet(pairs / "val.csv")):
        assert not report.ok
        assert "val: 0 images, 0 captions; per image 0 to 0, median 0\n  no images and no captions" in str(
            report
        )
    # Empty caption files.
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "id_mapping.json").write_text("{}")
    for name in ("train_caps.txt", "train_ids.txt"):
        (texts / name).write_text("")
    assert "  no images and no captions" in str(quiet(texts))
    assert not quiet(texts).ok


def test_caption_files_with_the_ids_of_another_split_are_a_leak_or_refused(tmp_path: Path) -> None:
    images = write(tmp_path, SOUND) / "images"
    (tmp_path / "dataset.json").unlink()
    names = {str(i): path.name for i, path in enumerate(sorted(images.iterdir()))}
    (tmp_path / "id_mapping.json").write_text(json.dumps(names))
    for split, ids, captions in (("train", "0 1 2", 6), ("dev", "3 4", 4)):
        (tmp_path / f"{split}_ids.txt").write_text(ids)
        (tmp_path / f"{split}_caps.txt").write_text("".join(f"{split} {i}\n" for i in range(captions)))
    assert quiet(tmp_path).ok
    # The counts fit: three captions per image.
    (tmp_path / "train_ids.txt").write_text("3 4")
    report = quiet(tmp_path)
    assert not report.ok
    assert [(leak.splits, len(leak.images)) for leak in report.leaks] == [(("dev", "train"), 2)]
    (tmp_path / "train_ids.txt").write_text("0 1 2 3")
    with pytest.raises(
        LapsValueError, match=r"train_ids\.txt does not fit train_caps\.txt .*4 ids and 6 captions"
    ):
        quiet(tmp_path)
    (tmp_path / "train_ids.txt").write_text("0 1 9")
    with pytest.raises(LapsValueError, match=r"train_ids\.txt:3 has the id 9, which has no image"):
        quiet(tmp_path)


def test_an_image_of_two_splits_is_a_leak_also_under_another_name(tmp_path: Path) -> None:
    entries = [*SOUND, ("a.jpg", "test", ["a square", "new"]), ("f.jpg", "val", ["x"])]
    images = write(tmp_path, entries) / "images"
    shutil.copy(images / "b.jpg", images / "f.jpg")
    report = quiet(tmp_path)
    assert not report.ok
    assert all(split.ok for split in report.splits.values())
    first, second = report.leaks
    assert (first.splits, first.images) == (
        ("train", "val"),
        [(str(images / "b.jpg"), str(images / "f.jpg"))],
    )
    assert (second.splits, second.captions) == (("train", "test"), ["a square"])
    text = str(report)
    assert f"train and val share images:\n  images: 1\n    {images / 'b.jpg'} = {images / 'f.jpg'}" in text
    assert "  captions of these: 1\n    a square" in text


def test_a_missing_image_of_two_splits_is_a_leak_too(tmp_path: Path) -> None:
    write(tmp_path, [*SOUND, ("a.jpg", "test", ["new"])])
    (tmp_path / "images" / "a.jpg").unlink()
    assert [leak.splits for leak in quiet(tmp_path).leaks] == [("train", "test")]


def test_duplicates_inside_a_split_are_reported_and_no_problem(tmp_path: Path) -> None:
    entries = [*SOUND, ("f.jpg", "test", ["a", "b", "a"])]
    images = write(tmp_path, entries) / "images"
    shutil.copy(images / "e.jpg", images / "f.jpg")
    report = quiet(tmp_path)
    assert report.ok
    test = report.splits["test"]
    assert test.duplicate_images == [[str(images / "e.jpg"), str(images / "f.jpg")]]
    assert test.duplicate_captions == [f"{tmp_path / 'dataset.json'}: images[5]"]
    assert "images given more than once: 1" in str(report)
    assert "captions given more than once for an image: 1" in str(report)


def test_caption_files_and_pairs_are_checked_too(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg", "2": "b.jpg", "3": "c.jpg"}')
    for split, ids in (("test", "1"), ("testall", "1\n2"), ("train", "2\n3")):
        (tmp_path / f"{split}_ids.txt").write_text(ids)
        (tmp_path / f"{split}_caps.txt").write_text("x\n" * len(ids.split()))
    # COCO's "testall" contains its "test" by design; that it meets "train" is a leak.
    assert [leak.splits for leak in quiet(tmp_path).leaks] == [("testall", "train")]
    (tmp_path / "all.tsv").write_text("image\tcaption\tsplit\na.jpg\tx\ttrain\na.jpg\t\ttest\n")
    report = quiet(tmp_path / "all.tsv", images=tmp_path / "images")
    assert report.splits["test"].empty_captions == [f"{tmp_path / 'all.tsv'}:3"]
    assert [leak.splits for leak in report.leaks] == [("train", "test")]


def test_only_the_asked_splits_are_checked(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    (tmp_path / "images" / "a.jpg").unlink()
    report = quiet(tmp_path, splits=["test", "val"])
    assert report.ok
    assert list(report.splits) == ["test", "val"]
    with pytest.raises(LapsValueError, match=r"no split 'dev2' \(expected one of train, val, test"):
        quiet(tmp_path, splits=["dev2"])


def test_the_report_is_json_and_its_text_is_short(tmp_path: Path) -> None:
    entries: list[Entry] = [("e.jpg", "test", ["x"]), *[(f"a{i}.jpg", "train", ["x"]) for i in range(30)]]
    write(tmp_path, entries)
    for i in range(25):
        (tmp_path / "images" / f"a{i}.jpg").unlink()
    report = quiet(tmp_path, threads=2)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["ok"] is False
    assert len(again["splits"]["train"]["missing"]) == 25
    assert "    ... and 15 more" in str(report)
    assert len(str(report).splitlines()) < 30


def test_progress_is_shown_on_a_terminal_alone_and_unless_turned_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SOUND)
    check(tmp_path)
    assert capfd.readouterr().err == ""
    main_end, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        quiet(tmp_path)
        stream.write("now: ")
        check(tmp_path)
    shown = os.read(main_end, 10000).decode()
    os.close(main_end)
    assert shown.startswith("now: ")
    assert "images: 100%" in shown


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LapsValueError, match=r"check: .*nowhere is missing"):
        quiet(tmp_path / "nowhere")
    write(tmp_path, SOUND)
    with pytest.raises(LapsValueError, match="max_length needs a tokenizer"):
        quiet(tmp_path, max_length=20)
    with pytest.raises(LapsValueError, match="max_length is out of range"):
        quiet(tmp_path, max_length=2, tokenizer=CaptionTokenizer.train(["a"], vocab_size=60))
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(LapsValueError, match=r"no image of .* was found"):
        quiet(tmp_path)


def test_control_characters_in_names_of_files_are_shown_escaped(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    (tmp_path / "dataset.json").unlink()
    entries = [{"image": name, "caption": "x"} for name in ("a.jpg", "\x1b[31mred\n.jpg")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, entries)))
    text = str(quiet(tmp_path / "train.jsonl"))
    assert r"\x1b[31mred\n.jpg" in text
    assert "\x1b" not in text
