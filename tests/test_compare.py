"""Comparisons: what a file may say, runs that go on where they stopped, and the tables."""

from __future__ import annotations

import csv
import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import laps
import PIL.Image
import pytest
import yaml
from _models import ENVIRONMENT
from laps import compare
from laps.cli import main
from laps.compare.settings import Scenes
from laps.compare.table import Cell, Table

pytestmark = pytest.mark.usefixtures("one_thread")

run_module = importlib.import_module("laps.compare.run")

TINY: dict[str, Any] = {
    "title": "Tiny",
    "scenes": {"train": 16, "dev": 4, "test": 4},
    "model": "small",
    "seeds": [0, 1],
    "start": {"head": "vse", "epochs": 1},
    "train": {"epochs": 1, "batch_size": 16, "warmup_epochs": 0, "augment": 0.0},
    "rows": [
        {"name": "VSE++", "head": "vse"},
        {"name": "CHAN", "head": "chan", "loss": {"margin": 0.1}, "published": "CHAN"},
    ],
    "published": {"all": "Flickr30K 1K", "backbone": "ViT-Base-224"},
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, **changes}))
    return file


def run(comparison: compare.Comparison, out: Path) -> Table:
    return compare.run(comparison, out, num_workers=0, progress=False)


def test_it_trains_what_is_missing_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare.read(written(tmp_path))
    out = tmp_path / "runs"
    # Seed 0 alone, as if the rest had been interrupted.
    run(replace(comparison, seeds=(0,)), out)
    assert capsys.readouterr().err.count("seed 0") == 3
    table = run(comparison, out)
    told = capsys.readouterr().err
    assert "seed 0" not in told
    assert told.count("seed 1") == 3
    assert [(r.row, r.seed) for r in table.results] == [
        ("VSE++", 0), ("CHAN", 0), ("VSE++", 1), ("CHAN", 1),
    ]  # fmt: skip
    assert str(run(comparison, out)) == str(table)
    assert capsys.readouterr().err == ""
    for name, seed in (("vse", 0), ("chan", 1)):
        folder = out / name / f"seed-{seed}"
        assert laps.LAPS.from_pretrained(folder / "best").head.name == name
        assert not (folder / "last").exists()
    assert laps.LAPS.from_pretrained(out / "chan" / "seed-0" / "best").objective.margin == 0.1
    assert all(r.steps == 5 and r.seconds > 0 for r in table.results)
    assert [r.parameters for r in table.results] == [0, 0, 0, 0]

    other = replace(comparison, train={**comparison.train, "learning_rate": 0.01})
    with pytest.raises(laps.LapsValueError, match="holds a run with other settings"):
        run(other, out)


def test_the_tables_say_what_was_found(tmp_path: Path) -> None:
    comparison = compare.read(written(tmp_path))
    base = dict.fromkeys(["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"], 10.0)
    results = [
        compare.Result(row, seed, {**base, "rsum": rsum}, None, 5, 60.0, 0)
        for row, seed, rsum in (
            ("VSE++", 0, 100.0),
            ("VSE++", 1, 110.0),
            ("CHAN", 0, 120.0),
            ("CHAN", 1, 130.0),
        )
    ]
    table = Table(comparison, results)
    lines = table.parts()["all"]
    assert [line.name for line in lines] == ["VSE++", "CHAN", "CHAN, published"]
    assert lines[0].cells["rsum"].mean == 105
    assert lines[0].cells["rsum"].spread == pytest.approx(50**0.5)
    assert lines[2].cells["rsum"] == Cell(489.9)
    markdown = table.markdown()
    assert "| VSE++ | **10.0 ± 0.0** |" in markdown
    assert "**125.0 ± 7.1** | 2 | 5 | 1.0 |" in markdown
    assert "| CHAN, published | 69.2 | 91.8 |" in markdown
    assert "105.0 ± 7.1 | 2 |" in markdown
    latex = table.latex()
    assert r"\multicolumn{3}{c}{Image-to-Text} & \multicolumn{3}{c}{Text-to-Image}" in latex
    assert r"\textbf{125.0 $\pm$ 7.1} \\" in latex
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [row["row"] for row in rows] == [line.name for line in lines]
    assert float(rows[1]["rsum"]) == 125
    table.save(tmp_path / "t")
    assert json.loads((tmp_path / "t" / "table.json").read_text())["lines"]["all"][0]["name"] == "VSE++"
    assert (tmp_path / "t" / "table.md").read_text() == markdown


