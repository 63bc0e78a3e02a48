"""Similarity heads: what turns image tokens and word tokens into scores; `laps` is the method.

A head is found by its name: ``build_head("laps", embed_dim=512, num_patches=196, selection_ratio=0.5)``.
"""

from .base import SimilarityHead, TrainingScores, build_head, head_names, register_head
from .chan import CHANHead
from .pairs import PairHead, Pairs
from .vse import GlobalHead

__all__ = [
    "CHANHead",
    "GlobalHead",
    "PairHead",
    "Pairs",
    "SimilarityHead",
    "TrainingScores",
    "build_head",
    "head_names",
    "register_head",
]
