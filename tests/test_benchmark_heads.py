"""The benchmark of all heads: what it compares is equal, and its table is made from what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import laps.heads
import pytest
import torch
from laps.heads import SimilarityHead
from laps.nn import LAPSHead
from test_benchmarks import MACHINE
from torch import Tensor

from benchmarks import heads, tables
from benchmarks.published_heads import PUBLISHED
from benchmarks.shapes import Batch, Shape, make_batch

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Shape("tiny", num_patches=15, channels=16)
TWO_FORMS = [row for row, (name, _) in heads.ROWS.items() if name not in heads.ONE_FORM]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "heads.json"
    assert heads.main(["--quick", "--threads", "1", "--output", str(file), *arguments]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_every_head_of_laps_has_a_row_and_one_kind_of_form() -> None:
    classes = [LAPSHead, *(getattr(laps.heads, name) for name in laps.heads.__all__)]
    names = {x.name for x in classes if isinstance(x, type) and issubclass(x, SimilarityHead)} - {""}
    assert {name for name, _ in heads.ROWS.values()} == names
    assert {"laps", *PUBLISHED, *heads.ONE_FORM} == names
    assert not set(PUBLISHED) & set(heads.ONE_FORM)


@pytest.mark.parametrize("row", TWO_FORMS)
def test_published_forms_have_the_scores_and_gradients_of_our_heads(row: str) -> None:
    head = heads.make_head(row, TINY).double()
    generator = torch.Generator().manual_seed(1)
    for name, x in head.state_dict().items():
        if x.is_floating_point():
            # A bias at zero, or a BatchNorm at rest, could be left out unnoticed; a variance is positive.
            noise = torch.rand(x.shape, dtype=x.dtype, generator=generator)
            x.add_(0.2 * (noise if "var" in name else noise - 0.5))
    # TGDT has no inner words in the shortest.
    single = make_batch(TINY, 3, 7, words=(1, 6))
    assert single.lengths.min() < 4
    batch = Batch(single.images.double(), single.words.double(), single.lengths, single.grad.double())
    forms, inputs = heads.make_forms(head, batch)
    inputs = [*inputs, *head.parameters()]

    ours, theirs = (forms[name]() for name in (heads.OURS, heads.THEIRS))

    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)
    found, expected = (
        # What has no part in the scores has a gradient of zeros.
        torch.autograd.grad((scores * batch.grad).sum(), inputs, allow_unused=True, materialize_grads=True)
        for scores in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_scores_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(*_: Any) -> Tensor:
        return torch.full((4, 4), torch.nan)

    monkeypatch.setitem(PUBLISHED, "chan", wrong)
    with pytest.raises(AssertionError, match="chan: the forms disagree by nan"):
        run(tmp_path, "--heads", "chan")


def test_benchmark_writes_what_its_table_is_made_from(tmp_path: Path) -> None:
    result = run(tmp_path)

    assert list(result["heads"]) == list(heads.ROWS)
    for row, entry in result["heads"].items():
        forms = [heads.OURS, heads.THEIRS] if row in TWO_FORMS else [heads.OURS]
        assert list(entry["forms"]) == forms
        assert all(form.keys() == {"forward", "step"} for form in entry["forms"].values())
        assert entry["sides"].keys() == {"forward", "step"}
        assert row not in TWO_FORMS or entry["difference"] <= 1e-4
    table = tables.heads_table(result)
    # Header, rule, and a line for each form.
    assert table.count("\n|") == 2 + len(heads.ROWS) + len(TWO_FORMS)
    assert "| `scan`, `direction=i2t` | **ours** |" in table
    assert table.count("| in the pairs |") == 1
    assert table.count("|  | plain |") == 1


def test_table_shows_where_we_lose_and_what_was_too_large() -> None:
    def seconds(value: float) -> dict[str, float]:
        return {"median_s": value}

    lost = {"forward": seconds(0.004096), "step": seconds(4.096), "step_bytes": 300_000_000}
    theirs = {"forward": seconds(0.002048)}
    one = {"forward": seconds(0.00004096), "step": seconds(0.0004096), "step_bytes": 100}
    sides = {"forward": seconds(0.01), "step": seconds(0.2)}
    entries = {
        "saf": {
            "head": "saf",
            "options": {},
            "sides": sides,
            "forms": {"ours": lost, "published": theirs},
            "published_step_needs_bytes": 70_000_000_000,
        },
        "vse": {"head": "vse", "options": {}, "sides": sides, "forms": {"ours": one}},
    }
    settings = {"shape": "ViT-224", "num_patches": 196, "channels": 512, "images": 64, "captions": 64}
    result = {"machine": MACHINE, "settings": settings | {"words": [8, 30]}, "heads": entries}

    table = tables.heads_table(result)

    assert "| `saf` | **ours** | 10 ms / 200 ms | 1 µs | 0.5x | 1,000 µs | n/a | 300 MB |" in table
    assert "|  | published |  | 0.5 µs | 1.0x | n/a (about 70 GB) | n/a | n/a |" in table
    assert "| `vse` | **ours** | 10 ms / 200 ms | 0.01 µs |  | 0.1 µs |  | 1 MB |" in table


def test_a_step_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heads, "free_memory", lambda: 1000.0)
    forms = run(tmp_path, "--heads", "chan")["heads"]["chan"]["forms"]
    assert forms["ours"].keys() == {"forward", "step"}
    assert forms["published"].keys() == {"forward"}


def test_what_autograd_keeps_is_counted_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    # exp keeps its result; of the product both factors are that one.
    assert heads.kept_by_autograd(lambda: (lambda y: y * y)(x.exp())) == 4000


def test_a_published_step_is_reckoned_from_captions_of_middling_length() -> None:
    batch = make_batch(TINY, 3, 9)
    for row in ("scan-i2t", "laps"):
        head = heads.make_head(row, TINY)
        whole = heads.kept_by_autograd(heads.make_forms(head, batch)[0][heads.THEIRS])
        assert heads.step_needs(head, batch) == pytest.approx(whole, rel=0.25)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_of_both_forms_is_measured() -> None:
    for form in (heads.OURS, heads.THEIRS):
        found = heads.measure_memory_here("scan", form, 2, 3, TINY)
        assert found.keys() == {"forward_bytes", "step_bytes"}


def test_a_document_has_its_own_tables_only(tmp_path: Path) -> None:
    own = [name for name, table in tables.TABLES.items() if table.document == "docs/heads.md"]
    text = "".join(f"before\n<!-- bench:{name} -->\n<!-- /bench:{name} -->\nafter\n" for name in own)
    (tmp_path / "heads.json").write_text(json.dumps(run(tmp_path, "--heads", "chan", "vse")))

    rendered = tables.render(text, tmp_path, "docs/heads.md")

    assert "| `chan` | **ours** |" in rendered
    assert tables.render(rendered, tmp_path, "docs/heads.md") == rendered
    with pytest.raises(SystemExit, match=r"README\.md has no place marked <!-- bench:head -->"):
        tables.render(text, tmp_path)
