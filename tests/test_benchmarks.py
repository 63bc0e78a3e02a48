"""What the benchmarks and the wheel check claim about themselves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from laps import compare
from laps.config import PRESETS

from benchmarks import evaluation, head, tables, training
from benchmarks.shapes import SHAPES, make_batch, similarity_flops
from scripts import check_wheel

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 24.0,
    "torch": "2.11.0",
    "torch_simd": "AVX512",
    "laps": "0.1.0",
    "laps_build": {"simd": "avx512"},
    "rustc": "rustc 1.95.0",
    "commit": "0123456789abcdef",
    "commit_is_changed": False,
    "threads": 2,
    "date": "2026-01-02 03:04 UTC",
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On inputs so small, threads that wait for each other only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_aggregated_tokens_are_those_of_the_method() -> None:
    assert {name: shape.aggregated for name, shape in SHAPES.items()} == {
        "vit-224": 39,
        "vit-384": 115,
        "swin-224": 23,
        "clip-l": 51,
    }


def test_counted_work_is_the_2_7_megaflop_a_pair_that_the_method_needs() -> None:
    flops = similarity_flops(SHAPES["vit-224"], 64, 64, 64 * 15)
    assert sum(flops.values()) / 64**2 == pytest.approx(2.7e6, rel=0.03)


def test_captions_have_8_to_30_words_and_repeat_with_the_seed() -> None:
    batch = make_batch(SHAPES["swin-224"], 2, 500)
    assert (batch.lengths.min(), batch.lengths.max()) == (8, 30)
    assert torch.equal(batch.words, make_batch(SHAPES["swin-224"], 2, 500).words)


@pytest.mark.parametrize("form", ["loop", "torch", "laps"])
def test_every_form_of_the_benchmark_makes_a_step(form: str) -> None:
    batch = head.make_inputs(SHAPES["swin-224"], 2, 3)
    scores, module = head.make_form(form, SHAPES["swin-224"])

    head.step(scores, batch, module)

    assert batch.images.grad is not None
    assert batch.words.grad is not None
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with head.peak_memory() as peak:
        torch.ones(16 * 2**20)
    # 64 MiB, give or take the allocator's pages.
    assert peak["bytes"] == pytest.approx(64 * 2**20, rel=0.1)


@pytest.mark.usefixtures("one_thread")
def test_evaluation_benchmark_extrapolates_slices_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SLICE_IMAGES", 2)
    options = argparse.Namespace(
        images=3, captions=10, loop_captions=2, torch_captions=5, repetitions=2, memory=False
    )

    forms = {name: evaluation.measure_here(name, options) for name in evaluation.FORMS}

    for name, measured in (("loop", 4), ("torch", 10), ("laps", 30)):
        form = forms[name]
        assert (form["pairs_measured"], form["extrapolated"]) == (measured, name != "laps")
        whole_s = form["prepare_s"] + form["pairs"]["median_s"] * 30 / measured
        assert form["whole_s"] == pytest.approx(whole_s)
        # The loop does nothing once per image.
        assert (form["prepare_s"] == 0) == (name == "loop")
        # Every slice was compared with the scores of laps.
        assert ("difference" in form) == (name != "laps")
    table = tables.evaluation_table(evaluation.report(forms, options))
    assert [line.count("(extrapolated)") for line in table.splitlines() if "pairs in" in line] == [1, 1, 0]


def test_evaluation_benchmark_has_the_ratios_of_the_preset() -> None:
    shape = SHAPES[evaluation.SHAPE]
    assert PRESETS["vit-base-224"].head_options == {
        "selection_ratio": shape.selection_ratio,
        "aggregation_ratio": shape.aggregation_ratio,
    }


def test_a_slice_of_captions_has_the_lengths_of_all() -> None:
    lengths = torch.randint(8, 31, (5000,), generator=torch.Generator().manual_seed(0))
    chosen = evaluation.spread(lengths, 8)
    assert len(set(chosen.tolist())) == 8
    assert lengths[chosen].float().mean() == pytest.approx(float(lengths.float().mean()), abs=0.5)
    assert sorted(evaluation.spread(lengths, 5000).tolist()) == list(range(5000))


def test_each_image_of_the_evaluation_benchmark_has_five_captions() -> None:
    assert np.bincount(evaluation.image_of(1000, 5000)).tolist() == [5] * 1000


@pytest.mark.usefixtures("one_thread")
def test_training_benchmark_takes_the_step_of_the_model_with_either_head() -> None:
    model = training.make_model(quick=True).eval()  # without dropout, so that gradients can be compared
    batch = training.make_batch(model, 3)
    gradients = {}
    for name in training.FORMS:
        seconds = training.forward_and_backward(model, training.make_form(name, model), batch)
        assert seconds.keys() | {"optimizer"} == set(training.PARTS)
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)

    model(batch)[0].backward()

    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(expected) == len(list(model.parameters()))
    for ours, loop, whole in zip(gradients["laps"], gradients["loop"], expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=0)
        # Another order of sums, through two encoders.
        torch.testing.assert_close(loop, whole, rtol=1e-2, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_training_benchmark_writes_what_its_table_is_made_from(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    assert training.main(["--quick", "--batch", "4", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {len(form["all_s"]) for form in result["forms"].values()} == {1}
    assert "two small encoders (random weights), batch 4" in tables.training_table(result)


@pytest.mark.usefixtures("one_thread")
def test_encoder_benchmark_writes_what_its_table_is_made_from(tmp_path: Path) -> None:
    try:
        from benchmarks import encoders
    except ImportError:
        pytest.skip("laps-rs-native is not installed for this torch")
    file = tmp_path / "encoders.json"
    assert encoders.main(["--quick", "--repetitions", "1", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text())
    for title, entry in result["encoders"].items():
        assert entry["largest_difference"] < 1e-5, title
        assert entry["step_s"].keys() == set(encoders.FORMS)
    assert "| BERT-base | 2 |" in tables.encoders_table(result)


def test_readme_tables_are_made_from_the_results(tmp_path: Path) -> None:
    form = {"forward": {"median_s": 2.0}, "step": {"median_s": 4.0}, "step_bytes": 3_000_000_000}
    ours = {"forward": {"median_s": 0.1}, "step": {"median_s": 0.32}, "step_bytes": 60_000_000}
    shape = {
        "shape": {"title": "ViT-224", "num_patches": 196, "channels": 512},
        "forms": {"loop": form, "laps": ours},
        "flops": {"all": 11_000_000_000},
        "flops_per_s": {"mm": 200e9, "similarity": 120e9, "head": 110e9},
    }
    settings = {"images": 64, "captions": 64, "words": [8, 30]}
    (tmp_path / "head.json").write_text(
        json.dumps({"machine": MACHINE, "settings": settings, "shapes": {"vit-224": shape}})
    )
    empty = "".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in tables.TABLES)

    readme = tables.render(f"before\n{empty}after\n", tmp_path)

    assert "| 100 ms | 24.41 µs | 20x | 320 ms | 78.12 µs | 12x | 60 MB |" in readme
    assert "| ViT-224 | 11.00 | 200 | 120 | 60% | 110 | 55% |" in readme
    assert tables.MISSING in readme  # no max_sim.json
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert tables.render(readme, tmp_path) == readme


@pytest.mark.parametrize(
    ("wheel", "complaints"),
    [
        ("laps_rs-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl", 0),
        ("laps_rs-0.1.0-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", 0),
        ("laps_rs-0.1.0-cp310-abi3-manylinux_2_34_x86_64.whl", 1),
        ("laps_rs-0.1.0-cp310-abi3-linux_x86_64.whl", 1),
        ("laps_rs-0.1.0-cp312-cp312-manylinux_2_28_x86_64.whl", 2),
    ],
)
def test_wheel_tags_must_be_abi3_and_manylinux_2_28_or_older(wheel: str, complaints: int) -> None:
    assert len(check_wheel.tag_problems(wheel)) == complaints


@pytest.mark.parametrize("library", ["libtorch_cpu.so", "libcudart.so.13", "libgomp.so.1", "libstdc++.so.6"])
def test_wheel_must_not_need_other_libraries(library: str) -> None:
    binary = check_wheel.Binary("laps/_laps.abi3.so", ("libc.so.6", "ld-linux-x86-64.so.2", library), (2, 28))
    [problem] = check_wheel.binary_problems(binary)
    assert library in problem


def test_source_distribution_must_be_whole_and_without_strays() -> None:
    names = [f"laps_rs-0.1.0/{name}" for name in check_wheel.SDIST_FILES]
    assert check_wheel.sdist_problems(names) == []
    assert check_wheel.sdist_problems(names[:-1]) == [f"{check_wheel.SDIST_FILES[-1]} is not in it"]
    [problem] = check_wheel.sdist_problems(
        [*names, "laps_rs-0.1.0/.venv/lib/README.md", "laps_rs-0.1.0/a.so"]
    )
    assert problem.startswith("2 files do not belong in it")


def test_wheel_must_not_need_a_newer_glibc() -> None:
    binary = check_wheel.Binary("laps/_laps.abi3.so", ("libc.so.6", "libgcc_s.so.1"), (2, 34))
    assert len(check_wheel.binary_problems(binary)) == 1


def test_evaluation_table_marks_what_is_extrapolated() -> None:
    def form(pairs: int, seconds: float, whole: float, extrapolated: bool) -> tables.Result:
        return {
            "pairs_measured": pairs,
            "pairs": {"median_s": seconds},
            "pairs_per_s": pairs / seconds,
            "prepare_s": 2.0,
            "whole_s": whole,
            "extrapolated": extrapolated,
            "extra_bytes": 90_000_000,
        }

    settings = {"shape": "ViT-224", "num_patches": 196, "channels": 512, "words": [8, 30]}
    settings |= {"images": 1000, "captions": 5000, "features": "random normal"}
    forms = {"loop": form(8000, 2.5, 1562.5, True), "laps": form(5_000_000, 80, 82, False)}
    forms["laps"]["metrics"] = {"median_s": 0.3}

    table = tables.evaluation_table({"machine": MACHINE, "settings": settings, "forms": forms})

    assert "| 8,000 pairs in 2.5 s | 3,200 | 26 min (extrapolated) | 1.0x | 90 MB |" in table
    assert "| 5,000,000 pairs in 80 s | 62,500 | 82 s | 19x | 90 MB |" in table
    assert "random normal" in table


def test_comparison_table_shows_how_far_laps_is_ahead_seed_by_seed() -> None:
    comparison = compare.read("scenes")
    rsum = {("VSE++", 0): 100.0, ("VSE++", 1): 120.0, ("LAPS", 0): 110.0, ("LAPS", 1): 115.0}
    metrics = dict.fromkeys(["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"], 12.5)
    results = [
        compare.Result(row, seed, {**metrics, "rsum": value}, None, 468, 60.0, 0)
        for (row, seed), value in rsum.items()
    ]
    found = json.loads(json.dumps(compare.Table(comparison, results).to_dict()))
    text = tables.compare_table({"machine": MACHINE, **found})
    assert "2,000 training scenes, 500 test scenes with 2,500 captions" in text
    assert "468 steps; 2 seeds" in text
    assert "| VSE++ | **12.5** |" in text
    assert "| 110.0 ± 14.1 | +2.5 (-5.0 to +10.0) |" in text
    assert "| **112.5 ± 3.5** |  |" in text
    assert "LAPS ahead by" in text


def test_training_table_shows_the_share_of_the_head() -> None:
    def form(head_s: float, head_bytes: int) -> tables.Result:
        parts = {"encoders_forward": 7.0, "head": head_s, "encoders_backward": 13.0, "optimizer": 0.5}
        whole = {"whole": sum(parts.values())}
        return {"median_s": parts | whole, "head_bytes": head_bytes, "step_bytes": 8_000_000_000}

    settings = {"encoders": "ViT + BERT", "batch": 32, "words": [8, 30]}
    forms = {"loop": form(1.5, 1_000_000_000), "laps": form(0.1, 50_000_000)}

    table = tables.training_table({"machine": MACHINE, "settings": settings, "forms": forms})

    assert "| 20 s | 100 ms | 15x | 0.5% | 0.5 s | 20.6 s | 1.07x | 50 MB | 8,000 MB |" in table
