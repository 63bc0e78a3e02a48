"""The per-caption loop: the head computed in the way the paper's authors publish it.

The benchmarks measure against this loop, and the tests hold the head to its scores. It shares nothing with
the fast paths: every token of every pair exists as a vector of C numbers, and the aggregation network runs
anew for each caption, on the patches that this caption keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def published_loop(
    image_tokens: Tensor,
    word_tokens: Tensor,
    word_lengths: Tensor,
    aggregation: Callable[[Tensor], Tensor],
    *,
    selection_ratio: float,
    num_prefix_tokens: int = 1,
    negative_slope: float = 0.1,
) -> Tensor:
    """Score every image against every caption, one caption at a time (variant "released").

    Args:
        image_tokens: (B_v, P+N, C), the P prefix tokens first.
        word_tokens: (B_t, L, C), padded with anything.
        word_lengths: (B_t,) int64, the real words of each caption.
        aggregation: maps (B_v, k, C) patches to (B_v, k, N_c) logits: ``LAPSHead(...).aggregation.logits``.
        selection_ratio: share of the N patches that a caption keeps, k = ceil(selection_ratio * N).
        num_prefix_tokens: P, the tokens that are no patches (1 for a ViT's [CLS], 0 for Swin).
        negative_slope: of the leaky ReLU on the alignment.

    Returns:
        (B_v, B_t) scores, differentiable; selection carries no gradient.
    """
    prefix, patches = image_tokens[:, :num_prefix_tokens], image_tokens[:, num_prefix_tokens:]
    images, num_patches, channels = patches.shape
    kept = math.ceil(num_patches * selection_ratio)

    with torch.no_grad():
        directions = F.normalize(patches, dim=-1)
        image_mean = F.normalize(patches.mean(dim=1, keepdim=True), dim=-1)
        self_score = (directions * image_mean).sum(dim=-1)

    columns = []
    for caption, length in zip(word_tokens, word_lengths.tolist(), strict=True):
        words = caption[:length]

        with torch.no_grad():
            text_mean = F.normalize(words.mean(dim=0), dim=-1)
            text_score = (directions * text_mean).sum(dim=-1)
            score, order = torch.sort(self_score + text_score, dim=1, descending=True, stable=True)

        keep, drop = order[:, :kept], order[:, kept:]
        selected = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, channels))
        weights = aggregation(selected).softmax(dim=1)
        tokens = [prefix, torch.bmm(weights.transpose(1, 2), selected)]
        if kept < num_patches:
            redundant = patches.gather(1, drop.unsqueeze(-1).expand(-1, -1, channels))
            share = score[:, kept:].softmax(dim=1).unsqueeze(-1)
            tokens.append((redundant * share).sum(dim=1, keepdim=True))

        visual = F.normalize(torch.cat(tokens, dim=1), dim=-1)
        textual = F.normalize(words, dim=-1).expand(images, -1, -1)
        alignment = F.leaky_relu(torch.bmm(visual, textual.transpose(1, 2)), negative_slope)
        word_to_patch = alignment.max(dim=1).values.mean(dim=1)
        patch_to_word = alignment.max(dim=2).values.mean(dim=1)
        columns.append(word_to_patch + patch_to_word)
    return torch.stack(columns, dim=1)
