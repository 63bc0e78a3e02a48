"""The process group of a command that torchrun starts; the library itself never makes one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .distributed import Ranks

__all__ = ["started_ranks"]


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
    finally:
        dist.destroy_process_group()
