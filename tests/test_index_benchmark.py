"""The benchmark of the search measures what it says, on small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _models import tiny_laps
from laps.data import CaptionTokenizer, load, make_scenes
from laps.index import Hit, Hits

from benchmarks import search

pytestmark = pytest.mark.usefixtures("one_thread")


def test_recall_is_the_share_of_the_true_hits() -> None:
    def hits(*names: str) -> Hits:
        return Hits("a", [Hit(i, 1.0, 1.0, Path(name)) for i, name in enumerate(names, 1)])

    assert search.recall([hits("a", "b"), hits("c")], [hits("b", "d"), hits("c", "a")]) == 0.5


def test_a_small_run_has_recall_1_with_all_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scenes(tmp_path / "s", num_train=8, num_dev=0, num_test=0, workers=1, progress=False)
    tokenizer = CaptionTokenizer.train(load(tmp_path / "s", "train").captions, vocab_size=150)
    tiny_laps(tokenizer=tokenizer).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(search, "CANDIDATES", (5, 30))
    output = tmp_path / "search.json"
    sizes = ["--images", "30", "--train", "4", "--queries", "4", "--exhaustive", "2", "--num-workers", "0"]
    arguments = [*sizes, "--model", str(tmp_path / "model"), "--no-shape", "--output", str(output)]

    assert search.main([*arguments, "--threads", "1"]) == 0

    found = json.loads(output.read_text())["scenes"]
    assert found["images"] == 30
    assert set(found["candidates"]) == {"5", "30"}
    assert found["candidates"]["30"]["recall"] >= 0.95
    assert found["graph_candidates"]["30"]["recall"] >= 0.95
    assert found["graph"]["bytes_per_image"] > 0
    assert found["storage"]["int8"]["bytes_per_image"] < found["storage"]["float32"]["bytes_per_image"]
    assert found["storage"]["float16"]["largest_difference"] < 1e-3
