"""The pair part of every head in the form in which such heads are published.

A loop over the captions, each beside all images of the batch at once; every vector that the equations name
exists, so there are no Gram matrices and no sums that are taken apart. Nothing is computed once but what the
public repositories compute once: unit patches, and the global vectors of each side. They are written from
the equations, and have the weights of our heads. LAPS is :func:`laps._loop.published_loop`.

CPFEAN is not public: its form here is the plain one of our reading of it. Heads have their default options,
except that SCAN may also go from image to text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from laps.features import ImageFeatures, TextFeatures
from torch import Tensor

# Of one head, the features of all images and of all captions: scores (B_v, B_t), differentiable.
Form = Callable[[Any, ImageFeatures, TextFeatures], Tensor]


def captions(texts: TextFeatures) -> Iterator[Tensor]:
    """The real words (l, C) of each caption."""
    assert texts.words is not None
    for words, length in zip(texts.words, texts.lengths.tolist(), strict=True):
        yield words[:length]


def unit_patches(images: ImageFeatures) -> Tensor:
    """(B_v, N, C)."""
    assert images.patches is not None
    return F.normalize(images.patches, dim=-1)


def attended(queries: Tensor, context: Tensor, scale: float) -> Tensor:
    """SCAN's attention: (B, Q, C) beside (B, K, C) to the context that each query attends to, (B, Q, C)."""
    products = F.leaky_relu(torch.bmm(context, queries.mT), 0.1)
    weights = (scale * F.normalize(products, dim=2)).softmax(dim=1)
    return torch.bmm(weights.mT, context)


def scan(head: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """Text to image or image to text, with the mean of the cosines."""
    patches = unit_patches(images)
    columns = []
    for caption in captions(texts):
        words = F.normalize(caption, dim=-1).expand(len(patches), -1, -1)
        if head.direction == "t2i":
            context = attended(words, patches, head.lambda_softmax_t2i)
            found = F.cosine_similarity(words, context, dim=2)
        else:
            context = attended(patches, words, head.lambda_softmax_i2t)
            found = F.cosine_similarity(patches, context, dim=2)
        columns.append(found.mean(dim=1))
    return torch.stack(columns, dim=1)


def nodes(head: Any, patches: Tensor, caption: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """SGRAF's similarity vectors of one caption and all images, (B_v, 1 + l, d), the global one first."""
    words = F.normalize(caption, dim=-1).expand(len(patches), -1, -1)
    context = F.normalize(attended(words, patches, 9.0), dim=-1)
    local = F.normalize(head.local_node((context - words).square()), dim=-1)
    whole = F.normalize(head.global_node((image - text).square()), dim=-1)
    return torch.cat([whole.unsqueeze(1), local], dim=1)


def sgr(head: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """Every step for every node, of which the last step's first one is taken."""
    patches = unit_patches(images)
    columns = []
    for caption, text in zip(captions(texts), texts.embedding, strict=True):
        x = nodes(head, patches, caption, images.embedding, text)
        for step in head.steps:
            edges = torch.bmm(step.query(x), step.key(x).mT).softmax(dim=-1)
            x = step.update(torch.bmm(edges, x)).relu()
        columns.append(head.output(x[:, 0]).sigmoid()[:, 0])
    return torch.stack(columns, dim=1)


def saf(head: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """In eval mode: BatchNorm has its running statistics."""
    patches, norm = unit_patches(images), head.norm
    mean, variance, weight, bias = (
        x.reshape(1) for x in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    columns = []
    for caption, text in zip(captions(texts), texts.embedding, strict=True):
        x = nodes(head, patches, caption, images.embedding, text)
        energies = F.batch_norm(head.filter(x).flatten(0, 1), mean, variance, weight, bias, eps=norm.eps)
        weights = energies.sigmoid().view(*x.shape[:2], 1)
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-8)
        z = F.normalize((weights * x).sum(dim=1), dim=-1)
        columns.append(head.output(z).sigmoid()[:, 0])
    return torch.stack(columns, dim=1)


def sgraf(head: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """The mean of the scores of two models, each with its own attention."""
    # The features hold the global vectors of both, each of length 1 / sqrt(2).
    image_saf, image_sgr = (2**0.5 * images.embedding).chunk(2, dim=-1)
    text_saf, text_sgr = (2**0.5 * texts.embedding).chunk(2, dim=-1)
    first = saf(head.saf, replace(images, embedding=image_saf), replace(texts, embedding=text_saf))
    second = sgr(head.sgr, replace(images, embedding=image_sgr), replace(texts, embedding=text_sgr))
    return (first + second) / 2


def chan(_: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """The best patch of each word, and the mean over the words."""
    patches = unit_patches(images)
    columns = []
    for caption in captions(texts):
        words = F.normalize(caption, dim=-1).expand(len(patches), -1, -1)
        columns.append(torch.bmm(patches, words.mT).max(dim=1).values.mean(dim=1))
    return torch.stack(columns, dim=1)


def tgdt(_: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """The best patches of the inner words, and the product of the global vectors."""
    patches = unit_patches(images)
    columns = []
    for caption in captions(texts):
        # Without [CLS], the last word piece and [SEP].
        words = F.normalize(caption[1 : max(len(caption) - 2, 1)], dim=-1).expand(len(patches), -1, -1)
        columns.append(10 * torch.bmm(patches, words.mT).max(dim=1).values.sum(dim=1))
    return torch.stack(columns, dim=1) + images.embedding @ texts.embedding.T


def cpfean(head: Any, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """Every region fused with its word, (B_v, N, C) for each caption; patches and words are unit vectors."""
    patches = images.patches
    assert patches is not None
    columns = []
    for words in captions(texts):
        best, chosen = (patches @ words.T).max(dim=-1)
        gate = torch.sigmoid(head.gate_scale * best + head.gate_bias)
        lent = gate.unsqueeze(-1) * torch.cat([patches, words[chosen]], dim=-1)
        fused = F.normalize(patches + head.fuse(lent), dim=-1)
        prominence = gate.new_zeros(len(patches), len(words)).scatter_add(1, chosen, gate)
        weights = 1 + head.gamma * prominence
        weights = weights / weights.sum(dim=1, keepdim=True)
        columns.append((weights * (fused @ words.T).max(dim=1).values).sum(dim=1))
    return torch.stack(columns, dim=1)


# By the name of the head.
PUBLISHED: dict[str, Form] = {
    "scan": scan,
    "saf": saf,
    "sgr": sgr,
    "sgraf": sgraf,
    "chan": chan,
    "tgdt": tgdt,
    "cpfean": cpfean,
}
