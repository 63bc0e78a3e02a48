"""Argument checks shared by the functions, modules and losses: convert once, check once, name what is wrong.

Nothing here computes. Values (not shapes) are looked at only where that costs no synchronisation and no graph
break: on plain CPU tensors, outside ``torch.compile`` and FakeTensor mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType as _TransformType
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .errors import LapsTypeError, LapsValueError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"
# What rounding may add to a probability: one part in a million for f32 and f64, more for the half types.
PROBABILITY_SLACK = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


# What names in files may hold and a terminal obeys: control characters but for tab and line feed, and marks
# of the writing direction; also halves of surrogate pairs, which cannot be written at all.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def message(operation: str, broken: str, expected: object, got: object = None) -> str:
    """The one form of an error message; `got` is left out where `broken` says it."""
    return printable(f"{operation}: {broken} (expected {expected}{'' if got is None else f', got {got}'})")


def printable(text: str) -> str:
    """The text, with an escape in place of each character that a terminal would obey or cannot show."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def name_of(value: object) -> str:
    """The short name of a dtype, or of a value's type."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else type(value).__name__


def vmapped() -> bool:
    """Whether `torch.vmap` is under way: values cannot be looked at."""
    return any(level.key() == _TransformType.Vmap for level in _functorch.get_interpreter_stack() or ())


def differentiated_otherwise() -> bool:
    """Whether derivatives are taken by other means than ``backward()``: `torch.func.grad` and its kin, or
    forward mode. The native operators do not take part in these, and would pass for constants."""
    return forward_ad._current_level >= 0 or any(
        level.key() in (_TransformType.Grad, _TransformType.Jvp)
        for level in _functorch.get_interpreter_stack() or ()
    )


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values is possible and free."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and not isinstance(tensor, FakeTensor)
        and not vmapped()
    )


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- converting


def _from_numpy(operation: str, argument: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise LapsTypeError(message(operation, f"{argument} has the wrong dtype", FLOAT_NAMES, array.dtype))
    # from_numpy refuses foreign byte order and negative strides, and warns of read-only arrays: copy those.
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if not array.flags.writeable:
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise LapsTypeError(
            message(operation, f"{argument} has the wrong dtype", FLOAT_NAMES, array.dtype)
        ) from None


def to_tensors(operation: str, arguments: Mapping[str, object]) -> tuple[dict[str, Tensor | None], bool]:
    """Each argument as a tensor (None stays None), and whether the caller gave NumPy arrays only."""
    arrays = [name for name, value in arguments.items() if isinstance(value, np.ndarray)]
    tensors: dict[str, Tensor | None] = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            tensors[name] = _from_numpy(operation, name, value)
        elif isinstance(value, Tensor):
            if arrays and needs_grad([value]):
                raise LapsTypeError(
                    message(
                        operation,
                        f"{name} requires grad, but {arrays[0]} is a NumPy array",
                        f"tensors only, or {name}.detach()",
                        "both",
                    )
                )
            dense(operation, name, value)
            tensors[name] = value
        elif value is None:
            tensors[name] = None
        else:
            raise LapsTypeError(
                message(operation, f"{name} is no array", "torch.Tensor or numpy.ndarray", name_of(value))
            )
    as_numpy = bool(arrays) and all(value is None or name in arrays for name, value in arguments.items())
    return tensors, as_numpy


def dense(operation: str, argument: str, tensor: Tensor) -> None:
    """Refuse sparse, nested and other tensors whose elements do not lie in memory by strides."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = (
            "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
        )
        raise LapsTypeError(message(operation, f"{argument} is not dense", "a strided tensor", layout))


def required(operation: str, argument: str, tensor: Tensor | None) -> Tensor:
    """The tensor, refusing None."""
    if tensor is None:
        raise LapsTypeError(
            message(operation, f"{argument} is missing", "torch.Tensor or numpy.ndarray", "None")
        )
    return tensor


# ---- shapes, devices, dtypes


