"""Encoders: pixels to image tokens, ids to word tokens, each projected to the C channels of the head.

:class:`ImageEncoder` and :class:`TextEncoder` wrap a backbone: a model of Hugging Face transformers (ViT,
DeiT, DINOv2 with or without registers, Swin, CLIP; BERT, CLIP's text model), or any ``nn.Module`` that
returns tokens. :class:`RegionBackbone` takes the features of a detector instead of pixels.
"""

from .image import ImageEncoder
from .regions import RegionBackbone, label_embeddings
from .text import TextEncoder

__all__ = ["ImageEncoder", "RegionBackbone", "TextEncoder", "label_embeddings"]
