"""CHAN against its equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _head_equations import CHANNELS, check_equations
from _models import tiny_laps
from laps import LapsValueError
from laps.heads import CHANHead, build_head
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: Any) -> CHANHead:
    head = build_head("chan", embed_dim=CHANNELS, num_patches=6, num_prefix_tokens=0, **options)
    assert isinstance(head, CHANHead)
    return head


def plain(v: Tensor, w: Tensor, pooling: str, temperature: float) -> Tensor:
    best = torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for x in v]).max() for y in w])
    return best.mean() if pooling == "mean" else (best / temperature).exp().sum().log()


@pytest.mark.parametrize("options", [{}, {"pooling": "lse"}, {"pooling": "lse", "temperature": 0.5}])
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (6, 1), (11, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    head = CHANHead(CHANNELS, patches, num_prefix_tokens=prefix, **options)
    check_equations(head, lambda v, w: plain(v[prefix:], w, head.pooling, head.temperature))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_highest_log_sum_exp_is_that_of_the_longest_caption_whose_words_are_all_there(
    temperature: float,
) -> None:
    head = make(pooling="lse", temperature=temperature, max_words=11)
    generator = torch.Generator().manual_seed(0)
    images, words = (torch.randn(4, n, CHANNELS, generator=generator) for n in (6, 11))
    lengths = torch.tensor([11, 7, 1, 11])
    # The first image has a patch that all words of the first caption are: the bound itself.
    words[0] = images[0, 3] * torch.rand(11, 1, generator=generator)
    scores = head.training_scores(images, words, lengths).scores

    assert head.max_score == pytest.approx(1 / temperature + math.log(11))
    assert float(scores[0, 0]) == pytest.approx(head.max_score, abs=1e-5)
    assert float(scores.max()) <= head.max_score + 1e-5
    assert make().max_score == 1.0


def test_a_longest_caption_of_no_words_is_refused() -> None:
    with pytest.raises(LapsValueError, match="max_words"):
        make(max_words=0)


def test_the_margin_is_the_authors() -> None:
    assert tiny_laps(head="chan").objective.options()["margin"] == 0.05
