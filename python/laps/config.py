"""What a model is made of, as data; and the configurations of the paper's tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import _check
from ._files import write_atomically
from ._json_files import read_object
from .errors import LapsError, LapsTypeError, LapsValueError

__all__ = ["PRESETS", "LAPSConfig", "Preset"]

FORMAT = 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class LAPSConfig:
    """Everything but the weights, the tokeniser and the transform of a :class:`laps.LAPS` model.

    Attributes:
        image_encoder: configuration of a transformers vision model, as its ``to_dict`` gives it; empty for a
            module of your own, which ``from_pretrained`` must then be given.
        text_encoder: the same for the text model.
        embed_dim: C.
        num_prefix_tokens: P of the image encoder.
        num_patches: N of the image encoder.
        image_size: S in pixels.
        image_projection: whether a linear map leads from the image backbone's own size to C; without one
            (CLIP) the two are equal.
        text_projection: the same for the text backbone.
        head: name of the similarity head; see :func:`laps.heads.head_names`.
        head_options: keyword arguments of the head.
        loss: keyword arguments of :class:`laps.objective.Objective`.

    Raises:
        LapsValueError, LapsTypeError: a value of the wrong type or out of range.
    """

    image_encoder: dict[str, Any]
    text_encoder: dict[str, Any]
    embed_dim: int
    num_prefix_tokens: int
    num_patches: int
    image_size: int
    image_projection: bool = True
    text_projection: bool = True
    head: str = "laps"
    head_options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        operation = "LAPSConfig"
        for name in ("embed_dim", "num_patches", "image_size"):
            _check.count(operation, name, getattr(self, name))
        _check.count(operation, "num_prefix_tokens", self.num_prefix_tokens, 0)
        for name in ("image_projection", "text_projection"):
            _check.flag(operation, name, getattr(self, name))
        for name, kind in (
            ("image_encoder", Mapping),
            ("text_encoder", Mapping),
            ("head", str),
            ("head_options", Mapping),
            ("loss", Mapping),
        ):
            value, expected = getattr(self, name), "str" if kind is str else "a dictionary"
            if not isinstance(value, kind):
                raise LapsTypeError(
                    _check.message(operation, f"{name} has the wrong type", expected, _check.name_of(value))
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, with the version of the format."""
        return {"laps_format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> LAPSConfig:
        """The inverse of `to_dict`.

        Raises:
            LapsValueError: another format, missing or unknown keys (named), or a value out of range.
            LapsTypeError: no dictionary, or a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise LapsTypeError(
                _check.message(
                    "LAPSConfig", f"{source} is no dictionary", "a JSON object", type(values).__name__
                )
            )
        values = dict(values)
        if values.pop("laps_format", None) != FORMAT:
            raise LapsValueError(
                _check.message(
                    "LAPSConfig",
                    f"{source} is not the config.json of a laps model",
                    f'"laps_format": {FORMAT}',
                )
            )
        known = {f.name for f in fields(cls)}
        required = {"image_encoder", "text_encoder", "embed_dim", "num_prefix_tokens", "num_patches"}
        required |= {"image_size"}
        missing, unknown = sorted(required - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise LapsValueError(
                _check.message(
                    "LAPSConfig",
                    f"{source} has other keys",
                    "those of LAPSConfig",
                    f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
                )
            )
        try:
            return cls(**values)
        except LapsError as error:
            raise type(error)(f"{source}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file, in one piece or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LAPSConfig:
        """Read the JSON file.

        Raises:
            LapsValueError, LapsTypeError: naming the file: it is missing, broken or another's.
        """
        values = read_object("LAPSConfig", Path(path), "the config.json of a laps model")
        return cls.from_dict(values, str(path))


@dataclass(frozen=True)
class Preset:
    """One LAPS row of the paper's Tables 1 and 2, or what its rows of regions share.

    Attributes:
        image_checkpoint, text_checkpoint: ids on the hub; None where the input is regions of a detector.
        image_encoder, text_encoder: the architecture, as keyword arguments of a transformers configuration,
            or of :class:`laps.encoders.RegionBackbone`.
        embed_dim: C of the projections; None: CLIP's own.
        head_options: rho and lambda.
        mean, std: of the pixels, per channel, as the image encoder was pretrained with.
        learning_rate, backbone_lr_ratio, batch_size: the recipe.
    """

    image_checkpoint: str | None
    text_checkpoint: str
    image_encoder: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    embed_dim: int | None
    head_options: Mapping[str, Any]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    learning_rate: float = 2e-4
    backbone_lr_ratio: float = 0.1
    batch_size: int = 128

    @property
    def regions(self) -> bool:
        """Whether the input is regions of a detector, in place of pixels."""
        return self.image_checkpoint is None

    def region_sizes(self, num_regions: int | None = None, feature_dim: int | None = None) -> dict[str, int]:
        """Keyword arguments of :class:`laps.data.RegionTransform`; its own where none is given."""
        given = {"num_regions": num_regions, "feature_dim": feature_dim}
        return {name: self.image_encoder[name] if size is None else size for name, size in given.items()}


BERT: dict[str, Any] = {"model_type": "bert"}
VIT_RATIOS = {"selection_ratio": 0.5, "aggregation_ratio": 0.4}
SWIN_RATIOS = {"selection_ratio": 0.8, "aggregation_ratio": 0.6}
# What CLIP's rows share: the projections are its own, and so are the pixels and the recipe.
CLIP: dict[str, Any] = {
    "embed_dim": None,
    "head_options": VIT_RATIOS,
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "learning_rate": 1e-4,
    "batch_size": 64,
}
SWIN_BASE = {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}

PRESETS: dict[str, Preset] = {
    "vit-base-224": Preset(
        "google/vit-base-patch16-224-in21k",
        "bert-base-uncased",
        {"model_type": "vit", "image_size": 224},
        BERT,
        512,
        VIT_RATIOS,
    ),
    "vit-base-384": Preset(
        "google/vit-base-patch16-384",
        "bert-base-uncased",
        {"model_type": "vit", "image_size": 384},
        BERT,
        512,
        VIT_RATIOS,
    ),
    "swin-base-224": Preset(
        "microsoft/swin-base-patch4-window7-224",
        "bert-base-uncased",
        {**SWIN_BASE, "image_size": 224, "window_size": 7},
        BERT,
        512,
        SWIN_RATIOS,
    ),
    "swin-base-384": Preset(
        "microsoft/swin-base-patch4-window12-384",
        "bert-base-uncased",
        {**SWIN_BASE, "image_size": 384, "window_size": 12},
        BERT,
        512,
        SWIN_RATIOS,
    ),
    "clip-vit-base-224": Preset(
        "openai/clip-vit-base-patch16",
        "openai/clip-vit-base-patch16",
        {"model_type": "clip_vision_model", "patch_size": 16, "image_size": 224},
        {"model_type": "clip_text_model"},
        **CLIP,
    ),
    "clip-vit-large-224": Preset(
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14",
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 768,
        },
        {
            "model_type": "clip_text_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        **CLIP,
    ),
    # Bottom-up attention's regions. C and the learning rate are those of CHAN's and HREM's authors; the
    # ratios, for LAPS, which nobody has published on regions, those of Swin's 49 patches.
    "region-36": Preset(
        None,
        "bert-base-uncased",
        {"model_type": "laps_regions", "num_regions": 36, "feature_dim": 2048},
        BERT,
        1024,
        SWIN_RATIOS,
        learning_rate=5e-4,
    ),
}