def test_latex_survives_the_names_of_rows() -> None:
    rows = (compare.Row("a & b_c 100%"),)
    comparison = compare.Comparison("t", rows, scenes=Scenes(), layout="ablation")
    metrics = dict.fromkeys(["i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "rsum"], 1.0)
    result = compare.Result("a & b_c 100%", 0, metrics, None, 1, 1.0, 0)
    assert r"a \& b\_c 100\% &" in Table(comparison, [result]).latex()


def test_published_figures_are_those_of_the_paper() -> None:
    found = compare.published()
    assert found["Flickr30K 1K", "ViT-Base-224", "LAPS"]["rsum"] == 507.3
    assert found["MS-COCO 5K", "Swin-Base-384", "LAPS"]["t2i_r1"] == 53.0
    assert found["MS-COCO 5K", "CLIP-ViT-Large-224", "LAPS"]["i2t_r1"] == 72.9
    assert found["Flickr30K 1K", "ViT-Base-224", "use the clustering algorithm"]["i2t_r1"] == 68.4
    for figures in found.values():
        if "rsum" in figures:
            recalls = [value for name, value in figures.items() if name != "rsum"]
            assert sum(recalls) == pytest.approx(figures["rsum"], abs=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [{"name": "a", "head": "scam"}]}, "head of row 'a'"),
        ({"rows": [{"name": "a"}, {"name": "A!"}]}, "names of rows"),
        ({"rows": [{"name": "start"}]}, "names of rows"),
        ({"rows": [{"head": "vse"}]}, "lacks a name"),
        ({"rows": [{"name": "a", "colour": 1}]}, "unknown names.*colour"),
        ({"rows": [{"name": "a", "loss": {"name": "x"}}]}, "name"),
        ({"rows": [{"name": "a", "options": 3}]}, "options of row 'a' is no mapping"),
        ({"model": "huge"}, "model"),
        ({"layout": "wide"}, "layout"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": "012"}, "seeds is no list"),
        ({"data": "a.json"}, "data and scenes.*both"),
        ({"scenes": None}, "data and scenes.*none"),
        ({"train": {"seed": 3}}, "train has seed"),
        ({"train": {"epoch": 3}}, "train has an unknown option"),
        ({"train": {"epochs": 0}}, "epochs"),
        ({"loss": {"colour": 1}}, "unknown option"),
        ({"loss": 3}, "loss is no mapping"),
        ({"scenes": {"trains": 3}}, "unknown names.*trains"),
        ({"nonsense": 1}, "unknown names.*nonsense"),
        ({"regions": {"num_regions": 3}}, "regions with a model of pixels"),
        ({"regions": {"colour": 3}}, "regions has unknown names.*colour"),
        ({"regions": {"num_regions": "4"}}, "num_regions of regions is no integer"),
        ({"regions": {"feature_dim": 0}}, "feature_dim of regions is out of range"),
        ({"regions": {"labels": 3}}, "labels of regions are no file"),
        ({"model": "region-36"}, "scenes have pixels"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(laps.LapsError, match=rf"tiny\.yaml: .*{message}"):
        compare.read(written(tmp_path, **changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text in ("[1, 2]", "title: [", "!!python/object/apply:os.system ['touch hostile']"):
        file.write_text(text)
        with pytest.raises(laps.LapsValueError, match=r"a\.yaml"):
            compare.read(file)
    with pytest.raises(laps.LapsValueError, match=r"a YAML file, or one of .*scenes"):
        compare.read(tmp_path / "missing.yaml")


def test_every_config_of_ours_can_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare"]) == 0
    listed = capsys.readouterr().out
    for name in compare.configs():
        assert name in listed
        drawn = "scenes:" in compare.configs()[name].read_text()
        comparison = compare.read(name, data=None if drawn else tmp_path)
        figures = compare.published()
        backbone = comparison.published.get("backbone")
        for protocol in set(comparison.published) - {"backbone"}:
            for row in comparison.rows:
                if row.published is not None:
                    assert (comparison.published[protocol], backbone, row.published) in figures


def test_the_heads_of_the_regions_config_can_be_built(tmp_path: Path) -> None:
    comparison = compare.read("flickr30k-regions", data=tmp_path)
    run_module._check_rows(comparison)
    assert comparison.region_options() == {"num_regions": 36, "feature_dim": 2048, "labels": None}
    rows = {row.head for row in comparison.rows}
    assert rows == {"vse", "gpo", "scan", "sgraf", "chan", "hrem", "tgdt", "cpfean"}


def test_labels_of_a_file_are_beside_it_and_those_of_the_command_go_before_them(tmp_path: Path) -> None:
    regions = {"num_regions": 9, "labels": "names.txt"}
    file = written(tmp_path, scenes=None, start=None, model="region-36", regions=regions)
    (tmp_path / "names.txt").write_text("star\n")
    comparison = compare.read(file, data=tmp_path)
    assert comparison.region_options() == {"num_regions": 9, "feature_dim": 2048, "labels": ["star"]}
    (tmp_path / "other.txt").write_text("moon\nsun\n")
    comparison = compare.read(file, data=tmp_path, labels=tmp_path / "other.txt")
    assert comparison.region_options()["labels"] == ["moon", "sun"]


def test_the_command_writes_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    arguments = ["compare", str(written(tmp_path)), "--out", str(out), "--quiet", "--num-workers", "0"]
    assert main([*arguments, "--rows", "VSE++", "--seeds", "3"]) == 0
    shown = capsys.readouterr().out
    assert "| VSE++ |" in shown
    assert (out / "vse" / "seed-3" / "result.json").exists()
    assert not (out / "chan").exists()
    for suffix in ("md", "tex", "csv", "json"):
        assert (out / f"table.{suffix}").read_text()
    assert main([*arguments, "--rows", "nothing"]) == 2
    assert "rows is unknown" in capsys.readouterr().err


# ---- what a reviewer found


def fake(comparison: compare.Comparison, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs in which nothing is trained; returns what was asked to be."""
    asked: list[str] = []

    def train(settings: compare.Comparison, row: compare.Row, seed: int, data: Any, options: Any) -> None:
        asked.append(f"{row.name} {seed}")
        metrics = dict.fromkeys(
            ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"], float(seed)
        )
        done = compare.Result(row.name, seed, metrics, None, 1, 1.0, 0)
        folder = run_module._folder(row.slug, seed, options)
        folder.mkdir(parents=True)
        key = run_module._key(settings, row, data)
        (folder / "result.json").write_text(json.dumps({"key": key, "laps": "0", **vars(done)}))

    monkeypatch.setattr(run_module, "_train", train)
    run(comparison, out)
    return asked


def pairs(folder: Path, word: str = "red") -> Path:
    lines = ["image,caption,split"]
    for split, number in (("train", 16), ("val", 4), ("test", 4)):
        for i in range(number):
            PIL.Image.new("RGB", (8, 8)).save(folder / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,a {word} circle,{split}")
    file = folder / "pairs.csv"
    file.write_text("\n".join(lines))
    return file


def test_results_belong_to_the_contents_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = pairs(tmp_path / "a"), pairs(tmp_path / "b")
    file = written(tmp_path, scenes=None, data=str(first), images=str(first.parent))
    comparison = compare.read(file)
    assert len(fake(comparison, tmp_path / "out", monkeypatch)) == 4
    moved = compare.read(file, data=second, images=second.parent)
    assert fake(moved, tmp_path / "out", monkeypatch) == []
    pairs(tmp_path / "b", "blue")
    with pytest.raises(laps.LapsValueError, match="other settings"):
        fake(moved, tmp_path / "out", monkeypatch)


def test_what_changes_no_result_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare.read(written(tmp_path, seeds=[0]))
    fake(comparison, tmp_path / "out", monkeypatch)
    other = replace(comparison, train={**comparison.train, "save_every": 7})
    renamed = replace(other, rows=(replace(other.rows[0], name="vse"), other.rows[1]))
    assert fake(renamed, tmp_path / "out", monkeypatch) == []
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| vse |" in table
    assert "| CHAN |" in table
    for change in (
        {"loss": {"margin": 0.3}},
        {"start": None},
        {"train": {**TINY["train"], "epochs": 2}},
    ):
        changed = replace(comparison, **change)  # type: ignore[arg-type]
        with pytest.raises(laps.LapsValueError, match="other settings"):
            fake(changed, tmp_path / "out", monkeypatch)


def test_a_command_that_a_signal_ends_says_that_the_same_goes_on(tmp_path: Path) -> None:
    train = {**TINY["train"], "epochs": 500}
    file = written(tmp_path, seeds=[0], start=None, train=train, rows=TINY["rows"][:1])
    arguments = ["compare", file, "--out", tmp_path / "out", "--device", "cpu", "--num-workers", 0, "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "laps.cli", *map(str, arguments)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "out").glob("*/seed-0/last/state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = (line for line in error.splitlines() if line.startswith("laps: "))
    assert line.startswith("laps: Trainer: SIGTERM after step ")
    assert line.endswith("/last; the same command goes on from there")
    assert "resume" not in error


def test_the_encoders_of_another_loss_are_no_start(tmp_path: Path) -> None:
    comparison = compare.read(written(tmp_path, seeds=[0]))
    run(comparison, tmp_path / "out")
    for row in comparison.rows:
        shutil.rmtree(tmp_path / "out" / row.slug)
    with pytest.raises(laps.LapsValueError, match=r"start.*other settings"):
        run(replace(comparison, loss={"margin": 0.3}), tmp_path / "out")


def test_the_table_keeps_what_was_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare.read(written(tmp_path))
    fake(comparison, tmp_path / "out", monkeypatch)
    more = replace(comparison, rows=(*comparison.rows, compare.Row("SCAN", "scan")))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(more, tmp_path / "out")
    table = compare.run(comparison, tmp_path / "out", rows=["VSE++"], progress=False)
    assert [(line.name, line.seeds) for line in table.parts()["all"]] == [
        ("VSE++", 2),
        ("CHAN", 2),
        ("CHAN, published", 0),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "a", "head": "chan", "options": {"poling": 1}}]}, "row 'a'.*poling"),
        ({"rows": [{"name": "a", "head": "clip", "loss": {"margin": 0.3}}]}, "row 'a'.*margin"),
        ({"rows": [{"name": "a", "published": "LAPSE"}]}, "row 'a' has no published figures"),
        ({"folds": 9}, "folds"),
    ],
)
def test_no_hours_pass_before_a_mistake_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare.read(written(tmp_path, **changes))
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(laps.LapsError, match=message):
        run(comparison, tmp_path / "out")
