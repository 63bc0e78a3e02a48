"""What is known of a backbone without importing transformers, which takes seconds."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import _check
from ..errors import LapsTypeError, LapsValueError

# A pooler and a masked-image-modelling token have no effect on tokens; checkpoints often lack them.
UNUSED = ("pooler.", "embeddings.mask_token")


def freeze(backbone: nn.Module, frozen: bool) -> None:
    """Take all parameters out of training, or all that tokens depend on into it."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(not frozen)
    _freeze_unused(backbone)


def prepare(operation: str, backbone: object, takes: str) -> Any:
    """Make a module ready to be an encoder's backbone; returns its configuration as :func:`config_of` does.

    Raises:
        LapsTypeError: no module. LapsValueError: as :func:`config_of`.
    """
    if not isinstance(backbone, nn.Module):
        raise LapsTypeError(
            _check.message(operation, "backbone is no module", "nn.Module", _check.name_of(backbone))
        )
    config = config_of(operation, backbone, takes)
    _freeze_unused(backbone)
    return config


def _freeze_unused(backbone: nn.Module) -> None:
    """Take the parameters that tokens do not depend on out of training: they would upset DDP."""
    if _is_transformers(backbone):
        for name, parameter in backbone.named_parameters():
            if any(part in name for part in UNUSED):
                parameter.requires_grad_(False)


def _is_transformers(module: nn.Module) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(module).__mro__)


def config_of(operation: str, backbone: nn.Module, takes: str | None) -> Any:
    """The configuration of a model of transformers; None for any other module.

    Args:
        operation: for messages.
        backbone: any module.
        takes: the name of the input that it has to take, ``"pixel_values"`` or ``"input_ids"``; None for any.

    Raises:
        LapsValueError: a model of the other kind, or a CLIP model without its projection, whose tokens lie
            outside the shared space.
    """
    if not _is_transformers(backbone):
        return None
    config: Any = getattr(backbone, "config", None)
    if takes is not None and getattr(backbone, "main_input_name", takes) != takes:
        raise LapsValueError(
            _check.message(
                operation,
                f"backbone {type(backbone).__name__} takes other inputs",
                takes,
                backbone.main_input_name,
            )
        )
    kind = getattr(config, "model_type", "")
    if kind in ("clip", "clip_vision_model", "clip_text_model") and not (
        hasattr(backbone, "visual_projection") or hasattr(backbone, "text_projection")
    ):
        raise LapsValueError(
            _check.message(
                operation,
                "backbone lacks CLIP's projection",
                "CLIPVisionModelWithProjection or CLIPTextModelWithProjection",
                type(backbone).__name__,
            )
        )
    return config
