"""Processes that write to an index and are ended: `_index_runs.main()` with the arguments FOLDER PHOTOS.

Prints one line of JSON: what became of each. They are forked from one that has imported everything and
computed nothing, so that each starts at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# transformers imports its parts late; here they come before the forks.
import transformers.models.bert.modeling_bert
import transformers.models.vit.modeling_vit  # noqa: F401
from _models import tiny_laps
from laps import Index, LapsError
from laps.index import IndexingStoppedError

ROOT, PHOTOS = Path(sys.argv[1]), Path(sys.argv[2])
QUERIES = ["a red circle", "two dotted triangles above it"]


def add(folder: Path, seconds: float = 0.01, workers: int = 0) -> None:
    """Encode all photos, slowly, two to a batch and four to a shard."""
    index = Index.open(folder) if (folder / "index.json").exists() else Index.create(folder, tiny_laps())

    def slow(*_: object) -> None:
        (ROOT / f"{folder.name}.begun").touch()
        time.sleep(seconds)

    index.model.image_encoder.register_forward_pre_hook(slow)
    size = 1 if workers == 0 else 2**30
    index.add(PHOTOS, batch_size=2, num_workers=workers, shard_bytes=size, progress=False)


def start(function: Callable[[], None]) -> int:
    """A process of its own group that calls the function; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgrp()
        function()
        status = 0
    except IndexingStoppedError as error:
        status = 128 + error.signal_number
    except LapsError as error:
        print(error, file=sys.stderr)
        status = 2
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Wait; the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def found(folder: Path) -> Any:
    """Everything that searches find in the index now, in a process of its own."""
    out = folder.with_suffix(".json")

    def write() -> None:
        index = Index.open(folder)
        hits = index.search(QUERIES, k=1000, candidates=1000)
        values = [{str(hit.path): hit.score for hit in each} for each in hits]
        out.write_text(json.dumps({"images": len(index), "hits": values, "ok": Index.check(folder).ok}))

    status = end(start(write))
    return json.loads(out.read_text()) if status == 0 else {"failed": status}


def killed() -> dict[str, Any]:
    """A run that is killed again and again at random moments, until one comes to its end."""
    folder, generator, seen, kills = ROOT / "killed", random.Random(0), [], 0
    while True:
        child, before = start(lambda: add(folder)), generation(folder)
        # The first two as they make the index, the others as they write a shard or the manifest.
        while kills >= 2 and runs(child) and generation(folder) == before:
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        if end(child) == 0:
            break
        kills += 1
        if generation(folder) > 0 and kills % 2:
            seen.append(found(folder))
    return {"kills": kills, "seen": seen, "found": found(folder)}


def generation(folder: Path) -> int:
    try:
        return int(json.loads((folder / "index.json").read_text())["generation"])
    except FileNotFoundError:
        return -1


def runs(child: int) -> bool:
    """Whether it still does; one that has ended keeps its id until `end`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def stopped(number: int) -> dict[str, Any]:
    """A run whose whole group, workers too, is told to stop within its first shard."""
    folder = ROOT / f"stopped-{number}"
    end(start(lambda: Index.create(folder, tiny_laps()) and None))
    child = start(lambda: add(folder, 0.2, workers=1))
    while runs(child) and not (ROOT / f"{folder.name}.begun").exists():
        time.sleep(0.005)
    time.sleep(0.3)
    os.killpg(child, number)
    status, began = end(child), found(folder)
    return {"ended": status, "began": began, "last": end(start(lambda: add(folder))), "found": found(folder)}


def two_writers() -> dict[str, Any]:
    """A second writer beside a first, and a reader that the first does not disturb."""
    folder = ROOT / "two"
    end(start(lambda: Index.create(folder, tiny_laps()) and None))
    first = start(lambda: add(folder, 0.1))
    while not (folder / ".lock").exists():
        time.sleep(0.005)
    second = end(start(lambda: add(folder)))
    reading = found(folder)
    return {"second": second, "first": end(first), "reading": reading, "found": found(folder)}


def main() -> None:
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                "whole": (end(start(lambda: add(ROOT / "whole"))), found(ROOT / "whole")),
                "killed": killed(),
                "terminated": stopped(signal.SIGTERM),
                "interrupted": stopped(signal.SIGINT),
                "two": two_writers(),
            }
        )
    )
