"""Hugging Face transformers as backbones: building, loading, and saving under the key names of the hub.

transformers renames its modules between versions and translates checkpoints as it loads and saves them. What
is stored here went through that translation, so a file outlives the version that wrote it.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .. import _check
from .._tensor_files import system_errors
from ..errors import LapsValueError
from .backbone import UNUSED
from .keys import check_keys

# CLIP's tokens live in the shared space only after its projections, which the plain models lack.
WITH_PROJECTION = {
    "clip_vision_model": CLIPVisionModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
}
INPUTS = {"vision": "pixel_values", "text": "input_ids"}


def num_prefix_tokens(config: PretrainedConfig) -> int | None:
    """P: how many tokens come before the patches; None for a family that is not known here."""
    known = {
        "vit": 1,
        "deit": 2,
        "dinov2": 1,
        "dinov2_with_registers": 1 + getattr(config, "num_register_tokens", 0),
        "swin": 0,
        "swinv2": 0,
        "clip_vision_model": 1,
        "resnet": 0,
        "convnext": 0,
        "convnextv2": 0,
    }
    return known.get(config.model_type)


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that `PretrainedConfig.to_dict` gave. Raises LapsValueError for an unknown family."""
    values = dict(values)
    try:
        return AutoConfig.for_model(**values)
    except (KeyError, ValueError, TypeError) as error:
        raise LapsValueError(
            _check.message(
                "encoder config", "model_type is unknown to transformers", "for example vit, bert", error
            )
        ) from None


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    model_class: type[PreTrainedModel]
    try:
        model_class = WITH_PROJECTION.get(config.model_type) or MODEL_MAPPING[type(config)]
    except KeyError:
        raise LapsValueError(
            _check.message(
                "encoder config", "model_type has no plain model", "for example vit, bert", config.model_type
            )
        ) from None
    return model_class


def _options(model_class: type[PreTrainedModel]) -> dict[str, Any]:
    """Leaves the pooler out where the model can do without: its unused weights would upset DDP."""
    accepted = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, in training mode."""
    model_class = _model_class(config)
    return model_class(config, **_options(model_class)).train()


def load(source: str | Path, part: str) -> PreTrainedModel:
    """A pretrained model from a folder or the hub, in training mode and float32.

    Args:
        source: a folder as `save_pretrained` writes it, or the hub's id.
        part: ``"vision"`` or ``"text"``: the half of a CLIP checkpoint to take.

    Raises:
        LapsValueError: no checkpoint there, one of another kind of model, or weights are missing from it (it
            names them).
    """
    operation = f"{part} encoder"
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise LapsValueError(_unreadable(operation, source, error)) from error
    config = getattr(config, f"{part}_config", config)
    model_class = _model_class(config)
    if model_class.main_input_name != INPUTS[part]:
        raise LapsValueError(
            _check.message(
                operation, f"{source} is no {part} model", f"one that takes {INPUTS[part]}", config.model_type
            )
        )
    with _quiet():
        try:
            model, report = model_class.from_pretrained(
                source,
                config=config,
                output_loading_info=True,
                dtype=torch.float32,
                # What does not fit is named below.
                ignore_mismatched_sizes=True,
                **_options(model_class),
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise LapsValueError(_unreadable(operation, source, error)) from error
    # What the checkpoint has beyond the encoder (a classifier, CLIP's other half) is left there on purpose.
    _check_keys(str(source), report, unexpected=False)
    return model.train()


def _unreadable(operation: str, source: str | Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return _check.message(
        operation, f"{source} cannot be loaded", "a folder or hub id of a transformers model", reason
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the hub's key names."""
    # Through a file, because that is where transformers translates its names.
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        with system_errors():
            model.save_pretrained(folder, max_shard_size="1TB")
        return load_file(Path(folder) / "model.safetensors")


def from_weights(config: PretrainedConfig, state: Mapping[str, Tensor], source: str) -> PreTrainedModel:
    """The model that `weights` came from. Raises LapsValueError that names missing and unexpected keys."""
    model_class = _model_class(config)
    with _quiet():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **_options(model_class),
        )
    _check_keys(source, report, unexpected=True)
    return model


def _check_keys(source: str, report: Mapping[str, Any], *, unexpected: bool) -> None:
    missing, surplus = (
        sorted(key for key in report[kind] if not any(part in key for part in UNUSED))
        for kind in ("missing_keys", "unexpected_keys")
    )
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    check_keys(source, missing, surplus if unexpected else [], mismatched)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars and reports out of ours; what matters is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
