"""Pixels to image tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._modes import eval_mode
from ..errors import LapsError, LapsValueError
from . import implementations
from .backbone import prepare

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """A vision backbone and a linear projection: pixels (B, 3, S, S) to tokens (B, P + N, C), prefix first.

    Args:
        backbone: a vision model of transformers, or any module that maps pixels (B, 3, S, S) to tokens
            (B, P + N, D), or to an object whose ``last_hidden_state`` they are. CLIP (its model with
            projection) gives ``visual_projection(post_layernorm(tokens))``, for every token. The feature map
            (B, D, H, W) of a convolutional network counts as N = H W patches, row by row.
        embed_dim: C; None for no projection: C is the backbone's own size (CLIP).
        num_prefix_tokens: P, the tokens before the patches ([CLS], registers). Known for ViT, DeiT, DINOv2,
            Swin, CLIP, ResNet and ConvNeXt; to be stated for others.
        image_size: S in pixels. Known for a model of transformers that is made for one size.

    Attributes: ``backbone``, ``projection``, ``num_prefix_tokens``, ``num_patches`` (N), ``embed_dim`` (C),
    ``image_size``, ``input_shape`` (3, S, S) or that of :class:`RegionBackbone`.

    Raises:
        LapsValueError: `num_prefix_tokens` or `image_size` is not stated and not known, or the backbone
            takes no images of that size, or returns no tokens (B, T > P, D). LapsTypeError: an argument of
            the wrong type.

    Example:
        >>> import laps, torch
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        >>> encoder = laps.encoders.ImageEncoder(ViTModel(config, add_pooling_layer=False), embed_dim=64)
        >>> encoder(torch.randn(2, 3, 32, 32)).shape, encoder.num_prefix_tokens
        (torch.Size([2, 5, 64]), 1)
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        embed_dim: int | None = None,
        num_prefix_tokens: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        description = prepare("ImageEncoder", backbone, "pixel_values")
        self.backbone = backbone
        if description is not None:
            known = description.num_prefix_tokens
            num_prefix_tokens = known if num_prefix_tokens is None else num_prefix_tokens
            image_size = description.image_size if image_size is None else image_size
        for name, value in (("num_prefix_tokens", num_prefix_tokens), ("image_size", image_size)):
            if value is None:
                raise LapsValueError(
                    _check.message("ImageEncoder", f"{name} of this backbone is not known", "to be stated")
                )
        self.num_prefix_tokens = _check.count("ImageEncoder", "num_prefix_tokens", num_prefix_tokens, 0)
        self.image_size = _check.count("ImageEncoder", "image_size", image_size)
        # Pixels, or the rows of regions (laps.encoders.RegionBackbone).
        pixels = (3, self.image_size, self.image_size)
        self.input_shape = (description and description.input_shape) or pixels
        self.projects = description is not None and description.projects
        tokens, width = self._probe()
        self.num_patches = tokens - self.num_prefix_tokens
        self.embed_dim = width if embed_dim is None else _check.count("ImageEncoder", "embed_dim", embed_dim)
        self.projection = nn.Identity() if embed_dim is None else nn.Linear(width, self.embed_dim)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        embed_dim: int | None = None,
        num_prefix_tokens: int | None = None,
        image_size: int | None = None,
        encoders: str = "hf",
    ) -> ImageEncoder:
        """An encoder around pretrained weights: a folder as transformers saves it, or the hub's id.

        Args:
            source: the folder or the id.
            embed_dim: as in the constructor, and so are the next two.
            num_prefix_tokens: P.
            image_size: S in pixels, if it is not the checkpoint's. Native ViT and CLIP take any: their
                position embeddings are interpolated. Models of transformers mostly take their own alone.
            encoders: ``"hf"``, ``"native"`` or ``"auto"``; see :meth:`laps.LAPS.from_pretrained`.

        Raises:
            LapsValueError: no checkpoint there, one of another kind of model, or one that lacks weights of
                the encoder (they are named). ImportError: no native encoders here.
        """
        return cls(
            implementations.load(source, "vision", encoders, image_size),
            embed_dim=embed_dim,
            num_prefix_tokens=num_prefix_tokens,
            image_size=image_size,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), normalised as the backbone expects, to tokens (B, P + N, C)."""
        if not isinstance(pixel_values, Tensor) or pixel_values.shape[1:] != self.input_shape:
            got = (
                tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            )
            expected = f"a tensor (B, {', '.join(map(str, self.input_shape))})"
            raise LapsValueError(
                _check.message("ImageEncoder", "pixel_values does not fit the model", expected, got)
            )
        tokens = self._tokens_of(self.backbone, pixel_values)
        if isinstance(self.projection, nn.Linear):
            # A backbone without weights, that of regions, keeps the dtype of its input. Autocast casts by
            # itself, and so do quantised weights, which are no floats.
            dtype = self.projection.weight.dtype
            if dtype.is_floating_point and not torch.is_autocast_enabled(tokens.device.type):
                tokens = tokens.to(dtype)
        projected: Tensor = self.projection(tokens)
        return projected

    def boxes(self, pixel_values: Tensor) -> Tensor | None:
        """Where each token is, (B, N, 4) as x0, y0, x1, y1 in [0, 1], of regions; None of pixels."""
        from .regions import RegionBackbone, boxes_of

        return boxes_of(pixel_values) if isinstance(self.backbone, RegionBackbone) else None

    def _tokens_of(self, backbone: Any, pixel_values: Tensor) -> Tensor:
        output = backbone(pixel_values)
        tokens = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        if isinstance(tokens, Tensor) and tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else _check.name_of(output)
            raise LapsValueError(
                _check.message("ImageEncoder", "backbone returns no tokens", "a tensor (B, P + N, D)", got)
            )
        if self.projects:
            tokens = backbone.visual_projection(backbone.vision_model.post_layernorm(tokens))
        return tokens

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """The number and size of the backbone's tokens, seen on one black image."""
        parameter = next(self.backbone.parameters(), torch.empty(0))
        pixels = torch.zeros(1, *self.input_shape, device=parameter.device, dtype=parameter.dtype)
        try:
            with eval_mode(self.backbone):
                tokens = self._tokens_of(self.backbone, pixels)
        except LapsError:
            raise
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise LapsValueError(
                _check.message(
                    "ImageEncoder",
                    f"backbone takes no images of {self.image_size} x {self.image_size}",
                    "the image_size that it was made for",
                    reason,
                )
            ) from error
        if tokens.shape[1] <= self.num_prefix_tokens:
            raise LapsValueError(
                _check.message(
                    "ImageEncoder",
                    "backbone returns too few tokens",
                    f"more than the {self.num_prefix_tokens} prefix tokens",
                    tokens.shape[1],
                )
            )
        return tokens.shape[1], tokens.shape[2]

    def extra_repr(self) -> str:
        return (
            f"num_prefix_tokens={self.num_prefix_tokens}, num_patches={self.num_patches}, "
            f"embed_dim={self.embed_dim}, image_size={self.image_size}"
        )
