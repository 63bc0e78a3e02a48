"""The published model, from its equations: key names of transformers 4, one caption at a time, plain torch.

The oracle of `laps convert`. It shares no code with laps or transformers and is written to be believed on
reading. A model is a dictionary of weights by their names in the published checkpoints, and its sizes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

IMAGE, TEXT, AGGREGATION = "img_enc.visual_encoder.", "txt_enc.bert.", "cross_net.aggr_net."
VIT_EPS, SWIN_EPS, BERT_EPS, HEAD_EPS = 1e-12, 1e-5, 1e-12, 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of a whole model; the defaults are tiny.

    For a Swin `width` and `heads` are those of the first stage, and the following have twice as many.
    """

    family: str = "vit"
    image_size: int = 32
    patch: int = 8
    width: int = 32
    depths: tuple[int, ...] = (2,)
    heads: int = 2
    window: int = 4
    vocabulary: int = 99
    text_width: int = 32
    text_depth: int = 2
    text_heads: int = 2
    positions: int = 64
    embed: int = 16
    selection_ratio: float = 0.5
    aggregation_ratio: float = 0.4

    @property
    def stages(self) -> int:
        return len(self.depths)

    @property
    def image_width(self) -> int:
        return self.width * 2 ** (self.stages - 1)

    @property
    def num_patches(self) -> int:
        return (self.image_size // (self.patch * 2 ** (self.stages - 1))) ** 2

    @property
    def num_tokens(self) -> int:
        return int(self.num_patches * self.aggregation_ratio * self.selection_ratio)

    def image_config(self) -> dict[str, Any]:
        """As the config.json of transformers has it."""
        common = {"model_type": self.family, "image_size": self.image_size, "patch_size": self.patch}
        if self.family == "vit":
            return common | {
                "hidden_size": self.width,
                "num_hidden_layers": self.depths[0],
                "num_attention_heads": self.heads,
                "intermediate_size": 4 * self.width,
            }
        return common | {
            "embed_dim": self.width,
            "depths": list(self.depths),
            "num_heads": [self.heads * 2**stage for stage in range(self.stages)],
            "window_size": self.window,
        }

    def text_config(self) -> dict[str, Any]:
        return {
            "model_type": "bert",
            "vocab_size": self.vocabulary,
            "hidden_size": self.text_width,
            "num_hidden_layers": self.text_depth,
            "num_attention_heads": self.text_heads,
            "intermediate_size": 4 * self.text_width,
            "max_position_embeddings": self.positions,
        }

    def options(self) -> argparse.Namespace:
        """What the published train.py is told, with the defaults of its other options."""
        return argparse.Namespace(
            data_path="data/",
            dataset="f30k",
            margin=0.2,
            num_epochs=30,
            batch_size=64,
            embed_size=self.embed,
            grad_clip=2.0,
            learning_rate=0.0002,
            logger_name="runs/f30k",
            max_violation=False,
            img_res=self.image_size,
            vit_type=self.family,
            multi_gpu=0,
            lr_schedules=[9, 15, 20, 25],
            max_word=90,
            aggr_ratio=self.aggregation_ratio,
            sparse_ratio=self.selection_ratio,
            attention_weight=0.8,
            ratio_weight=2.0,
            num_patches=self.num_patches,
        )


TINY = {
    "vit": Sizes(),
    # Two windows side by side in the last stage too, so that both stages shift theirs.
    "swin": Sizes("swin", 64, 4, 16, (2, 2), heads=2, window=4, selection_ratio=0.8, aggregation_ratio=0.6),
}
BERT_BASE: dict[str, Any] = {
    "vocabulary": 30522,
    "text_width": 768,
    "text_depth": 12,
    "text_heads": 12,
    "positions": 512,
    "embed": 512,
}
BASE = {
    "vit-224": Sizes("vit", 224, 16, 768, (12,), 12, **BERT_BASE),
    "vit-384": Sizes("vit", 384, 16, 768, (12,), 12, **BERT_BASE),
    "swin-224": Sizes(
        "swin", 224, 4, 128, (2, 2, 18, 2), 4, 7, **BERT_BASE, selection_ratio=0.8, aggregation_ratio=0.6
    ),
    "swin-384": Sizes(
        "swin", 384, 4, 128, (2, 2, 18, 2), 4, 12, **BERT_BASE, selection_ratio=0.8, aggregation_ratio=0.6
    ),
}


# ---- names and shapes


def shapes(sizes: Sizes) -> Shapes:
    """Of all weights of a checkpoint, the unused poolers too."""
    image = vit_shapes(sizes) if sizes.family == "vit" else swin_shapes(sizes)
    result = {IMAGE + name: shape for name, shape in image.items()}
    result |= {TEXT + name: shape for name, shape in bert_shapes(sizes).items()}
    for name, width in (("img_enc.vision_proj", sizes.image_width), ("txt_enc.fc", sizes.text_width)):
        # The published code has no map where it would not change the width.
        if width != sizes.embed:
            result |= linear_shapes(name, width, sizes.embed)
    hidden = int(sizes.embed * 0.2)
    return result | {
        f"{AGGREGATION}scale": (1, 1, 1),
        **norm_shapes(f"{AGGREGATION}weight.0", sizes.embed),
        **linear_shapes(f"{AGGREGATION}weight.1", sizes.embed, hidden),
        **linear_shapes(f"{AGGREGATION}weight.3", hidden, sizes.num_tokens),
    }


def linear_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block_shapes(name: str, attention: str, width: int) -> Shapes:
    """What a layer of each of the three has."""
    result = linear_shapes(f"{name}.attention.output.dense", width, width)
    for part in ("query", "key", "value"):
        result |= linear_shapes(f"{name}.attention.{attention}.{part}", width, width)
    result |= linear_shapes(f"{name}.intermediate.dense", width, 4 * width)
    return result | linear_shapes(f"{name}.output.dense", 4 * width, width)


def vit_shapes(sizes: Sizes) -> Shapes:
    width = sizes.width
    result: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + sizes.num_patches, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, sizes.patch, sizes.patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **norm_shapes("layernorm", width),
        **linear_shapes("pooler.dense", width, width),
    }
    for layer in range(sizes.depths[0]):
        name = f"encoder.layer.{layer}"
        result |= block_shapes(name, "attention", width)
        result |= norm_shapes(f"{name}.layernorm_before", width) | norm_shapes(
            f"{name}.layernorm_after", width
        )
    return result


