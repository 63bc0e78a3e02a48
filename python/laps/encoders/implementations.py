"""Whose implementation of an encoder's backbone: that of Hugging Face transformers, or the native one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import _check
from ..errors import LapsValueError

__all__ = ["IMPLEMENTATIONS", "build", "load", "restore"]

# "auto" is the native one where it is installed and can build the model, else that of transformers.
# The model_type of laps.encoders.RegionBackbone.
REGIONS = "laps_regions"
IMPLEMENTATIONS = ("hf", "native", "auto")


def _is_native(encoders: str, config: Mapping[str, Any]) -> bool:
    _check.choice("encoders", "encoders", encoders, IMPLEMENTATIONS)
    if encoders != "auto":
        return encoders == "native"
    try:
        from . import native
    except ImportError:
        return False
    return native.builds(config)


def build(config: Mapping[str, Any], encoders: str) -> nn.Module:
    """A backbone with random weights, in training mode.

    Raises:
        LapsValueError: a senseless configuration. ImportError: no native encoders here, where they are asked
            for.
    """
    if config.get("model_type") == REGIONS:
        return _regions(config)
    if _is_native(encoders, config):
        from . import native

        return native.NativeBackbone(config)
    from . import transformers_backbone as backbones

    backbone: nn.Module = backbones.build(backbones.config_from_dict(config))
    return backbone


def restore(config: Mapping[str, Any], encoders: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, bool]:
    """A backbone for weights under the hub's names, and whether they all found their place.

    The native one is left without weights: its names are those of `state`, so that the caller can load them.

    Raises:
        LapsValueError, ImportError: as `build`.
    """
    if config.get("model_type") == REGIONS:
        return _regions(config), True
    if _is_native(encoders, config):
        from . import native

        return native.NativeBackbone(config, random=False), True
    from . import transformers_backbone as backbones

    backbone, misfit = backbones.from_weights(backbones.config_from_dict(config), state)
    return backbone, not any(misfit)


def _regions(config: Mapping[str, Any]) -> nn.Module:
    # Nobody's but ours, whatever `encoders` says.
    from .regions import RegionBackbone

    return RegionBackbone.from_config(config)


def load(source: str | Path, part: str, encoders: str, image_size: int | None = None) -> nn.Module:
    """A pretrained backbone from a folder or the hub, in training mode and float32.

    Args:
        source: a folder as transformers writes it, or the hub's id.
        part: ``"vision"`` or ``"text"``: the half of a CLIP checkpoint to take.
        encoders: "hf", "native" or "auto".
        image_size: S in pixels, of a native ViT or CLIP: its position embeddings are interpolated to it.

    Raises:
        LapsValueError: no checkpoint there, one of another kind of model, or weights are missing from it (it
            names them). ImportError: as `build`.
    """
    _check.choice("encoders", "encoders", encoders, IMPLEMENTATIONS)
    if encoders != "hf" and _is_native(encoders, _config(source, part)):
        from . import native

        try:
            return native.load(source, part, image_size=image_size)
        except LapsValueError:
            # Weights in a form that only transformers reads, or that fit neither: let it say so.
            if encoders == "native":
                raise
    from . import transformers_backbone as backbones

    backbone: nn.Module = backbones.load(source, part)
    return backbone


def _config(source: str | Path, part: str) -> Mapping[str, Any]:
    """The configuration of a checkpoint, or of its half."""
    from .._hub import find_folder
    from .._json_files import read_object

    operation = f"{part} encoder"
    folder = find_folder(operation, source, ["config.json"])
    config = read_object(operation, folder / "config.json", "the config.json of a checkpoint")
    # Old checkpoints of CLIP keep the values that count under the first name.
    older = config.get(f"{part}_config_dict")
    nested = older if isinstance(older, dict) else config.get(f"{part}_config")
    if nested is None:
        return config
    return {"model_type": f"clip_{part}_model", **nested} if isinstance(nested, dict) else {}
