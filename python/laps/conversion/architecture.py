"""Which model a checkpoint of the published code is of: from its options, its shapes and the base models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .. import _check
from .._json_files import read_object
from ..config import PRESETS
from ..encoders.transformers_backbone import config_from_dict
from ..errors import LapsError, LapsTypeError, LapsValueError
from .published import AGGREGATION, IMAGE, IMAGE_PROJECTION, TEXT, TEXT_PROJECTION, Published

__all__ = ["Architecture", "find_architecture"]

# The published model with each image encoder. Only ratios and what shapes do not tell is taken from it.
BASES = {"vit": PRESETS["vit-base-224"], "swin": PRESETS["swin-base-224"]}
# The width of the base models, whose number of heads no shape tells.
BASE_WIDTH = 768
# Far above any published model: a file must not make us take a machine's whole memory.
MAX_IMAGE_SIZE, MAX_PATCHES = 2048, 16384


@dataclass(frozen=True)
class Architecture:
    """What a model is built from.

    Attributes:
        image_config, text_config: of the encoders.
        image_projection, text_projection: whether a linear map leads from an encoder's own size to C.
        embed_dim: C.
        image_size: S in pixels.
        num_patches: N.
        selection_ratio, aggregation_ratio: rho, lambda.
    """

    image_config: PretrainedConfig
    text_config: PretrainedConfig
    image_projection: bool
    text_projection: bool
    embed_dim: int
    image_size: int
    num_patches: int
    selection_ratio: float
    aggregation_ratio: float


def find_architecture(
    operation: str,
    published: Published,
    image_config: str | Path | None,
    text_config: str | Path | None,
    selection_ratio: float | None,
    aggregation_ratio: float | None,
) -> Architecture:
    """The model that the options, the shapes of the weights and, where given, configurations agree on.

    Args:
        operation: for messages.
        published: the checkpoint.
        image_config: ``config.json`` of transformers, for another size than the base model's.
        text_config: the same.
        selection_ratio: where the file has no options; None for the published one.
        aggregation_ratio: the same.

    Raises:
        LapsValueError, LapsTypeError: two of them contradict each other (both are said), weights lack that
            tell the size, or sizes that need a configuration have none.
    """
    finder = _Finder(operation, published)
    family = finder.family()
    given = finder.given("image", image_config, family)
    found = finder.vit() if family == "vit" else finder.swin(given)
    image_size, num_patches = found["image_size"], finder.num_patches(family, found)
    embed_dim = finder.size(AGGREGATION + "weight.0.weight", 1, 0)
    finder.agree("embed_size", embed_dim)
    rho, lambda_ = finder.ratios(family, num_patches, selection_ratio, aggregation_ratio)
    text = finder.bert()
    image_width = found.get("hidden_size") or found["embed_dim"] * 2 ** (len(found["depths"]) - 1)
    return Architecture(
        finder.config("image", family, found, image_config, given),
        finder.config("text", "bert", text, text_config, finder.given("text", text_config, "bert")),
        bool(published.part(IMAGE_PROJECTION)) or image_width != embed_dim,
        bool(published.part(TEXT_PROJECTION)) or text["hidden_size"] != embed_dim,
        embed_dim,
        image_size,
        num_patches,
        rho,
        lambda_,
    )


class _Finder:
    """Sizes of one checkpoint, with errors that name its file."""

    def __init__(self, operation: str, published: Published) -> None:
        self.operation = operation
        self.published = published

    def refuse(self, broken: str, expected: object, got: object = None) -> LapsValueError:
        return LapsValueError(
            _check.message(self.operation, f"{self.published.path}: {broken}", expected, got)
        )

    # ---- shapes

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        tensor = self.published.weights.get(name)
        name = self.published.prefix + name
        if tensor is None:
            raise self.refuse(f"{name} is missing", "the weights of the published model")
        if tensor.dim() != axes:
            raise self.refuse(f"{name} has another shape", f"{axes} axes", tuple(tensor.shape))
        return tuple(tensor.shape)

    def size(self, name: str, axes: int, axis: int) -> int:
        return self.shape(name, axes)[axis]

    def count(self, start: str) -> int:
        """How many numbers follow this beginning of a name; which, is checked with the names."""
        names = (name.removeprefix(start) for name in self.published.weights if name.startswith(start))
        return len({name.split(".")[0] for name in names})

    def family(self) -> str:
        """The image encoder's: vit or swin."""
        names = self.published.part(IMAGE)
        family = "vit" if "embeddings.cls_token" in names else "swin"
        if family == "swin" and not any(name.startswith("encoder.layers.") for name in names):
            raise self.refuse(
                f"{self.published.prefix}{IMAGE}* is no encoder of the published code",
                "the weights of a ViT or a Swin",
                ", ".join(sorted(names)[:3]) or "none",
            )
        chosen = self.published.options.get("vit_type")
        if chosen is not None and ("swin" in str(chosen)) != (family == "swin"):
            raise self.refuse(f"opt.vit_type={chosen!r}, but the weights are of a {family}", "one model")
        return family

    def patch_size(self) -> int:
        name = IMAGE + "embeddings.patch_embeddings.projection.weight"
        height, width = self.shape(name, 4)[2:]
        if height != width:
            raise self.refuse(f"{self.published.prefix}{name} is not square", "patches as wide as high")
        return height

    def vit(self) -> dict[str, Any]:
        """Sizes of a ViT, under their names in a configuration."""
        _, tokens, hidden_size = self.shape(IMAGE + "embeddings.position_embeddings", 3)
        side, patch_size = math.isqrt(tokens - 1), self.patch_size()
        if tokens < 2 or side * side != tokens - 1:
            raise self.refuse(f"position embeddings of {tokens} tokens", "1 and those of a square of patches")
        image_size = side * patch_size
        self.agree("img_res", image_size)
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": self.count(IMAGE + "encoder.layer."),
            "intermediate_size": self.size(IMAGE + "encoder.layer.0.intermediate.dense.weight", 2, 0),
            "patch_size": patch_size,
            "image_size": image_size,
        }

    def swin(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Sizes of a Swin, under their names in a configuration."""
        layers = IMAGE + "encoder.layers."
        stages = self.count(layers)
        table = layers + "{}.blocks.0.attention.self.relative_position_bias_table"
        places = self.size(table.format(0), 2, 0)
        window = (math.isqrt(places) + 1) // 2
        if (2 * window - 1) ** 2 != places:
            raise self.refuse(f"{self.published.prefix}{table.format(0)} has {places} rows", "(2 w - 1)^2")
        sizes: dict[str, Any] = {
            "patch_size": self.patch_size(),
            "embed_dim": self.size(IMAGE + "embeddings.patch_embeddings.projection.weight", 4, 0),
            "depths": [self.count(f"{layers}{stage}.blocks.") for stage in range(stages)],
            "num_heads": [self.size(table.format(stage), 2, 1) for stage in range(stages)],
            "window_size": window,
        }
        # No weight depends on it. The published sizes end in one window: 7 x 32 = 224, 12 x 32 = 384.
        image_size = self.published.options.get("img_res")
        if image_size is None:
            image_size = (given or {}).get("image_size", window * sizes["patch_size"] * 2 ** (stages - 1))
        elif not _check.is_integer(image_size):
            raise self.refuse("opt.img_res is no integer", "pixels", repr(image_size))
        return sizes | {"image_size": _square(image_size)}

    def bert(self) -> dict[str, Any]:
        """Sizes of a BERT, under their names in a configuration."""
        embeddings = TEXT + "embeddings."
        vocab_size, hidden_size = self.shape(embeddings + "word_embeddings.weight", 2)
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": self.count(TEXT + "encoder.layer."),
            "intermediate_size": self.size(TEXT + "encoder.layer.0.intermediate.dense.weight", 2, 0),
            "max_position_embeddings": self.size(embeddings + "position_embeddings.weight", 2, 0),
            "type_vocab_size": self.size(embeddings + "token_type_embeddings.weight", 2, 0),
        }

    # ---- options

    def agree(self, option: str, found: int) -> None:
        """Refuse a file whose option says another size than its weights."""
        value = self.published.options.get(option)
        if value is not None and value != found:
            raise self.refuse(f"opt.{option}={value!r}, but the weights have {found}", "equal")

    def num_patches(self, family: str, sizes: Mapping[str, Any]) -> int:
        """N of an image of the size."""
        image_size: Any = sizes["image_size"]
        pixels: int = sizes["patch_size"] * (2 ** (len(sizes["depths"]) - 1) if family == "swin" else 1)
        if not _check.is_integer(image_size) or not 0 < image_size <= MAX_IMAGE_SIZE or image_size % pixels:
            raise self.refuse(
                f"images of {image_size!r} pixels",
                f"a multiple of {pixels}, the size of a patch, up to {MAX_IMAGE_SIZE}",
            )
        side: int = image_size // pixels
        if side * side > MAX_PATCHES:
            raise self.refuse(f"images of {side * side} patches", f"at most {MAX_PATCHES}")
        if family == "swin" and sizes["window_size"] > side:
            raise self.refuse(
                f"images of {image_size} pixels, which end in {side} x {side} patches",
                f"at least a window of {sizes['window_size']} x {sizes['window_size']}",
            )
        self.agree("num_patches", side * side)
        return side * side

    def ratios(
        self, family: str, num_patches: int, selection: float | None, aggregation: float | None
    ) -> tuple[float, float]:
        """rho and lambda, which must give as many aggregated tokens as the weights have."""
        published = BASES[family].head_options
        ratios = []
        for name, option, given in (
            ("selection_ratio", "sparse_ratio", selection),
            ("aggregation_ratio", "aggr_ratio", aggregation),
        ):
            stored = self.published.options.get(option)
            if given is not None and stored is not None and given != stored:
                raise self.refuse(f"opt.{option}={stored!r}, but {name}={given!r} is given", "equal")
            label = name if stored is None else f"{self.published.path}: opt.{option}"
            value = stored if given is None else given
            value = published[name] if value is None else value
            ratios.append(_check.number(self.operation, label, value, 0.0, 1.0, open_low=True))
        rho, lambda_ = ratios
        name = AGGREGATION + "weight.3.weight"
        tokens = self.size(name, 2, 0)
        # In this order: another one rounds to another number.
        if tokens != int(num_patches * lambda_ * rho):
            raise self.refuse(
                f"{num_patches} patches, selection ratio {rho:g} (sparse_ratio) and aggregation ratio "
                f"{lambda_:g} (aggr_ratio) make {int(num_patches * lambda_ * rho)} tokens, but "
                f"{self.published.prefix}{name} {tokens}",
                "equal"
                if self.published.options
                else "--selection-ratio and --aggregation-ratio of the model",
            )
        return rho, lambda_

    # ---- configurations

    def given(self, side: str, path: str | Path | None, family: str) -> dict[str, Any] | None:
        """A user's configuration of an encoder of this family."""
        if path is None:
            return None
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        values = read_object(self.operation, file, "the config.json of a transformers model")
        if values.get("model_type") != family:
            raise self.refuse(
                f"the {side} encoder is a {family}, but model_type of {file} is {values.get('model_type')!r}",
                "equal",
            )
        return values

    def config(
        self,
        side: str,
        family: str,
        found: dict[str, Any],
        path: str | Path | None,
        given: Mapping[str, Any] | None,
    ) -> PretrainedConfig:
        """The user's configuration, which must agree with the shapes, or the base model's with theirs."""
        if given is None:
            if found.get("hidden_size", BASE_WIDTH) != BASE_WIDTH:
                raise self.refuse(
                    f"the {side} encoder has hidden_size={found['hidden_size']}, whose number of heads is "
                    "not known",
                    f"{BASE_WIDTH}, or --{side}-config with the config.json of its model",
                )
            return config_from_dict({"model_type": family, **found})
        config = self._built(given, path)
        for name, size in found.items():
            value = getattr(config, name, None)
            value = _square(value) if name in ("image_size", "patch_size") else value
            if (list(value) if isinstance(value, tuple) else value) != size:
                raise self.refuse(f"{name} of the {side} encoder is {size}, but {value!r} in {path}", "equal")
        # A size that is written as [224, 224] is a number from here on.
        return self._built({**given, **found}, path)

    def _built(self, values: Mapping[str, Any], path: str | Path | None) -> PretrainedConfig:
        try:
            return config_from_dict(values)
        except LapsError as error:
            kind = LapsTypeError if isinstance(error, LapsTypeError) else LapsValueError
            raise kind(f"{path}: {error}") from None


def _square(size: Any) -> Any:
    """The number of pixels of [224, 224]."""
    pair = isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]
    return size[0] if pair else size
