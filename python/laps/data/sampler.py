"""The order of a training run, known from (seed, epoch) alone, so that a run can go on in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """A permutation of 0..size-1 per epoch, which may start in its midst.

    Args:
        size: number of items.
        seed: of the order.

    Example:
        >>> from laps.data.sampler import EpochSampler
        >>> sampler = EpochSampler(5, seed=0)
        >>> sampler.start(epoch=3, skip=0)
        >>> whole = list(sampler)
        >>> sampler.start(epoch=3, skip=2)
        >>> list(sampler) == whole[2:]
        True
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch, self.skip = 0, 0

    def start(self, epoch: int, skip: int) -> None:
        """Choose the epoch of the next iteration, and how many of its items are done already."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[int]:
        # Two numbers in one seed: epochs of one run, and runs of neighbouring seeds, do not meet.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.size, generator=generator)[self.skip :].tolist()

    def __len__(self) -> int:
        return self.size - self.skip