def swin_shapes(sizes: Sizes) -> Shapes:
    result: Shapes = {
        "embeddings.patch_embeddings.projection.weight": (sizes.width, 3, sizes.patch, sizes.patch),
        "embeddings.patch_embeddings.projection.bias": (sizes.width,),
        **norm_shapes("embeddings.norm", sizes.width),
        **norm_shapes("layernorm", sizes.image_width),
    }
    for stage, depth in enumerate(sizes.depths):
        width = sizes.width * 2**stage
        for block in range(depth):
            name = f"encoder.layers.{stage}.blocks.{block}"
            result |= block_shapes(name, "self", width)
            result |= norm_shapes(f"{name}.layernorm_before", width)
            result |= norm_shapes(f"{name}.layernorm_after", width)
            table = f"{name}.attention.self.relative_position_bias_table"
            result[table] = ((2 * sizes.window - 1) ** 2, sizes.heads * 2**stage)
        if stage + 1 < sizes.stages:
            name = f"encoder.layers.{stage}.downsample"
            result |= norm_shapes(f"{name}.norm", 4 * width)
            result[f"{name}.reduction.weight"] = (2 * width, 4 * width)
    return result


def bert_shapes(sizes: Sizes) -> Shapes:
    width = sizes.text_width
    result: Shapes = {
        "embeddings.word_embeddings.weight": (sizes.vocabulary, width),
        "embeddings.position_embeddings.weight": (sizes.positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **norm_shapes("embeddings.LayerNorm", width),
        **linear_shapes("pooler.dense", width, width),
    }
    for layer in range(sizes.text_depth):
        name = f"encoder.layer.{layer}"
        result |= block_shapes(name, "self", width)
        result |= norm_shapes(f"{name}.attention.output.LayerNorm", width)
        result |= norm_shapes(f"{name}.output.LayerNorm", width)
    return result


def random_weights(sizes: Sizes, seed: int = 0) -> Weights:
    """None of them is zero or one, so that what is left out shows; with the numbers that transformers 4 kept
    beside them."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes(sizes).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        result[name] = scale * torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            result[name] += 1
    result[f"{AGGREGATION}weight.0.weight"] += 1
    result[f"{AGGREGATION}scale"] = torch.full((1, 1, 1), 3.0)
    result[f"{TEXT}embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    if sizes.family == "swin":
        tables = [name for name in result if name.endswith("relative_position_bias_table")]
        for name in tables:
            index = relative_positions(sizes.window)
            result[name.replace("relative_position_bias_table", "relative_position_index")] = index
    return result


# ---- forward passes


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(weights: Weights, name: str, x: Tensor, heads: int, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for x (B, T, D); bias broadcasts to (B, heads, T, T)."""
    query, key, value = (
        linear(weights, f"{name}.{role}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for role in ("query", "key", "value")
    )
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return ((logits + bias).softmax(-1) @ value).transpose(1, 2).flatten(2)


def vit(weights: Weights, sizes: Sizes, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) to tokens (B, 1 + N, D)."""
    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(
        pixels, weights[f"{projection}.weight"], weights[f"{projection}.bias"], stride=sizes.patch
    )
    start = weights["embeddings.cls_token"].expand(len(pixels), 1, -1)
    x = torch.cat([start, patches.flatten(2).transpose(1, 2)], 1) + weights["embeddings.position_embeddings"]
    for layer in range(sizes.depths[0]):
        name = f"encoder.layer.{layer}"
        inside = norm(weights, f"{name}.layernorm_before", x, VIT_EPS)
        inside = attention(weights, f"{name}.attention.attention", inside, sizes.heads, torch.zeros(()))
        x = x + linear(weights, f"{name}.attention.output.dense", inside)
        inside = norm(weights, f"{name}.layernorm_after", x, VIT_EPS)
        x = x + mlp(weights, name, inside)
    return norm(weights, "layernorm", x, VIT_EPS)


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.output.dense", gelu(linear(weights, f"{name}.intermediate.dense", x)))


def relative_positions(window: int) -> Tensor:
    """(w^2, w^2): the row of the bias table for each pair of places in a window."""
    places = [(row, column) for row in range(window) for column in range(window)]
    side = 2 * window - 1
    return torch.tensor(
        [[(a - c + window - 1) * side + (b - d + window - 1) for c, d in places] for a, b in places]
    )


def swin(weights: Weights, sizes: Sizes, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) to tokens (B, N, D)."""
    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d(pixels, weights[f"{projection}.weight"], weights[f"{projection}.bias"], stride=sizes.patch)
    x = norm(weights, "embeddings.norm", x.permute(0, 2, 3, 1), SWIN_EPS)
    for stage, depth in enumerate(sizes.depths):
        for block in range(depth):
            shift = sizes.window // 2 if block % 2 and x.shape[1] > sizes.window else 0
            x = swin_block(
                weights,
                f"encoder.layers.{stage}.blocks.{block}",
                x,
                sizes.heads * 2**stage,
                sizes.window,
                shift,
            )
        if stage + 1 < sizes.stages:
            corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            name = f"encoder.layers.{stage}.downsample"
            x = linear(
                weights, f"{name}.reduction", norm(weights, f"{name}.norm", torch.cat(corners, -1), SWIN_EPS)
            )
    return norm(weights, "layernorm", x.flatten(1, 2), SWIN_EPS)


def swin_block(weights: Weights, name: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """Attention within windows of a grid x (B, H, H, D), which `shift` moves; each window is taken alone."""
    side = x.shape[1]
    inside = norm(weights, f"{name}.layernorm_before", x, SWIN_EPS).roll((-shift, -shift), (1, 2))
    table = weights[f"{name}.attention.self.relative_position_bias_table"]
    bias = table[relative_positions(window)].permute(2, 0, 1)
    region = torch.zeros(side, side)
    if shift:
        # Places that the roll brought together, but that are no neighbours in the image, are apart.
        band = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift).long()
        region = 3 * band[:, None] + band[None, :]
    out = torch.empty_like(inside)
    for top in range(0, side, window):
        for left in range(0, side, window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            kind = region[rows, columns].flatten()
            apart = torch.where(kind[:, None] == kind[None, :], 0.0, -100.0)
            tokens = inside[:, rows, columns].flatten(1, 2)
            seen = attention(weights, f"{name}.attention.self", tokens, heads, bias + apart)
            out[:, rows, columns] = seen.unflatten(1, (window, window))
    x = x + linear(weights, f"{name}.attention.output.dense", out.roll((shift, shift), (1, 2)))
    return x + mlp(weights, name, norm(weights, f"{name}.layernorm_after", x, SWIN_EPS))


def bert(weights: Weights, sizes: Sizes, input_ids: Tensor) -> Tensor:
    """Ids (B, L), 0 where there is no token, to tokens (B, L, D)."""
    x = (
        weights["embeddings.word_embeddings.weight"][input_ids]
        + weights["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(weights, "embeddings.LayerNorm", x, BERT_EPS)
    hidden = torch.zeros(input_ids.shape).masked_fill(input_ids == 0, -math.inf)[:, None, None, :]
    for layer in range(sizes.text_depth):
        name = f"encoder.layer.{layer}"
        seen = attention(weights, f"{name}.attention.self", x, sizes.text_heads, hidden)
        x = x + linear(weights, f"{name}.attention.output.dense", seen)
        x = norm(weights, f"{name}.attention.output.LayerNorm", x, BERT_EPS)
        x = norm(weights, f"{name}.output.LayerNorm", x + mlp(weights, name, x), BERT_EPS)
    return x


def caption_scores(weights: Weights, sizes: Sizes, images: Tensor, words: Tensor) -> Tensor:
    """Scores (B_v,) of image tokens (B_v, P + N, C) with one caption's words (l, C), without padding."""
    prefix = images.shape[1] - sizes.num_patches
    patches = images[:, prefix:]
    directions = F.normalize(patches, dim=-1)
    score = directions @ F.normalize(words.mean(0), dim=0)
    score = score + (directions * F.normalize(patches.mean(1, keepdim=True), dim=-1)).sum(-1)
    order = score.sort(dim=1, descending=True, stable=True)
    num_kept = math.ceil(sizes.num_patches * sizes.selection_ratio)
    ranked = patches.gather(1, order.indices[..., None].expand_as(patches))
    kept, dropped = ranked[:, :num_kept], ranked[:, num_kept:]

    hidden = norm(weights, "weight.0", kept, HEAD_EPS)
    logits = linear(weights, "weight.3", gelu(linear(weights, "weight.1", hidden))) * weights["scale"]
    aggregated = logits.softmax(1).transpose(1, 2) @ kept
    fused = (order.values[:, num_kept:].softmax(1)[..., None] * dropped).sum(1, keepdim=True)
    tokens = F.normalize(torch.cat([images[:, :prefix], aggregated, fused], 1), dim=-1)

    alignment = tokens @ F.normalize(words, dim=-1).T
    alignment = torch.where(alignment > 0, alignment, 0.1 * alignment)
    return alignment.amax(1).mean(1) + alignment.amax(2).mean(1)


@torch.no_grad()
def scores(weights: Weights, sizes: Sizes, pixels: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Scores (B_v, B_t) of pixels (B_v, 3, S, S) with ids (B_t, L), as the published code's eval mode."""
    image_encoder = vit if sizes.family == "vit" else swin
    images = image_encoder(part(weights, IMAGE), sizes, pixels)
    words = bert(part(weights, TEXT), sizes, input_ids)
    if "img_enc.vision_proj.weight" in weights:
        images = linear(weights, "img_enc.vision_proj", images)
    if "txt_enc.fc.weight" in weights:
        words = linear(weights, "txt_enc.fc", words)
    head = part(weights, AGGREGATION)
    columns = [
        caption_scores(head, sizes, images, caption[:length])
        for caption, length in zip(words, lengths.tolist(), strict=True)
    ]
    return torch.stack(columns, 1)


def checkpoint(weights: Weights, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What the published train.py saves."""
    state = {"model": weights, "opt": sizes.options(), "epoch": 21, "best_rsum": 507.25, "Eiters": 9660}
    return state | more
