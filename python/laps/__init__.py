"""laps: fine-grained image-text alignment (Linguistic-Aware Patch Slimming, CVPR 2024) for PyTorch.

- :mod:`laps.nn`: :class:`~laps.nn.LAPSHead` and its parts, as modules;
- :mod:`laps.functional`: the same without parameters, for tensors and NumPy arrays;
- :mod:`laps.losses`: what such scores are trained with;
- :mod:`laps.ops`: the operators registered with PyTorch;
- :class:`laps.LAPS`: the whole model, with :mod:`laps.encoders` and :mod:`laps.heads`;
- :mod:`laps.data`, :mod:`laps.train`, :func:`laps.evaluate`, :mod:`laps.metrics`: from files to a trained,
  measured model;
- :class:`laps.Index`: a folder of images, searched by sentences;
- :func:`laps.explain`: why an image and a caption have their score.

Example:
    >>> import laps, torch
    >>> head = laps.nn.LAPSHead(embed_dim=64, num_patches=49)
    >>> images, words, lengths = torch.randn(2, 1 + 49, 64), torch.randn(3, 12, 64), torch.tensor([12, 7, 5])
    >>> head(images, words, lengths).shape
    torch.Size([2, 3])
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, functional, heads, losses, nn, objective, ops
from ._info import info
from ._laps import __version__
from .errors import LapsError, LapsTypeError, LapsValueError

if TYPE_CHECKING:
    from . import config, data, distributed, encoders, grounding, metrics, plot, step, train
    from .config import LAPSConfig
    from .conversion import convert
    from .evaluation import evaluate
    from .explanation import explain
    from .index import Index
    from .model import LAPS

__all__ = [
    "LAPS",
    "Index",
    "LAPSConfig",
    "LapsError",
    "LapsTypeError",
    "LapsValueError",
    "__version__",
    "config",
    "convert",
    "data",
    "distributed",
    "encoders",
    "errors",
    "evaluate",
    "explain",
    "functional",
    "grounding",
    "heads",
    "info",
    "losses",
    "metrics",
    "nn",
    "objective",
    "ops",
    "plot",
    "step",
    "train",
]

# Whoever needs the head alone does not wait for image and hub libraries: these load at first use.
_LAZY = {
    "Index": "index",
    "LAPS": "model",
    "LAPSConfig": "config",
    "config": None,
    "convert": "conversion",
    "data": None,
    "distributed": None,
    "encoders": None,
    "evaluate": "evaluation",
    "explain": "explanation",
    "grounding": None,
    "metrics": None,
    "plot": None,
    "step": None,
    "train": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _LAZY[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
