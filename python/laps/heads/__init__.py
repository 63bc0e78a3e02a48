"""Similarity heads: what turns image tokens and word tokens into scores; `laps` is the method.

A head is found by its name: ``build_head("laps", embed_dim=512, num_patches=196, selection_ratio=0.5)``.
"""

from .base import SimilarityHead, TrainingScores, build_head, head_names, register_head
from .chan import CHANHead
from .clip import CLIPHead
from .cpfean import CPFEANHead
from .embedding import EmbeddingHead
from .gpo import GeneralizedPooling, GPOHead
from .hrem import HREMHead, RelationInteraction, RelationPooling
from .pairs import PairHead, Pairs
from .scan import SCANHead
from .sgraf import SAFHead, SGRAFHead, SGRHead
from .tgdt import TGDTHead
from .vse import GlobalHead

__all__ = [
    "CHANHead",
    "CLIPHead",
    "CPFEANHead",
    "EmbeddingHead",
    "GPOHead",
    "GeneralizedPooling",
    "GlobalHead",
    "HREMHead",
    "PairHead",
    "Pairs",
    "RelationInteraction",
    "RelationPooling",
    "SAFHead",
    "SCANHead",
    "SGRAFHead",
    "SGRHead",
    "SimilarityHead",
    "TGDTHead",
    "TrainingScores",
    "build_head",
    "head_names",
    "register_head",
]
