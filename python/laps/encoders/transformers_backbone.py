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
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .. import _check
from .._tensor_files import load_tensors, system_errors
from ..errors import LapsValueError
from .backbone import UNKEPT, UNUSED, Description
from .keys import check_keys, check_weights, other_shape

# CLIP's tokens live in the shared space only after its projections, which the plain models lack.
WITH_PROJECTION = {
    "clip_vision_model": CLIPVisionModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
}
INPUTS = {"vision": "pixel_values", "text": "input_ids"}
# What comes of a configuration of wrong types, or of sizes that do not fit each other.
UNBUILDABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Misfit(NamedTuple):
    """Weights that do not fit a model, under the names that this version of transformers gives them."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


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


def describe(model: Any) -> Description:
    """What is known of a model of transformers."""
    config = model.config
    return Description(
        {name: value for name, value in config.to_dict().items() if name not in UNKEPT},
        inputs=getattr(model, "main_input_name", None),
        num_prefix_tokens=num_prefix_tokens(config),
        image_size=getattr(config, "image_size", None),
        max_length=getattr(config, "max_position_embeddings", None),
        vocab_size=getattr(config, "vocab_size", None),
        projects=config.model_type in WITH_PROJECTION,
    )


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that `PretrainedConfig.to_dict` gave. Raises LapsValueError for a senseless one."""
    values = dict(values)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise LapsValueError(
            _check.message(
                "encoder config", "model_type is unknown to transformers", "for example vit, bert", repr(kind)
            )
        )
    try:
        return CONFIG_MAPPING[kind](**values)
    except (*UNBUILDABLE, StrictDataclassError) as error:
        raise LapsValueError(_refused(kind, error)) from error


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
    """A model with random weights, in training mode. Raises LapsValueError for sizes that do not fit."""
    model_class = _model_class(config)
    try:
        return model_class(config, **_options(model_class)).train()
    except UNBUILDABLE as error:
        raise LapsValueError(_refused(config.model_type, error)) from error


def _refused(kind: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return _check.message(
        "encoder config", f"no {kind} model can be built", "the values of its configuration", reason
    )


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
    except (OSError, *UNBUILDABLE, StrictDataclassError) as error:
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
        except (OSError, *UNBUILDABLE, SafetensorError) as error:
            raise LapsValueError(_unreadable(operation, source, error)) from error
    misfit = _misfit(report)
    # What the checkpoint has beyond the encoder (a classifier, CLIP's other half) is left there on purpose.
    if misfit.missing or misfit.mismatched:
        file = Path(source) / "model.safetensors"
        if file.exists():
            _check_file(file, model)
        check_keys(str(source), *misfit)
    return model.train()


def _check_file(file: Path, model: PreTrainedModel) -> None:
    """Refuse a file that lacks weights of the model, under the names that they have there."""
    given, own = load_tensors("encoder weights", file), weights(model)
    # A model for a task keeps the encoder under a name of its own.
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in given):
        own = {prefix + name: tensor for name, tensor in own.items()}
    check_weights(
        str(file),
        *(
            {n: t for n, t in state.items() if not any(part in n for part in UNUSED)}
            for state in (own, given)
        ),
    )


def _unreadable(operation: str, source: str | Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return _check.message(
        operation, f"{source} cannot be loaded", "a folder or hub id of a transformers model", reason
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the hub's key names."""
    # Through a file, because that is where transformers translates its names.
    with _quiet(), _saving_on_every_rank(model), tempfile.TemporaryDirectory() as folder:
        with system_errors():
            model.save_pretrained(folder, max_shard_size="1TB")
        return load_tensors("encoder weights", Path(folder) / "model.safetensors")


@contextlib.contextmanager
def _saving_on_every_rank(model: PreTrainedModel) -> Iterator[None]:
    """From 5.23 on transformers writes on rank 0 alone; the weights are wanted on the rank that asks."""
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


def from_weights(config: PretrainedConfig, state: Mapping[str, Tensor]) -> tuple[PreTrainedModel, Misfit]:
    """The model that `weights` came from, and what of `state` did not fit it: weights that it lacks are
    random."""
    model_class = _model_class(config)
    with _quiet():
        try:
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                output_loading_info=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                **_options(model_class),
            )
        except UNBUILDABLE as error:
            raise LapsValueError(_refused(config.model_type, error)) from error
    return model, _misfit(report)


def _misfit(report: Mapping[str, Any]) -> Misfit:
    """What matters of transformers' report."""
    missing, unexpected = (
        [key for key in report[kind] if not any(part in key for part in UNUSED)]
        for kind in ("missing_keys", "unexpected_keys")
    )
    return Misfit(missing, unexpected, [other_shape(*key) for key in report["mismatched_keys"]])


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
