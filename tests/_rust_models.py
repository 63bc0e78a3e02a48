"""Models and what Python says of them, as folders that tests/model.rs compares the Rust model with.

``python tests/_rust_models.py FOLDER`` makes one folder per model: the model itself (save_pretrained),
``batch.safetensors`` (pixels, ids, lengths, images) and ``expected.safetensors``: scores in float32 and
float64, and of two SGD steps in float64 the losses and, under ``after.``, the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import laps
import torch
from _models import CAPTIONS, LENGTHS, SIZE, bert_tokenizer, clip_tokenizer, text_model, vision_model
from laps.data import Batch
from laps.encoders import ImageEncoder, TextEncoder
from safetensors.torch import save_file
from torch import Tensor

LEARNING_RATE = 0.01
# name: vision family, text family, embed_dim, head options, loss options.
MODELS: dict[str, tuple[str, str, int | None, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit", "bert", 24, {}, {}),
    "swin": ("swin", "bert", 24, {"selection_ratio": 0.8, "aggregation_ratio": 0.6}, {"name": "info_nce"}),
    "clip": ("clip", "clip", None, {"directions": "word_to_patch", "fusion": False}, {"margin": 0.3}),
    "paper": ("vit", "bert", 24, {"variant": "paper"}, {"name": "triplet", "cutoff": 1.9}),
    "all patches": ("vit", "bert", 24, {"variant": "paper", "selection": "none"}, {}),
    "image": ("vit", "bert", 24, {"selection": "image", "direction_reduction": "mean"}, {"max_score": 1.0}),
    "dot": ("vit", "bert", 24, {"score": "dot", "directions": "patch_to_word", "negative_slope": 0.3}, {}),
    "top-k": ("vit", "bert", 24, {"variant": "paper", "sampling": "topk", "temperature": 0.5}, {}),
}


def build(
    vision: str, text: str, embed_dim: int | None, head: dict[str, Any], loss: dict[str, Any]
) -> laps.LAPS:
    """A tiny model without dropout."""
    tokenizer = clip_tokenizer(CAPTIONS) if text == "clip" else bert_tokenizer()
    images, texts = vision_model(vision), text_model(text, vocab_size=tokenizer.vocab_size)
    for module in [*images.modules(), *texts.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for config in (images.config, texts.config):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    for module in images.modules():
        if type(module).__name__ == "SwinDropPath":
            module.drop_prob = 0.0
    torch.manual_seed(1)
    encoder = ImageEncoder(images, embed_dim=embed_dim)
    words = TextEncoder(texts, embed_dim=embed_dim)
    n, p = encoder.num_patches, encoder.num_prefix_tokens
    built = laps.nn.LAPSHead(encoder.embed_dim, n, num_prefix_tokens=p, **head)
    return laps.LAPS(encoder, words, built, tokenizer=tokenizer, objective=laps.objective.Objective(**loss))


def batch(model: laps.LAPS) -> Batch:
    """Four pairs of ragged captions, two of them of one image."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    vocabulary = model.text_encoder.vocab_size or 0
    ids = torch.randint(1, vocabulary, (4, max(LENGTHS)), generator=generator)
    return Batch(pixels, ids, torch.tensor(LENGTHS), torch.tensor([0, 1, 2, 1]), torch.arange(4))


def scores(model: laps.LAPS, data: Batch) -> Tensor:
    with torch.no_grad():
        pixels = data.pixel_values.to(next(model.parameters()).dtype)
        return model.similarity(model.encode_image(pixels), model.encode_text(data.input_ids, data.lengths))


def train(model: laps.LAPS, data: Batch, steps: int = 2) -> list[Tensor]:
    """SGD in place; the losses. The draws of sampled selections and negatives follow seed 3."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    torch.manual_seed(3)
    losses = []
    model.train()
    for _ in range(steps):
        loss, _ = model(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def write(folder: Path) -> None:
    for name, options in MODELS.items():
        model = build(*options).eval()
        data = batch(model)
        place = folder / name
        model.save_pretrained(place)
        save_file(
            {
                "pixels": data.pixel_values,
                "ids": data.input_ids,
                "lengths": data.lengths,
                "images": data.image_ids,
            },
            place / "batch.safetensors",
        )
        expected = {"scores32": scores(model, data)}
        model.double()
        expected["scores64"] = scores(model, data)
        expected["losses"] = torch.stack(train(model, data))
        expected |= {f"after.{key}": value.contiguous() for key, value in model._portable_weights().items()}
        save_file(expected, place / "expected.safetensors")


if __name__ == "__main__":
    # One thread: sums of these sizes gain nothing from more.
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
