"""SGRAF: similarities as vectors, reasoned over as a graph (SGR) or filtered by attention (SAF)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from .._precision import wide
from ..features import ImageFeatures, Span, TextFeatures
from .base import TrainingScores, mean_of_words, register_head
from .layers import Linear
from .pairs import PairHead, Pairs, unit

__all__ = ["SAFHead", "SGRAFHead", "SGRHead"]

# Of the published code: leaky ReLU and inverse temperature of the attention, dropout of the global vectors,
# reasoning steps.
SLOPE, SHARPNESS, DROPOUT, STEPS = 0.1, 9.0, 0.4, 3


class _RowNorm(nn.BatchNorm1d):
    """BatchNorm over all rows of (..., C), so over any number of patches."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        rows, weight, bias = x.flatten(0, -2), self.weight.to(x.dtype), self.bias.to(x.dtype)
        # Copies, where the statistics are stored in half precision.
        mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        # One row has no variance; torch refuses it in training.
        training = self.training and len(rows) > 1
        normed = F.batch_norm(rows, mean, variance, weight, bias, training, self.momentum, self.eps)
        if training:
            self.num_batches_tracked.add_(1)
            if mean.dtype != self.running_mean.dtype:
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        return normed.view_as(x)


class _CaptionNorm(nn.Module):
    """BatchNorm of scalars, in training per caption over all images beside it and its valid nodes."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("running_mean", torch.zeros(()))
        self.register_buffer("running_var", torch.ones(()))

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(b, t, K) or (b, K), and in training the mean and the unbiased variance, (1, t, 1) or (1, 1).

        The running statistics stay: this may be called again in the backward pass.
        """
        if not self.training:
            return self._scaled(x, self.running_mean, self.running_var), []
        real = real.expand_as(x)
        count = real.sum((0, -1), keepdim=True)
        mean = x.masked_fill(~real, 0).sum((0, -1), keepdim=True) / count
        squares = (x - mean).masked_fill(~real, 0).square().sum((0, -1), keepdim=True)
        # One image with one node has no variance.
        unbiased = squares / (count - 1).clamp(min=1)
        return self._scaled(x, mean, squares / count), [mean.detach(), unbiased.detach()]

    def _scaled(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        mean, variance, weight, bias = (y.to(x.dtype) for y in (mean, variance, self.weight, self.bias))
        return (x - mean) / (variance + self.eps).sqrt() * weight + bias

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Takes in the statistics (B_t,) of captions, one after the other."""
        ages = torch.arange(len(mean) - 1, -1, -1, dtype=mean.dtype, device=mean.device)
        kept = 1 - self.momentum
        for running, values in ((self.running_mean, mean), (self.running_var, variance)):
            # Rounded once, where they are stored in half precision.
            running.copy_(kept ** len(mean) * running.to(mean) + (self.momentum * kept**ages * values).sum())


class _GlobalAttention(nn.Module):
    """The global vector: attention over patches or words, guided by their mean."""

    def __init__(self, channels: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.local, self.whole = Linear(channels, channels), Linear(channels, channels)
        # A bias would cancel in the softmax.
        self.weigh = Linear(channels, 1, bias=False)
        self.local_norm = _RowNorm(channels) if batch_norm else nn.Identity()
        self.whole_norm = _RowNorm(channels) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, n, C) unit vectors, zero at padding, and their numbers (B,) to (B, C), unit."""
        lengths = lengths.to(x.device)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        local = self.dropout(self.local_norm(self.local(x)).tanh())
        whole = self.dropout(self.whole_norm(self.whole(mean_of_words(x, lengths))).tanh())
        energies = self.weigh(local * whole[:, None])[..., 0]
        weights = energies.masked_fill(~real, -torch.inf).softmax(-1)
        return unit((weights[:, None] @ x)[:, 0])


class _GraphReasoning(nn.Module):
    """One step: X <- ReLU(W_r softmax(Q K^T) X + b)."""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.query, self.key = Linear(sim_dim, sim_dim), Linear(sim_dim, sim_dim)
        self.update = Linear(sim_dim, sim_dim)

    def forward(self, nodes: Tensor, real: Tensor, queries: Tensor) -> Tensor:
        """(..., K, d), (..., K) bool and the nodes (..., Q, d) that are wanted to these nodes' new values."""
        energies = self.query(queries) @ self.key(nodes).transpose(-1, -2)
        edges = energies.masked_fill(~real[..., None, :], -torch.inf).softmax(-1)
        updated: Tensor = self.update(edges @ nodes).relu()
        return updated


class _VectorHead(PairHead):
    """What SAF and SGR share: the global vectors and the nodes of a pair."""

    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.2}

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, sim_dim: int = 256
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.sim_dim = _check.count(type(self).__name__, "sim_dim", sim_dim)
        self.image_attention = _GlobalAttention(embed_dim, batch_norm=True)
        self.text_attention = _GlobalAttention(embed_dim, batch_norm=False)
        self.local_node, self.global_node = Linear(embed_dim, sim_dim), Linear(embed_dim, sim_dim)
        self.output = Linear(sim_dim, 1)

    def options(self) -> dict[str, Any]:
        return {"sim_dim": self.sim_dim}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        features = super().encode_image(image_tokens)
        assert features.patches is not None
        with torch.autocast(image_tokens.device.type, enabled=False):
            patches = unit(wide(features.patches))
            every = torch.full((len(patches),), patches.shape[1])
            return replace(features, embedding=self.image_attention(patches, every))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        features = super().encode_text(word_tokens, word_lengths, spans)
        assert features.words is not None
        with torch.autocast(word_tokens.device.type, enabled=False):
            return replace(
                features, embedding=self.text_attention(unit(wide(features.words)), features.lengths)
            )

    def pair_scores(self, pairs: Pairs) -> Tensor:
        return self.score(local_differences(pairs), global_differences(pairs), pairs.real)

    def score(self, local: Tensor, whole: Tensor, real: Tensor) -> Tensor:
        """Scores (...) from (c_j - w_j)^2 (..., L, C), (V - T)^2 (..., C) and which words are (..., L)."""
        nodes = torch.cat([unit(self.global_node(whole))[..., None, :], unit(self.local_node(local))], dim=-2)
        return self.reason(nodes, F.pad(real, (1, 0), value=True))

    @abstractmethod
    def reason(self, nodes: Tensor, real: Tensor) -> Tensor:
        """Scores (...) from nodes (..., 1 + L, d), the global one first, and which there are."""

    def pair_floats(self, patches: int, words: int) -> int:
        return local_floats(self.embed_dim, patches, words) + self.score_floats(words)

    def score_floats(self, words: int) -> int:
        """How many numbers `score` holds at once for a pair."""
        return 5 * (1 + words) * self.sim_dim


