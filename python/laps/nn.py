"""The LAPS head and its stages as modules. Sizes and symbols as in :mod:`laps.functional`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from . import _check, ablations
from . import functional as F
from ._precision import wide
from .attribution import Attribution, attribute, kept_patches
from .errors import LapsTypeError, LapsValueError
from .features import ImageFeatures, Span, TextFeatures
from .heads.base import SimilarityHead, TrainingScores, mean_of_words, register_head

__all__ = ["LAPSHead", "PatchCalibration", "PatchScore", "PatchSelection", "PatchWordAlignment"]

VARIANTS = ("released", "paper")
SELECTIONS = ("text", "image", "none")
ABLATION_OPTIONS = {
    "calibration": "aggregation",
    "alignment": "spa",
    "relevance_k": 5,
    "words": "all",
    "word_ratio": 0.5,
    "max_words": 64,
}


class PatchScore(nn.Module):
    """The score net of the paper variant: the probability that a patch is worth keeping, whatever the
    caption.

    p = softmax(Linear(GELU(Linear(LayerNorm(v)))))_0, with C/4 hidden units and two outputs: keep, drop.

    Args:
        embed_dim: C, >= 1.

    Source: section LPS, paper variant.

    Example:
        >>> import laps, torch
        >>> laps.nn.PatchScore(64)(torch.randn(2, 49, 64)).shape
        torch.Size([2, 49])
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = _check.count("PatchScore", "embed_dim", embed_dim)
        hidden = max(1, self.embed_dim // 4)
        self.norm = nn.LayerNorm(self.embed_dim)
        self.fc1 = nn.Linear(self.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, 2)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B_v, N, C), floating, to keep probabilities (B_v, N) in [0, 1]."""
        hidden = nn.functional.gelu(self.fc1(self.norm(patches)))
        keep_prob: Tensor = self.fc2(hidden).softmax(dim=-1)[..., 0]
        return keep_prob


class PatchSelection(nn.Module):
    """The patches of each image that matter for each caption; see :func:`laps.functional.select_patches`.

    Args:
        selection_ratio: share of patches to keep, in (0, 1].
        language_context: whether the caption takes part.
        score: ``"cosine"`` or ``"dot"``.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: section LPS, released variant.

    Example:
        >>> import laps, torch
        >>> laps.nn.PatchSelection(0.5)(torch.randn(2, 49, 64), torch.randn(3, 12, 64), [12, 7, 5]).shape
        torch.Size([2, 3, 25])
    """

    def __init__(
        self,
        selection_ratio: float = 0.5,
        *,
        language_context: bool = True,
        score: str = "cosine",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        operation = "PatchSelection"
        self.selection_ratio = _check.number(
            operation, "selection_ratio", selection_ratio, 0.0, 1.0, open_low=True
        )
        self.language_context = _check.flag(operation, "language_context", language_context)
        self.score = _check.choice(operation, "score", score, F.SCORES)
        self.backend = _check_backend(operation, backend)

    def forward(self, patches: Tensor, words: Tensor, word_lengths: F.Lengths) -> Tensor:
        """Patches (B_v, N, C), words (B_t, L, C), lengths (B_t,) to ascending indices (B_v, B_t, k)."""
        return F.select_patches(
            patches,
            words,
            word_lengths,
            self.selection_ratio,
            language_context=self.language_context,
            score=self.score,
            backend=self.backend,
        )

    def scores(self, patches: Tensor, words: Tensor, word_lengths: F.Lengths) -> Tensor:
        """The significance (B_v, B_t, N) behind the choice, without gradient."""
        return F.selection_scores(
            patches,
            words,
            word_lengths,
            language_context=self.language_context,
            score=self.score,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name in ("selection_ratio", "language_context", "score")
        )


class PatchCalibration(nn.Module):
    """The aggregation network, and the calibrated tokens that its logits give.

    logits = scale * Linear(GELU(Linear(LayerNorm(v)))), with max(1, int(0.2 C)) hidden units and N_c outputs.
    They do not depend on the caption, so there is one row per patch and not one per pair (identity 1).

    Args:
        embed_dim: C, >= 1.
        num_tokens: N_c, >= 1.
        fusion: whether dropped patches form a fused token.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: section SPC.

    Example:
        >>> import laps, torch
        >>> calibration, v, s = laps.nn.PatchCalibration(64, 9), torch.randn(2, 49, 64), torch.randn(2, 3, 49)
        >>> calibration(v, s > 0, s)[0].shape
        torch.Size([2, 3, 10, 64])
    """

    def __init__(
        self, embed_dim: int, num_tokens: int, *, fusion: bool = True, backend: str | None = None
    ) -> None:
        super().__init__()
        operation = "PatchCalibration"
        self.embed_dim = _check.count(operation, "embed_dim", embed_dim)
        self.num_tokens = _check.count(operation, "num_tokens", num_tokens)
        self.fusion = _check.flag(operation, "fusion", fusion)
        self.backend = _check_backend(operation, backend)
        hidden = max(1, int(0.2 * self.embed_dim))
        self.norm = nn.LayerNorm(self.embed_dim)
        self.fc1 = nn.Linear(self.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, self.num_tokens)
        # Three axes because published checkpoints have them.
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def logits(self, patches: Tensor) -> Tensor:
        """Patches (B_v, N, C), floating, to aggregation logits (B_v, N, N_c)."""
        logits: Tensor = self.scale * self.fc2(nn.functional.gelu(self.fc1(self.norm(patches))))
        return logits

    def forward(
        self, patches: Tensor, mask: Tensor, scores: Tensor, *, prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Calibrated tokens and their counts; see :func:`laps.functional.calibrate_patches`.

        Args:
            patches: (B_v, N, C), floating.
            mask: (B_v, B_t, N), bool or floating in [0, 1].
            scores: (B_v, B_t, N), floating.
            prefix: (B_v, P, C) or None.

        Returns:
            Tokens (B_v, B_t, P + N_c + 1, C), one less without fusion, and counts (B_v, B_t), int64.
        """
        return F.calibrate_patches(
            patches,
            self.logits(patches),
            mask,
            scores,
            prefix=prefix,
            fusion=self.fusion,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_tokens={self.num_tokens}, fusion={self.fusion}"


class PatchWordAlignment(nn.Module):
    """Alignment of calibrated tokens with words; see :func:`laps.functional.align_patches_words`.

    Args:
        directions: ``"both"``, ``"word_to_patch"`` or ``"patch_to_word"``.
        direction_reduction: ``"sum"`` or ``"mean"`` of the two.
        negative_slope: slope of the leaky ReLU, in [0, 1]; 1.0 switches it off.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range.

    Source: section SPA.

    Example:
        >>> import laps, torch
        >>> tokens, words = torch.randn(2, 3, 10, 64), torch.randn(3, 12, 64)
        >>> laps.nn.PatchWordAlignment()(tokens, words, [12, 7, 5])[0].shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        *,
        directions: str = "both",
        direction_reduction: str = "sum",
        negative_slope: float = 0.1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        operation = "PatchWordAlignment"
        self.directions = _check.choice(operation, "directions", directions, F.DIRECTIONS)
        self.direction_reduction = _check.choice(
            operation, "direction_reduction", direction_reduction, F.DIRECTION_REDUCTIONS
        )
        self.negative_slope = _check.number(operation, "negative_slope", negative_slope, 0.0, 1.0)
        self.backend = _check_backend(operation, backend)

    def forward(
        self, tokens: Tensor, words: Tensor, word_lengths: F.Lengths, *, token_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B_v, B_t, M, C), words (B_t, L, C) to scores (B_v, B_t) and alignment (B_v, B_t, M, L)."""
        return F.align_patches_words(
            tokens,
            words,
            word_lengths,
            token_counts=token_counts,
            directions=self.directions,
            direction_reduction=self.direction_reduction,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"directions={self.directions!r}, direction_reduction={self.direction_reduction!r}, "
            f"negative_slope={self.negative_slope}"
        )


@register_head("laps")
class LAPSHead(SimilarityHead):
    """Scores of all images against all captions from their patch and word features: the published head,
    trainable.

    ``variant="released"`` computes what the published code computes: selection by cosine to the image and the
    text, leaky ReLU 0.1. ``variant="paper"`` is what the text describes and the code leaves out: a score net
    joins the selection, whose Gumbel-softmax sampling passes gradient to it in training; no leaky ReLU. In
    training its noise is drawn from torch's default CPU generator (so ``torch.manual_seed`` repeats it); in
    eval mode there is none.

    The rows of the paper's Table 4, also in :data:`laps.ablations.TABLE_4` under the names that it prints:

    =============================================  ===========================================
    without patch selection (keep all)             ``selection="none"``
    without language context                       ``selection="image"`` (paper: (1-beta) p + beta a),
                                                   or ``variant="paper", attention_weight=0`` (p alone)
    only attentive scores                          ``variant="paper", attention_weight=1``
    without patch calibration                      ``calibration="none", fusion=False``: the tokens are the
                                                   prefix and the kept patches
    without redundant fusion                       ``fusion=False``
    clustering in place of the aggregation         ``calibration="clustering"``
    SCAN alignment                                 ``alignment="scan"``
    only patch-to-word, only word-to-patch         ``directions="patch_to_word"``, ``"word_to_patch"``
    word selection, word aggregation, both         ``words="selection"``, ``"aggregation"``, ``"both"``
    =============================================  ===========================================

    Another `calibration`, `alignment` or `words` than the default is computed by :mod:`laps.ablations`, in
    plain PyTorch: no native kernels, no `explain`.

    Args:
        embed_dim: C, the size of both kinds of tokens.
        num_patches: N, the number of spatial patches.
        selection_ratio: rho, share of patches kept, in (0, 1].
        aggregation_ratio: lambda, in (0, 1]: N_c = int(N * lambda * rho) aggregated tokens, which must be at
            least 1.
        variant: ``"released"`` or ``"paper"``.
        num_prefix_tokens: P, the tokens before the patches: 1 for ViT and CLIP ([CLS]), 0 for Swin, more with
            registers.
        directions: ``"both"``, ``"word_to_patch"`` or ``"patch_to_word"``.
        direction_reduction: ``"sum"`` or ``"mean"`` of the two directions; scores lie within [-2, 2] or [-1,
            1].
        negative_slope: slope of the leaky ReLU, in [0, 1]; 1.0 is no leaky ReLU. None: 0.1 released, 1.0
            paper.
        selection: what patches are selected by: ``"text"`` (image and text), ``"image"`` (the image alone),
            ``"none"`` (all are kept, N_c unchanged, no fused token, no score net).
        fusion: whether dropped patches form the fused token.
        calibration: what becomes of the kept patches: ``"aggregation"`` (N_c tokens by the aggregation
            network), ``"none"`` (each is a token) or ``"clustering"`` (means of N_c clusters: DPC-kNN on
            normalised patches, 5 neighbours; no gradient through the choice). Without the network there is
            no `aggregation`.
        alignment: ``"spa"``, or ``"scan"``: the cosine of each word with the mean of the tokens that it
            attends to, averaged over the words. SCAN has its own leaky ReLU (0.1) and temperature (9), and
            one direction. ``"relevance"``, of later work (SEPS, arXiv 2511.01390): SPA, and in each direction
            what a small network makes of the `relevance_k` best matches
            (:class:`laps.ablations.RelevanceNet`); these scores have no bound.
        relevance_k: how many, 1 to 1024.
        words: ``"all"``; ``"selection"``: per pair the ceil(word_ratio * l) words with the highest cosine to
            the mean of the words plus cosine to the mean of the patches, at least 4, the first ([CLS]) always
            among them; ``"aggregation"``: max(4, int(0.75 l)) words made of the l words by another network of
            the same form; ``"both"``: those of the words selected. Which patches are selected does not
            depend on it.
        word_ratio: share of the words kept, in (0, 1].
        max_words: the length of a caption from which on it gets no more aggregated words, >= 1: the network
            has outputs for that many. Shorter captions use the first ones.
        attention_weight: beta, weight of the attentive scores against the score net's, in [0, 1]; paper
            variant.
        score: ``"cosine"``, or ``"dot"`` as equation 2 prints.
        sampling: ``"gumbel"`` or ``"topk"`` (keeps the budget exactly); paper variant in training.
        temperature: of the Gumbel softmax, > 0.
        chunk: scratch memory of a call in bytes; None for 24 MiB (native), 48 MiB (torch), on a GPU
            1 GiB forward and 192 MiB backward (native). One caption and,
            native, one image per thread are held in any case. :mod:`laps.ablations`: 256 MiB.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Parameters in the state dict: ``aggregation.scale``, ``aggregation.norm.*``, ``aggregation.fc1.*``,
    ``aggregation.fc2.*``; the paper variant adds ``score.norm.*``, ``score.fc1.*``, ``score.fc2.*``,
    aggregated words ``word_aggregation.*`` as ``aggregation.*``, relevance ``relevance.{direction}.fc1.*``
    and ``.fc2.*``.

    Raises:
        LapsValueError, LapsTypeError: an argument out of its range; N_c < 1; the native backend with what
        it does not have.

    Source: Fu et al., Linguistic-Aware Patch Slimming Framework for Fine-grained Cross-Modal Alignment (CVPR
    2024).

    Example:
        >>> import laps, torch
        >>> head = laps.nn.LAPSHead(embed_dim=64, num_patches=49)
        >>> head(torch.randn(2, 1 + 49, 64), torch.randn(3, 12, 64), torch.tensor([12, 7, 5])).shape
        torch.Size([2, 3])
    """

    aggregation: PatchCalibration  # unless another calibration takes its place
    score: PatchScore | None
    word_aggregation: PatchCalibration | None
    relevance: nn.ModuleDict | None

    row_wise: ClassVar[bool] = True

    def __init__(
        self,
        embed_dim: int,
        num_patches: int,
        selection_ratio: float = 0.5,
        aggregation_ratio: float = 0.4,
        *,
        variant: str = "released",
        num_prefix_tokens: int = 1,
        directions: str = "both",
        direction_reduction: str = "sum",
        negative_slope: float | None = None,
        selection: str = "text",
        fusion: bool = True,
        calibration: str = "aggregation",
        alignment: str = "spa",
        relevance_k: int = 5,
        words: str = "all",
        word_ratio: float = 0.5,
        max_words: int = 64,
        attention_weight: float = 0.8,
        score: str = "cosine",
        sampling: str = "gumbel",
        temperature: float = 1.0,
        chunk: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        operation = "LAPSHead"
        self.embed_dim = _check.count(operation, "embed_dim", embed_dim)
        self.num_patches = _check.count(operation, "num_patches", num_patches)
        self.selection_ratio = _check.number(
            operation, "selection_ratio", selection_ratio, 0.0, 1.0, open_low=True
        )
        self.aggregation_ratio = _check.number(
            operation, "aggregation_ratio", aggregation_ratio, 0.0, 1.0, open_low=True
        )
        self.variant = _check.choice(operation, "variant", variant, VARIANTS)
        self.num_prefix_tokens = _check.count(operation, "num_prefix_tokens", num_prefix_tokens, 0)
        self.directions = _check.choice(operation, "directions", directions, F.DIRECTIONS)
        self.direction_reduction = _check.choice(
            operation, "direction_reduction", direction_reduction, F.DIRECTION_REDUCTIONS
        )
        if negative_slope is None:
            negative_slope = 1.0 if self.variant == "paper" else 0.1
        self.negative_slope = _check.number(operation, "negative_slope", negative_slope, 0.0, 1.0)
        self.selection = _check.choice(operation, "selection", selection, SELECTIONS)
        self.fusion = _check.flag(operation, "fusion", fusion)
        self.calibration = _check.choice(operation, "calibration", calibration, ablations.CALIBRATIONS)
        self.alignment = _check.choice(operation, "alignment", alignment, ablations.ALIGNMENTS)
        self.relevance_k = _check.count(operation, "relevance_k", relevance_k)
        self.words = _check.choice(operation, "words", words, ablations.WORDS)
        self.word_ratio = _check.number(operation, "word_ratio", word_ratio, 0.0, 1.0, open_low=True)
        self.max_words = _check.count(operation, "max_words", max_words)
        self.attention_weight = _check.number(operation, "attention_weight", attention_weight, 0.0, 1.0)
        self.selection_score = _check.choice(operation, "score", score, F.SCORES)
        self.sampling = _check.choice(operation, "sampling", sampling, F.SAMPLINGS)
        self.temperature = _check.number(operation, "temperature", temperature, 0.0, open_low=True)
        self.chunk = None if chunk is None else _check.count(operation, "chunk", chunk)
        self.backend = _check_backend(operation, backend)

        ablations.check_backend(operation, self._switches, self.backend)

        num_tokens = self.num_tokens
        if num_tokens < 1 and self.calibration != "none":
            raise LapsValueError(
                _check.message(
                    operation,
                    "num_patches * aggregation_ratio * selection_ratio leaves no aggregated token",
                    "N_c >= 1",
                    f"int({num_patches} * {aggregation_ratio} * {selection_ratio}) = {num_tokens}",
                )
            )
        # A network that is not used would have no gradient, which DDP refuses.
        if self.calibration == "aggregation":
            self.aggregation = PatchCalibration(self.embed_dim, num_tokens, fusion=fusion, backend=backend)
        scored = self.variant == "paper" and self.selection != "none"
        self.score = PatchScore(self.embed_dim) if scored else None
        self.word_aggregation = None
        if self._switches.aggregates_words:
            slots = ablations.word_slots(self.max_words)
            self.word_aggregation = PatchCalibration(self.embed_dim, slots, backend=backend)
        self.relevance = None
        if self.alignment == "relevance":
            ways = ("word_to_patch", "patch_to_word") if self.directions == "both" else (self.directions,)
            self.relevance = nn.ModuleDict({way: ablations.RelevanceNet(self.relevance_k) for way in ways})

    @property
    def max_score(self) -> float:
        """2 for the sum of two directions, each a mean of cosines; else 1. What a relevance net adds may
        exceed it."""
        summed = (self.directions, self.direction_reduction) == ("both", "sum")
        return 2.0 if summed and self.alignment != "scan" else 1.0

    @property
    def num_tokens(self) -> int:
        """N_c, the number of aggregated tokens or clusters; 0 without calibration."""
        if self.calibration == "none":
            return 0
        # The order of this product is part of the definition: another one rounds to another N_c.
        return int(self.num_patches * self.aggregation_ratio * self.selection_ratio)

    @property
    def num_kept(self) -> int:
        """k, the number of patches kept (on average, where they are sampled without a budget)."""
        return (
            self.num_patches
            if self.selection == "none"
            else math.ceil(self.num_patches * self.selection_ratio)
        )

    @overload
    def forward(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of every image with every caption.

        Args:
            image_tokens: (B_v, P + N, C), prefix tokens first, floating.
            word_tokens: (B_t, L, C), floating; rows past a caption's length may hold anything.
            word_lengths: (B_t,) integers in 1..L, on the CPU (a list will do).
            return_kept_fraction: also return the share of patches kept per pair, for
                :func:`laps.losses.ratio_loss`.

        Returns:
            Scores (B_v, B_t), images as rows, and with `return_kept_fraction` the pair (scores, kept
            fraction): float64 for float64 tokens, else float32, under autocast too.

        Raises:
            LapsValueError: a wrong number of tokens, a wrong C, and all of
            :func:`laps.functional.similarity`. LapsTypeError: a wrong dtype.
        """
        result: Tensor | tuple[Tensor, Tensor] = self._score_pairs(
            F.similarity, self._arguments(image_tokens, word_tokens, word_lengths), return_kept_fraction
        )
        return result

    @overload
    def pairwise(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def pairwise(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def pairwise(
        self,
        image_tokens: Tensor,
        word_tokens: Tensor,
        word_lengths: F.Lengths,
        *,
        return_kept_fraction: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores (B,) of image i with caption i, the diagonal of `forward`; same arguments and errors."""
        result: Tensor | tuple[Tensor, Tensor] = self._score_pairs(
            F.similarity_pairwise,
            self._arguments(image_tokens, word_tokens, word_lengths),
            return_kept_fraction,
        )
        return result

    # ---- images and captions apart: what a gallery keeps

    def options(self) -> dict[str, Any]:
        """The keyword arguments, beside the sizes, that would build this head again.

        Those of :mod:`laps.ablations` are left out where they are the default: the Rust core, which reads
        the configurations of models too, knows them not and refuses what it does not know.
        """
        options = {
            "selection_ratio": self.selection_ratio,
            "aggregation_ratio": self.aggregation_ratio,
            "variant": self.variant,
            "directions": self.directions,
            "direction_reduction": self.direction_reduction,
            "negative_slope": self.negative_slope,
            "selection": self.selection,
            "fusion": self.fusion,
            "attention_weight": self.attention_weight,
            "score": self.selection_score,
            "sampling": self.sampling,
            "temperature": self.temperature,
        }
        return options | {
            name: getattr(self, name)
            for name, usual in ABLATION_OPTIONS.items()
            if getattr(self, name) != usual
        }

    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        """Everything about images that no caption changes; see :class:`laps.features.ImageFeatures`.

        Args:
            image_tokens: (B_v, P + N, C), prefix tokens first, floating.

        Raises:
            LapsValueError: a wrong number of tokens, a wrong C. LapsTypeError: a wrong dtype.
        """
        parts = self._image_arguments(image_tokens)
        patches: Tensor = parts["patches"].detach()
        with torch.autocast(patches.device.type, enabled=False):
            patches = wide(patches)
            embedding = nn.functional.normalize(patches.mean(1), dim=-1)
            self_scores = (nn.functional.normalize(patches, dim=-1) @ embedding[..., None])[..., 0]
        return ImageFeatures(embedding=embedding, self_scores=self_scores, **parts)

    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        """Everything about captions that no image changes; see :class:`laps.features.TextFeatures`.

        Args:
            word_tokens: (B_t, L, C), floating; rows past a caption's length may hold anything.
            word_lengths: (B_t,) int64 in 1..L.
            spans: per caption its words as (first piece, past the last piece, text).

        Raises:
            LapsValueError: a wrong C, a length out of range. LapsTypeError: a wrong dtype.
        """
        word_lengths = self._check_words(word_tokens, word_lengths)
        mean = mean_of_words(wide(word_tokens.detach()), word_lengths)
        return TextFeatures(
            embedding=nn.functional.normalize(mean, dim=-1),
            lengths=word_lengths.cpu(),
            words=word_tokens,
            spans=spans,
        )

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t), float32 or float64, of what `encode_image` and `encode_text` gave."""
        scores: Tensor = self._score_pairs(F.similarity, self._feature_arguments(images, texts))
        return scores

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B,) of image i with caption i, the diagonal of `similarity`."""
        scores: Tensor = self._score_pairs(F.similarity_pairwise, self._feature_arguments(images, texts))
        return scores

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """Where the score of one image and one caption comes from; no selection is sampled.

        See :meth:`laps.heads.SimilarityHead.explain`.
        """
        ablations.refuse("explain", self._switches, ", the method's own")
        options = self._options()
        for name in ("chunk", "backend", "seed"):
            del options[name]
        given = self._feature_arguments(images, texts)
        length = int(given.pop("word_lengths")[0])
        one: dict[str, Any] = {name: None if x is None else x[0] for name, x in given.items()}
        if mask is not None:
            one["mask"] = kept_patches(self.num_patches, mask).to(one["patches"].device)
        return attribute(**one | {"words": one["words"][:length]}, **options)

    def training_scores(
        self, image_tokens: Tensor, word_tokens: Tensor, word_lengths: Tensor
    ) -> TrainingScores:
        """Scores (B_v, B_t) and, in the paper variant, the kept fraction (B_v, B_t) for the ratio loss."""
        if self.score is None:
            return TrainingScores(self(image_tokens, word_tokens, word_lengths))
        scores, kept_fraction = self(image_tokens, word_tokens, word_lengths, return_kept_fraction=True)
        return TrainingScores(scores, kept_fraction=kept_fraction)

    def keep_probability(self, image_tokens: Tensor) -> Tensor:
        """The score net's opinion alone, to log: it is known to be unstable.

        Args:
            image_tokens: (B_v, P + N, C), prefix tokens first, floating.

        Returns:
            Keep probabilities (B_v, N) in [0, 1].

        Raises:
            LapsValueError: a wrong number of tokens, a wrong C, or a head without a score net.
            LapsTypeError: a wrong dtype.
        """
        if self.score is None:
            raise LapsValueError(
                _check.message(
                    "LAPSHead.keep_probability",
                    "variant has no score net",
                    'variant="paper" and a selection',
                    f"variant={self.variant!r}, selection={self.selection!r}",
                )
            )
        return self._keep_prob(self._split(image_tokens)[1])

    def extra_repr(self) -> str:
        names = ["embed_dim", "num_patches", "selection_ratio", "aggregation_ratio", "variant"]
        names += ["num_prefix_tokens", "directions", "direction_reduction", "negative_slope", "selection"]
        if self.score is not None:
            names += ["attention_weight", "sampling", "temperature"]
        options = [f"{name}={getattr(self, name)!r}" for name in names]
        rare: list[tuple[str, object, object]] = [("score", self.selection_score, "cosine")]
        rare += [("chunk", self.chunk, None), ("backend", self.backend, None)]
        rare += [(name, getattr(self, name), usual) for name, usual in ABLATION_OPTIONS.items()]
        return ", ".join(options + [f"{name}={value!r}" for name, value, usual in rare if value != usual])

    def _keep_prob(self, patches: Tensor) -> Tensor:
        assert self.score is not None
        keep_prob: Tensor = self.score(patches)
        return keep_prob

    def _arguments(self, image_tokens: Tensor, words: Tensor, word_lengths: F.Lengths) -> dict[str, Any]:
        """What `forward` and `pairwise` pass on alike."""
        images = self._image_arguments(image_tokens)
        if images["prefix"] is not None and not self._switches.any:
            # As they came: of two parts, the gradient would be put together in a copy.
            images |= {"patches": image_tokens, "prefix": self.num_prefix_tokens}
        return images | {"words": words, "word_lengths": self._check_words(words, word_lengths)}

    def _score_pairs(
        self, function: Callable[..., Any], arguments: dict[str, Any], return_kept_fraction: bool = False
    ) -> Any:
        """What a function of :mod:`laps.functional` gives, or :mod:`laps.ablations` in its place."""
        switches, arguments = self._switches, arguments | self._options()
        if not switches.any:
            return function(**arguments, return_kept_fraction=return_kept_fraction)
        scores, kept_fraction = ablations.similarity(
            arguments.pop("patches"),
            **arguments,
            switches=switches,
            word_logits=self._word_logits(arguments["words"], arguments["word_lengths"]),
            relevance=None if self.relevance is None else dict(self.relevance.items()),
            pairwise=function is F.similarity_pairwise,
        )
        return (scores, kept_fraction) if return_kept_fraction else scores

    @property
    def _switches(self) -> ablations.Switches:
        return ablations.Switches(
            self.calibration, self.alignment, self.words, self.word_ratio, self.num_tokens
        )

    def _word_logits(self, words: Tensor, lengths: Tensor) -> Tensor | None:
        """Logits (B_t, L, slots) of the words, or None if they are not aggregated."""
        if self.word_aggregation is None:
            return None
        # What stands at padding may be anything, and NaN times a gradient of zero is NaN.
        real = torch.arange(words.shape[1], device=words.device) < lengths.to(words.device)[:, None]
        words = words.masked_fill(~real[..., None], 0).to(self.word_aggregation.fc1.weight.dtype)
        return self.word_aggregation.logits(words)

    def _check_words(self, words: Tensor, word_lengths: F.Lengths) -> Tensor:
        """The lengths as a tensor, after both were checked under the names that the caller knows."""
        self._check_tokens("word_tokens", words, "B_t L C")
        captions, longest, _ = words.shape
        return _check.word_lengths(
            "LAPSHead",
            word_lengths,
            captions,
            longest,
            words.device,
            words="word_tokens",
            patches="image_tokens",
        )

    def _image_arguments(self, image_tokens: Tensor) -> dict[str, Any]:
        """The arguments of `functional.similarity` that images alone decide."""
        prefix, patches = self._split(image_tokens)
        return {
            "patches": patches,
            "prefix": prefix,
            "logits": self._logits(image_tokens),
            "keep_prob": None if self.score is None else self._keep_prob(patches),
        }

    def _logits(self, image_tokens: Tensor) -> Tensor | None:
        if self.calibration != "aggregation":
            return None
        # Of all tokens, prefix too: LayerNorm would copy the patches alone, forward and backward.
        return self.aggregation.logits(image_tokens)[:, self.num_prefix_tokens :]

    def _feature_arguments(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Any]:
        return {
            "patches": images.patches,
            "prefix": images.prefix,
            "logits": images.logits,
            "keep_prob": images.keep_prob,
            "words": texts.words,
            "word_lengths": texts.lengths,
        }

    def _options(self) -> dict[str, Any]:
        """The other arguments; draws the seed."""
        sampled = self.score is not None and self.training
        return {
            "selection_ratio": 1.0 if self.selection == "none" else self.selection_ratio,
            # A tensor and not a number: torch.compile would break the graph, and recompile for every seed.
            "seed": torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if sampled else None,
            "directions": self.directions,
            "direction_reduction": self.direction_reduction,
            "negative_slope": self.negative_slope,
            "fusion": self.fusion,
            "language_context": self.selection == "text",
            "attention_weight": self.attention_weight,
            "score": self.selection_score,
            "sampling": self.sampling,
            "temperature": self.temperature,
            "chunk": self.chunk,
            "backend": self.backend,
        }

    def _split(self, image_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """Prefix tokens (B_v, P, C), or None where P = 0, and patches (B_v, N, C)."""
        operation, p, n = "LAPSHead", self.num_prefix_tokens, self.num_patches
        self._check_tokens("image_tokens", image_tokens, "B_v P+N C")
        if image_tokens.shape[1] != p + n:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"image_tokens has {image_tokens.shape[1]} tokens per image",
                    f"{p} prefix tokens + {n} patches = {p + n}",
                )
            )
        weight = self._weight
        if weight is not None and image_tokens.dtype != weight.dtype and not _autocast(image_tokens):
            raise LapsTypeError(
                _check.message(
                    operation,
                    f"image_tokens has dtype {_check.name_of(image_tokens.dtype)}, "
                    f"but the head has dtype {_check.name_of(weight.dtype)}",
                    "equal, or torch.autocast",
                )
            )
        if p == 0:
            return None, image_tokens
        # One split and not two slices: its gradient is one concatenation.
        prefix, patches = image_tokens.split([p, n], dim=1)  # type: ignore[no-untyped-call]
        return prefix, patches

    @property
    def _weight(self) -> Tensor | None:
        """A parameter, for its dtype and device; None if this head has none."""
        if self.calibration == "aggregation":
            return self.aggregation.fc1.weight
        network = self.score or self.word_aggregation
        return None if network is None else network.fc1.weight

    def _check_tokens(self, name: str, tokens: Tensor, dims: str) -> None:
        """What both kinds of tokens must be beside this head, by the names that its caller knows."""
        operation, weight = "LAPSHead", self._weight
        if not isinstance(tokens, Tensor):
            raise LapsTypeError(
                _check.message(operation, f"{name} is no tensor", "torch.Tensor", _check.name_of(tokens))
            )
        _check.dense(operation, name, tokens)
        _check.Sizes(operation).match(name, tokens, dims)
        if tokens.shape[2] != self.embed_dim:
            raise LapsValueError(
                _check.message(operation, f"{name} has C={tokens.shape[2]}", f"embed_dim={self.embed_dim}")
            )
        if weight is not None and tokens.device != weight.device:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{name} is on {tokens.device}, but the head is on {weight.device}",
                    "the same device",
                )
            )
        _check.common_dtype(operation, {"the head": weight, name: tokens})
        _check.fake_tensors(operation, {name: tokens, "the head": weight})


def _autocast(tensor: Tensor) -> bool:
    """Whether autocast will bring this tensor and the weights to one dtype."""
    device = tensor.device.type
    return (
        tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def _check_backend(operation: str, backend: str | None) -> str | None:
    return None if backend is None else _check.choice(operation, "backend", backend, F.BACKENDS)
