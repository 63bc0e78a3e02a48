"""`laps demo` at a tiny size: the report, the models it leaves, and what the report's numbers claim."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from laps import LAPS, LapsValueError
from laps.data import RetrievalData, load, make_scenes
from laps.data.phrases import read_scene_words
from laps.data.scene_facts import is_true
from laps.demo import recipe, run
from laps.demo.lookalikes import QUERIES, Lookalike, TestScenes, rank_accuracy
from laps.demo.measure import measure
from laps.demo.recipe import HEADS, Sizes
from laps.demo.report import chance
from laps.evaluation import evaluate
from laps.grounding import evaluate_grounding
from laps.metrics import retrieval_metrics
from PIL import Image

SIZES = Sizes(train=16, dev=4, test=16, pretraining_epochs=1, epochs=1, batch_size=16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Models this small gain nothing from more, and wait long for each other on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Done:
    """A folder into which the demo ran twice, and what it held after the first time."""

    out: Path
    first_report: str

    @property
    def file(self) -> Path:
        return self.out / "scenes" / "dataset.json"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("demo") / "out"
    run(out, seed=3, sizes=SIZES, progress=False)
    first = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").write_text("an old report")
    (out / "mine.txt").write_text("not the demo's")
    (out / "laps" / "mine.txt").write_text("not the demo's")
    assert run(out, seed=3, sizes=SIZES, progress=False) == out / "report.html"
    return Done(out, first)


class Page(HTMLParser):
    """Collects what the claims are about; elements that are closed out of order raise."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def page(done: Done) -> Page:
    return Page((done.out / "report.html").read_text(encoding="utf-8"))


def test_report_is_well_formed(page: Page) -> None:
    assert page.open == []
    assert {"html", "main", "table", "svg"} <= {tag for tag, _ in page.elements}
    assert not any("nan" in value for value in page.values("points"))


