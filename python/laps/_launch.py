"""The process group of a command that torchrun starts; the library itself never makes one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from .distributed import Ranks
from .errors import LapsError

__all__ = ["started_ranks"]

# Seconds that a rank waits to hear whether rank 0 has failed alike.
WAIT = 3


@contextlib.contextmanager
def started_ranks(device: str | None) -> Iterator[Ranks]:
    """The ranks that torchrun started; elsewhere this process alone.

    Each rank has a GPU of its own where there are GPUs and `device` does not say otherwise.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_RANK" not in os.environ:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    on_cuda = torch.cuda.is_available() and device in (None, "cuda")
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield Ranks.here()
    except LapsError as error:
        error.told_by_rank_0 = _told_by_rank_0(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _told_by_rank_0(text: str) -> bool:
    """Whether rank 0 ends by the same error, which one of all ranks should print.

    Through the store, not a collective operation: where one rank alone fails, the others do not take part.
    """
    import torch.distributed as dist

    store, key = dist.distributed_c10d._get_default_store(), "laps/error"
    try:
        if dist.get_rank() == 0:
            store.set(key, text)
            return False
        store.wait([key], timedelta(seconds=WAIT))
        return bool(store.get(key).decode() == text)
    # Rank 0 has no error, or it had the store and has gone with it.
    except Exception:
        return False
