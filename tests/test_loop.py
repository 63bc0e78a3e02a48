"""The per-caption loop, which the benchmarks time the head against, computes the head's scores."""

from __future__ import annotations

import pytest
import torch
from laps._loop import published_loop
from laps.nn import LAPSHead


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("num_patches", "num_prefix_tokens", "selection_ratio", "aggregation_ratio"),
    [(49, 0, 0.8, 0.6), (36, 1, 0.5, 0.4), (16, 5, 1.0, 0.5)],
    ids=["swin", "vit", "keep-all"],
)
def test_head_equals_the_per_caption_loop(
    backend: str, num_patches: int, num_prefix_tokens: int, selection_ratio: float, aggregation_ratio: float
) -> None:
    torch.manual_seed(0)
    head = LAPSHead(
        32,
        num_patches,
        selection_ratio,
        aggregation_ratio,
        num_prefix_tokens=num_prefix_tokens,
        backend=backend,
    ).double()
    images = torch.randn(4, num_prefix_tokens + num_patches, 32, dtype=torch.float64, requires_grad=True)
    words = torch.randn(5, 9, 32, dtype=torch.float64, requires_grad=True)
    lengths, grad = torch.tensor([9, 1, 4, 7, 2]), torch.randn(4, 5, dtype=torch.float64)
    inputs = [images, words, *head.parameters()]

    ours = head(images, words, lengths)
    loop = published_loop(
        images,
        words,
        lengths,
        head.aggregation.logits,
        selection_ratio=selection_ratio,
        num_prefix_tokens=num_prefix_tokens,
    )

    torch.testing.assert_close(ours, loop, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(loop, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
