"""CPFEAN, our reading: gates strengthen prominent regions, and prominent words weigh more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from .. import _check
from .._precision import wide
from ..attribution import Attribution, attribute_patches, one_pair
from ..errors import LapsValueError
from ..features import ImageFeatures, Span, TextFeatures
from .base import TrainingScores, mean_of_words, register_head
from .chan import best_of_each_word
from .pairs import EPS, PairHead, Pairs, unit

__all__ = ["CPFEANHead"]

ALIGNMENTS = ("prominent", "max_mean", "region", "attention")
# Regions that overlap more than this see each other.
IOU = 0.2
# Of the softmax of alignment="attention".
TEMPERATURE = 9.0
# Where the gate starts: half open at a cosine of 0.3, and nearly shut at 0.
GATE_SCALE, GATE_BIAS = 10.0, -3.0


class RegionLayer(nn.Module):
    """A transformer layer with the norms first: x + MHA(LN(x)), then x + MLP(LN(x)) with 4 C hidden units.

    Args:
        embed_dim: C.
        num_heads: a divisor of C.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """(B, N, C), and (B, 1, N, N) bool: whether a region (first N) sees another; None for all."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class WordGraph(nn.Module):
    """One graph convolution over all words: t_j + ReLU(W_g sum_k A_jk t_k).

    A = softmax_k(lambda (W_q t_j) . (W_k t_k)) over real words, with lambda = 1 / sqrt(C).

    Args:
        embed_dim: C.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.weight = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        """(B, L, C) and (B, L) bool to (B, L, C); what comes out at padding is of no use."""
        # One head is what scaled dot-product attention calls lambda, A and the sum.
        q, k, v = (x[:, None] for x in (self.query(words), self.key(words), words))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])[:, 0]
        result: Tensor = words + self.weight(mixed).relu()
        return result


