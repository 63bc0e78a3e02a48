"""HREM: one vector per side; in training the pairs of a batch also learn from what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _check
from .._precision import wide
from ..errors import LapsValueError
from ..features import ImageFeatures, Span, TextFeatures
from .base import TrainingScores, mean_of_words, register_head
from .embedding import EmbeddingHead
from .layers import Linear
from .pairs import unit

__all__ = ["HREMHead", "RelationInteraction", "RelationPooling"]

FFN, DROPOUT = 1024, 0.1
# What the strongest values and the context count for in an embedding.
MAX_SHARE, CONTEXT_SHARE = 0.8, 0.2
STRONGEST = 2
# Of a pair's matches, those that the learned part of the cross relation sees.
TOP_MATCHES = 10
NEGATIVE_SLOPE = 0.1
PENALTY_WEIGHT = 10.0


@register_head("hrem")
class HREMHead(EmbeddingHead):
    """S = v . t of unit vectors; in training an interaction within the batch adds three matrices to the loss.

    Each side has its own :class:`RelationPooling`; prefix tokens are left out of the patches. Once
    `interaction_start` batches have been seen in training mode, :class:`RelationInteraction` turns the
    embeddings of a batch into v^, t^, and the loss is that of v.t, v.t^, v^.t and v^.t^ together, plus
    10 times the regularisation of the cross relation. In eval mode there is no interaction.

    On COCO its authors take `relation_weight` 1.5 and, in the loss, ``{"name": "triplet", "cutoff": 1.9}``.

    Args:
        embed_dim: C.
        num_patches: N.
        num_prefix_tokens: P.
        num_heads: attention heads, which must divide C.
        relation_weight: of the relations in the attention of the interaction, >= 0; 1.0 for Flickr30K, 1.5
            for COCO.
        interaction_start: batches before the interaction begins. The state dict holds their count, `steps`,
            so that a resumed run goes on.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range, heads that do not divide C; from
            `training_scores`, an interaction of unequal numbers of images and captions.

    Source: Fu et al., Learning Semantic Relationship among Instances for Image-Text Matching (HREM, CVPR
    2023), section 3.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("hrem", embed_dim=64, num_patches=49)
        >>> images = head.encode_image(torch.randn(2, 50, 64))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    default_loss: ClassVar[Mapping[str, Any]] = {"name": "triplet", "margin": 0.2}
    steps: Tensor
    # `steps` as the CPU knows it without waiting for the device; None until it is read there.
    _known_steps: int | None = None
    _repeated = False

    def __init__(
        self,
        embed_dim: int,
        num_patches: int,
        *,
        num_prefix_tokens: int = 1,
        num_heads: int = 16,
        relation_weight: float = 1.0,
        interaction_start: int = 8000,
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        name = "HREMHead"
        self.num_heads = _check.count(name, "num_heads", num_heads)
        if self.embed_dim % self.num_heads:
            raise LapsValueError(
                _check.message(
                    name, "num_heads does not divide embed_dim", f"a divisor of {self.embed_dim}", num_heads
                )
            )
        self.relation_weight = _check.number(name, "relation_weight", relation_weight, 0.0)
        self.interaction_start = _check.count(name, "interaction_start", interaction_start, 0)
        self.image_pooling = RelationPooling(self.embed_dim, self.num_heads)
        self.text_pooling = RelationPooling(self.embed_dim, self.num_heads)
        self.interaction = RelationInteraction(self.embed_dim, self.num_heads, self.relation_weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_forget_known_steps)  # type: ignore[no-untyped-call]

    def options(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "relation_weight": self.relation_weight,
            "interaction_start": self.interaction_start,
        }

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        patches = image_tokens[:, self.num_prefix_tokens :]
        lengths = torch.full((len(patches),), patches.shape[1])
        return ImageFeatures(embedding=self.image_pooling(patches, lengths))

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        lengths = word_lengths.cpu()
        return TextFeatures(embedding=self.text_pooling(word_tokens, lengths), lengths=lengths, spans=spans)

    def training_scores(
        self, image_tokens: Tensor, word_tokens: Tensor, word_lengths: Tensor
    ) -> TrainingScores:
        images, texts = self.encode_image(image_tokens), self.encode_text(word_tokens, word_lengths)
        scores = self.similarity(images, texts)
        if not self._interacts():
            # DistributedDataParallel waits for a gradient of every parameter, also of those whose time has
            # not come; to freeze them instead would hide them from an optimizer that is built now.
            unused = [(0 * parameter).sum() for parameter in self.interaction.parameters()]
            return TrainingScores(scores, penalty=torch.stack(unused).sum())
        if len(images) != len(texts):
            raise LapsValueError(
                _check.message(
                    "HREMHead",
                    f"the interaction got {len(images)} images and {len(texts)} captions",
                    "equal numbers in training",
                )
            )
        v, t = images.embedding, texts.embedding
        patches = image_tokens[:, self.num_prefix_tokens :]
        with torch.autocast(scores.device.type, enabled=False):
            image_nodes, text_nodes, divergence = self.interaction(v, t, patches, word_tokens, texts.lengths)
            crossed = [v @ text_nodes.T, image_nodes @ t.T, image_nodes @ text_nodes.T]
        return TrainingScores(scores, loss_scores=(scores, *crossed), penalty=PENALTY_WEIGHT * divergence)

    @contextlib.contextmanager
    def same_step(self) -> Iterator[None]:
        self._repeated = True
        try:
            yield
        finally:
            self._repeated = False

    def _interacts(self) -> bool:
        """Whether this batch has an interaction; counts it."""
        if not self.training:
            return False
        if self._repeated:
            return (self._known_steps or 0) > self.interaction_start
        if self._known_steps is None:
            self._known_steps = int(self.steps)
        interacts = self._known_steps >= self.interaction_start
        self._known_steps += 1
        self.steps += 1
        return interacts


def _forget_known_steps(head: nn.Module, _: object) -> None:
    """After a state dict is loaded the count is another."""
    assert isinstance(head, HREMHead)
    head._known_steps = None


class RelationPooling(nn.Module):
    """e = l2(0.8 * (mean of the two largest values of each channel) + 0.2 * mean(TransformerLayer(f))).

    A set of one element has that one as its largest. Our reading: the layer's activation is ReLU.

    Args:
        embed_dim: C.
        num_heads: a divisor of C.

    Source: baselines.md, "HREM"; Fu et al., HREM (CVPR 2023), section 3.1.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer = _transformer_layer(embed_dim, num_heads)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, K, C) and lengths (B,), int64 on the CPU, to unit vectors (B, C)."""
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        padding = ~real.to(tokens.device)
        # Without a mask attention has faster kernels.
        mask = None if bool(real.all()) else padding
        # What stands at padding may be anything, and NaN times zero is NaN. Tokens may be of half precision
        # where the layer is not, without autocast.
        values = tokens.masked_fill(padding[..., None], 0).to(self.layer.linear1.weight.dtype)
        context = mean_of_words(wide(self.layer(values, src_key_padding_mask=mask)), lengths)
        hidden = wide(tokens).masked_fill(padding[..., None], -torch.inf)
        largest = hidden.topk(min(STRONGEST, tokens.shape[1]), 1).values
        return unit(
            MAX_SHARE * mean_of_words(largest, lengths.clamp_max(STRONGEST)) + CONTEXT_SHARE * context
        )


class RelationInteraction(nn.Module):
    """What a batch of B pairs learns from itself: v^, t^ = TransformerLayer over its 2B embeddings.

    The layer's attention adds `weight` * relation to its logits, and each embedding sees the half of the 2B
    that it has the strongest relations with:

    - intra relation, of embeddings of one side: exp(-|a - b|);
    - cross relation, of an image and a caption, with a = leakyReLU(v_n . w_j) of unit vectors without
      gradient: text-to-image normalises a over the words of each patch and takes the maximum over the
      patches, which leaves one match per word; image-to-text normalises over the patches of each word and
      takes the maximum over the words, one match per patch. Relation = mean(matches) + MLP(the ten largest).

    The regularisation holds the cross relation to the distances of the embeddings, without gradient to them.

    Our reading, where the published text leaves it open:

    - rows of images have the image-to-text relation, rows of captions the text-to-image one, and each
      direction has its own MLP: Linear(10, 10), ReLU, Linear(10, 1), of the matches in descending order,
      padded with zeros where there are fewer than ten;
    - only the tokens are without gradient: the embeddings of the intra relation have it;
    - the strongest half is of a whole row, both sides together: B of 2B;
    - v^, t^ are l2-normalised, as the loss takes their products for cosines;
    - "KL both ways" is over the captions of each image and over the images of each caption:
      mean_i KL(Q_i || P_i) + mean_t KL(Q_t || P_t), with P = softmax(relation) and Q proportional to
      exp(-|v - t|), which is softmax(-|v - t|).

    Args:
        embed_dim: C.
        num_heads: a divisor of C.
        weight: of the relations, >= 0.

    Source: baselines.md, "HREM"; Fu et al., HREM (CVPR 2023), sections 3.2 and 3.3.
    """

    def __init__(self, embed_dim: int, num_heads: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.layer = _transformer_layer(embed_dim, num_heads)
        self.image_to_text = _match_mlp()
        self.text_to_image = _match_mlp()

    def forward(
        self, v: Tensor, t: Tensor, patches: Tensor, words: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, C) twice, patches (B, N, C), words (B, L, C) and their lengths (B,) to v^, t^, both
        (B, C) of unit norm, and the regularisation, 0-d."""
        image_to_text, text_to_image = self.cross_relations(patches, words, lengths)
        distance = _distances(v.detach(), t.detach())
        divergence = _divergence(image_to_text, distance) + _divergence(text_to_image, distance.T)
        relation = torch.cat(
            [
                torch.cat([(-_distances(v, v)).exp(), image_to_text], 1),
                torch.cat([text_to_image, (-_distances(t, t)).exp()], 1),
            ]
        )
        near = torch.zeros_like(relation, dtype=torch.bool)
        near.scatter_(1, relation.topk(len(v), 1).indices, True)
        mask = (self.weight * relation).masked_fill(~near, -torch.inf)
        # Embeddings are never of half precision; the layer may be.
        nodes, mask = (x.to(self.layer.linear1.weight.dtype) for x in (torch.cat([v, t]), mask))
        nodes = unit(self.layer(nodes[None], src_mask=mask)[0].to(v.dtype))
        return nodes[: len(v)], nodes[len(v) :], divergence

    def cross_relations(self, patches: Tensor, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Image-to-text (B_v, B_t) and text-to-image (B_t, B_v)."""
        patches = unit(wide(patches.detach()))
        columns = []
        # Caption by caption: the products of all pairs would take B times the memory.
        for caption, length in zip(words.detach(), lengths.tolist(), strict=True):
            products = patches @ unit(wide(caption[:length])).T
            matches = nn.functional.leaky_relu(products, NEGATIVE_SLOPE)
            per_patch, per_word = unit(matches.mT).amax(1), unit(matches).amax(1)
            columns.append([*_mean_and_top(per_patch), *_mean_and_top(per_word)])
        image_mean, image_top, text_mean, text_top = (
            torch.stack(parts) for parts in zip(*columns, strict=True)
        )
        image_to_text = image_mean + self.image_to_text(image_top)[..., 0]
        return image_to_text.T, text_mean + self.text_to_image(text_top)[..., 0]


def _transformer_layer(embed_dim: int, num_heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(embed_dim, num_heads, FFN, DROPOUT, batch_first=True)


def _match_mlp() -> nn.Sequential:
    return nn.Sequential(Linear(TOP_MATCHES, TOP_MATCHES), nn.ReLU(), Linear(TOP_MATCHES, 1))


def _mean_and_top(matches: Tensor) -> tuple[Tensor, Tensor]:
    """Matches (B, K) to their mean (B,) and the ten largest (B, 10), zeros after them if K < 10."""
    top = matches.topk(min(TOP_MATCHES, matches.shape[1]), 1).values
    return matches.mean(1), nn.functional.pad(top, (0, TOP_MATCHES - top.shape[1]))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|, (B, B). Its gradient is zero where the two are equal."""
    # By differences: 2 - 2 a.b would lose half of the digits of a small distance.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _divergence(relation: Tensor, distance: Tensor) -> Tensor:
    """KL(softmax(-distance) || softmax(relation)) of each row, their mean."""
    target = (-distance).log_softmax(1)
    return nn.functional.kl_div(relation.log_softmax(1), target, reduction="batchmean", log_target=True)
