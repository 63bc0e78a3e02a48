"""LAPS for all image x text pairs in batched PyTorch: the backend for any device that knows float64.

It uses the identities of the method's description: logits once per image (1), softmax denominators that
cancel (2), P = V W^T and token lengths from G = V V^T in place of the tokens themselves (3), the maximum
before the leaky ReLU (4). Gradients are autograd's. Arguments are taken as valid: :mod:`laps.functional`
checks them and casts half precision to float32.

Sizes: b images, t captions, N patches, P prefix tokens, N_c aggregated tokens, M tokens, L words, C channels.
Captions have a leading size s besides: 1 where all images share them, b where image i has its own text i
only; both broadcast against b.

Where precision is at stake. Selection is computed in float64, so that float32 input selects as float64 input
does. Tokens whose length G cannot tell are computed again, in float64 (`_repair`). Patches enter P and G
scaled by the image's largest entry, which no score depends on, so nothing overflows. What is not finite
becomes zero on the way in and NaN on the way out (`_score`), so it spoils neither scores nor gradients of
other pairs.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

EPS = 1e-6  # floor of the stable weights, and clamp of the probabilities
ZERO = 1e-12  # a vector shorter than this, or a sum shorter than this share of its terms, counts as zero
CANCELLED = 1e-2  # where |sum_i e_i v_i|^2 is below this share of (sum_i e_i |v_i|)^2, G gives too few digits
UNDERFLOWED = 1e-12  # where sum_i e_i |v_i| is below this share of the largest entry, e has too few digits
SCRATCH = 64 * 2**20  # bytes

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Options:
    """The options of :func:`laps.functional.similarity` that are not batches of something."""

    selection_ratio: float = 1.0
    seed: int | Tensor | None = None
    directions: str = "both"
    direction_reduction: str = "sum"
    negative_slope: float = 0.1
    fusion: bool = True
    language_context: bool = True
    attention_weight: float = 0.8
    score: str = "cosine"
    sampling: str = "gumbel"
    temperature: float = 1.0


class Images(NamedTuple):
    """What depends on the image alone, for b images."""

    position: Tensor  # (b, 1), key of the noise
    finite: Tensor  # (b, 1)
    patches: Tensor  # (b, N, C), raw
    scaled: Tensor  # (b, N, C), in units of the image's largest entry
    norms: Tensor  # (b, N, 1) of the scaled patches, no gradient
    prefix: Tensor  # (b, P, C), normalised
    logits: Tensor  # (b, N_c, N)
    keep_prob: Tensor | None  # (b, N)
    probes: Tensor  # (b, N, C) float64, what the text is compared with for selection
    self_scores: Tensor  # (b, N) float64


class Captions(NamedTuple):
    """What depends on the caption alone, for t captions."""

    position: Tensor  # (s, t), key of the noise
    finite: Tensor  # (s, t)
    real: Tensor  # (s, t, L), False at padding
    lengths: Tensor  # (s, t)
    units: Tensor  # (s, t, L, C), normalised words, zeros at padding
    text: Tensor  # (s, t, C) float64, what the probes are compared with


def _full_precision(function: FunctionT) -> FunctionT:
    """Keep autocast out: float32 means float32 here."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return cast(FunctionT, wrapper)


def _traced(x: Tensor) -> bool:
    """Whether there are no values to look at, as in torch.compile: no branch or shape may depend on them."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


# ---- all pairs


@_full_precision
def similarity(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (B_v, B_t); arguments as in :func:`laps.functional.similarity`."""
    given, budget = Options(**options), _budget(chunk, patches)
    image_step, caption_step = _chunk_sizes(patches, words, logits, prefix, budget)
    rows = []
    for i in range(0, len(patches), image_step):
        own = slice(i, i + image_step)
        images = _images(own, patches, prefix, logits, keep_prob, given.score)
        row = []
        for t in range(0, len(words), caption_step):
            texts = slice(t, t + caption_step)
            captions = _captions(words[None, texts], word_lengths[None, texts], t, given.score)
            row.append(_score(images, captions, None if mask is None else mask[own, texts], given, budget))
        rows.append([torch.cat(part, dim=1) for part in zip(*row, strict=True)])
    scores, kept_fraction = (torch.cat(part) for part in zip(*rows, strict=True))
    return scores, kept_fraction


