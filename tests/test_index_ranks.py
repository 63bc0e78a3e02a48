"""An index that two processes encode is the one that a process encodes; what ends one of them ends both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from _models import TESTS, tiny_laps
from _torchrun import torchrun
from laps import Index

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]

QUERY = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model, of 11 photos in `photos`, and of the same with a damaged eighth in `damaged`."""
    folder = tmp_path_factory.mktemp("index-ranks")
    tiny_laps().save_pretrained(folder / "model")
    for name in ("photos", "damaged"):
        (folder / name).mkdir()
        for number in range(11):
            path = folder / name / f"{number:02}.png"
            PIL.Image.new("RGB", (40, 40), (20 * number, 250 - 20 * number, 40)).save(path)
    (folder / "damaged/07.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank tells."""
    (folder / "out").mkdir()
    places = [folder / name for name in ("out", "model", "photos", "damaged")]
    torchrun(TESTS / "_index_ranks.py", *places)
    return [json.loads((folder / f"out/{rank}.json").read_text()) for rank in range(2)]


def scores(index: Index) -> dict[str, float]:
    return {hit.path.name: hit.score for hit in index.search(QUERY, k=100, candidates=100)}


def test_two_ranks_encode_what_one_process_encodes(folder: Path, ranks: list[dict[str, Any]]) -> None:
    alone = Index.create(folder / "alone", tiny_laps())
    alone.add(folder / "photos", progress=False)
    assert ranks[0]["whole"] == ranks[1]["whole"]
    assert ranks[0]["whole"]["added"]["added"] == ranks[0]["whole"]["images"] == 11
    index = Index.open(folder / "out/whole")
    assert Index.check(index.folder, progress=False).ok
    assert scores(index) == pytest.approx(scores(alone), abs=1e-4)
    # Of both ranks, in shards of two images and one: the first has five images, the second six.
    assert len(list((index.folder / "shards").iterdir())) == 6
    assert ranks[0]["again"]["added"]["unchanged"] == 11


def test_what_one_rank_cannot_read_both_refuse_or_skip(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["damaged"] == ranks[1]["damaged"]
    assert "07.png" in ranks[0]["damaged"]["failed"]
    assert ranks[0]["skipped"] == ranks[1]["skipped"]
    done = ranks[0]["skipped"]["added"]
    assert done["skipped"] == 1
    # What either had encoded until then was kept.
    assert done["unchanged"] >= 4
    assert done["unchanged"] + done["added"] == 10


def test_a_signal_to_one_rank_stops_both_and_the_same_call_goes_on(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    for told in ranks:
        assert told["stopped"]["signal"] == 15
        assert "SIGTERM after 4 of 6 images" in told["stopped"]["failed"]
        assert told["resumed"]["images"] == 11
        assert 4 <= told["resumed"]["added"]["unchanged"] < 11
    assert scores(Index.open(folder / "out/stopped")) == pytest.approx(
        scores(Index.open(folder / "out/whole")), abs=1e-4
    )


def test_a_signal_to_a_rank_that_waits_for_the_others_stops_all_and_loses_nothing(
    ranks: list[dict[str, Any]],
) -> None:
    for told in ranks:
        assert told["waiting"]["signal"] == 15
        assert "SIGTERM after 1 of 1 images" in told["waiting"]["failed"]
        assert told["waiting"]["images"] == 3


def test_what_the_encoder_raises_on_one_rank_ends_both_and_loses_nothing(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["broken"]["failed"] == "out of memory"
    assert "rank 1 failed" in ranks[0]["broken"]["failed"]
    assert "RuntimeError: out of memory" in ranks[0]["broken"]["failed"]
    # The first round's shards, and rank 0's of the second.
    assert ranks[0]["broken"]["images"] == ranks[1]["broken"]["images"] == 6


def test_the_command_encodes_in_two_ranks_and_tells_once(folder: Path) -> None:
    place = folder / "command"
    command = ["-m", "laps.cli", "encode", folder / "photos", "-o", place, "--device", "cpu"]
    text = torchrun(*command, "--model", folder / "model", "--num-workers", "0")
    assert text.count("11 added") == text.count("added") == 1
    assert len(Index.open(place)) == 11
