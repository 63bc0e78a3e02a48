"""What a training run needs to go on as if nothing had happened: weights, optimizer, counters, random states.

Nothing is pickled: tensors are in safetensors files, all else is JSON. A checkpoint is a folder that appears
whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _check
from ._files import atomic_folder, recover_folder
from ._json_files import read_object
from ._tensor_files import load_tensors, save_tensors
from .encoders.keys import check_weights
from .errors import LapsValueError

__all__ = ["generator_states", "load_checkpoint", "save_checkpoint"]

MODEL, OPTIMIZER, RANDOM, STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    generators: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write a checkpoint, replacing the one that may be there only once the new one is complete.

    Args:
        folder: where.
        model: its state dict is stored under its own names, for the same installation.
        optimizer: with its state per parameter.
        progress: counters and the like, as JSON can hold them.
        generators: of several ranks the states of torch's, of :func:`generator_states`, in their order.

    Raises:
        OSError: the disk is full, or not writable; the old checkpoint is untouched.
    """
    states, groups = _flatten(optimizer.state_dict())
    with atomic_folder(folder) as new:
        save_tensors(new / MODEL, model.state_dict())
        save_tensors(new / OPTIMIZER, states)
        save_tensors(new / RANDOM, _random_tensors(generators))
        state = {
            "progress": progress,
            "optimizer": groups,
            "python_random": list(random.getstate()[1]),
            "numpy_random": np.random.get_state(legacy=False),
        }
        (new / STATE).write_text(json.dumps(state, default=np.ndarray.tolist))


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> dict[str, Any]:
    """Restore everything that `save_checkpoint` wrote, random states included, and return its `progress`.

    A `rank` that there was not keeps the states of torch's generators that it has.

    Raises:
        LapsValueError: no checkpoint there, a broken file (named), or the weights of another model (the
            missing and unexpected keys are named).
    """
    folder = Path(folder)
    recover_folder(folder)
    if not (folder / STATE).is_file():
        raise LapsValueError(
            _check.message("load_checkpoint", f"{folder} holds no checkpoint", "a folder with state.json")
        )
    state = _read_state(folder / STATE)
    weights, moments, randoms = (
        load_tensors("load_checkpoint", folder / name) for name in (MODEL, OPTIMIZER, RANDOM)
    )
    # All files are checked before anything is changed.
    check_weights(str(folder / MODEL), own=model.state_dict(), given=weights)
    with _naming(folder / STATE):
        generators = _generators(state)
        _check_groups(state["optimizer"], optimizer)
    with _naming(folder / RANDOM):
        own = _of_rank(randoms, rank)
        if "torch" in own:
            torch.Generator().set_state(own["torch"])
    with _naming(folder / OPTIMIZER):
        restored = _unflatten(moments, state["optimizer"])
        _check_moments(restored, optimizer)
        optimizer.load_state_dict(restored)
    model.load_state_dict(weights)
    _restore_random(*generators, own)
    progress: dict[str, Any] = state["progress"]
    return progress


def _read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, with everything in it that there should be."""
    expected = "the state of a run"
    state = read_object("load_checkpoint", path, expected)
    kinds = {"progress": dict, "optimizer": list, "python_random": list, "numpy_random": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            got = _check.name_of(state[name]) if name in state else "nothing"
            raise LapsValueError(
                _check.message(
                    "load_checkpoint", f"{path}: {name} is broken", f"{expected}: a {kind.__name__}", got
                )
            )
    return state


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file whose content was refused."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LapsValueError(
            _check.message("load_checkpoint", f"{path} is broken", "what save_checkpoint writes", reason)
        ) from error


# ---- the optimizer: {parameter: {name: tensor}} and its groups


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, name = key.split(".", 1)
        states.setdefault(int(parameter), {})[name] = tensor
    return {"state": states, "param_groups": groups}


def _check_groups(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse groups of parameters that the optimizer would take and fail with at its next step."""
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{len(groups)} groups of parameters, not {len(optimizer.param_groups)}")
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        absent = sorted(own.keys() - group.keys())
        if absent:
            raise ValueError(f"a group of parameters lacks {', '.join(absent)}")
        if len(group["params"]) != len(own["params"]):
            raise ValueError(f"a group has {len(group['params'])} parameters, not {len(own['params'])}")


def _check_moments(restored: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse states of parameters that the optimizer would take and fail with at its next step."""
    for group, own in zip(restored["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], own["params"], strict=True):
            for name, tensor in restored["state"].get(number, {}).items():
                if tensor.dim() and tensor.shape != parameter.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(parameter.shape)}"
                    raise ValueError(f"{name} of parameter {number} has shape {shapes}")


# ---- random states


def generator_states(device: torch.device | None = None) -> dict[str, Tensor]:
    """The states of torch's generators: the CPU's, and that of `device`, or of all GPUs if it is None."""
    states = {"torch": torch.get_rng_state()}
    if device is not None:
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
    elif torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_tensors(generators: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if not generators:
        return generator_states()
    return {f"rank{r}.{n}": state for r, states in enumerate(generators) for n, state in states.items()}


def _of_rank(randoms: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The states of one rank; those of one process are rank 0's."""
    if rank == 0 and not any(name.startswith("rank0.") for name in randoms):
        # Without it the file is broken.
        return {**randoms, "torch": randoms["torch"]}
    prefix = f"rank{rank}."
    return {name.removeprefix(prefix): t for name, t in randoms.items() if name.startswith(prefix)}


def _generators(state: dict[str, Any]) -> tuple[random.Random, np.random.RandomState]:
    """Generators of Python and NumPy in the states that were kept. Raises what they raise for broken ones."""
    own, numpys = random.Random(), np.random.RandomState()
    own.setstate((3, tuple(state["python_random"]), None))
    numpys.set_state(state["numpy_random"])
    return own, numpys


def _restore_random(own: random.Random, numpys: np.random.RandomState, randoms: dict[str, Tensor]) -> None:
    if "torch" in randoms:
        torch.set_rng_state(randoms["torch"])
    if "cuda" in randoms and torch.cuda.is_available():
        torch.cuda.set_rng_state(randoms["cuda"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in randoms:
            torch.cuda.set_rng_state(randoms[f"cuda.{i}"], i)
    random.setstate(own.getstate())
    np.random.set_state(numpys.get_state(legacy=False))