@_full_precision
def similarity_pairwise(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (B,) of image i with text i; mask (B, N)."""
    given, budget = Options(**options), _budget(chunk, patches)
    step, _ = _chunk_sizes(patches, words, logits, prefix, budget, pairwise=True)
    parts = []
    for i in range(0, len(patches), step):
        own = slice(i, i + step)
        images = _images(own, patches, prefix, logits, keep_prob, given.score)
        captions = _captions(words[own, None], word_lengths[own, None], i, given.score)
        parts.append(_score(images, captions, None if mask is None else mask[own, None], given, budget))
    scores, kept_fraction = (torch.cat(part).squeeze(1) for part in zip(*parts, strict=True))
    return scores, kept_fraction


def _score(
    images: Images, captions: Captions, mask: Tensor | None, options: Options, budget: int
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (b, t) of one chunk, whose mask is (b, t, N)."""
    finite = images.finite & captions.finite
    if mask is not None and mask.is_floating_point():
        mask_finite = mask.isfinite().all(-1)
        finite, mask = finite & mask_finite, torch.where(mask_finite[..., None], mask, 0.0)
    scores = _selection_scores(images.probes, images.self_scores, captions.text, images.keep_prob, options)
    decision = _decide(scores, images, captions, options) if mask is None else mask
    cosines, counts = _cosines(images, captions, decision, scores, options, budget)
    result = _reduce(cosines, counts, captions, options)
    kept_fraction = decision.to(result.dtype).mean(-1)
    return torch.where(finite, result, math.nan), torch.where(finite, kept_fraction, math.nan)


def _budget(chunk: int | None, x: Tensor) -> int:
    """Bytes of scratch memory; a traced graph grows with every chunk, so there must be a reason for them."""
    if chunk is None:
        return sys.maxsize if _traced(x) else SCRATCH
    return chunk


def _chunk_sizes(
    patches: Tensor, words: Tensor, logits: Tensor, prefix: Tensor | None, budget: int, pairwise: bool = False
) -> tuple[int, int]:
    """How many images and captions at a time keep scratch memory below `budget` bytes.

    Half of it is for the tensors counted here, which are alive together; half is for `_repair`.
    """
    (images, n, c), (captions, length, _) = patches.shape, words.shape
    aggregated, size = logits.shape[-1], patches.element_size()
    tokens = aggregated + 1 + (0 if prefix is None else prefix.shape[1])
    image = n * c * (16 + 5 * size) + n * (n + 3 * aggregated) * size
    caption = length * c * (16 + 5 * size)
    pair = (3 * aggregated * n + 2 * n * length + 5 * tokens * length) * size + 80 * n
    if _traced(patches):
        pair += 32 * tokens * (n + c)
    if pairwise:
        step = max(1, budget // 2 // (image + caption + pair))
        return step, step
    return _fit(images, captions, image, caption, pair, budget // 2)


def _fit(images: int, captions: int, image: int, caption: int, pair: int, budget: int) -> tuple[int, int]:
    """Halve the larger of the two numbers until the bytes for each image, caption and pair fit."""
    while images * captions > 1 and images * image + captions * caption + images * captions * pair > budget:
        if images >= captions:
            images = (images + 1) // 2
        else:
            captions = (captions + 1) // 2
    return images, captions


# ---- one side only


def _polar(x: Tensor, smallest: Tensor | float = ZERO) -> tuple[Tensor, Tensor]:
    """x / |x| (..., C) and |x| (..., 1); both are zero, without gradient, where |x| <= smallest."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    scaled = x / largest.clamp(min=torch.finfo(x.dtype).tiny)  # its squares cannot overflow
    squares = scaled.square().sum(-1, keepdim=True)
    zero = largest * squares.detach().sqrt() <= smallest
    root = torch.where(zero, 1.0, squares).sqrt()
    return torch.where(zero, 0.0, scaled / root), torch.where(zero, 0.0, largest * root)


def _direction_of_sum(vectors: Tensor, lengths: Tensor) -> Tensor:
    """l2(sum_i v_i) (..., C) of vectors (..., n, C); zero where they cancel but for rounding."""
    return _polar(vectors.sum(-2), ZERO * lengths.sum(-2))[0]


def _images(
    own: slice, patches: Tensor, prefix: Tensor | None, logits: Tensor, keep_prob: Tensor | None, score: str
) -> Images:
    """Cut images out of the batch and prepare them."""
    patches, logits = patches[own], logits[own]
    prefix = patches[:, :0] if prefix is None else prefix[own]
    keep_prob = None if keep_prob is None else keep_prob[own]
    given = [patches, logits, prefix] if keep_prob is None else [patches, logits, prefix, keep_prob]
    finite = torch.stack([x.isfinite().flatten(1).all(1) for x in given]).all(0)[:, None]
    patches, logits, prefix = (torch.where(finite[..., None], x, 0.0) for x in (patches, logits, prefix))
    largest = patches.detach().abs().amax((1, 2), keepdim=True)
    scaled = patches / largest.clamp(min=torch.finfo(patches.dtype).tiny)
    probes, self_scores = _probes(patches, score)
    return Images(
        position=torch.arange(own.start, own.start + len(patches), device=patches.device)[:, None],
        finite=finite,
        patches=patches,
        scaled=scaled,
        norms=scaled.detach().norm(dim=-1, keepdim=True),
        prefix=_polar(prefix)[0],
        logits=logits.mT,
        keep_prob=None if keep_prob is None else torch.where(finite, keep_prob, 0.0),
        probes=probes,
        self_scores=self_scores,
    )


def _probes(patches: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """The vectors (b, N, C) that texts are compared with, and self scores a (b, N); float64, no gradient."""
    wide = patches.detach().double()
    if score == "dot":
        probes, mean = wide, wide.mean(1) / wide.shape[-1]
    else:
        probes, lengths = _polar(wide)
        mean = _direction_of_sum(wide, lengths)
    return probes, (probes @ mean[..., None]).squeeze(-1)


def _captions(words: Tensor, lengths: Tensor, first: int, score: str) -> Captions:
    """Prepare words (s, t, L, C) with lengths (s, t), numbered from `first`."""
    words, real, lengths, finite = _real_words(words, lengths)
    wide = words.detach().double()
    if score == "dot":
        text = wide.sum(2) / (lengths[..., None] * wide.shape[-1])
    else:
        text = _direction_of_sum(wide, _polar(wide)[1])
    position = first + torch.arange(lengths.numel(), device=words.device).view_as(lengths)
    return Captions(position, finite, real, lengths, _polar(words)[0], text)


def _real_words(words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is real in words (..., L, C) with lengths (...).

    Returns:
        The words, zero at padding and in captions that are not finite; which words are real (..., L); the
        lengths, at least 1; which captions are finite (...): not those with an impossible length.
    """
    if lengths.device.type == "cpu" and not _traced(lengths):
        words = words[..., : int(lengths.max()), :]
    lengths, longest = lengths.to(words.device), words.shape[-2]
    real = torch.arange(longest, device=words.device) < lengths[..., None]
    finite = (words.isfinite().all(-1) | ~real).all(-1) & (lengths >= 1) & (lengths <= longest)
    words = torch.where((real & finite[..., None])[..., None], words, 0.0)
    return words, real, lengths.clamp(min=1), finite


# ---- selection (LPS)


def _selection_scores(
    probes: Tensor, self_scores: Tensor, text: Tensor, keep_prob: Tensor | None, options: Options
) -> Tensor:
    """s (b, t, N), float64, with gradient to keep_prob (b, N) only."""
    a = self_scores[:, None].expand(-1, text.shape[1], -1)
    b = _products(text[:, :, None], probes).squeeze(2) if options.language_context else None
    if keep_prob is None:
        return a if b is None else a + b
    context = _min_max(a) if b is None else (_min_max(a) + _min_max(b)) / 2
    beta = options.attention_weight
    return (1 - beta) * keep_prob.double()[:, None] + beta * context


def _min_max(x: Tensor) -> Tensor:
    """x (..., N) scaled to [0, 1]; zeros where it is constant."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / torch.where(high > low, high - low, 1.0)


def _decide(scores: Tensor, images: Images, captions: Captions, options: Options) -> Tensor:
    """D (b, t, N): bool in the hard form, floating with its straight-through gradient in the stable form."""
    num_patches = scores.shape[-1]
    k = math.ceil(num_patches * options.selection_ratio)
    if images.keep_prob is None:
        return _top(scores, k)
    clamped = scores.clamp(EPS, 1 - EPS)
    z = clamped.log() - (1 - clamped).log()
    if options.seed is None:
        hard = _top(scores, k)
    else:
        z = z + logistic_noise(options.seed, images.position, captions.position, num_patches)
        hard = _top(z, k) if options.sampling == "topk" else z > 0
    soft = torch.sigmoid(z / options.temperature)
    return (hard + (soft - soft.detach())).to(images.patches.dtype)


def _top(values: Tensor, k: int) -> Tensor:
    """Whether a value is among the k highest of its row; ties go to the lower index."""
    values = values.detach().masked_fill(values == 0, 0.0)  # a radix sort may tell -0.0 from 0.0
    highest = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, highest, True)


def logistic_noise(seed: int | Tensor, image: Tensor, caption: Tensor, num_patches: int) -> Tensor:
    """Logistic noise (b, t, N), float64, that depends on nothing but (seed, image, caption, patch).

    Args:
        seed: an integer, taken modulo 2^64, or an int64 tensor ().
        image: (b, 1) int64, positions in the batch.
        caption: (s, t) int64.
        num_patches: N.
    """
    golden = _signed(0x9E3779B97F4A7C15)
    patch = torch.arange(num_patches, device=image.device)
    start = seed.to(image.device) if isinstance(seed, Tensor) else torch.full_like(image, _signed(seed))
    state = _mix(start + golden)
    for key in (image, caption):
        state = _mix(state + (key + 1) * golden)
    state = _mix(state[..., None] + (patch + 1) * golden)
    uniform = (_shift_right(state, 11).double() + 0.5) * 2.0**-53
    return uniform.log() - torch.log1p(-uniform)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose sums and products wrap as those of uint64 do."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """The logical shift; `>>` on int64 repeats the sign."""
    return torch.bitwise_and(z >> bits, 2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


# ---- calibration (SPC): tokens as weights over patches


def _aggregation_weights(logits: Tensor, decision: Tensor) -> Tensor:
    """Weights (..., N) of aggregated tokens from logits and decision (..., N), up to a factor per token.

    The maximum of the stable form is part of the formula (eps is measured by it) and carries gradient.
    """
    if decision.dtype == torch.bool:
        highest = torch.where(decision, logits.detach(), -math.inf).amax(-1, keepdim=True)
        return torch.where(decision, logits - highest, -math.inf).exp()
    return (logits - logits.max(-1, keepdim=True).values).exp() * decision + EPS / logits.shape[-1]


def _fusion_weights(scores: Tensor, decision: Tensor) -> Tensor:
    """Weights (..., N) of the fused token, up to a factor; zeros where nothing is dropped."""
    dropped = decision != 1
    highest = torch.where(dropped, scores.detach(), -math.inf).amax(-1, keepdim=True)
    if decision.dtype == torch.bool:
        return torch.where(dropped, scores - highest, -math.inf).exp()
    # A kept patch may score far above; its weight is 0, but e^s is the gradient of that and must stay finite.
    return (scores - highest).clamp(max=60).exp() * (1 - decision)


def _tokens(weights: Tensor, patches: Tensor) -> Tensor:
    """l2(sum_i w_i v_i) (b, r, C) for weights (b, r, N) and patches (b, N, C), computed in float64."""
    weights, wide = weights.double(), patches.double()
    reach = weights.detach() @ _polar(wide.detach())[1]
    return _polar(weights @ wide, ZERO * reach)[0].to(patches.dtype)


# ---- alignment (SPA)


def _products(words: Tensor, vectors: Tensor) -> Tensor:
    """w_j . v_i (b, t, L, K) for words (s, t, L, C) and vectors (b, K, C)."""
    s, t, length, c = words.shape
    flat = words.reshape(t * length, c) if s == 1 else words.reshape(s, t * length, c)
    return (flat @ vectors.mT).reshape(len(vectors), t, length, vectors.shape[1])


def _token_products(tokens: Tensor, words: Tensor) -> Tensor:
    """u_m . w_j (b, t, M, L) for tokens (b, t, M, C) and words (s, t, L, C)."""
    if len(words) == 1:
        return torch.einsum("btmc,tlc->btml", tokens, words[0])
    return tokens @ words.mT


def _cosines(
    images: Images, captions: Captions, decision: Tensor, scores: Tensor, options: Options, budget: int
) -> tuple[Tensor, Tensor]:
    """u_m . w_j (b, t, M, L) for all tokens, prefix first and fused last; each pair's number of tokens."""
    all_kept = (decision == 1).all(-1)
    fuse = options.fusion and (_traced(all_kept) or not bool(all_kept.all()))
    parts = [_products(captions.units, images.prefix).mT]
    if _traced(all_kept):  # the tokens themselves, for which shapes need not depend on values
        weights = _aggregation_weights(images.logits.double()[:, None], decision[:, :, None])
        if fuse:
            weights = torch.cat([weights, _fusion_weights(scores, decision)[:, :, None]], dim=2)
        tokens = _tokens(weights.flatten(1, 2), images.patches).reshape(*weights.shape[:3], -1)
        parts.append(_token_products(tokens, captions.units))
    else:
        align = _GramAlignment(images, captions, budget)
        parts.append(align.aggregated(decision))
        if fuse:
            parts.append(align.fused(decision, scores))
    cosines = torch.cat(parts, dim=2)
    counts = torch.full_like(all_kept, cosines.shape[2], dtype=torch.int64)
    return cosines, counts - all_kept.long() if fuse else counts


class _GramAlignment:
    """u_m . w_j = (sum_i e_i P_ij) / sqrt(e^T G e) for tokens with weights e over patches (identity 3)."""

    def __init__(self, images: Images, captions: Captions, budget: int) -> None:
        self.images, self.captions, self.budget = images, captions, budget
        self.products = _products(captions.units, images.scaled).mT  # P (b, t, N, L)
        self.gram = images.scaled @ images.scaled.mT  # G (b, N, N)

    def aggregated(self, decision: Tensor) -> Tensor:
        """(b, t, N_c, L) of the aggregated tokens."""
        logits = self.images.logits
        highest = logits.max(-1, keepdim=True).values
        if decision.dtype == torch.bool:
            highest = highest.detach()  # any constant would do here
        exponentials = (logits - highest).exp()  # once per image
        weights = exponentials[:, None] * decision[:, :, None]
        if decision.dtype != torch.bool:
            weights = weights + EPS / logits.shape[-1]

        def exact(i: int, chosen: Tensor, rows: Tensor) -> Tensor:
            return _aggregation_weights(logits[i].double()[rows], decision[i, chosen][:, None])

        return self._align(weights, exact)

    def fused(self, decision: Tensor, scores: Tensor) -> Tensor:
        """(b, t, 1, L) of the fused token."""
        weights = _fusion_weights(scores, decision)[:, :, None]
        return self._align(weights.to(self.gram.dtype), lambda i, chosen, rows: weights[i, chosen])

    def _align(self, weights: Tensor, exact: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """(b, t, m, L) of m tokens given by e (b, t, m, N); `exact` as in `_repair`."""
        flat = weights.flatten(1, 2)
        square = ((flat @ self.gram) * flat).sum(-1).view(weights.shape[:3])
        reach = (flat.detach() @ self.images.norms).view(weights.shape[:3])  # if all patches were aligned
        doubtful = (square.detach() < CANCELLED * reach.square()) | (reach < UNDERFLOWED)
        length = torch.where(doubtful, 1.0, square).sqrt()
        return self._repair((weights @ self.products) / length[..., None], doubtful, exact)

    def _repair(
        self, cosines: Tensor, doubtful: Tensor, exact: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Replace the doubtful rows (b, t, m) of cosines (b, t, m, L): their tokens are computed in float64.

        `exact` gives the weights (q, r, N), in float64, of the tokens `rows` (q, r) of image i before the
        captions `chosen` (q,).
        """
        patches, units = self.images.patches, self.captions.units
        _, n, c = patches.shape
        places, repaired = [], []
        for i in doubtful.flatten(1).any(1).nonzero().flatten().tolist():
            counts = doubtful[i].sum(-1)
            most = int(counts.max())  # captions with fewer doubtful tokens get sound ones repaired as well
            scratch = 32 * most * (n + c) + 2 * units[0, 0].numel() * units.element_size()  # per caption
            step = max(1, self.budget // 2 // scratch)
            for chosen in torch.split(counts.nonzero().flatten(), step):
                rows = doubtful[i, chosen].int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
                weights = exact(i, chosen, rows)
                tokens = _tokens(weights.flatten(0, 1)[None], patches[i : i + 1]).reshape(*rows.shape, c)
                words = units[0 if len(units) == 1 else i, chosen]
                repaired.append((tokens @ words.mT).flatten(0, 1))
                place = torch.full_like(rows, i), chosen[:, None].expand_as(rows), rows
                places.append(torch.stack(place).flatten(1))
        return cosines.index_put(tuple(torch.cat(places, dim=1)), torch.cat(repaired)) if places else cosines


def _reduce(cosines: Tensor, counts: Tensor, captions: Captions, options: Options) -> Tensor:
    """Scores (b, t) from u_m . w_j (b, t, M, L), where each pair has the first counts (b, t) of M tokens."""
    result = torch.zeros_like(cosines[..., 0, 0])
    existing = torch.arange(cosines.shape[2], device=cosines.device) < counts[..., None]
    if options.directions in ("both", "word_to_patch"):
        best = cosines.masked_fill(~existing[..., None], -math.inf).max(2).values
        best = F.leaky_relu(best, options.negative_slope)
        result = result + torch.where(captions.real, best, 0.0).sum(-1) / captions.lengths
    if options.directions in ("both", "patch_to_word"):
        best = cosines.masked_fill(~captions.real[:, :, None], -math.inf).max(3).values
        best = F.leaky_relu(best, options.negative_slope)
        result = result + torch.where(existing, best, 0.0).sum(-1) / counts
    halve = options.directions == "both" and options.direction_reduction == "mean"
    return result / 2 if halve else result


# ---- the stages alone


@_full_precision
def selection_scores(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    *,
    keep_prob: Tensor | None = None,
    language_context: bool = True,
    attention_weight: float = 0.8,
    score: str = "cosine",
) -> Tensor:
    """s (B_v, B_t, N), with gradient to keep_prob (B_v, N) only; NaN for pairs that are not finite."""
    options = Options(language_context=language_context, attention_weight=attention_weight, score=score)
    return _stage_scores(patches, words, word_lengths, keep_prob, options).to(patches.dtype)


@_full_precision
def select_patches(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    selection_ratio: float,
    *,
    language_context: bool = True,
    score: str = "cosine",
) -> Tensor:
    """The k patches that each pair keeps (B_v, B_t, k) int64, ascending."""
    options = Options(language_context=language_context, score=score)
    k = math.ceil(patches.shape[1] * selection_ratio)
    kept = _top(_stage_scores(patches, words, word_lengths, None, options), k)
    return kept.int().sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _stage_scores(
    patches: Tensor, words: Tensor, word_lengths: Tensor, keep_prob: Tensor | None, options: Options
) -> Tensor:
    """s (B_v, B_t, N), float64."""
    captions = _captions(words[None], word_lengths[None], 0, options.score)
    scores = _selection_scores(*_probes(patches, options.score), captions.text, keep_prob, options)
    return torch.where(captions.finite[..., None], scores, math.nan)


@_full_precision
def calibrate_patches(
    patches: Tensor,
    logits: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    prefix: Tensor | None = None,
    fusion: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokens (B_v, B_t, M, C), normalised, and each pair's number of tokens (B_v, B_t) int64.

    Differentiable in every floating argument: mask D (B_v, B_t, N), bool for the hard form, floating for the
    stable form; scores s (B_v, B_t, N). The fused token comes last. Pairs that drop nothing do not count it:
    they have zeros there, or M is one less if no pair drops anything (not under torch.compile).
    """
    all_kept = (mask == 1).all(-1)
    fuse = fusion and (_traced(all_kept) or not bool(all_kept.all()))
    rows = []
    for i in range(len(patches)):
        weights = _aggregation_weights(logits[i].double().mT, mask[i, :, None])
        if fuse:
            weights = torch.cat([weights, _fusion_weights(scores[i].double(), mask[i])[:, None]], dim=1)
        rows.append(_tokens(weights.flatten(0, 1)[None], patches[i : i + 1]).reshape(*weights.shape[:2], -1))
    tokens = torch.stack(rows)
    if prefix is not None:
        tokens = torch.cat([_polar(prefix)[0][:, None].expand(-1, mask.shape[1], -1, -1), tokens], dim=2)
    counts = torch.full_like(all_kept, tokens.shape[2], dtype=torch.int64)
    return tokens, counts - all_kept.long() if fuse else counts


@_full_precision
def align_patches_words(
    tokens: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    *,
    token_counts: Tensor | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Scores (B_v, B_t) and A (B_v, B_t, M, L), zero at padding, of tokens (B_v, B_t, M, C) with words.

    token_counts (B_v, B_t) says how many of the M tokens exist, the first ones; None for all.
    """
    options = Options(
        directions=directions, direction_reduction=direction_reduction, negative_slope=negative_slope
    )
    captions = _captions(words[None], word_lengths[None], 0, options.score)
    cosines = _token_products(_polar(tokens)[0], captions.units)
    if token_counts is None:
        token_counts = torch.full_like(cosines[..., 0, 0], cosines.shape[2], dtype=torch.int64)
    token_counts = token_counts.to(cosines.device)
    scores = torch.where(captions.finite, _reduce(cosines, token_counts, captions, options), math.nan)
    existing = torch.arange(cosines.shape[2], device=cosines.device) < token_counts[..., None]
    shown = existing[..., None] & captions.real[:, :, None]
    alignment = torch.where(shown, F.leaky_relu(cosines, negative_slope), 0.0)
    return scores, F.pad(alignment, (0, words.shape[1] - alignment.shape[-1]))


@_full_precision
def max_sim(patches: Tensor, words: Tensor, word_lengths: Tensor, *, chunk: int | None = None) -> Tensor:
    """S (B_v, B_t) = sum_j max_i v_i . w_j over the real words, vectors as they are; NaN if not finite."""
    (images, n, c), (captions, length, _), size = patches.shape, words.shape, patches.element_size()
    budget = _budget(chunk, patches)
    image, caption, pair = 3 * n * c * size, 3 * length * c * size, 3 * n * length * size
    image_step, caption_step = _fit(images, captions, image, caption, pair, budget)
    rows = []
    for own in torch.split(patches, image_step):
        own_finite = own.isfinite().flatten(1).all(1)[:, None]
        own = torch.where(own_finite[..., None], own, 0.0)
        row = []
        for t in range(0, captions, caption_step):
            texts = slice(t, t + caption_step)
            own_words, real, _, finite = _real_words(words[texts], word_lengths[texts])
            best = _products(own_words[None], own).max(-1).values
            row.append(torch.where(own_finite & finite, torch.where(real, best, 0.0).sum(-1), math.nan))
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
