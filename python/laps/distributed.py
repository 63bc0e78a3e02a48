"""Tensors of all ranks of a process group, with the gradients that one process would have.

Every rank computes the loss of the joint batch, from what all of them gathered: the same number on each. The
gradient of what was gathered is the sum over the ranks' gradients, W times that of one process. Averaged
over the ranks, as DistributedDataParallel does it, the gradient of a parameter is then exact:

    1/W sum_r J_r^T (W dL/dx_r) = sum_r J_r^T dL/dx_r          (J_r: of rank r's part of the batch)

The process group is the caller's: nothing here starts or ends one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check
from .errors import LapsError, LapsValueError

if TYPE_CHECKING:
    from .heads import TrainingScores

__all__ = ["Ranks"]

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train, evaluate or index together.

    Attributes:
        rank: of this process, in 0..size-1.
        size: W, how many processes there are.
        group: their process group; None: the default one.

    Example:
        >>> from laps.distributed import Ranks
        >>> Ranks.here()  # no process group: this process alone
        Ranks(rank=0, size=1, group=None)
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def here(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks of a group, or of the default one; without a process group this process alone.

        Raises:
            LapsValueError: this process does not belong to `group`.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise LapsValueError(
                _check.message("Ranks.here", "this process is not in the group", "one of its ranks")
            )
        return cls(rank, dist.get_world_size(group), group)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    # ---- tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks: (B_r, ...) to (sum of B_r, ...), differentiable.

        Ranks may have different numbers of rows, but not different other sizes.

        Raises:
            LapsValueError: the other sizes differ.
        """
        if self.size == 1:
            return tensor
        rows = self._sizes("gather", tensor)
        gathered: Tensor = _Gather.apply(tensor, rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def gather_padded(self, tokens: Tensor) -> Tensor:
        """As `gather`, of (B_r, L_r, C) with different L_r: padded with zeros to the longest."""
        if self.size == 1:
            return tokens
        longest = max(shape[1] for shape in self._shapes(tokens))
        return self.gather(torch.nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1])))

    def gather_host(self, numbers: Tensor, device: torch.device) -> Tensor:
        """As `gather`, of integers on the CPU, which travel by `device`: not every group knows the CPU."""
        return self.gather(numbers.to(device)).to(numbers.device)

    def gather_scores(self, scored: TrainingScores) -> TrainingScores:
        """Rows of scores as the whole; a penalty and what is logged are of this rank's rows alone."""
        if self.size == 1:
            return scored
        kept = scored.kept_fraction
        return replace(
            scored,
            scores=self.gather(scored.scores),
            loss_scores=[self.gather(each) for each in scored.loss_scores],
            kept_fraction=None if kept is None else self.gather(kept),
        )

    def part(self, count: int) -> slice:
        """This rank's share of `count` items: contiguous, sizes that differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def _shapes(self, tensor: Tensor) -> list[tuple[int, ...]]:
        mine = torch.tensor(tensor.shape, device=tensor.device)
        shapes = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shapes, mine, group=self.group)
        return [tuple(shape) for shape in torch.stack(shapes).tolist()]

    def _sizes(self, operation: str, tensor: Tensor) -> list[int]:
        """The numbers of rows of all ranks."""
        shapes = self._shapes(tensor)
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise LapsValueError(
                _check.message(f"Ranks.{operation}", "ranks differ in all but rows", "equal", shapes)
            )
        return [shape[0] for shape in shapes]

    # ---- objects and turns

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def objects(self, value: ResultT) -> list[ResultT]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, function: Callable[[], ResultT]) -> ResultT:
        """Call the function on every rank; if it fails on one, all raise that rank's error.

        Else the others would wait for it.

        Raises:
            LapsError, OSError: of the first rank that raised one.
        """
        if self.size == 1:
            return function()
        result: Any = None
        failed: LapsError | OSError | None = None
        try:
            result = function()
        except (LapsError, OSError) as error:
            failed = error
        for error_of_rank in self.objects(failed):
            if error_of_rank is not None:
                raise error_of_rank
        returned: ResultT = result
        return returned

    def on_main(self, function: Callable[[], ResultT]) -> ResultT:
        """Call the function on rank 0 alone; all ranks get what it returned, or raise what it raised.

        Raises:
            LapsError, OSError: of rank 0.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome = [function(), None]
            except (LapsError, OSError) as raised:
                outcome = [None, raised]
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(outcome, src=source, group=self.group)
        result, error = outcome
        if error is not None:
            raise error
        returned: ResultT = result
        return returned


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backwards the sum over the ranks of the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
        ctx.rows, ctx.ranks = rows, ranks
        most = max(rows)
        mine = tensor.contiguous()
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        parts = [torch.empty_like(mine) for _ in rows]
        dist.all_gather(parts, mine, group=ranks.group)
        return torch.cat([part[:size] for part, size in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        rows, ranks = ctx.rows, ctx.ranks
        if len(set(rows)) == 1 and dist.get_backend(ranks.group) == "nccl":
            mine = gradient.new_empty(rows[0], *gradient.shape[1:])
            dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ranks.group)
            return mine, None, None
        # Gloo has no reduce-scatter, and takes no rows of different number.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ranks.group)
        first = sum(rows[: ranks.rank])
        return total[first : first + rows[ranks.rank]], None, None
