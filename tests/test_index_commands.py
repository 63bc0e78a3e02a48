"""`laps encode`, `laps search` and `laps index`, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import PIL.Image
import pytest
from _models import ENVIRONMENT, tiny_laps
from laps.cli import main
from laps.index import fingerprint, listing
from laps.index.hits import Hit, HitLists, Hits
from laps.index.page import page
from laps.index.terminal import picture_lines

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_laps().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for colour in ("red", "green", "blue", "white", "black"):
        PIL.Image.new("RGB", (48, 32), colour).save(folder / f"{colour} & <co>.png")
    return folder


@pytest.fixture
def index(model: Path, photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    assert run("encode", photos, "-o", folder, "--model", model, *QUICK) == 0
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_folder_is_encoded_and_searched_in_processes_of_their_own(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    commands = [
        ["encode", photos, "-o", tmp_path / "index", "--model", model, "--num-workers", "2"],
        ["search", tmp_path / "index", "a red circle", "-k", "3", "--thumbnails"],
    ]
    answers = [
        subprocess.run(
            [sys.executable, "-m", "laps.cli", *map(str, command)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        for command in commands
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert answers[0].stdout.startswith("5 added, 0 updated, 0 unchanged, 0 deleted, 0 skipped: 5 images")
    lines = answers[1].stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["rank", "score", "global", "image"]
    # No terminal, no pictures.
    assert "\x1b" not in answers[1].stdout


def test_json_and_page_have_the_hits(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    capsys.readouterr()
    assert run("search", index, "a circle", "two squares", "-k", 2, "--json", "--html", page) == 0

    results = json.loads(capsys.readouterr().out)
    assert [result["text"] for result in results] == ["a circle", "two squares"]
    assert [hit["rank"] for hit in results[0]["hits"]] == [1, 2]
    html = page.read_text()
    assert html.count("<img") == 4
    assert html.count(" alt=") == 4
    assert "<co>" not in html
    assert "http" not in html
    assert "color-scheme: light dark" in html


def test_an_image_is_a_query(index: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = photos / "red & <co>.png"
    capsys.readouterr()
    assert run("search", index, "--image", path, "-k", 1) == 0
    assert str(path) in capsys.readouterr().out


def test_a_second_run_needs_no_model_and_prunes(
    index: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(photos, tmp_path / "copy")
    assert run("encode", copy, "-o", index, *QUICK) == 0
    (copy / "red & <co>.png").unlink()
    capsys.readouterr()
    assert run("encode", copy, "-o", index, "--prune", *QUICK) == 0
    assert capsys.readouterr().out.startswith("0 added, 0 updated, 4 unchanged, 1 deleted, 0 skipped")
    assert run("index", "delete", index, copy) == 0
    assert "deleted 4; 5 images" in capsys.readouterr().out
    assert run("index", "compact", index, "--quiet") == 0
    assert "5 images" in capsys.readouterr().out


def test_a_new_index_is_made_from_one_listing_and_one_look_at_the_weights(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        assert run("encode", photos, "-o", tmp_path / "index", "--model", model, *QUICK) == 0
    finally:
        sys.setprofile(before)
    assert calls[listing.list_folder.__code__] == 1
    assert calls[fingerprint._digest.__code__] == 1


def test_a_folder_without_images_leaves_no_index(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    assert run("encode", tmp_path / "none", "-o", tmp_path / "index", "--model", model, *QUICK) == 2
    assert "no image files" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


def test_a_folder_of_unreadable_images_is_an_error_though_the_index_stays(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("no image")
    command = ["encode", photos, "-o", tmp_path / "index", "--model", model, *QUICK]
    with pytest.warns(UserWarning, match=r"a\.jpg"):
        assert run(*command) == 2
    answer = capsys.readouterr()
    assert "0 added, 0 updated, 0 unchanged, 0 deleted, 1 skipped: 0 images" in answer.out
    assert f"laps: laps encode: {tmp_path / 'index'} is empty" in answer.err
    PIL.Image.new("RGB", (40, 40)).save(photos / "b.jpg")
    with pytest.warns(UserWarning, match=r"a\.jpg"):
        assert run(*command) == 0


def test_check_has_status_1_for_damage_and_repairs_it(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("index", "check", index, "--quiet") == 0
    [shard] = (index / "shards").iterdir()
    with shard.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage" * 10)
    capsys.readouterr()
    assert run("index", "check", index, "--repair", "--quiet") == 1
    out = capsys.readouterr().out
    assert shard.name in out
    assert "left out, and laps encode adds them again" in out
    assert run("index", "check", index, "--quiet") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "{photos}", "-o", "{new}"], "is no index yet (expected --model, to make one)"),
        (["encode", "{photos}/no", "-o", "{new}", "--model", "{model}"], "is missing"),
        (["encode", "{photos}/red & <co>.png", "-o", "{new}", "--model", "{model}"], "is a file"),
        (["encode", "{photos}", "-o", "{index}", "--storage", "int8"], "has another --storage"),
        (["search", "{index}"], "nothing to search for"),
        (["search", "{new}", "a circle"], "holds no index"),
        (["search", "{index}", "a circle", "-k", "0"], "k is out of range"),
        (["search", "{index}", " "], "caption"),
        (["index", "delete", "{index}", "absent.jpg"], "is not in the index"),
    ],
)
def test_errors_are_one_line_with_status_2(
    arguments: list[str],
    message: str,
    index: Path,
    photos: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"index": index, "photos": photos, "model": model, "new": tmp_path / "new"}
    capsys.readouterr()
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_hits_show_their_queries_once_escaped_and_with_pictures(photos: Path) -> None:
    path = photos / "red & <co>.png"
    lists = HitLists([Hits("a \x1b[1m <b>", [Hit(1, 0.5, 0.25, path)]), Hits(path, [Hit(1, 1.0, 1.0, path)])])
    assert repr(lists[0]).splitlines()[0] == r'"a \x1b[1m <b>"'
    assert repr(lists) == f"{lists[0]!r}\n\n{lists[1]!r}"
    html = lists._repr_html_()
    # Two hits, and the image that is the second query.
    assert html.count("<img") == 3
    assert html.index("the image that was searched with") < html.index("Like ")
    assert html in page(lists)
    assert "<b>" not in html.replace("<b>1</b>", "")
    assert "<span>score 0.500,</span> <span>global 0.250</span>" in html


def test_thumbnails_are_half_blocks_in_colour(photos: Path) -> None:
    lines = picture_lines(photos / "red & <co>.png")
    assert len(lines) == 8
    assert all(line.count("▀") == 24 and line.endswith("\x1b[0m") for line in lines)
    assert "38;2;255;0;0" in lines[0]
    assert picture_lines(photos / "absent.png") == []
