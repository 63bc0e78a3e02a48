"""CHAN against its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _head_equations import CHANNELS, check_equations
from _models import tiny_laps
from laps.heads import build_head
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(v: Tensor, w: Tensor, pooling: str, temperature: float) -> Tensor:
    best = torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for x in v]).max() for y in w])
    return best.mean() if pooling == "mean" else (best / temperature).exp().sum().log()


@pytest.mark.parametrize("options", [{}, {"pooling": "lse"}, {"pooling": "lse", "temperature": 0.5}])
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (6, 1), (11, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    head = build_head("chan", embed_dim=CHANNELS, num_patches=patches, num_prefix_tokens=prefix, **options)
    check_equations(head, lambda v, w: plain(v[prefix:], w, **head.options()))


def test_the_margin_is_the_authors() -> None:
    assert tiny_laps(head="chan").objective.options()["margin"] == 0.05
