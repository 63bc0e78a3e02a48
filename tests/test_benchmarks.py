"""What the benchmarks and the wheel check claim about themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import head, tables
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