class Sizes:
    """Names for sizes: the first argument that has one sets it, every later argument must agree."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.seen: dict[str, tuple[str, int]] = {}

    def match(self, argument: str, tensor: Tensor, dims: str, *, may_be_empty: str = "") -> None:
        """Check that `tensor` has the sizes `dims` such as ``"B_v N C"``, none 0 but `may_be_empty`."""
        names, shape = dims.split(), tensor.shape
        if len(names) != len(shape):
            raise LapsValueError(
                message(
                    self.operation,
                    f"{argument} has the wrong rank",
                    f"{len(names)}: ({', '.join(names)})",
                    f"{len(shape)}: {tuple(shape)}",
                )
            )
        for name, size in zip(names, shape, strict=True):
            if name not in self.seen:
                self.seen[name] = (argument, size)
            first, known = self.seen[name]
            if size != known:
                raise LapsValueError(
                    message(
                        self.operation,
                        f"{argument} has {name}={size}, but {first} has {name}={known}",
                        "equal",
                    )
                )
            if size == 0 and name != may_be_empty:
                raise LapsValueError(
                    message(self.operation, f"{argument} has {name}=0", f"{name} >= 1", tuple(shape))
                )

    def __getitem__(self, name: str) -> int:
        return self.seen[name][1]


def same_device(operation: str, tensors: Mapping[str, Tensor | None]) -> torch.device:
    """The one device of all tensors."""
    first_name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise LapsValueError(
                message(
                    operation,
                    f"{name} is on {tensor.device}, but {first_name} is on {first.device}",
                    "the same device",
                )
            )
    return first.device


def common_dtype(
    operation: str, tensors: Mapping[str, Tensor | None], *, may_be_bool: str = ""
) -> torch.dtype:
    """Float64 if all tensors are, float32 if none is: half types mix with float32, as under autocast."""
    first_name, first_dtype = "", torch.float32
    for name, tensor in tensors.items():
        if tensor is None or (name == may_be_bool and tensor.dtype == torch.bool):
            continue
        if tensor.dtype not in FLOATS:
            allowed = f"bool, {FLOAT_NAMES}" if name == may_be_bool else FLOAT_NAMES
            raise LapsTypeError(
                message(operation, f"{name} has the wrong dtype", allowed, name_of(tensor.dtype))
            )
        if not first_name:
            first_name, first_dtype = name, tensor.dtype
        elif (tensor.dtype == torch.float64) != (first_dtype == torch.float64):
            raise LapsTypeError(
                message(
                    operation,
                    f"{name} has dtype {name_of(tensor.dtype)}, "
                    f"but {first_name} has dtype {name_of(first_dtype)}",
                    "equal",
                )
            )
    return torch.float64 if first_dtype == torch.float64 else torch.float32


def fake_tensors(operation: str, tensors: Mapping[str, Tensor | None], *, needs_values: bool = False) -> None:
    """Refuse FakeTensors beside real ones; where the computation looks at values, all, and meta tensors."""
    # Inside torch.compile all are fake, and nothing looks at values.
    if torch.compiler.is_compiling():
        return
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    fake = [name for name, tensor in given.items() if isinstance(tensor, FakeTensor)]
    real = [name for name in given if name not in fake]
    empty = fake + [name for name in real if given[name].is_meta]
    if empty and needs_values:
        kind = "FakeTensor" if fake else "a meta tensor"
        raise LapsTypeError(message(operation, f"{empty[0]} has no values", "a real tensor", kind))
    if fake and real:
        raise LapsTypeError(
            message(operation, f"{fake[0]} is a FakeTensor, but {real[0]} is none", "all or none", "both")
        )


# ---- values


def word_lengths(
    operation: str,
    value: object,
    captions: int,
    longest: int,
    device: torch.device,
    *,
    words: str = "words",
    patches: str = "patches",
) -> Tensor:
    """The lengths as an int64 tensor (B_t,), on the CPU, or unchecked on the device of the others.

    `words` and `patches` are what the caller calls those arguments.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise LapsTypeError(
                message(operation, "word_lengths has the wrong dtype", "int64 or int32", value.dtype)
            )
        if value.dtype == np.uint64:
            value = np.minimum(value, np.uint64(np.iinfo(np.int64).max))
        lengths = torch.from_numpy(value.astype(np.int64))
    elif isinstance(value, Tensor):
        dense(operation, "word_lengths", value)
        lengths = value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        lengths = _from_list(operation, value)
    else:
        raise LapsTypeError(
            message(
                operation, "word_lengths is no list of integers", "an int64 tensor (B_t,)", name_of(value)
            )
        )
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise LapsTypeError(
            message(operation, "word_lengths has the wrong dtype", "int64 or int32", name_of(lengths.dtype))
        )
    if lengths.device.type != "cpu" and lengths.device != device:
        raise LapsValueError(
            message(operation, f"word_lengths is on {lengths.device}, but {patches} is on {device}", "cpu")
        )
    if lengths.dim() != 1:
        raise LapsValueError(
            message(
                operation,
                "word_lengths has the wrong rank",
                "1: (B_t)",
                f"{lengths.dim()}: {tuple(lengths.shape)}",
            )
        )
    if lengths.shape[0] != captions:
        raise LapsValueError(
            message(
                operation, f"word_lengths has B_t={lengths.shape[0]}, but {words} has B_t={captions}", "equal"
            )
        )
    lengths = lengths.to(torch.int64).contiguous().resolve_neg()
    if readable(lengths):
        wrong = (lengths < 1) | (lengths > longest)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise LapsValueError(
                message(
                    operation,
                    f"word_lengths[{index}] is out of range",
                    f"1 <= length <= L={longest}",
                    int(lengths[index]),
                )
            )
    return lengths


def _from_list(operation: str, lengths: Sequence[object]) -> Tensor:
    for i, length in enumerate(lengths):
        if not is_integer(length):
            raise LapsTypeError(
                message(operation, f"word_lengths[{i}] is no integer", "int", name_of(length))
            )
    most = torch.iinfo(torch.int64).max
    return torch.tensor([max(0, min(int(length), most)) for length in lengths], dtype=torch.int64)  # type: ignore[call-overload]