@register_head("cpfean")
class CPFEANHead(PairHead):
    """CPFEAN, our reading of its public description: neither its equations nor its code are public.

    Regions v_i pass a norm and transformer layers, words w_j a dense graph; both are made unit vectors. Per
    pair, with s_ij = v_i . w_j and j*(i) the word that region i is most like, regions take up their word by a
    gate::

        g_i = sigmoid(a s_{i j*(i)} + b),   v~_i = l2(v_i + Linear(g_i [v_i ; w_{j*(i)}]))
        n_j = sum_{i: j*(i) = j} g_i,       alpha_j = (1 + gamma n_j) / sum_k (1 + gamma n_k)
        S = sum_j alpha_j max_i v~_i . w_j

    Position and label of a region belong to the encoder that makes the image tokens
    (:class:`laps.encoders.RegionBackbone`). A mismatched caption can lend its words to the regions too: watch
    the two mean gates in the log of `training_scores`.

    Args:
        embed_dim: C.
        num_patches: N, of patches or regions.
        num_prefix_tokens: P.
        region_layers: pre-norm transformer layers over the regions; 0: "without the visual transformer".
        num_heads: of these layers, a divisor of C.
        iou_mask: where boxes are given, a region sees itself and those with IoU > 0.2 only.
        word_graph: False: "without the GCN".
        fusion: False, "without fusion": v~_i = v_i, in the same alignment.
        alignment: ``"prominent"`` as above; ``"max_mean"``, the same with gamma = 0; ``"region"``,
            S = sum_i g_i v~_i . w_{j*(i)} / (sum_i g_i + 1e-8); ``"attention"``, "cross-attention instead of
            the prominent alignment": S = mean_j cos(w_j, sum_i softmax_i(9 v~_i . w_j) v~_i).
        gamma: how much more a prominent word weighs, >= 0.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: after arXiv 2311.02183 (CPFEAN, 2023), from its summary alone; all sizes and constants are ours.

    Example:
        >>> import laps, torch
        >>> head = laps.heads.build_head("cpfean", embed_dim=64, num_patches=36, num_prefix_tokens=0)
        >>> corners = torch.rand(2, 36, 2, 2).sort(dim=2).values
        >>> images = head.encode_image(torch.randn(2, 36, 64), boxes=corners.flatten(2))
        >>> texts = head.encode_text(torch.randn(3, 12, 64), torch.tensor([12, 7, 5]))
        >>> head.similarity(images, texts).shape
        torch.Size([2, 3])
    """

    uses_boxes: ClassVar[bool] = True
    uses_image_ids: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = {"name": "hinge", "margin": 0.2}

    def __init__(
        self,
        embed_dim: int,
        num_patches: int,
        *,
        num_prefix_tokens: int = 1,
        region_layers: int = 2,
        num_heads: int = 8,
        iou_mask: bool = True,
        word_graph: bool = True,
        fusion: bool = True,
        alignment: str = "prominent",
        gamma: float = 1.0,
    ) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        name, c = "CPFEANHead", self.embed_dim
        self.num_heads = _check.count(name, "num_heads", num_heads)
        layers = _check.count(name, "region_layers", region_layers, 0)
        if layers and c % self.num_heads:
            raise LapsValueError(
                _check.message(name, "num_heads does not fit", f"a divisor of embed_dim={c}", num_heads)
            )
        self.iou_mask = _check.flag(name, "iou_mask", iou_mask)
        self.fusion = _check.flag(name, "fusion", fusion)
        self.alignment = _check.choice(name, "alignment", alignment, ALIGNMENTS)
        self.gamma = _check.number(name, "gamma", gamma, 0.0)
        self.norm = nn.LayerNorm(c)
        self.region_layers = nn.ModuleList(RegionLayer(c, self.num_heads) for _ in range(layers))
        self.word_graph = WordGraph(c) if _check.flag(name, "word_graph", word_graph) else None
        self.gated = self.fusion or alignment in ("prominent", "region")
        if self.gated:
            self.gate_scale = nn.Parameter(torch.tensor(GATE_SCALE))
            self.gate_bias = nn.Parameter(torch.tensor(GATE_BIAS))
        if self.fusion:
            self.fuse = nn.Linear(2 * c, c)
            # As drawn it would be nearly as long as a region, and the same in all of them.
            nn.init.zeros_(self.fuse.bias)

    def options(self) -> dict[str, Any]:
        return {
            "region_layers": len(self.region_layers),
            "num_heads": self.num_heads,
            "iou_mask": self.iou_mask,
            "word_graph": self.word_graph is not None,
            "fusion": self.fusion,
            "alignment": self.alignment,
            "gamma": self.gamma,
        }

    def pair_floats(self, patches: int, words: int) -> int:
        held = (13 if self.fusion else 5) * patches * words
        if self.alignment == "attention":
            held += words * (7 * self.embed_dim + 4 * patches)
        return held

    # ---- each side alone

    def encode_image(self, image_tokens: Tensor, boxes: Tensor | None = None) -> ImageFeatures:
        """See :meth:`laps.heads.SimilarityHead.encode_image`.

        Args:
            image_tokens: (B_v, P + N, C), prefix first.
            boxes: (B_v, N, 4), the regions' x0, y0, x1, y1 in [0, 1], for the mask; None: all see all.

        Raises:
            LapsValueError: boxes of another shape, or (on the CPU) with values outside [0, 1].
        """
        patches = image_tokens[:, self.num_prefix_tokens :]
        seen = None
        if boxes is not None:
            check_boxes(boxes, len(patches), patches.shape[1])
            if self.iou_mask:
                seen = overlapping(boxes)[:, None].to(patches.device)
        patches = self.norm(patches)
        for layer in self.region_layers:
            patches = layer(patches, seen)
        patches = unit(wide(patches))
        return ImageFeatures(embedding=unit(patches.mean(1)), patches=patches)

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        texts = super().encode_text(word_tokens, word_lengths, spans)
        words = texts.words
        assert words is not None
        real = torch.arange(words.shape[1]) < texts.lengths[:, None]
        real = real.to(words.device)
        if self.word_graph is not None:
            words = self.word_graph(words, real).masked_fill(~real[..., None], 0)
        words = unit(wide(words))
        return replace(texts, words=words, embedding=unit(mean_of_words(words, word_lengths)))

    def training_scores(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: Tensor,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> TrainingScores:
        """Scores (B_v, B_t), and for the log, if there is fusion, two mean gates.

        "gate_positive" is that of matching pairs, the diagonal; "gate_negative" that of each image beside the
        caption of another image that it likes best. An image without such a caption is left out of the mean,
        which is 0 if there is none left.

        Args:
            image_tokens: (B_v, P + N, C), prefix first.
            word_tokens: (B_t, L, C).
            word_lengths: (B_t,).
            boxes: see :meth:`encode_image`.
            image_ids: (B,) integers, which image row i and caption i belong to; None: each to one of its own.

        Raises:
            LapsValueError: `image_ids` of another shape, or of unequal numbers of images and captions.
        """
        images = self.encode_image(image_tokens, boxes)
        texts = self.encode_text(word_tokens, word_lengths)
        scores = self.similarity(images, texts)
        log = {}
        if self.fusion:
            log = self._mean_gates(scores.detach(), images.detach(), texts.detach(), image_ids)
        return TrainingScores(scores, log=log)

    # ---- pairs

    def pair_scores(self, pairs: Pairs) -> Tensor:
        cosines = pairs.products(pairs.patches, pairs.words)
        if self.gated:
            gate, chosen = self._gate(cosines, pairs.real)
        if self.fusion:
            own, lent = self.halves(pairs.patches, pairs.words)
            cosines, lengths = self._fused(pairs, cosines, gate, chosen, own, lent)
        if self.alignment == "region":
            best = (chosen * cosines).sum(-1)
            return (gate * best).sum(-1) / (gate.sum(-1) + EPS)
        if self.alignment == "attention":
            shares = (TEMPERATURE * cosines).softmax(-2)
            if self.fusion:
                # sum_i shares_ij u_i / |u_i|, part by part: all u_i of all pairs would be too large.
                shares = shares / lengths[..., None]
                context = mixture(pairs, shares, pairs.patches + self.fuse.bias.to(own))
                shares = shares * gate[..., None]
                context = context + mixture(pairs, shares, own) + shares.mT @ chosen @ pairs.of_texts(lent)
            else:
                context = mixture(pairs, shares, pairs.patches)
            # Words at padding are zero, and so is what they agree with.
            return (unit(context) * pairs.of_texts(pairs.words)).sum((-2, -1)) / pairs.lengths
        weights = pairs.real.to(cosines)
        if self.alignment == "prominent":
            weights = weights * (1 + self.gamma * (gate[..., None] * chosen).sum(-2))
        return (weights * cosines.amax(-2)).sum(-1) / weights.sum(-1)

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """Shares of v~_i . w_j, weighted as in the score; see :meth:`laps.heads.SimilarityHead.explain`.

        A patch is v~_i here: the word that was mixed into it counts as a part of the patch. Patches that the
        mask drops make no word prominent.
        """
        if self.alignment == "attention":
            raise LapsValueError(
                _check.message("explain", 'alignment "attention" is no sum over patches', "another alignment")
            )
        with torch.no_grad():
            patches, words = one_pair(images, texts)
            kept = slice(None) if mask is None else mask.to(patches.device)
            gate, chosen = patches.new_zeros(len(patches)), patches.new_zeros(len(patches), len(words))
            if self.gated:
                real = torch.ones(len(words), dtype=torch.bool, device=words.device)
                gate, chosen = self._gate(patches @ words.T, real)
            if self.fusion:
                own, lent = self.halves(patches, words)
                patches = unit(patches + self.fuse.bias.to(patches) + gate[:, None] * (own + chosen @ lent))
            gates = (gate[:, None] * chosen)[kept].cpu()

            def parts(cosines: Tensor) -> Tensor:
                if self.alignment == "region":
                    return gates * cosines / (gates.sum() + EPS)
                weights = 1 + (self.gamma if self.alignment == "prominent" else 0) * gates.sum(0)
                return best_of_each_word(cosines) * weights / weights.mean()

            return attribute_patches(patches, words, parts, mask=mask)

    def halves(self, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """(..., N, C) and (..., L, C) through their halves of the Linear, without its bias."""
        for_patches, for_words = self.fuse.weight.to(patches).chunk(2, dim=1)
        return linear(patches, for_patches), linear(words, for_words)

    def _gate(self, cosines: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (..., N, L) and real words (..., L) to g (..., N), and 1 at j*(i), else 0, (..., N, L)."""
        best, word = cosines.masked_fill(~real[..., None, :], -torch.inf).max(-1, keepdim=True)
        chosen = torch.zeros_like(cosines).scatter_(-1, word, 1.0)
        return torch.sigmoid(self.gate_scale * best[..., 0] + self.gate_bias), chosen

    def _fused(
        self, pairs: Pairs, cosines: Tensor, gate: Tensor, chosen: Tensor, own: Tensor, lent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All v~_i . w_j, (b, t, N, L) or (b, N, L), and |u_i|, (b, t, N) or (b, N), by inner products alone.

        u = v' + g m is what l2 makes v~ of, with v' = v + bias, and m = own + lent_j* the two halves; then
        v~ . w = u . w / |u| and |u|^2 = |v'|^2 + 2 g v' . m + g^2 |m|^2, without any u. In float32 that is
        good to 1e-5 unless fusion takes more than 95 % of a region's length away.
        """
        words, bias = pairs.words, self.fuse.bias.to(own)
        shifted = pairs.patches + bias

        def at_chosen(x: Tensor) -> Tensor:
            return (chosen * x).sum(-1)

        mixed = pairs.products(own, words) + chosen @ pairs.of_texts(lent @ words.mT)
        products = cosines + pairs.of_texts(words @ bias)[..., None, :] + gate[..., None] * mixed
        of_own = pairs.of_images(own.square().sum(-1))
        of_lent = at_chosen(pairs.of_texts(lent.square().sum(-1))[..., None, :])
        size = pairs.of_images(shifted.square().sum(-1)) + gate.square() * (of_own + of_lent)
        across = pairs.of_images((shifted * own).sum(-1)) + at_chosen(pairs.products(shifted, lent))
        square = size + 2 * gate * (across + gate * at_chosen(pairs.products(own, lent)))
        # Where the parts cancel, only rounding is left of the square: no cosine may grow beyond 1 by that.
        square = torch.maximum(square, torch.finfo(size.dtype).eps * size)
        lengths = (square + EPS**2).sqrt()
        return products / lengths[..., None], lengths

    @torch.no_grad()
    def _mean_gates(
        self, scores: Tensor, images: ImageFeatures, texts: TextFeatures, image_ids: Tensor | None
    ) -> dict[str, Tensor]:
        """For the log; see :meth:`training_scores`."""
        own = same_image(scores, image_ids)

        def mean_gates(count: int, captions: Tensor) -> Tensor:
            assert texts.words is not None
            # Indexed where they lie: the CPU need not wait for the scores.
            lengths = texts.lengths.to(captions.device)[captions]
            chosen = TextFeatures(texts.embedding[captions], lengths, texts.words[captions])
            pairs = Pairs(images[:count], chosen, paired=True)
            with torch.autocast(scores.device.type, enabled=False):
                return self._gate(pairs.products(pairs.patches, pairs.words), pairs.real)[0].mean(-1)

        count = min(scores.shape)
        positive = mean_gates(count, torch.arange(count, device=scores.device))
        counted = ~own.all(1)
        negative = mean_gates(len(scores), scores.masked_fill(own, -torch.inf).argmax(1))
        total = negative.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        return {"gate_positive": positive.mean(), "gate_negative": total}


def same_image(scores: Tensor, image_ids: Tensor | None) -> Tensor:
    """(B_v, B_t) bool: whether a caption is one of the image of that row; without ids the diagonal."""
    if image_ids is None:
        return torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    for axis in (0, 1):
        if tuple(image_ids.shape) != (scores.shape[axis],):
            raise LapsValueError(
                _check.message(
                    "CPFEANHead.training_scores",
                    "image_ids does not fit",
                    f"shape ({scores.shape[axis]},), as many as images and as captions",
                    tuple(image_ids.shape),
                )
            )
    ids = image_ids.to(scores.device)
    return ids[:, None] == ids


def mixture(pairs: Pairs, shares: Tensor, patches: Tensor) -> Tensor:
    """sum_i shares_ij patches_i: (b, t, N, L) or (b, N, L), and (b, N, C), to (b, t, L, C) or (b, L, C)."""
    return torch.einsum("bnl,bnc->blc" if pairs.paired else "btnl,bnc->btlc", shares, patches)


def overlapping(boxes: Tensor) -> Tensor:
    """(B, N, 4) to (B, N, N) bool: IoU > 0.2, and every box with itself."""
    corners = wide(boxes)
    first, last = corners[..., :2], corners[..., 2:]
    shared = torch.minimum(last[:, :, None], last[:, None]) - torch.maximum(first[:, :, None], first[:, None])
    intersection = shared.clamp(min=0).prod(-1)
    area = (last - first).clamp(min=0).prod(-1)
    union = area[:, :, None] + area[:, None] - intersection
    own = torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    # As a product: a box without area has no IoU.
    return (intersection > IOU * union) | own


def check_boxes(boxes: Tensor, images: int, patches: int) -> None:
    """Refuse another shape, and values outside [0, 1] where that can be seen."""
    operation = "CPFEANHead.encode_image"
    if tuple(boxes.shape) != (images, patches, 4):
        raise LapsValueError(
            _check.message(
                operation, "boxes does not fit", f"shape {(images, patches, 4)}", tuple(boxes.shape)
            )
        )
    if _check.readable(boxes):
        wrong = ~((boxes >= 0) & (boxes <= 1))
        if bool(wrong.any()):
            raise LapsValueError(
                _check.message(
                    operation,
                    "boxes has a value out of range",
                    "x0, y0, x1, y1 in [0, 1]",
                    f"{float(boxes[wrong][0]):.6g}",
                )
            )