def local_differences(pairs: Pairs) -> Tensor:
    """(c_j - w_j)^2 with c_j, unit, what word j attends to in the image: (b, t, L, C) or (b, L, C)."""
    patches, words = unit(pairs.patches), unit(pairs.words)
    # Zero at padding, so that padding has no part in the norm over words.
    products = F.leaky_relu(pairs.products(patches, words), SLOPE)
    weights = (SHARPNESS * unit(products)).softmax(-2)
    attended = torch.einsum("bnl,bnc->blc" if pairs.paired else "btnl,bnc->btlc", weights, patches)
    return (unit(attended) - pairs.of_texts(words)).square()


def global_differences(pairs: Pairs) -> Tensor:
    """(V - T)^2, (b, t, C) or (b, C)."""
    return (pairs.of_images(pairs.images.embedding) - pairs.of_texts(pairs.texts.embedding)).square()


def local_floats(channels: int, patches: int, words: int) -> int:
    """How many numbers `local_differences` holds at once for a pair, with those for its gradient."""
    return 6 * patches * words + 7 * words * channels


@register_head("sgr")
class SGRHead(_VectorHead):
    """Similarity graph reasoning: three steps over the nodes of a pair; the global one tells the score.

    Nodes are x_0 = l2(W_glo (V - T)^2 + b) and x_j = l2(W_loc (c_j - w_j)^2 + b) of unit vectors: V and T
    are the global vectors of :meth:`encode_image` and :meth:`encode_text`, c_j is what word j attends to
    (SCAN, text to image). A step is X <- ReLU(W_r softmax(Q K^T) X + b); S = sigmoid(w . x_0 + b), in (0, 1).

    The published BatchNorm of V has one mean for each of 36 regions; here it has one per channel, over the
    images and their patches. In training V depends on the other images of the batch, and V and T on dropout.
    All linear maps start as in the published code: Xavier, biases at zero.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        sim_dim: d, of the nodes.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Diao et al., SGRAF (AAAI 2021), sections "Similarity Representation Learning" and "SGR Module".

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("sgr", embed_dim=64, num_patches=49, sim_dim=32).eval()
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, sim_dim: int = 256
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens, sim_dim=sim_dim)
        self.steps = nn.ModuleList(_GraphReasoning(sim_dim) for _ in range(STEPS))
        _initialise(self)

    def reason(self, nodes: Tensor, real: Tensor) -> Tensor:
        *first, last = self.steps
        for step in first:
            nodes = step(nodes, real, nodes)
        whole: Tensor = last(nodes, real, nodes[..., :1, :])
        scores: Tensor = self.output(whole)[..., 0, 0].sigmoid()
        return scores

    def score_floats(self, words: int) -> int:
        nodes = 1 + words
        return super().score_floats(words) + STEPS * nodes * (5 * self.sim_dim + 2 * nodes)


@register_head("saf")
class SAFHead(_VectorHead):
    """Similarity attention filtration: a weighted sum of the nodes of a pair tells the score.

    Of the nodes of :class:`SGRHead`, r_i = sigmoid(BN(w . x_i + b)), z = l2(sum_i x_i r_i / sum r), and
    S = sigmoid(w . z + b), in (0, 1).

    In training the BatchNorm takes the statistics of each caption over all images beside it and its own
    nodes, and moves its running statistics caption after caption. A block therefore holds all images of
    :meth:`similarity`, whatever `chunk` says, and what is not finite spoils its captions for all images. The
    statistics of :meth:`similarity_pairwise` are then those of all its pairs together; they are not kept, and
    its scores are no diagonal.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        sim_dim: d, of the nodes.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Diao et al., SGRAF (AAAI 2021), sections "Similarity Representation Learning" and "SAF Module".

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("saf", embed_dim=64, num_patches=49, sim_dim=32).eval()
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, sim_dim: int = 256
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens, sim_dim=sim_dim)
        self.filter = Linear(sim_dim, 1)
        self.norm = _CaptionNorm()
        _initialise(self)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t) of every image with every caption, `chunk` bytes at a time."""
        return self.settle(super().similarity(images, texts))

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return super().similarity_pairwise(images, texts)[..., 0]

    def settle(self, found: Tensor) -> Tensor:
        """The scores (B_v, B_t) of what `reason` found for all pairs; in training the statistics are kept."""
        if self.training:
            self.norm.update(*found[0, :, 1:].unbind(-1))
        return found[..., 0]

    def reason(self, nodes: Tensor, real: Tensor) -> Tensor:
        """(..., 1), the scores; in training (..., 3), with the mean and the variance of the caption."""
        energies, statistics = self.norm(self.filter(nodes)[..., 0], real)
        weights = energies.sigmoid().masked_fill(~real, 0)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
        scores = self.output(unit((weights[..., None, :] @ nodes)[..., 0, :]))[..., 0].sigmoid()
        return torch.stack([scores, *(value[..., 0].expand_as(scores) for value in statistics)], dim=-1)

    def _steps(self, images: ImageFeatures, texts: TextFeatures) -> tuple[int, int]:
        steps = super()._steps(images, texts)
        return _of_all_images(steps, len(images)) if self.training else steps


@register_head("sgraf")
class SGRAFHead(PairHead):
    """The mean of the scores of :class:`SAFHead` and :class:`SGRHead`, which share patches and words.

    The published ones are trained apart, each with its own encoders. Here both are trained at once, with one
    loss for either's scores; heads trained apart can be loaded into `saf` and `sgr`. The global vectors are
    those of both, one after the other: (B, 2 C), unit.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        sim_dim: d, of the nodes.

    Attributes:
        saf: the :class:`SAFHead`.
        sgr: the :class:`SGRHead`.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: Diao et al., SGRAF (AAAI 2021), section "Training Objectives and Inference Strategies".

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("sgraf", embed_dim=64, num_patches=49, sim_dim=32).eval()
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    default_loss: ClassVar[Mapping[str, Any]] = _VectorHead.default_loss

    def __init__(
        self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1, sim_dim: int = 256
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.sim_dim = _check.count("SGRAFHead", "sim_dim", sim_dim)
        self.saf = SAFHead(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens, sim_dim=sim_dim)
        self.sgr = SGRHead(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens, sim_dim=sim_dim)

    def options(self) -> dict[str, Any]:
        return {"sim_dim": self.sim_dim}

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        saf, sgr = self.saf.encode_image(image_tokens), self.sgr.encode_image(image_tokens)
        return replace(saf, embedding=_joined(saf.embedding, sgr.embedding))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        saf, sgr = (head.encode_text(word_tokens, word_lengths, spans) for head in (self.saf, self.sgr))
        return replace(saf, embedding=_joined(saf.embedding, sgr.embedding))

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t) of every image with every caption, `chunk` bytes at a time."""
        return torch.stack(self._both(images, texts)).mean(0)

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return super().similarity_pairwise(images, texts)[..., :2].mean(-1)

    def training_scores(
        self, image_tokens: Tensor, word_tokens: Tensor, word_lengths: Tensor
    ) -> TrainingScores:
        """The mean scores (B_v, B_t), and those of SAF and of SGR for the loss."""
        both = self._both(self.encode_image(image_tokens), self.encode_text(word_tokens, word_lengths))
        return TrainingScores(torch.stack(both).mean(0), loss_scores=both)

    def _both(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor]:
        found = super().similarity(images, texts)
        return self.saf.settle(found[..., 1:]), found[..., 0]

    def pair_scores(self, pairs: Pairs) -> Tensor:
        """(..., 2), the scores of SGR, then what SAF found, which is more in training."""
        local = local_differences(pairs)
        # Of both global vectors, each of length 1/sqrt(2).
        saf, sgr = (2 * global_differences(pairs)).chunk(2, dim=-1)
        first = self.sgr.score(local, sgr, pairs.real)
        return torch.cat([first[..., None], self.saf.score(local, saf, pairs.real)], dim=-1)

    def pair_floats(self, patches: int, words: int) -> int:
        reasoned = self.saf.score_floats(words) + self.sgr.score_floats(words)
        return local_floats(self.embed_dim, patches, words) + reasoned

    def _steps(self, images: ImageFeatures, texts: TextFeatures) -> tuple[int, int]:
        steps = super()._steps(images, texts)
        return _of_all_images(steps, len(images)) if self.training else steps


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Two unit vectors as one."""
    joined: Tensor = torch.cat([first, second], dim=-1) * 0.5**0.5
    return joined


def _of_all_images(steps: tuple[int, int], images: int) -> tuple[int, int]:
    """As many pairs in a block, but all images of a caption."""
    return images, max(1, steps[0] * steps[1] // images)


def _initialise(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
