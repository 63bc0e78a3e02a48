"""Whether two models are the same one: features of different models must not share an index."""

from __future__ import annotations

import hashlib
import json

import torch

from ..encoders.backbone import UNUSED
from ..model import LAPS

__all__ = ["fingerprint"]


def fingerprint(model: LAPS) -> str:
    """Of the weights, the configuration, the transform and the tokenizer; the same after saving and loading.

    Reads all weights, at about a second a gigabyte.
    """
    digest = hashlib.sha256()
    # The head's and the encoders' settings; those of the loss change no score.
    settings = {name: value for name, value in model.config.to_dict().items() if name != "loss"}
    digest.update(json.dumps([settings, model.transform.to_dict()], sort_keys=True).encode())
    if model.tokenizer is not None:
        digest.update(f"{model.tokenizer.max_length} {model.tokenizer.backend.to_str()}".encode())
    for name, tensor in sorted(model._portable_weights().items()):
        if any(part in name for part in UNUSED):
            # Their values change no token, and a loaded model lacks them.
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