def test_report_needs_no_other_file_and_no_network(done: Done, page: Page) -> None:
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert page.values("href") == []
    assert not {"link", "iframe"} & {tag for tag, _ in page.elements}
    assert not page.values("src") or all("http" not in value for value in page.values("src"))
    style = (done.out / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_picture_decodes_and_says_what_it_shows(page: Page) -> None:
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    # Eight of four look-alikes, and five by each model for the first sentence at least.
    assert len(images) > 18
    for attributes in images:
        assert attributes["alt"]
        assert attributes["src"] is not None
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as picture:
            picture.load()
            assert picture.size == (96, 96)


def test_report_follows_dark_mode_and_fits_a_phone(done: Done, page: Page) -> None:
    assert "prefers-color-scheme: dark" in (done.out / "report.html").read_text(encoding="utf-8")
    assert "width=device-width, initial-scale=1" in page.values("content")


def test_report_has_the_results_and_the_sentences_searched_with(done: Done, page: Page) -> None:
    scenes = TestScenes(done.file, load(done.file, "test"))
    searched = [query.text for query in QUERIES if scenes.true_images(query.facts)]
    assert searched
    assert all(f"“{text}”" in page.text for text in searched[:4])
    for head in HEADS:
        assert f"{json.loads((done.out / f'{head}.json').read_text())['metrics']['rsum']:.1f}" in page.text


@pytest.mark.parametrize("head", HEADS)
def test_saved_models_give_the_reported_metrics_again(done: Done, head: str) -> None:
    again = evaluate(LAPS.from_pretrained(done.out / head), load(done.file, "test"), progress=False)
    assert again.metrics == json.loads((done.out / f"{head}.json").read_text())["metrics"]


def test_second_run_replaces_its_own_files_and_no_others(done: Done) -> None:
    assert (done.out / "mine.txt").read_text() == "not the demo's"
    assert (done.out / "laps" / "mine.txt").read_text() == "not the demo's"
    report = (done.out / "report.html").read_text(encoding="utf-8")
    # Equal seeds give equal results; only the times differ.
    first, second = (text.partition("How it was done")[0] for text in (done.first_report, report))
    assert first == second
    assert not list(done.out.glob(".*"))


def test_ctrl_c_leaves_the_old_report_and_no_scraps(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("an old report")
    # So many epochs that the signal comes before the last one.
    sizes = Sizes(train=16, dev=4, test=4, epochs=1000, batch_size=16)
    code = "import sys; from laps.demo import run; from laps.demo.recipe import Sizes; "
    code += f"run(sys.argv[1], sizes={sizes})"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where the tests run in the background, children are told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while child.poll() is None and not list(tmp_path.glob(".training-*/last/*")):
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()

    assert errors.decode().strip().endswith("KeyboardInterrupt")
    assert (tmp_path / "report.html").read_text() == "an old report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "scenes"]


def test_both_models_go_on_from_the_same_encoders(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_data, dev_data = (load(done.file, split) for split in ("train", "dev"))
    learn = partial(recipe.train, sizes=SIZES, seed=3, progress=False)
    start = learn(recipe.PRETRAINING_HEAD, train_data, dev_data, tmp_path / "start").model
    monkeypatch.setattr(recipe, "TRAINING_RATE", 1e-12)

    for head in HEADS:
        model = learn(head, train_data, dev_data, tmp_path / head, start=start).model
        for ours, theirs in (
            (model.image_encoder, start.image_encoder),
            (model.text_encoder, start.text_encoder),
        ):
            for name, weights in theirs.named_parameters():
                torch.testing.assert_close(ours.get_parameter(name), weights, atol=1e-6, rtol=1e-6)


def test_scenes_of_another_seed_are_drawn_anew(tmp_path: Path) -> None:
    sizes = Sizes(train=4, dev=4, test=4, pretraining_epochs=1, epochs=1, batch_size=4)
    earlier = make_scenes(tmp_path / "scenes", num_train=12, num_dev=4, num_test=4, seed=7, workers=1)

    measured = measure(tmp_path, seed=8, sizes=sizes, progress=False)

    assert measured.file == earlier
    assert json.loads(earlier.read_text())["scenes"]["seed"] == 8
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 12


def test_foreign_files_among_the_scenes_are_refused_and_stay(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=4, num_dev=4, num_test=4, seed=7, workers=1)
    foreign = tmp_path / "scenes" / "images" / "holiday.jpg"
    foreign.write_bytes(b"mine")

    with pytest.raises(LapsValueError, match="holds something else"):
        measure(tmp_path, seed=8, sizes=SIZES, progress=False)
    assert foreign.read_bytes() == b"mine"


def test_chance_is_what_random_scores_reach_on_average() -> None:
    data = RetrievalData([Path(f"{i}.jpg") for i in range(6)], ["a"] * 15, np.arange(15) // 3 + 1)
    rng = np.random.default_rng(0)
    found = [retrieval_metrics(rng.random((6, 15)), data.caption_to_image) for _ in range(2000)]

    for name, expected in chance(data).items():
        values = [metrics[name] for metrics in found]
        # Five standard errors.
        assert np.mean(values) == pytest.approx(expected, abs=5 * np.std(values) / 2000**0.5 + 1e-9)


def test_lookalikes_are_images_of_which_the_caption_is_false(done: Done) -> None:
    data = load(done.file, "test")
    scenes = TestScenes(done.file, data)

    for pair in scenes.lookalikes():
        truth = [is_true(scenes.facts[pair.caption], scenes.objects[i], 96) for i in (pair.image, pair.other)]
        assert truth == [True, False]
        assert data.caption_to_image[pair.caption] == pair.image
        assert scenes.groups[pair.image] == scenes.groups[pair.other]


def test_rank_accuracy_counts_ties_as_failures() -> None:
    scores = np.array([[0.5, 0.1, 0.3], [0.5, 0.2, 0.1]], dtype=np.float32)
    pairs = [Lookalike(0, 0, 1), Lookalike(1, 0, 1), Lookalike(2, 0, 1), Lookalike(1, 1, 0)]

    assert rank_accuracy(scores, pairs) == 50.0


def test_words_that_point_are_counted(done: Done, page: Page) -> None:
    data, model = load(done.file, "test"), LAPS.from_pretrained(done.out / "laps").eval()
    words = [w for w in read_scene_words(done.file) if w.image in data.image_paths]
    result = evaluate_grounding(model, words, progress=False).summary()
    assert f"In {result['pointing']:.0f} of 100 cases" in page.text
    assert f"a patch at random would in {result['chance']:.0f}" in page.text


def test_pairs_can_be_looked_into(done: Done) -> None:
    html = (done.out / "report.html").read_text(encoding="utf-8")
    views = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert len(views) == 3
    for view in views:
        data = json.loads(view)
        assert len(data["kept"]) == 36
        assert data["words"][0]["text"] == "[start]"
