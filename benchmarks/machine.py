"""What a result was measured on, and how a result becomes a file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import laps
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def _field(path: str, key: str) -> str | None:
    """The first value of `key : value` in one of /proc's files; None on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key), None
    )


def describe() -> dict[str, Any]:
    """The machine, the versions and the moment."""
    memory = _field("/proc/meminfo", "MemTotal")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = _first_line("git", "rev-parse", "HEAD")
    changed = _first_line(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "src", "python", "Cargo.toml"
    )
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "laps": laps.__version__,
        "laps_build": {key: str(value) for key, value in laps.info().items()},
        "rustc": _first_line("rustc", "-V"),
        "commit": commit,
        "commit_is_changed": None if commit is None else changed is not None,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def memory_of_child(module: str, arguments: Sequence[str], what: str) -> dict[str, int]:
    """What a benchmark measures of `what` in a fresh process and prints; empty where the system cannot tell.

    Args:
        module: of this package, whose `--memory-of` prints JSON in its last line.
        arguments: of its command line.
        what: for messages.
    """
    # Not Linux.
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if answer.returncode:
        raise RuntimeError(f"measuring the memory of {what} failed:\n{answer.stderr}")
    result: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
    return result


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What every benchmark of whole processes takes; `name` is its file among the results."""
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default: %(default)s)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only")
    parser.add_argument(
        "--output", type=Path, help=f"the JSON to write (default: results/{name} after a full run)"
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
    print(f"Wrote {os.path.relpath(path)}")
