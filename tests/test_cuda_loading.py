"""Driver, NVRTC and the cache of kernels: what can go wrong, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cuda_emulator import build
from laps import _cuda, _laps
from laps.errors import LapsError

TESTS = Path(__file__).parent
CODE = """
import test_cuda_kernels as kernels
from laps import LapsError
try:
    print("score", kernels.forward(kernels.make())[0][0, 0].item())
except LapsError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build(tmp_path_factory.mktemp("cuda"))


def run(emulated: dict[str, str], **environment: str) -> str:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **emulated, **environment}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("LAPS_CUDA_DRIVER", "/nowhere/libcuda.so.1", "cuda: no CUDA driver (expected /nowhere/libcuda.so.1"),
        ("LAPS_CUDA_DRIVER", "libm.so.6", "cuda: the CUDA driver is too old (expected the function cuInit"),
        ("LAPS_NVRTC", "/nowhere/libnvrtc.so.13", "cuda: no NVRTC (expected one of /nowhere/libnvrtc.so.13"),
        ("LAPS_EMULATOR_INIT", "100", "cuda: cuInit failed (expected success, got CUDA_ERROR_NO_DEVICE"),
        (
            "LAPS_EMULATOR_ARCHITECTURE",
            "75",
            "cuda: GPU 0 is too old for the kernels (expected compute capability",
        ),
        ("LAPS_EMULATOR_COMPILER", "false", "cuda: NVRTC 13.0 cannot compile similarity_forward"),
        (
            "LAPS_EMULATOR_LAUNCH",
            "2",
            "similarity: cuLaunchKernel failed (expected success, got CUDA_ERROR_OUT_OF",
        ),
        (
            "LAPS_EMULATOR_SHARED_MEMORY",
            "256",
            "similarity: GPU 0 has too little shared memory for the forward pass",
        ),
    ],
)
def test_what_goes_wrong_is_an_error_that_says_what(
    emulated: dict[str, str], tmp_path: Path, variable: str, value: str, problem: str
) -> None:
    cache = {"LAPS_CACHE_DIR": str(tmp_path)} if variable == "LAPS_EMULATOR_COMPILER" else {}
    assert run(emulated, **{variable: value}, **cache).startswith(f"LapsError {problem}")


def test_kernels_are_compiled_once_and_kept(emulated: dict[str, str], tmp_path: Path) -> None:
    cache = {"LAPS_CACHE_DIR": str(tmp_path / "new" / "folder")}
    first = run(emulated, **cache)
    assert first.startswith("score ")
    [kept] = (tmp_path / "new" / "folder").iterdir()
    assert run(emulated, **cache, LAPS_EMULATOR_COMPILER="false") == first

    # A damaged file is a miss, and is replaced.
    whole = kept.read_bytes()
    for damaged in (whole[:-5], whole[:10], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert "cannot compile" in run(emulated, **cache, LAPS_EMULATOR_COMPILER="false")
        assert run(emulated, **cache) == first
        assert kept.read_bytes()[:100] == whole[:100]
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


def test_a_cache_that_cannot_be_written_is_done_without(emulated: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert run(emulated, LAPS_CACHE_DIR=str(tmp_path / "file")).startswith("score ")


def test_kernels_for_other_architectures_are_kept_apart(emulated: dict[str, str], tmp_path: Path) -> None:
    cache = {"LAPS_CACHE_DIR": str(tmp_path)}
    first = run(emulated, **cache)
    assert run(emulated, **cache, LAPS_EMULATOR_ARCHITECTURE="86") == first
    assert len(list(tmp_path.iterdir())) == 2


def test_tf32_is_asked_for_in_the_words_of_any_torch() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            assert _cuda.tf32_allowed() == (setting == "tf32")
    finally:
        matmul.fp32_precision = before


def test_nvrtc_is_found_beside_torch() -> None:
    files = _cuda.nvrtc_files()
    if not files:
        pytest.skip("a torch without CUDA")
    assert all(file.name.startswith("libnvrtc.so.") for file in files)


def test_an_unknown_architecture_is_named() -> None:
    if not _cuda.nvrtc_files():
        pytest.skip("a torch without CUDA")
    with pytest.raises(LapsError, match=r"NVRTC \d+\.\d+ cannot compile .* for sm_35"):
        _laps.cuda_compile(_cuda.nvrtc_files(), 35)
