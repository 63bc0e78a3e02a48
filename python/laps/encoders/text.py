"""Token ids to word tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._modes import eval_mode
from ..errors import LapsTypeError, LapsValueError
from . import implementations
from .backbone import prepare

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """A text backbone and a linear projection: token ids (B, L) to word tokens (B, L, C).

    Args:
        backbone: a text model of transformers, or any module called as
            ``backbone(input_ids=..., attention_mask=...)`` that returns tokens (B, L, D), or an object whose
            ``last_hidden_state`` they are. CLIP (its model with projection) gives
            ``text_projection(tokens)``, for every token.
        embed_dim: C; None for no projection: C is the backbone's own size (CLIP).

    Attributes: ``backbone``, ``projection``, ``embed_dim`` (C), ``max_length`` (the most tokens of a caption)
    and ``vocab_size``, of which None means not known.

    Raises:
        LapsValueError: the backbone returns no tokens. LapsTypeError: an argument of the wrong type.

    Example:
        >>> import laps, torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> encoder = laps.encoders.TextEncoder(BertModel(config, add_pooling_layer=False), embed_dim=64)
        >>> encoder(torch.tensor([[101, 7, 102, 0]]), torch.tensor([3])).shape
        torch.Size([1, 4, 64])
    """

    def __init__(self, backbone: nn.Module, *, embed_dim: int | None = None) -> None:
        super().__init__()
        description = prepare("TextEncoder", backbone, "input_ids")
        self.backbone = backbone
        self.projects = description is not None and description.projects
        self.max_length = description.max_length if description else None
        self.vocab_size = description.vocab_size if description else None
        width = self._probe()
        self.embed_dim = width if embed_dim is None else _check.count("TextEncoder", "embed_dim", embed_dim)
        self.projection = nn.Identity() if embed_dim is None else nn.Linear(width, self.embed_dim)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, embed_dim: int | None = None, encoders: str = "hf"
    ) -> TextEncoder:
        """An encoder around pretrained weights: a folder as transformers saves it, or the hub's id.

        Args:
            source: the folder or the id.
            embed_dim: as in the constructor.
            encoders: ``"hf"``, ``"native"`` or ``"auto"``; see :meth:`laps.LAPS.from_pretrained`.

        Raises:
            LapsValueError: no checkpoint there, one of another kind of model, or one that lacks weights of
                the encoder (they are named). ImportError: no native encoders here.
        """
        return cls(implementations.load(source, "text", encoders), embed_dim=embed_dim)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids (B, L) int64 and lengths (B,) int64, on any device, to tokens (B, L, C).

        Rows past a caption's length are undefined.

        Raises:
            LapsValueError: shapes that do not fit, or longer captions than the backbone has positions for.
            LapsTypeError: no tensors.
        """
        for name, value in (("input_ids", input_ids), ("lengths", lengths)):
            if not isinstance(value, Tensor):
                raise LapsTypeError(
                    _check.message(
                        "TextEncoder", f"{name} is no tensor", "torch.Tensor", _check.name_of(value)
                    )
                )
        if input_ids.dim() != 2 or lengths.shape != input_ids.shape[:1]:
            got = f"{tuple(input_ids.shape)} and {tuple(lengths.shape)}"
            raise LapsValueError(
                _check.message("TextEncoder", "input_ids and lengths do not fit", "(B, L) and (B,)", got)
            )
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            raise LapsValueError(
                _check.message(
                    "TextEncoder",
                    "input_ids has more tokens than the backbone has positions",
                    f"at most {self.max_length}: CaptionTokenizer(..., max_length={self.max_length}) cuts",
                    input_ids.shape[1],
                )
            )
        tokens: Tensor = self.projection(self._tokens_of(self.backbone, input_ids, lengths))
        return tokens

    def _tokens_of(self, backbone: Any, input_ids: Tensor, lengths: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = position < lengths.to(input_ids.device, non_blocking=True)[:, None]
        output = backbone(input_ids=input_ids, attention_mask=mask.long())
        tokens = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else _check.name_of(output)
            raise LapsValueError(
                _check.message("TextEncoder", "backbone returns no tokens", "a tensor (B, L, D)", got)
            )
        if self.projects:
            tokens = backbone.text_projection(tokens)
        return tokens

    @torch.no_grad()
    def _probe(self) -> int:
        """The size of the backbone's tokens, seen on one caption of one token."""
        parameter = next(self.backbone.parameters(), torch.empty(0))
        one = torch.ones(1, 1, dtype=torch.int64, device=parameter.device)
        with eval_mode(self.backbone):
            tokens = self._tokens_of(self.backbone, one, torch.tensor([1]))
        return tokens.shape[2]

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}"