def is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def probabilities(operation: str, argument: str, tensor: Tensor) -> None:
    """Refuse finite values outside [0, 1]; a non-finite one is the caller's NaN score, not an error."""
    if not readable(tensor):
        return
    values, slack = tensor.detach(), PROBABILITY_SLACK[tensor.dtype]
    right = (values >= -slack) & (values <= 1 + slack)
    if bool(right.all()):
        return
    wrong = ~right & values.isfinite()
    if bool(wrong.any()):
        raise LapsValueError(
            message(
                operation,
                f"{argument} has a value out of range",
                "0 <= value <= 1",
                f"{float(values[wrong][0]):.6g}",
            )
        )


def mask_values(operation: str, mask: Tensor) -> None:
    """Refuse a mask (..., N) with a value outside [0, 1], or a row of zeros: a pair without patches."""
    if not readable(mask):
        return
    if mask.is_floating_point():
        probabilities(operation, "mask", mask)
    # Rounding may have left values just below zero, which count as zero; NaN is the caller's NaN score.
    empty = (mask.detach() <= 0).all(dim=-1)
    if bool(empty.any()):
        row = empty.nonzero()[0].tolist()
        raise LapsValueError(
            message(operation, f"mask{row} keeps no patch", "at least one nonzero value per pair", "none")
        )


def choice(operation: str, argument: str, value: object, allowed: Sequence[str]) -> str:
    """One of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        error = LapsValueError if isinstance(value, str) else LapsTypeError
        raise error(message(operation, f"{argument} is unknown", f"one of {words}", repr(value)))
    return value


def flag(operation: str, argument: str, value: object) -> bool:
    """A bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise LapsTypeError(message(operation, f"{argument} is no flag", "bool", name_of(value)))
    return bool(value)


# Python's integers go on where float ends, and cannot even be printed from some thousand digits on.
BEYOND_FLOAT = 2**1023


def number(
    operation: str,
    argument: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> float:
    """A finite number in [low, high], or in (low, high] when `open_low`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise LapsTypeError(message(operation, f"{argument} is no number", "float", name_of(value)))
    if isinstance(value, int) and not -BEYOND_FLOAT < value < BEYOND_FLOAT:
        value = math.inf if value > 0 else -math.inf
    result = float(value)
    # Comparisons only, which NaN fails: a compiled function's float argument may be symbolic.
    if not (
        -math.inf < result < math.inf and result <= high and (result > low if open_low else result >= low)
    ):
        rule = f"{'a finite number' if low == -math.inf else f'{low:g} ' + ('<' if open_low else '<=')}"
        if low != -math.inf:
            rule += f" {argument}" + (f" <= {high:g}" if high != math.inf else "")
        raise LapsValueError(message(operation, f"{argument} is out of range", rule, value))
    return result


def count(operation: str, argument: str, value: object, low: int = 1) -> int:
    """An integer >= low."""
    if not is_integer(value):
        raise LapsTypeError(message(operation, f"{argument} is no integer", "int", name_of(value)))
    result = int(value)  # type: ignore[call-overload]
    if result < low:
        raise LapsValueError(message(operation, f"{argument} is out of range", f"{argument} >= {low}", value))
    return int(result)


def seed(operation: str, value: object) -> Tensor | None:
    """The noise seed as a 0-d int64 CPU tensor; Python integers count modulo 2^64."""
    if value is None:
        return None
    if is_integer(value):
        word = int(value) & (2**64 - 1)  # type: ignore[call-overload]
        return torch.tensor(word - 2**64 if word >= 2**63 else word, dtype=torch.int64)
    if not isinstance(value, Tensor):
        raise LapsTypeError(
            message(operation, "seed is no integer", "int or a 0-d int64 tensor", name_of(value))
        )
    if value.dtype != torch.int64:
        raise LapsTypeError(message(operation, "seed has the wrong dtype", "int64", name_of(value.dtype)))
    if value.dim() != 0:
        raise LapsValueError(
            message(operation, "seed has the wrong rank", "0", f"{value.dim()}: {tuple(value.shape)}")
        )
    if value.device.type != "cpu":
        raise LapsValueError(message(operation, f"seed is on {value.device}", "cpu"))
    return value


def token_counts(operation: str, counts: Tensor, tokens: int, device: torch.device) -> Tensor:
    """The counts (B_v, B_t) as int64, each in 1..M where that can be seen."""
    if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
        raise LapsTypeError(
            message(operation, "token_counts has the wrong dtype", "int64", name_of(counts.dtype))
        )
    if counts.device != device:
        raise LapsValueError(
            message(
                operation, f"token_counts is on {counts.device}, but tokens is on {device}", "the same device"
            )
        )
    counts = counts.to(torch.int64).contiguous().resolve_neg()
    if readable(counts):
        wrong = (counts < 1) | (counts > tokens)
        if bool(wrong.any()):
            raise LapsValueError(
                message(
                    operation,
                    "token_counts has a value out of range",
                    f"1 <= count <= M={tokens}",
                    int(counts[wrong][0]),
                )
            )
    return counts
