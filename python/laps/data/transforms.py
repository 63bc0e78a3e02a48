"""Image transforms as published, as one small value that is stored with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .images import open_image

__all__ = ["ImageTransform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")

ToTensor = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ImageTransform:
    """How an RGB image becomes the pixels (3, S, S) float32 that an encoder takes.

    Attributes:
        image_size: S.
        mean, std: per channel, of pixels in [0, 1].
        crop_scale: the smallest and the largest share of the image that a training crop keeps; its sides may
            differ by 4:3. None crops nothing.
        flip: the probability that a training image is mirrored.
        interpolation: "bicubic", "bilinear" or "nearest".

    Raises:
        LapsValueError, LapsTypeError: a value out of range or of the wrong type.

    Source: the recipe, train and test transforms.

    Example:
        >>> import PIL.Image
        >>> from laps.data import ImageTransform
        >>> transform = ImageTransform(image_size=32)
        >>> transform.eval()(PIL.Image.new("RGB", (60, 40))).shape
        torch.Size([3, 32, 32])
        >>> ImageTransform.from_dict(transform.to_dict()) == transform
        True
    """

    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_scale: tuple[float, float] | None = (0.6, 1.0)
    flip: float = 0.5
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        operation = "ImageTransform"
        values: dict[str, Any] = {
            "image_size": _check.count(operation, "image_size", self.image_size),
            "mean": _numbers("mean", self.mean, 3),
            "std": _numbers("std", self.std, 3),
            "flip": _check.number(operation, "flip", self.flip, 0.0, 1.0),
            "interpolation": _check.choice(operation, "interpolation", self.interpolation, INTERPOLATIONS),
        }
        if min(values["std"]) <= 0:
            raise LapsValueError(_check.message(operation, "std is out of range", "std > 0", self.std))
        if self.crop_scale is not None:
            low, high = values["crop_scale"] = _numbers("crop_scale", self.crop_scale, 2)
            if not 0 < low <= high <= 1:
                raise LapsValueError(
                    _check.message(
                        operation, "crop_scale is out of range", "0 < low <= high <= 1", self.crop_scale
                    )
                )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(3, S, S)."""
        return 3, self.image_size, self.image_size

    def open(self, path: str | Path) -> Image.Image:
        """The image of a file; see :func:`laps.data.open_image`."""
        return open_image(path)

    def train(self) -> ToTensor:
        """The training transform, PIL RGB image to (3, S, S) float32; it draws from torch's CPU generator."""
        steps: list[Any] = []
        if self.crop_scale is None:
            steps.append(self._resize())
        else:
            steps.append(
                v2.RandomResizedCrop(
                    self.image_size, scale=self.crop_scale, interpolation=self._mode(), antialias=True
                )
            )
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        return self._to_tensor(steps)

    def eval(self) -> ToTensor:
        """The transform without randomness: the whole image, resized to (S, S)."""
        return self._to_tensor([self._resize()])

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageTransform:
        """The reverse of `to_dict`; what is absent has its default. LapsValueError lists unknown keys."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise LapsValueError(
                _check.message(
                    "ImageTransform.from_dict", "unknown keys", ", ".join(known), ", ".join(map(str, unknown))
                )
            )
        return cls(**settings)

    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode(self.interpolation)

    def _resize(self) -> v2.Resize:
        return v2.Resize((self.image_size, self.image_size), interpolation=self._mode(), antialias=True)

    def _to_tensor(self, steps: list[Any]) -> ToTensor:
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        # A plain tensor: the Image subclass would follow the pixels into the model and slow every operation.
        return cast(ToTensor, v2.Compose([*steps, *to_float, v2.ToPureTensor()]))


def _numbers(argument: str, value: object, size: int) -> tuple[float, ...]:
    operation = "ImageTransform"
    if not isinstance(value, (tuple, list)):
        raise LapsTypeError(
            _check.message(operation, f"{argument} is no list", f"{size} numbers", _check.name_of(value))
        )
    if len(value) != size:
        raise LapsValueError(
            _check.message(operation, f"{argument} has the wrong length", f"{size} numbers", len(value))
        )
    return tuple(_check.number(operation, argument, item) for item in value)
