"""The gradient of a batch: at once, in parts that fit the memory, with the batches of all ranks as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import _check
from .data import Batch
from .distributed import Ranks
from .errors import LapsTypeError
from .model import LAPS, BatchTokens

__all__ = ["TrainingStep"]


class TrainingStep:
    """Computes the loss of a batch and adds its gradient to the parameters' ``grad``.

    With `mini_batch_size` the encoders see that many pairs at a time, and keep the activations of no more
    (GradCache): all tokens are computed without a graph, then the loss and its gradient with respect to the
    tokens, then each part's tokens anew, with a graph. The loss still has the negatives of the whole batch,
    and the gradient is that of the whole batch, for a third more time. Dropout draws the same numbers both
    times.

    With several `ranks` (``torchrun``) their batches are one: captions are gathered, each rank scores its own
    images with all captions, and gradients are those of one process with the joint batch, whatever the loss.
    Heads whose `row_wise` is False gather the images too, and each rank scores all pairs. The model is
    wrapped in DistributedDataParallel here; the process group is the caller's.

    Args:
        model: on its device; under torchrun each rank's own copy.
        mini_batch_size: pairs that are encoded at once, on each rank; None for the whole batch.
        ranks: None for those of the default process group, if there is one.
        amp: whether the forward pass runs under bfloat16 autocast.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range or of the wrong type.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (2021), for
    GradCache; Radford et al., CLIP (2021), for negatives of all ranks.

    Example::

        step = laps.step.TrainingStep(model, mini_batch_size=32)
        for batch in loader:                       # of 1,024 pairs
            loss, values = step(batch.to(device))  # there is no loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        model: LAPS,
        *,
        mini_batch_size: int | None = None,
        ranks: Ranks | None = None,
        amp: bool = False,
    ) -> None:
        if not isinstance(model, LAPS):
            raise LapsTypeError(
                _check.message("TrainingStep", "model has the wrong type", "laps.LAPS", _check.name_of(model))
            )
        if mini_batch_size is not None:
            mini_batch_size = _check.count("TrainingStep", "mini_batch_size", mini_batch_size)
        self.model, self.mini_batch_size = model, mini_batch_size
        self.ranks = Ranks.here() if ranks is None else ranks
        self.amp = _check.flag("TrainingStep", "amp", amp)
        self._pass: nn.Module = _Pass(model)
        if self.ranks.size > 1:
            # Without device_ids: it would move the lengths, which stay on the CPU.
            self._pass = DistributedDataParallel(self._pass, process_group=self.ranks.group)

    def __call__(
        self,
        batch: Batch,
        *,
        warmup: float | None = None,
        dense_weight: float = 1.0,
        scale: float = 1.0,
        sync: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward and backward pass.

        Args:
            batch: on the model's device; this rank's part.
            warmup: see :meth:`laps.LAPS.forward`.
            dense_weight: the same.
            scale: what the gradient is multiplied by, for accumulation: 1 / batches.
            sync: False leaves the gradients of the ranks apart: for all but the last batch of an
                accumulation.

        Returns:
            The loss, without graph, and values to log. Both are of all ranks' pairs.

        Raises:
            LapsValueError: as the model does.
        """
        options: dict[str, Any] = {"warmup": warmup, "dense_weight": dense_weight, "ranks": self.ranks}
        if self.mini_batch_size is None or self.mini_batch_size >= len(batch):
            with self._apart(not sync):
                with self._autocast():
                    loss, values = self._pass(batch, options)
                torch.autograd.backward(loss * scale)
            return loss.detach(), values
        starts = range(0, len(batch), self.mini_batch_size)
        parts = [batch.part(first, first + self.mini_batch_size) for first in starts]
        return self._cached(batch, parts, options, scale, sync)

    def _cached(
        self, batch: Batch, parts: Sequence[Batch], options: dict[str, Any], scale: float, sync: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device, states, encoded = self.model.device, [], []
        for part in parts:
            states.append(_RandomState.now(device))
            with torch.no_grad(), self._autocast():
                encoded.append(self.model.encode_batch(part))
        tokens = _leaves(encoded)
        del encoded
        with self._autocast():
            loss, values = self.model.loss_of_tokens(batch, tokens, **options)
        # Not yet into the parameters' grad: DistributedDataParallel wants each of them once.
        leaves = [each for each in tokens if each is not None]
        rest = _after_encoders(self.model)
        found = torch.autograd.grad(loss * scale, [*leaves, *rest], allow_unused=True)
        for_tokens, for_rest = found[: len(leaves)], found[len(leaves) :]
        after = _RandomState.now(device)
        for number, (part, state) in enumerate(zip(parts, states, strict=True)):
            state.restore()
            last = number == len(parts) - 1
            first = number * len(parts[0])
            with self._apart(not (last and sync)):
                with self._autocast():
                    again, tied = self._pass(part, None, for_rest if last else None)
                outputs, gradients = [], []
                for output, gradient in zip((t for t in again if t is not None), for_tokens, strict=True):
                    if gradient is not None and output.requires_grad:
                        outputs.append(output)
                        gradients.append(gradient[first : first + len(part)])
                if tied is not None:
                    outputs.append(tied)
                    gradients.append(torch.ones_like(tied))
                if outputs:
                    torch.autograd.backward(outputs, gradients)
        after.restore()
        return loss.detach(), values

    def _apart(self, apart: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which backward passes leave the ranks' gradients apart."""
        if apart and isinstance(self._pass, DistributedDataParallel):
            return self._pass.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.amp):
            yield


class _Pass(nn.Module):
    """What DistributedDataParallel wraps: every forward pass after which there is a backward pass."""

    def __init__(self, model: LAPS) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: Batch,
        options: dict[str, Any] | None,
        for_rest: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """The loss and values to log; without `options` the tokens, and where the gradients of the head's and
        the objective's parameters are given, a number that has them."""
        if options is not None:
            return self.model(batch, **options)
        tokens = self.model.encode_batch(batch)
        if for_rest is None:
            return tokens, None
        tied = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for parameter, gradient in zip(_after_encoders(self.model), for_rest, strict=True):
            # Also where there is no gradient: DistributedDataParallel waits for every parameter.
            known = torch.zeros_like(parameter) if gradient is None else gradient
            tied = tied + (parameter * known).sum()
        return tokens, tied if tied.requires_grad else None


def _after_encoders(model: LAPS) -> list[nn.Parameter]:
    """What is trained of the head and of the objective."""
    parameters = [*model.head.parameters(), *model.objective.parameters()]
    return [parameter for parameter in parameters if parameter.requires_grad]


def _leaves(parts: Sequence[BatchTokens]) -> BatchTokens:
    """The tokens of the parts of a batch as those of the batch, of which gradients are wanted."""
    dense = [part.dense for part in parts if part.dense is not None]
    return BatchTokens(
        torch.cat([part.images for part in parts]).requires_grad_(),
        torch.cat([part.words for part in parts]).requires_grad_(),
        torch.cat(dense).requires_grad_() if dense else None,
    )


@dataclass(frozen=True)
class _RandomState:
    """The generators that dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
