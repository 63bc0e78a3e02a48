"""What the demo's benchmark claims about its figures, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from laps.demo.recipe import HEADS, Sizes, settings
from test_benchmarks import MACHINE

from benchmarks import demo, seeds, tables


def seed(laps: float, vse: float) -> dict[str, Any]:
    return {
        "metrics": {"laps": {"rsum": laps}, "vse": {"rsum": vse}},
        "lookalikes": {"laps": 70.0, "vse": 60.0},
        "chance": {"rsum": 6.4},
    }


def result(seeds: dict[str, Any]) -> dict[str, Any]:
    sizes = {"train": 2500, "dev": 200, "test": 500, "pretraining_epochs": 2, "epochs": 3}
    return {"machine": MACHINE, "settings": {"sizes": sizes}, "seeds": seeds, "summary": demo.summary(seeds)}


def test_lead_is_the_mean_of_the_differences_with_their_spread() -> None:
    seeds = {"0": seed(150.0, 130.0), "1": seed(145.0, 135.0), "2": seed(140.0, 146.0)}

    lead = demo.summary(seeds)["rsum"]["lead"]

    assert lead == {"mean": 8.0, "min": -6.0, "max": 20.0, "stdev": pytest.approx(172**0.5)}


def test_table_has_every_seed_and_a_lead_that_may_be_negative() -> None:
    table = tables.scenes_table(result({"0": seed(150.0, 130.0), "2": seed(140.0, 146.0)}))

    assert "| 0 | 150.0 | 23x | 130.0 | 20x | +20.0 | 70.0 % | 60.0 % |" in table
    assert "| 2 | 140.0 | 22x | 146.0 | 23x | -6.0 |" in table
    assert "**+7.0 ± 18.4**" in table
    assert "between -6.0 and +20.0" in table


def test_table_of_one_seed_claims_no_spread() -> None:
    table = tables.scenes_table(result({"1": seed(150.0, 130.0)}))

    assert "+20.0" in table
    assert "mean" not in table
    assert "±" not in table


def test_seeds_of_other_settings_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "scenes.json"
    wanted = {"sizes": {"train": 8}, **settings()}
    path.write_text(json.dumps({"settings": wanted, "seeds": {"0": {}}}))

    assert seeds.earlier(path, json.loads(json.dumps(wanted))) == {"0": {}}
    assert seeds.earlier(path, {**wanted, "sizes": {"train": 9}}) == {}
    assert seeds.earlier(tmp_path / "absent.json", wanted) == {}


def test_one_seed_runs_and_a_second_one_joins_it(tmp_path: Path) -> None:
    output = tmp_path / "scenes.json"
    sizes = Sizes(train=8, dev=4, test=4, pretraining_epochs=1, epochs=1, batch_size=8)
    arguments = ["--output", str(output)]
    for name, value in asdict(sizes).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]

    for number in (1, 0):
        assert demo.main([*arguments, "--seeds", str(number)]) == 0

    written = json.loads(output.read_text())
    assert list(written["seeds"]) == ["0", "1"]
    for entry in written["seeds"].values():
        assert set(entry["metrics"]) == set(HEADS)
        assert set(entry["seconds"]) >= {"pretrain", "train laps", "train vse"}
    assert tables.scenes_table(written)
