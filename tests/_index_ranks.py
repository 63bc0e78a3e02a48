"""One rank that adds to indexes, started by torchrun: ``_index_ranks.py OUT MODEL PHOTOS DAMAGED``.

What became of each index is in ``OUT/RANK.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from _models import at_batch
from laps import LAPS, Index, LapsError
from laps.distributed import Ranks


def main(out: Path, saved: Path, photos: Path, damaged: Path) -> None:
    dist.init_process_group("gloo")
    ranks, model = Ranks.here(), LAPS.from_pretrained(saved)

    def outcome(name: str, source: Path | list[Path], **options: Any) -> dict[str, Any]:
        ranks.on_main(lambda: (out / name).exists() or Index.create(out / name, model) is None)
        index = Index.open(out / name, model=model)
        try:
            # Two to a batch, a shard for each batch: several rounds.
            options = {"batch_size": 2, "shard_bytes": 1, **options}
            added = index.add(source, progress=False, ranks=ranks, **options)
            return {"added": asdict(added), "images": len(index)}
        except (LapsError, RuntimeError) as error:
            number = getattr(error, "signal_number", None)
            return {"failed": str(error), "signal": number, "images": len(Index.open(out / name))}

    found = {"whole": outcome("whole", photos), "again": outcome("whole", photos)}
    found["damaged"] = outcome("damaged", damaged, on_error="raise")
    found["skipped"] = outcome("damaged", damaged)
    if ranks.rank == 1:
        at_batch(model, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found["stopped"] = outcome("stopped", photos)
    found["resumed"] = outcome("stopped", photos)
    # Rank 0 has done its one image and waits for rank 1, which has two, slowly.
    if ranks.rank == 0:
        at_batch(model, 1, lambda: tell_later(os.getpid()))
    else:
        at_batch(model, 2, lambda: time.sleep(3))
    found["waiting"] = outcome("waiting", sorted(photos.iterdir())[:3], batch_size=1)
    if ranks.rank == 1:
        at_batch(model, 2, fail)
    found["broken"] = outcome("broken", photos)
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def tell_later(process: int) -> None:
    """It is told to stop when it has done what it is at."""
    threading.Timer(1.5, os.kill, (process, signal.SIGTERM)).start()


def fail() -> None:
    raise RuntimeError("out of memory")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
