"""Tiny encoders, in memory and as checkpoints on disk, and whole models and data sets made of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import laps
import torch
import transformers
from laps.data import Batch, CaptionTokenizer, RetrievalData, load, make_scenes
from laps.data.vocabulary import learn_vocabulary
from laps.encoders import ImageEncoder, TextEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

# What the imports made stays to the end: else each full collection walks it again, for a third of a second.
gc.freeze()

TESTS = Path(__file__).parent
SIZE, PATCH, PATCHES = 32, 8, 16
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION: dict[str, Any] = {**SMALL, "image_size": SIZE, "patch_size": PATCH}
LENGTHS = [9, 3, 6, 2]
CAPTIONS = ["a red circle", "the large blue square left of a green star", "two dotted triangles above it"]
# For other processes. Nothing is downloaded, whatever they ask for; one thread: see conftest.py.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
}


def vision_config(family: str) -> transformers.PretrainedConfig:
    """A tiny vision model's configuration; all have 16 patches of a 32-pixel image."""
    if family == "swin":
        return transformers.SwinConfig(
            image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
    families = {
        "vit": transformers.ViTConfig,
        "deit": transformers.DeiTConfig,
        "dinov2": transformers.Dinov2Config,
        "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
        "clip": transformers.CLIPVisionConfig,
    }
    more = {"num_register_tokens": 4} if family == "dinov2_with_registers" else {}
    more |= {"projection_dim": 24} if family == "clip" else {}
    return families[family](**VISION, **more)


def vision_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny vision model with random weights, in eval mode; none of them is zero or one."""
    config = vision_config(family)
    torch.manual_seed(seed)
    if family == "clip":
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        model = transformers.AutoModel.from_config(config)
    return shaken(model)


def text_model(family: str = "bert", *, vocab_size: int = 99, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny text model with random weights, in eval mode; CLIP's end token is 2."""
    torch.manual_seed(seed)
    options = {**SMALL, "vocab_size": vocab_size}
    if family == "bert":
        return shaken(transformers.BertModel(transformers.BertConfig(**options)))
    config = transformers.CLIPTextConfig(
        **options, projection_dim=24, pad_token_id=1, bos_token_id=0, eos_token_id=vocab_size - 1
    )
    return shaken(transformers.CLIPTextModelWithProjection(config))


def shaken(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Fresh models have norms of weight one and biases of zero: a norm left out would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bert_tokenizer(captions: list[str] | None = None) -> CaptionTokenizer:
    """BERT's conventions, learned from the captions."""
    return CaptionTokenizer.train(captions or CAPTIONS, vocab_size=150)


def clip_tokenizer(captions: list[str]) -> CaptionTokenizer:
    """CLIP's conventions: start and end tokens, no mask token, the end token is the last and pads."""
    words = {token: i for i, token in enumerate(learn_vocabulary("test", captions, 150))}
    vocabulary = {token: i for i, token in enumerate(t for t in words if not t.startswith("["))}
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary |= {"<unk>": len(vocabulary), start: len(vocabulary) + 1, end: len(vocabulary) + 2}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
    )
    return CaptionTokenizer(tokenizer)


def tiny_laps(
    family: str = "vit",
    text: str = "bert",
    *,
    head: str = "laps",
    tokenizer: CaptionTokenizer | None = None,
    seed: int = 0,
    **options: Any,
) -> laps.LAPS:
    """A whole model with random weights, in eval mode. CLIP has no projections of ours."""
    embed_dim = None if "clip" in (family, text) else 16
    tokenizer = tokenizer or bert_tokenizer()
    images = ImageEncoder(vision_model(family, seed), embed_dim=embed_dim)
    texts = TextEncoder(text_model(text, vocab_size=tokenizer.vocab_size, seed=seed), embed_dim=embed_dim)
    built = laps.heads.build_head(
        head,
        embed_dim=images.embed_dim,
        num_patches=images.num_patches,
        num_prefix_tokens=images.num_prefix_tokens,
        **options,
    )
    return laps.LAPS(images, texts, built, tokenizer=tokenizer).eval()


@dataclass(frozen=True)
class Variant:
    """What a tiny model is made of."""

    family: str
    text: str
    head: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.family, self.text, self.head, *map(str, self.options.values())])


VARIANTS = [
    Variant("vit", "bert", "laps"),
    Variant("swin", "bert", "laps", {"selection_ratio": 0.8, "aggregation_ratio": 0.6}),
    Variant("clip", "clip", "laps"),
    Variant("dinov2_with_registers", "bert", "laps", {"variant": "paper"}),
    Variant("vit", "bert", "vse"),
]


def build(variant: Variant, **more: Any) -> laps.LAPS:
    """The variant's model, in eval mode; its vocabulary has more than 40 tokens."""
    return tiny_laps(variant.family, variant.text, head=variant.head, **variant.options, **more)


def make_batch() -> Batch:
    """Four pairs, of which two show the same image."""
    ids, lengths = token_ids(LENGTHS)
    image_ids = torch.tensor([0, 1, 2, 1])
    return Batch(pixels(4)[image_ids], ids.remainder(40), lengths, image_ids, torch.arange(4))


def pixels(number: int, seed: int = 0) -> Tensor:
    """(number, 3, 32, 32) random pixels."""
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def token_ids(lengths: list[int], longest: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids of the ordinary tokens 5..98, padded with 0, and their lengths."""
    ids = torch.randint(
        5, 98, (len(lengths), longest or max(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return ids, torch.tensor(lengths)


def scenes(folder: Path, *, train: int = 24, dev: int = 8) -> tuple[RetrievalData, RetrievalData]:
    """Drawn scenes with two captions each: the splits train and dev (as many test images as dev)."""
    make_scenes(
        folder,
        num_train=train,
        num_dev=dev,
        num_test=dev,
        image_size=40,
        captions_per_image=2,
        workers=1,
        progress=False,
    )
    return load(folder, "train"), load(folder, "dev")


def at_batch(model: laps.LAPS, batch: int, act: Callable[[], object]) -> None:
    """Act as the n-th batch of images from now on is encoded."""
    left = [batch]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    model.image_encoder.register_forward_pre_hook(count)
