"""Encoders: pixels to image tokens, ids to word tokens, each projected to the C channels of the head.

:class:`ImageEncoder` and :class:`TextEncoder` wrap a backbone: a model of Hugging Face transformers (ViT,
DeiT, DINOv2 with or without registers, Swin, CLIP; BERT, CLIP's text model), or any ``nn.Module`` that
returns tokens.
"""

from .image import ImageEncoder
from .text import TextEncoder

__all__ = ["ImageEncoder", "TextEncoder"]
