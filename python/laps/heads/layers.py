"""Layers that compute in the precision of what they are given, whatever that of their weights is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear"]


class Linear(nn.Linear):
    """``nn.Linear`` whose weights may be stored in half precision beside inputs in float32.

    Heads score in float32, also those of a model that is in bfloat16 or float16 as a whole.

    Example:
        >>> import torch
        >>> from laps.heads.layers import Linear
        >>> Linear(8, 2).to(torch.bfloat16)(torch.randn(3, 8)).dtype
        torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)
