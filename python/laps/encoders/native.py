"""ViT, Swin, BERT and CLIP in Rust, on the libtorch of the installed torch.

They compute the same tokens as the models of transformers from the same checkpoints, and their parameters are
ordinary ``torch.nn.Parameter``, named as the hub names them: optimizers, DDP, ``state_dict``, ``to`` and
autocast work. ``torch.compile`` leaves them as they are.

Importing this module raises ImportError where ``laps-rs-native`` is not installed, or was built for another
torch; nothing else of laps needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._hub import find_folder
from .._laps import __version__
from ..errors import LapsValueError
from .backbone import UNKEPT, DescribedBackbone, Description
from .keys import check_weights

__all__ = ["KNOWN", "NativeBackbone", "load"]

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

    Raises:
        LapsValueError: an unknown ``model_type``, a value out of range, or sizes that do not fit each other.

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
        values = {name: value for name, value in config.items() if name not in UNKEPT}
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
        self._encoder = _native.Encoder(KNOWN[kind], json.dumps(values))
        if random:
            tensors = self._encoder.random()
        else:
            tensors = [(name, torch.empty(shape)) for name, shape in self._encoder.parameters()]
        for name, tensor in tensors:
            _register(self, name, tensor)
        # By name and not by module: a module may be replaced, and a parameter become computed.
        self._names = [name.rpartition(".")[::2] for name, _ in tensors]
        self.description = Description(
            values,
            inputs="pixel_values" if KNOWN[kind] == "vision" else "input_ids",
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

        The mask, 1 for tokens and 0 for padding, must have its ones first; None is all ones. Rows of padding
        are undefined.

        Raises:
            LapsValueError: the input of the other kind of encoder.
        """
        parameters = [getattr(self.get_submodule(path), name) for path, name in self._names]
        given = pixel_values if self.description.inputs == "pixel_values" else input_ids
        if given is None:
            raise LapsValueError(
                _check.message("NativeBackbone", f"{self.description.inputs} is missing", "a tensor")
            )
        lengths = None
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            lengths = mask.sum(1)
        tokens: Tensor = self._encoder.forward(parameters, given, lengths, self.training)
        return tokens

    def extra_repr(self) -> str:
        return f"model_type={self.description.config['model_type']!r}"


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
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = find_folder(f"{part} encoder", source, patterns)
    file, config, tensors = _native.read_checkpoint(folder, part, image_size)
    backbone = NativeBackbone(json.loads(config), random=False)
    if backbone.description.inputs != ("pixel_values" if part == "vision" else "input_ids"):
        raise LapsValueError(
            _check.message(f"{part} encoder", f"{source} is no {part} model", f"a {part} model", KNOWN)
        )
    given = {name: tensor.float() for name, tensor in tensors}
    check_weights(file, backbone.state_dict(), given)
    backbone.load_state_dict(given)
    return backbone.train()
