"""Which patches LAPS keeps of an image for a caption, and which of them each word matches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import functional
from ..model import LAPS
from ..nn import LAPSHead

__all__ = ["Matching", "WordMatch", "match"]


@dataclass(frozen=True)
class WordMatch:
    """The token of the image that a word matches best.

    Attributes:
        word: as written.
        dropped: whether it is the fused token of the dropped patches, and not an aggregated one of the kept.
        cosine: of the word and the token, in [-1, 1].
        weights: (G, G), how much each patch is in the token; sums to 1.
    """

    word: str
    dropped: bool
    cosine: float
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Matching:
    """One image and one caption: the score, the (G, G) patches that are kept, and a match per word."""

    score: float
    kept: NDArray[np.bool_]
    words: list[WordMatch]


@torch.inference_mode()
def match(model: LAPS, image: Path, caption: str) -> Matching:
    """Take the score of an image file and a caption apart.

    The model has a LAPS head, no prefix tokens, and G x G patches.
    """
    head = model.head
    assert isinstance(head, LAPSHead)
    assert head.num_prefix_tokens == 0
    images, texts = model.encode_files([image]), model.encode_captions([caption])
    patches, logits, words, spans = images.patches, images.logits, texts.words, texts.spans
    # What a LAPS head keeps, and encode_captions.
    assert patches is not None
    assert logits is not None
    assert words is not None
    assert spans is not None
    side = math.isqrt(head.num_patches)
    arguments = (patches, words, texts.lengths)
    indices = functional.select_patches(*arguments, head.selection_ratio)[0, 0]
    significance = functional.selection_scores(*arguments)
    kept = torch.zeros(head.num_patches, dtype=torch.bool)
    kept[indices] = True

    tokens, counts = head.aggregation(patches, kept[None, None], significance)
    # A slope of 1: the cosines themselves, and not what the leaky ReLU leaves of negative ones.
    _, alignment = functional.align_patches_words(
        tokens, words, texts.lengths, token_counts=counts, negative_slope=1.0
    )
    weights = _token_weights(logits[0], significance[0, 0], kept)
    matches = []
    for start, end, word in spans[0]:
        # The pieces of a word together, as one column.
        column: Tensor = alignment[0, 0, :, start:end].mean(1)
        best = int(column.argmax())
        share = weights[best].reshape(side, side).numpy()
        matches.append(WordMatch(word, best == head.num_tokens, float(column[best]), share))
    score = float(model.similarity(images, texts))
    return Matching(score, kept.reshape(side, side).numpy(), matches)


def _token_weights(logits: Tensor, significance: Tensor, kept: Tensor) -> Tensor:
    """How much of each patch is in each token: logits (N, N_c) to weights (N_c + 1, N), the fused one last.

    Source: section SPC.
    """
    aggregated = logits.masked_fill(~kept[:, None], -math.inf).softmax(0).T
    if kept.all():
        return aggregated
    fused = significance.masked_fill(kept, -math.inf).softmax(0)
    return torch.cat([aggregated, fused[None]])
