"""Evaluation of a retrieval model on images and captions: :func:`laps.evaluate` and what it returns."""

from .encode import RetrievalModel
from .report import Evaluation
from .rerank import Reranked
from .run import evaluate

__all__ = ["Evaluation", "Reranked", "RetrievalModel", "evaluate"]
