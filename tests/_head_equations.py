"""Similarity heads beside a plain writing of their equations, one image and one caption at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from laps.heads import SimilarityHead
from torch import Tensor

LENGTHS = [5, 1, 3, 2]
CHANNELS = 8


def example(patches: int, prefix: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of three images and four captions in float64, and their lengths; padding is huge."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, prefix + patches, CHANNELS, dtype=torch.float64, generator=generator)
    words = torch.randn(4, max(LENGTHS), CHANNELS, dtype=torch.float64, generator=generator)
    for row, length in zip(words, LENGTHS, strict=True):
        row[length:] = 1e6
    return images, words, torch.tensor(LENGTHS)


def check_equations(
    head: SimilarityHead, plain: Callable[[Tensor, Tensor], Tensor], *, tolerance: float = 1e-9
) -> None:
    """All scores, and the gradients of both sides and of every parameter, are those of `plain`.

    Args:
        head: of CHANNELS channels; made float64 here.
        plain: from the tokens (P + N, C) of an image and the real words (l, C) of a caption to their score;
            it may use the head's parameters.
        tolerance: of scores and gradients.
    """
    head.double()
    images, words, lengths = example(head.num_patches, head.num_prefix_tokens, seed=head.num_patches)
    inputs = [images.requires_grad_(), words.requires_grad_(), *head.parameters()]
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [
            torch.stack([plain(v, w[:length]) for w, length in zip(words, LENGTHS, strict=True)])
            for v in images
        ]
    )
    scores = head.training_scores(images, words, lengths).scores
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    found, wanted = (
        torch.autograd.grad((values * weights).sum(), inputs, allow_unused=True)
        for values in (scores, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        # A parameter that the equations leave out has no gradient, or zeros.
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=tolerance)
