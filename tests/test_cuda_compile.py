"""Every kernel compiles for every architecture, without a GPU, and keeps its variables in registers."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from laps import _cuda, _laps

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def logs() -> dict[int, list[tuple[str, str]]]:
    files = _cuda.nvrtc_files()
    if not files:
        pytest.skip("a torch without CUDA")
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda architecture: _laps.cuda_compile(files, architecture), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, built, strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_their_variables_in_registers(
    logs: dict[int, list[tuple[str, str]]], architecture: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(logs[architecture]) == 13
    in_memory = []
    with capsys.disabled():
        print(f"\nsm_{architecture}:", end="")
        for name, log in logs[architecture]:
            registers, stack, spills = (
                max(map(int, re.findall(pattern, log)))
                for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill")
            )
            print(f"\n  {name}: {registers} registers, {stack} bytes of stack, {spills} spilled", end="")
            # A stack means variables with an address, which every use then loads from memory.
            if spills or (stack and "forward" in name):
                in_memory.append(name)
            assert "warning" not in log, log
    assert not in_memory
