"""What is known of a backbone without importing transformers, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import _check
from ..errors import LapsTypeError, LapsValueError

# A pooler and a masked-image-modelling token have no effect on tokens; checkpoints often lack them.
UNUSED = ("pooler.", "embeddings.mask_token")

# A path of its maker's machine, and notes that transformers adds when it saves: no part of a configuration.
UNKEPT = ("_name_or_path", "architectures", "dtype")


@dataclass(frozen=True)
class Description:
    """What a backbone tells of itself; None where it does not.

    Attributes:
        config: as ``config.json`` keeps it: the values of a transformers configuration.
        inputs: the name of its input, ``"pixel_values"`` or ``"input_ids"``.
        num_prefix_tokens: P.
        image_size: S in pixels; of regions, their number.
        max_length: the most tokens of a caption.
        vocab_size: the number of token ids.
        input_shape: of an image's input, where that is no picture (3, S, S).
        projects: whether its tokens are made by CLIP's projection, which is left to the encoder.
    """

    config: dict[str, Any]
    inputs: str | None = None
    num_prefix_tokens: int | None = None
    image_size: int | None = None
    max_length: int | None = None
    vocab_size: int | None = None
    input_shape: tuple[int, ...] | None = None
    projects: bool = False


class DescribedBackbone(nn.Module):
    """A backbone of this package's own, which names its parameters as the hub does."""

    description: Description


def freeze(backbone: nn.Module, frozen: bool) -> None:
    """Take all parameters out of training, or all that tokens depend on into it."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(not frozen)
    _freeze_unused(backbone)


def prepare(operation: str, backbone: object, inputs: str) -> Description | None:
    """Make a module ready to be an encoder's backbone; returns what `describe` does.

    Args:
        operation: for messages.
        backbone: any module.
        inputs: what it has to take, ``"pixel_values"`` or ``"input_ids"``.

    Raises:
        LapsTypeError: no module. LapsValueError: a backbone that takes the other input, or a CLIP model
            without its projection, whose tokens lie outside the shared space.
    """
    if not isinstance(backbone, nn.Module):
        raise LapsTypeError(
            _check.message(operation, "backbone is no module", "nn.Module", _check.name_of(backbone))
        )
    description = describe(backbone)
    kind = type(backbone).__name__
    if description is not None and (description.inputs or inputs) != inputs:
        raise LapsValueError(
            _check.message(operation, f"backbone {kind} takes other inputs", inputs, description.inputs)
        )
    if is_transformers(backbone):
        model_type = getattr(backbone.config, "model_type", "")
        projections = (hasattr(backbone, name) for name in ("visual_projection", "text_projection"))
        if model_type in ("clip", "clip_vision_model", "clip_text_model") and not any(projections):
            expected = "CLIPVisionModelWithProjection or CLIPTextModelWithProjection"
            raise LapsValueError(
                _check.message(operation, "backbone lacks CLIP's projection", expected, kind)
            )
    _freeze_unused(backbone)
    return description


def _freeze_unused(backbone: nn.Module) -> None:
    """Take the parameters that tokens do not depend on out of training: they would upset DDP."""
    if is_transformers(backbone):
        for name, parameter in backbone.named_parameters():
            if any(part in name for part in UNUSED):
                parameter.requires_grad_(False)


def is_transformers(module: nn.Module) -> bool:
    """Whether this is a model of transformers."""
    return any(base.__module__.startswith("transformers.") for base in type(module).__mro__)


def describe(backbone: nn.Module) -> Description | None:
    """What the backbone tells of itself; None for a module of the user's own."""
    if isinstance(backbone, DescribedBackbone):
        return backbone.description
    if not is_transformers(backbone):
        return None
    from . import transformers_backbone

    return transformers_backbone.describe(backbone)
