"""What a training run needs to go on as if nothing had happened: weights, optimizer, counters, random states.

Nothing is pickled: tensors are in safetensors files, all else is JSON. A checkpoint is a folder that appears
whole or not at all.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _check
from ._files import atomic_folder, recover_folder
from ._tensor_files import load_tensors, save_tensors
from .encoders.keys import check_keys
from .errors import LapsValueError

__all__ = ["load_checkpoint", "save_checkpoint"]

MODEL, OPTIMIZER, RANDOM, STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write a checkpoint, replacing the one that may be there only once the new one is complete.

    Args:
        folder: where.
        model: its state dict is stored under its own names, for the same installation.
        optimizer: with its state per parameter.
        progress: counters and the like, as JSON can hold them.

    Raises:
        OSError: the disk is full, or not writable; the old checkpoint is untouched.
    """
    states, groups = _flatten(optimizer.state_dict())
    with atomic_folder(folder) as new:
        save_tensors(new / MODEL, model.state_dict())
        save_tensors(new / OPTIMIZER, states)
        save_tensors(new / RANDOM, _random_tensors())
        state = {
            "progress": progress,
            "optimizer": groups,
            "python_random": list(random.getstate()[1]),
            "numpy_random": np.random.get_state(legacy=False),
        }
        (new / STATE).write_text(json.dumps(state, default=np.ndarray.tolist))


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore everything that `save_checkpoint` wrote, random states included, and return its `progress`.

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
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise LapsValueError(
            _check.message("load_checkpoint", f"{folder / STATE} cannot be read", "a JSON file", error)
        ) from None
    weights, moments, randoms = (
        load_tensors("load_checkpoint", folder / name) for name in (MODEL, OPTIMIZER, RANDOM)
    )
    own = model.state_dict()
    shared = own.keys() & weights.keys()
    check_keys(
        str(folder / MODEL),
        missing=sorted(own.keys() - weights.keys()),
        unexpected=sorted(weights.keys() - own.keys()),
        mismatched=sorted(name for name in shared if own[name].shape != weights[name].shape),
    )
    model.load_state_dict(weights)
    optimizer.load_state_dict(_unflatten(moments, state["optimizer"]))
    _restore_random(state, randoms)
    progress: dict[str, Any] = state["progress"]
    return progress


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


# ---- random states


def _random_tensors() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random(state: dict[str, Any], randoms: dict[str, Tensor]) -> None:
    torch.set_rng_state(randoms["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in randoms:
            torch.cuda.set_rng_state(randoms[f"cuda.{i}"], i)
    random.setstate((3, tuple(state["python_random"]), None))
    np.random.set_state(state["numpy_random"])
