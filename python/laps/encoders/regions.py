"""Regions of a detector as image tokens: what Faster R-CNN rows of the tables start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._modes import eval_mode
from ..data.regions import BOX, LABEL, label_names
from ..data.tokenizer import CaptionTokenizer
from ..errors import LapsError, LapsTypeError, LapsValueError
from .backbone import DescribedBackbone, Description
from .implementations import REGIONS
from .text import TextEncoder

__all__ = ["RegionBackbone", "boxes_of", "label_embeddings"]


class RegionBackbone(DescribedBackbone):
    """Rows of regions (B, K, D + 5), as :class:`laps.data.RegionTransform` makes them, to (B, K, D + 5 + E).

    After the detector's features f come the position p of the region (its box x0, y0, x1, y1 in [0, 1], and
    the area of that) and the embedding e of its label, fixed, or zeros for a region without label. The
    projection of :class:`ImageEncoder` makes tokens of them: W_v f + W_p p + W_e e + b.

    Args:
        num_regions: K.
        feature_dim: D.
        labels: (number of labels, E), see :func:`label_embeddings`; or its shape, to be loaded later; None
            for E = 0, "without the label prior".
        position: whether p is there.

    Rows are in float32 whatever the model's dtype is: half precision has no 301, a label's number. They are
    looked up and put together as they are, and the encoder's projection takes them in its own dtype.

    Raises:
        LapsValueError, LapsTypeError: a size < 1. In `forward` LapsValueError: a label that has no embedding;
            on a GPU, where looking costs time, its image becomes NaN. LapsTypeError: rows with labels in half
            precision.

    Source: CPFEAN's description (arXiv 2311.02183); without labels as in SCAN, CHAN, HREM on regions.

    Example:
        >>> import laps, torch
        >>> backbone = laps.encoders.RegionBackbone(36, 2048)
        >>> encoder = laps.encoders.ImageEncoder(backbone, embed_dim=64)
        >>> encoder(torch.rand(2, 36, 2053)).shape
        torch.Size([2, 36, 64])
    """

    def __init__(
        self,
        num_regions: int = 36,
        feature_dim: int = 2048,
        *,
        labels: Tensor | Sequence[int] | None = None,
        position: bool = True,
    ) -> None:
        super().__init__()
        name = "RegionBackbone"
        self.num_regions = _check.count(name, "num_regions", num_regions)
        self.feature_dim = _check.count(name, "feature_dim", feature_dim)
        if labels is None:
            table = torch.empty(0, 0)
        elif isinstance(labels, Tensor):
            table = labels.detach().float()
        else:
            table = torch.zeros(*labels)
        if table.dim() != 2:
            raise LapsValueError(
                _check.message(name, "labels has the wrong shape", "(number, E)", tuple(table.shape))
            )
        # A file of weights holds no empty tensor.
        self.register_buffer("labels", table, persistent=bool(table.numel()))
        self.labels: Tensor
        self.position = _check.flag(name, "position", position)
        self.description = Description(
            config={
                "model_type": REGIONS,
                "num_regions": self.num_regions,
                "feature_dim": self.feature_dim,
                "labels": list(table.shape) if table.numel() else None,
                "position": self.position,
            },
            inputs="pixel_values",
            num_prefix_tokens=0,
            image_size=self.num_regions,
            input_shape=(self.num_regions, self.feature_dim + BOX + LABEL),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RegionBackbone:
        """The backbone of a `description`'s config; its labels are zeros until weights are loaded."""
        given = {name: value for name, value in config.items() if name != "model_type"}
        try:
            return cls(**given)
        except LapsError:
            # A LapsTypeError is a TypeError, and says itself what is wrong.
            raise
        except TypeError as error:
            raise LapsValueError(
                _check.message("RegionBackbone", "the config has other keys", "its arguments", error)
            ) from None

    def gradient_checkpointing_enable(self, options: object = None) -> None:
        """There is nothing to recompute; so that the text encoder's can be asked for."""

    def gradient_checkpointing_disable(self) -> None:
        """As `gradient_checkpointing_enable`."""

    def forward(self, regions: Tensor) -> Tensor:
        """(B, K, D + 5) to (B, K, D + 5 + E)."""
        if self.labels.numel() and regions.dtype not in (torch.float32, torch.float64):
            raise LapsTypeError(
                _check.message(
                    "RegionBackbone",
                    "regions with labels have the wrong dtype",
                    "float32, also by a model in half precision, which rounds the labels' numbers",
                    _check.name_of(regions.dtype),
                )
            )
        parts = [regions[..., : self.feature_dim]]
        if self.position:
            boxes = boxes_of(regions)
            area = (boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True)
            parts += [boxes, area]
        if not self.labels.numel():
            return torch.cat(parts, -1)
        numbers = regions[..., -1].long()
        if not numbers.is_cuda and bool((numbers >= len(self.labels)).any()):
            raise LapsValueError(
                _check.message(
                    "RegionBackbone",
                    "a label has no embedding",
                    f"numbers below {len(self.labels)}",
                    int(numbers.max()),
                )
            )
        prior = self.labels[numbers.clamp(0, len(self.labels) - 1)] * (numbers >= 0)[..., None]
        prior = prior.masked_fill((numbers >= len(self.labels))[..., None], torch.nan)
        return torch.cat([*parts, prior.to(regions.dtype)], -1)


@torch.no_grad()
def label_embeddings(
    labels: Sequence[str] | str | Path, text_encoder: TextEncoder, tokenizer: CaptionTokenizer
) -> Tensor:
    """What a language model knows of the labels: the mean of each one's word pieces, (number, E).

    Args:
        labels: such as ``["person", "traffic light"]``, in the order of their numbers; or the path of a text
            file with a name a line.
        text_encoder: its backbone is asked, as it is now but in eval mode; E is the backbone's own size.
        tokenizer: of that backbone.

    Raises:
        LapsValueError: no label, or one without a token; a file that cannot be read. LapsTypeError: something
            else, such as a mapping.
    """
    tokens = tokenizer.encode(label_names("label_embeddings", labels))
    parameter = next(text_encoder.parameters())
    rows = []
    with eval_mode(text_encoder):
        for ids, length in zip(tokens.input_ids, tokens.lengths.tolist(), strict=True):
            ids = ids[None, :length].to(parameter.device)
            one = text_encoder._tokens_of(text_encoder.backbone, ids, torch.tensor([length]))
            # Without start and end.
            rows.append(one[0, 1:-1].float().mean(0).cpu())
    return torch.stack(rows)


def boxes_of(regions: Tensor) -> Tensor:
    """(B, K, D + 5) to the boxes (B, K, 4)."""
    return regions[..., -(BOX + LABEL) : -LABEL]
