"""What is in a checkpoint of the published code."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._tensor_files import load_tensors
from ..errors import LapsTypeError, LapsValueError
from .unpickling import load_pickled

__all__ = ["AGGREGATION", "IMAGE", "IMAGE_PROJECTION", "TEXT", "TEXT_PROJECTION", "Published", "read"]

# What the published train.py writes into the folder of a run.
FILE = "model_best.pth"
IMAGE, IMAGE_PROJECTION = "img_enc.visual_encoder.", "img_enc.vision_proj."
TEXT, TEXT_PROJECTION = "txt_enc.bert.", "txt_enc.fc."
AGGREGATION = "cross_net.aggr_net."
PARTS = (IMAGE, TEXT, AGGREGATION)
# What transformers 4 stored of numbers that follow from the sizes.
DERIVED = ("embeddings.position_ids", "relative_position_index")
MAX_RSUM = 600.0
# Of DataParallel.
WRAPPER = "module."


@dataclass(frozen=True)
class Published:
    """A checkpoint of the published code, checked to hold tensors that can be weights.

    Attributes:
        path: of the file.
        prefix: what stands before every name in the file: ``"module."`` of DataParallel, mostly nothing.
        weights: by their names without the prefix, in float32.
        options: the command line that it was trained with, by the options' names; empty if not known.
        epoch, best_rsum: where training was, and what it had reached on the split that it selected on; None
            if not known.
    """

    path: Path
    prefix: str
    weights: dict[str, Tensor]
    options: dict[str, Any]
    epoch: int | None
    best_rsum: float | None

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights whose names begin so, without that beginning."""
        return {n.removeprefix(prefix): t for n, t in self.weights.items() if n.startswith(prefix)}


def read(operation: str, source: str | Path) -> Published:
    """A checkpoint: ``model_best.pth``, the folder that has one, or a ``.safetensors`` of the same weights.

    A file of weights alone, without options, is taken too.

    Raises:
        LapsValueError, LapsTypeError: naming the file: it is missing or damaged, another kind of file, or has
            tensors that are no weights (they are named).
    """
    path = Path(source)
    if path.is_dir():
        path = path / FILE
    expected = f"{FILE} of the published code"
    if not path.exists():
        raise LapsValueError(_check.message(operation, f"{path} does not exist", expected))
    if not path.is_file():
        raise LapsValueError(_check.message(operation, f"{path} is no regular file", expected))
    if path.suffix == ".safetensors":
        content: Any = {"model": load_tensors(operation, path)}
    else:
        content = load_pickled(operation, path)
    if not isinstance(content, dict):
        raise LapsTypeError(
            _check.message(
                operation,
                f"{path} is no checkpoint",
                "a dictionary with model, opt, ...",
                _check.name_of(content),
            )
        )
    content = _plain(content)
    if "model" not in content and _is_model(content):
        content = {"model": content}
    state = content.get("model")
    if isinstance(state, dict):
        state = _plain(state)
    if not isinstance(state, dict) or not _is_model(state):
        keys = ", ".join(ascii(key)[:80] for key in list(content if state is None else _keys(state))[:5])
        raise LapsValueError(
            _check.message(
                operation,
                f"{path} is no checkpoint of the published code",
                f'"model" with weights {", ".join(f"{part}*" for part in PARTS)}',
                f"{'keys' if state is None else 'weights'} {keys or 'none'}",
            )
        )
    prefix = WRAPPER if all(name.startswith(WRAPPER) for name in state) else ""
    epoch, best = content.get("epoch"), content.get("best_rsum")
    return Published(
        path,
        prefix,
        _weights(operation, path, prefix, state),
        _options(operation, path, content.get("opt")),
        epoch if _is_number(epoch) and isinstance(epoch, int) and 0 <= epoch < 2**63 else None,
        float(best) if _is_number(best) and 0 <= best <= MAX_RSUM else None,
    )


def _plain(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """A copy that has no attributes: a pickle can hide the methods of an OrderedDict behind some."""
    return dict(dict.items(mapping))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _keys(state: object) -> list[str]:
    return list(state) if isinstance(state, dict) else [_check.name_of(state)]


def _is_model(state: Mapping[Any, Any]) -> bool:
    """Whether these are names of the published model."""
    if not all(isinstance(name, str) for name in state):
        return False
    # Names get into messages, which a terminal shows.
    if not all(name.isprintable() for name in state):
        return False
    return any(name.removeprefix(WRAPPER).startswith(PARTS) for name in state)


def _weights(operation: str, path: Path, prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {}
    size, file_size = 0, path.stat().st_size
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise LapsTypeError(
                _check.message(operation, f"{path}: {name} is no tensor", "weights", _check.name_of(tensor))
            )
        if name.endswith(DERIVED):
            continue
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not tensor.is_floating_point() or tensor.numel() == 0:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{path}: {name} is no weight",
                    "a dense tensor of floats",
                    f"{_check.name_of(tensor.dtype)} {tuple(tensor.shape)}, {tensor.layout}, {tensor.device}",
                )
            )
        # A few bytes that are repeated over and over would fill any memory.
        size += tensor.numel() * tensor.element_size()
        if size > file_size:
            raise LapsValueError(
                _check.message(
                    operation, f"{path} is smaller than its weights", f"more than {size} bytes", file_size
                )
            )
        weights[name.removeprefix(prefix)] = tensor = tensor.detach().float()
        if not bool(tensor.isfinite().all()):
            raise LapsValueError(_check.message(operation, f"{path}: {name} is not finite", "finite weights"))
    return weights


def _options(operation: str, path: Path, opt: object) -> dict[str, Any]:
    """Numbers and strings of an ``argparse.Namespace``, or of a dictionary."""
    if opt is None:
        return {}
    values = vars(opt) if isinstance(opt, Namespace) else opt
    if not isinstance(values, dict):
        raise LapsTypeError(
            _check.message(operation, f"{path}: opt holds no options", "Namespace", _check.name_of(opt))
        )
    plain = {
        name: value
        for name, value in _plain(values).items()
        if isinstance(name, str) and isinstance(value, (int, float, str))
    }
    for name, value in plain.items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise LapsValueError(
                _check.message(operation, f"{path}: opt.{name} is out of range", "an integer of 64 bits")
            )
    return plain
