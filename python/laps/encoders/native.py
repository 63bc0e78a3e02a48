"""ViT, Swin, BERT and CLIP in Rust, on the libtorch of the installed torch.

They compute the same tokens as the models of transformers from the same checkpoints, and their parameters are
ordinary ``torch.nn.Parameter``, named as the hub names them: optimizers, DDP, ``state_dict``, ``to`` and
autocast work. ``torch.compile`` leaves them as they are.

Importing this module raises ImportError where ``laps-rs-native`` is not installed, or was built for another
torch; nothing else of laps needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._hub import find_folder
from .._laps import __version__
from ..errors import LapsTypeError, LapsValueError
from .backbone import UNKEPT, DescribedBackbone, Description
from .keys import check_weights

__all__ = ["KNOWN", "NativeBackbone", "builds", "load"]

INSTALL = "`make native` in a clone, or the wheel that `make wheel` builds"


def _require() -> Any:
    """The extension module; loaded only beside the torch that it was built for."""
    try:
        import laps_native
    except ImportError:
        raise ImportError(
            _check.message("laps.encoders.native", "laps-rs-native is not installed", INSTALL)
        ) from None
    installed = ".".join(torch.__version__.split(".")[:2])
    if installed != laps_native.BUILT_FOR_TORCH:
        raise ImportError(
            _check.message(
                "laps.encoders.native",
                f"laps-rs-native was built for torch {laps_native.BUILT_FOR_TORCH}",
                f"torch=={laps_native.BUILT_FOR_TORCH}.*, or the encoders of transformers",
                torch.__version__,
            )
        )
    from laps_native import _native

    if _native.__version__ != __version__:
        raise ImportError(
            _check.message(
                "laps.encoders.native",
                f"laps-rs-native is of version {_native.__version__}",
                f"that of laps, {__version__}: {INSTALL}",
            )
        )
    return _native


_native = _require()

# The families, by transformers' model_type, and what they take.
KNOWN = {
    "vit": "vision",
    "swin": "vision",
    "clip_vision_model": "vision",
    "bert": "text",
    "clip_text_model": "text",
}


class NativeBackbone(DescribedBackbone):
    """A ViT, Swin, BERT or CLIP backbone in Rust.

    CLIP's halves come with their projection, which they apply to every token.

    Args:
        config: the values of the transformers configuration of such a model, with ``model_type``.
        random: draw initial weights as transformers would; False leaves them undefined, to be loaded.

    Its submodules hold parameters and compute nothing: hooks on them do not fire, ``eval()`` of one of them
    alone changes nothing, and one that is replaced by a module that computes is refused at the next call.
    Parameters may be replaced, shared, frozen or computed (``torch.nn.utils.parametrize``).

    Raises:
        LapsValueError: an unknown ``model_type``, a value out of range, or sizes that do not fit each other.
        LapsTypeError: no mapping.

    Example:
        >>> import laps, torch
        >>> from laps.encoders.native import NativeBackbone
        >>> small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> vit = NativeBackbone({"model_type": "vit", "image_size": 32, **small})
        >>> encoder = laps.encoders.ImageEncoder(vit, embed_dim=64)
        >>> encoder(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, config: Mapping[str, Any], *, random: bool = True) -> None:
        super().__init__()
        if not isinstance(config, Mapping):
            raise LapsTypeError(
                _check.message(
                    "NativeBackbone",
                    "config has the wrong type",
                    "a mapping, such as config.to_dict() of transformers",
                    _check.name_of(config),
                )
            )
        values = {name: value for name, value in config.items() if name not in UNKEPT}
        self._encoder = _encoder(values)
        kind = KNOWN[values["model_type"]]
        if random:
            tensors = self._encoder.random()
        else:
            # Whatever the default dtype and device are.
            tensors = [
                (name, torch.empty(shape, dtype=torch.float32, device="cpu"))
                for name, shape in self._encoder.parameters()
            ]
        for name, tensor in tensors:
            _register(self, name, tensor)
        self._places = _places([name for name, _ in tensors])
        self._count = len(tensors)
        self.description = Description(
            values,
            inputs="pixel_values" if kind == "vision" else "input_ids",
            num_prefix_tokens=self._encoder.num_prefix_tokens,
            image_size=self._encoder.image_size,
            max_length=self._encoder.max_length,
            vocab_size=self._encoder.vocab_size,
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Pixels (B, 3, S, S) to tokens (B, P + N, D), or ids and mask (B, L) to tokens (B, L, D).

        The mask is 1 for tokens and 0 for padding, None for no padding; rows of padding are undefined. CLIP's
        tokens look back only, so that its padding must be at the end (which is checked on the CPU).

        Raises:
            LapsValueError: the input of the other kind of encoder, a mask of another shape, CLIP's padding
                elsewhere, or a submodule that was replaced.
        """
        parameters: list[Any] = [None] * self._count
        _collect(self, self._places, parameters)
        given = pixel_values if self.description.inputs == "pixel_values" else input_ids
        if given is None:
            raise LapsValueError(
                _check.message("NativeBackbone", f"{self.description.inputs} is missing", "a tensor")
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and mask.shape != given.shape:
            raise LapsValueError(
                _check.message(
                    "NativeBackbone",
                    "attention_mask does not fit",
                    f"the shape of input_ids, {tuple(given.shape)}",
                    tuple(mask.shape),
                )
            )
        looks_back = self.description.config["model_type"] == "clip_text_model"
        if mask is not None and looks_back and not mask.is_cuda and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise LapsValueError(
                _check.message("NativeBackbone", "attention_mask is not of CLIP's kind", "its ones first")
            )
        tokens: Tensor = self._encoder.forward(parameters, given, mask, self.training)
        return tokens

    def extra_repr(self) -> str:
        return f"model_type={self.description.config['model_type']!r}"


def _encoder(values: Mapping[str, Any]) -> Any:
    kind = values.get("model_type")
    if kind not in KNOWN:
        raise LapsValueError(
            _check.message(
                "NativeBackbone",
                "model_type is not one of the native encoders",
                ", ".join(KNOWN),
                repr(kind),
            )
        )
    return _native.Encoder(KNOWN[kind], json.dumps(values))


def builds(config: Mapping[str, Any]) -> bool:
    """Whether there is a native encoder for this configuration."""
    try:
        _encoder({name: value for name, value in config.items() if name not in UNKEPT})
    except (LapsValueError, TypeError):
        # Of another family, of values that only transformers has, or none that JSON could hold.
        return False
    return True


@dataclass
class _Places:
    """Where a module and those below it keep the parameters, by their numbers."""

    own: list[tuple[str, int]] = field(default_factory=list)
    below: dict[str, _Places] = field(default_factory=dict)


def _places(names: Sequence[str]) -> _Places:
    root = _Places()
    for number, path in enumerate(names):
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            place = place.below.setdefault(parent, _Places())
        place.own.append((name, number))
    return root


def _collect(module: nn.Module, places: _Places, parameters: list[Any]) -> None:
    """Fill in the parameters as they are now: one may have been replaced, or become computed.

    A few hundred look-ups come with every call, so they bypass what makes `getattr` of a module slow.
    """
    for name, number in places.own:
        parameter = module._parameters.get(name)
        parameters[number] = getattr(module, name) if parameter is None else parameter
    for name, below in places.below.items():
        child = module._modules.get(name)
        if child is None or type(child).forward is not nn.Module.forward:
            raise LapsValueError(
                _check.message(
                    "NativeBackbone",
                    f"the submodule {name} was replaced",
                    'parameters alone; encoders="hf" has modules that can be replaced',
                    _check.name_of(child),
                )
            )
        _collect(child, below, parameters)


def _register(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Make the tensor a parameter under its dotted name."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.register_parameter(name, nn.Parameter(tensor))


def load(source: str | Path, part: str, *, image_size: int | None = None) -> NativeBackbone:
    """A pretrained backbone from a folder or the hub, in training mode and float32.

    Args:
        source: a folder as transformers writes it (config.json; model.safetensors or its shards), or the
            hub's id.
        part: ``"vision"`` or ``"text"``: the half of a CLIP checkpoint to take.
        image_size: S in pixels, to interpolate the position embeddings to; None for the checkpoint's.

    Raises:
        LapsValueError: no such checkpoint, one of another kind of model, or weights that do not fit (missing
            and unexpected keys are listed).
    """
    if image_size is not None:
        image_size = _check.count(f"{part} encoder", "image_size", image_size)
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = find_folder(f"{part} encoder", source, patterns)
    file, config, tensors = _native.read_checkpoint(folder, part, image_size)
    backbone = NativeBackbone(json.loads(config), random=False)
    if backbone.description.inputs != ("pixel_values" if part == "vision" else "input_ids"):
        raise LapsValueError(
            _check.message(
                f"{part} encoder",
                f"{source} is no {part} model",
                f"a {part} model",
                backbone.description.config["model_type"],
            )
        )
    given = {name: tensor.float() for name, tensor in tensors}
    check_weights(file, backbone.state_dict(), given)
    backbone.load_state_dict(given)
    return backbone.train()
