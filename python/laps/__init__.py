"""laps: fine-grained image-text alignment (Linguistic-Aware Patch Slimming, CVPR 2024) for PyTorch.

- :mod:`laps.nn`: :class:`~laps.nn.LAPSHead` and its parts, as modules;
- :mod:`laps.functional`: the same without parameters, for tensors and NumPy arrays;
- :mod:`laps.losses`: what such scores are trained with;
- :mod:`laps.ops`: the operators registered with PyTorch.

Example:
    >>> import laps, torch
    >>> head = laps.nn.LAPSHead(embed_dim=64, num_patches=49)
    >>> images, words, lengths = torch.randn(2, 1 + 49, 64), torch.randn(3, 12, 64), torch.tensor([12, 7, 5])
    >>> head(images, words, lengths).shape
    torch.Size([2, 3])
"""

from . import errors, functional, losses, nn, ops
from ._info import info
from ._laps import __version__
from .errors import LapsError, LapsTypeError, LapsValueError

__all__ = [
    "LapsError",
    "LapsTypeError",
    "LapsValueError",
    "__version__",
    "errors",
    "functional",
    "info",
    "losses",
    "nn",
    "ops",
]
