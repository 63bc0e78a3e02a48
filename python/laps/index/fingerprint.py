"""Whether two models are the same one: features of different models must not share an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._tensor_files import load_tensors
from ..config import LAPSConfig
from ..data import CaptionTokenizer, ImageTransform, RegionTransform
from ..encoders.backbone import UNUSED
from ..model import CONFIG, LAPS, TOKENIZER, TRANSFORM, WEIGHTS, _read_transform

__all__ = ["fingerprint", "folder_fingerprint"]


def fingerprint(model: LAPS) -> str:
    """Of the weights, the configuration, the transform and the tokenizer; the same after saving and loading.

    Reads all weights, at about a second a gigabyte.
    """
    return _digest(model.config, model.transform, model.tokenizer, model._portable_weights())


def folder_fingerprint(folder: Path) -> str:
    """That of the model which was saved in a folder, be its encoders the user's own, which no file describes.

    Raises:
        LapsError: a file that is missing or broken (it is named).
    """
    tokenizer = folder / TOKENIZER
    return _digest(
        LAPSConfig.load(folder / CONFIG),
        _read_transform(folder / TRANSFORM),
        CaptionTokenizer.from_file(tokenizer) if tokenizer.exists() else None,
        load_tensors("Index", folder / WEIGHTS),
    )


def _digest(
    config: LAPSConfig,
    transform: ImageTransform | RegionTransform,
    tokenizer: CaptionTokenizer | None,
    weights: Mapping[str, Tensor],
) -> str:
    digest = hashlib.sha256()
    # The head's and the encoders' settings; those of the loss change no score.
    settings = {name: value for name, value in config.to_dict().items() if name != "loss"}
    digest.update(json.dumps([settings, transform.to_dict()], sort_keys=True).encode())
    if tokenizer is not None:
        digest.update(f"{tokenizer.max_length} {tokenizer.backend.to_str()}".encode())
    for name, tensor in sorted(weights.items()):
        if any(part in name for part in UNUSED):
            # Their values change no token, and a loaded model lacks them.
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
