"""The CUDA kernels without a GPU: stand-ins for driver and NVRTC that compile and run them on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "cuda"


def compiler() -> list[str]:
    """A C++ compiler: the system's, or the one that ziglang brings."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return [found] if found else [sys.executable, "-m", "ziglang", "c++"]


def build(folder: Path, flags: str = "-O1") -> dict[str, str]:
    """Build the stand-ins in `folder`; the environment in which laps takes them for driver and NVRTC."""
    libraries = {}
    for name in ("driver", "nvrtc"):
        libraries[name] = str(folder / f"lib{name}.so")
        command = [*compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", str(FOLDER / f"{name}.cpp")]
        subprocess.run([*command, "-o", libraries[name], "-ldl"], check=True)
    return {
        "LAPS_CUDA_DRIVER": libraries["driver"],
        "LAPS_NVRTC": libraries["nvrtc"],
        "LAPS_CACHE_DIR": str(folder / "cache"),
        "LAPS_EMULATOR_COMPILER": " ".join([*compiler(), *flags.split()]),
        "LAPS_EMULATOR_FOLDER": str(FOLDER),
    }
