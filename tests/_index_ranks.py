"""One rank that adds to indexes, started by torchrun: ``_index_ranks.py OUT MODEL PHOTOS DAMAGED``.

What became of each index is in ``OUT/RANK.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from laps import LAPS, Index, LapsError
from laps.distributed import Ranks


def main(out: Path, saved: Path, photos: Path, damaged: Path) -> None:
    dist.init_process_group("gloo")
    ranks, model = Ranks.here(), LAPS.from_pretrained(saved)

    def outcome(name: str, source: Path, **options: Any) -> dict[str, Any]:
        ranks.on_main(lambda: (out / name).exists() or Index.create(out / name, model) is None)
        index = Index.open(out / name, model=model)
        try:
            # Two to a batch, a shard for each batch: several rounds.
            added = index.add(source, batch_size=2, shard_bytes=1, progress=False, ranks=ranks, **options)
            return {"added": asdict(added), "images": len(index)}
        except LapsError as error:
            return {"failed": str(error), "signal": getattr(error, "signal_number", None)}

    found = {"whole": outcome("whole", photos), "again": outcome("whole", photos)}
    found["damaged"] = outcome("damaged", damaged, on_error="raise")
    found["skipped"] = outcome("damaged", damaged)
    if ranks.rank == 1:
        tell_after(model, 2)
    found["stopped"] = outcome("stopped", photos)
    found["resumed"] = outcome("stopped", photos)
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def tell_after(model: LAPS, batches: int) -> None:
    """This process is told to stop as it encodes its n-th batch."""
    left = [batches]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    model.image_encoder.register_forward_pre_hook(count)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
