"""The order of a training run, known from (seed, epoch) alone, so that a run can go on in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """A permutation of 0..size-1 per epoch, which may start in its midst.

    With several ranks each draws its share of every batch; what is left after the last whole batch is drawn
    by none.

    Args:
        size: number of items.
        seed: of the order.
        batch_size: of all ranks together, a multiple of `world_size`.
        rank: in 0..world_size-1.
        world_size: W.

    Example:
        >>> from laps.data.sampler import EpochSampler
        >>> sampler = EpochSampler(5, seed=0)
        >>> sampler.start(epoch=3, skip=0)
        >>> whole = list(sampler)
        >>> sampler.start(epoch=3, skip=2)
        >>> list(sampler) == whole[2:]
        True
    """

    def __init__(
        self, size: int, seed: int, *, batch_size: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.seed = size, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epoch, self.skip = 0, 0

    def start(self, epoch: int, skip: int) -> None:
        """Choose the epoch of the next iteration, and how many of all ranks' items are done already."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[int]:
        # Two numbers in one seed: epochs of one run, and runs of neighbouring seeds, do not meet.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)[self.skip :]
        if self.world_size > 1:
            batches = order[: len(order) // self.batch_size * self.batch_size]
            order = batches.view(-1, self.world_size, self.batch_size // self.world_size)[:, self.rank]
        yield from order.flatten().tolist()

    def __len__(self) -> int:
        left = self.size - self.skip
        if self.world_size == 1:
            return left
        return left // self.batch_size * (self.batch_size // self.world_size)
