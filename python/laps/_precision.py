"""The precision in which sums over many numbers are taken."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is: digits survive autocast and stored half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
