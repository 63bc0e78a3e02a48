"""LAPS for all image x text pairs in batched PyTorch: the backend for any device that knows float64.

It uses the identities of the method's description: logits once per image (1), softmax denominators that
cancel (2), P = V W^T and token lengths from G = V V^T in place of the tokens themselves (3), the maximum
before the leaky ReLU (4). Gradients are autograd's. Arguments are taken as valid: :mod:`laps.functional`
checks them and casts half precision to float32.

Sizes: b images, t captions, N patches, P prefix tokens, N_c aggregated tokens, M tokens, L words, C channels.
Captions have a leading size s besides: 1 where all images share them, b where image i has its own text i
only; both broadcast against b.

Where precision is at stake. Patches are scaled by a power of two that brings the image's largest entry near
1: no score depends on it, nothing overflows, no digit is lost. Products with the text are formed in the dtype
of the input, selection scores then in float64. Tokens whose length has lost digits, where opposed patches
cancel or weights underflow, are computed again, in float64 (`_repair`). Not so when traced (torch.compile),
for no shape may depend on values then: such tokens keep the error of the form e^T G e there, and a token is
zero once its patches cancel, or its kept logits lie below the image's highest, as far as the dtype can tell.
What is not finite becomes zero on the way in and NaN on the way out (`_score`), so it spoils neither scores
nor gradients of other pairs. A matrix product may round each of its rows differently, so equal patches take
the selection scores of the first of them (`_twins`), or noise would break their ties.
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

from . import _check

EPS = 1e-6  # floor of the stable weights, and clamp of the probabilities
ZERO = 1e-12  # a vector shorter than this, or a sum shorter than this share of its terms, counts as zero
# Where e^T G e is below this share of (sum_i e_i |v_i|)^2, it has too few digits; where it is at least half
# of sum_i (e_i |v_i|)^2, as for many patches in all directions, little cancels and a tenth will do.
CANCELLED = {torch.float32: 1e-2, torch.float64: 1e-6}
UNDERFLOWED = 1e-12  # where sum_i e_i |v_i| is below this, of patches scaled to about 1, e has too few digits
CONSTANT = 16  # epsilons of its largest value: what a row of scores must spread to count as more than noise
SCRATCH = 48 * 2**20  # bytes
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio

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


class Rows(NamedTuple):
    """The patches of b images as sums and scores of all kinds need them."""

    finite: Tensor  # (b, 1)
    scaled: Tensor  # (b, N, C), times a power of two that brings the image's largest entry near 1
    norms: Tensor  # (b, N) float64 of the scaled patches, no gradient
    self_scores: Tensor  # (b, N) float64, no gradient
    text_factors: Tensor  # (b, N) float64, what makes a text score of the product with a text's direction
    twins: Tensor  # (b, N) int64, the first patch of the image that is equal to this one


class Images(NamedTuple):
    """What depends on the image alone, for b images.

    In the stable form the mean of the patches counts as one more patch, N' = N + 1, whose weight is eps.
    """

    position: Tensor  # (b, 1), key of the noise
    finite: Tensor  # (b, 1)
    rows: Rows
    patches: Tensor  # (b, N', C), scaled
    norms: Tensor  # (b, N'), no gradient
    gram: Tensor  # G (b, N', N')
    exponentials: Tensor  # e^{l - max l} (b, N_c, N')
    logits: Tensor  # (b, N_c, N)
    prefix: Tensor  # (b, P, C), normalised
    keep_prob: Tensor | None  # (b, N)


class Captions(NamedTuple):
    """What depends on the caption alone, for t captions."""

    position: Tensor  # (s, t), key of the noise
    finite: Tensor  # (s, t)
    real: Tensor  # (s, t, L), False at padding
    lengths: Tensor  # (s, t)
    units: Tensor  # (s, t, L, C), normalised words, zeros at padding
    packed: Tensor  # (s, W, C), of `units` those at `places`
    places: Tensor | None  # (W,) among the t L; None for all
    direction: Tensor  # (s, t, C) float64, of the mean word, no gradient
    size: Tensor  # (s, t) float64, what a product with the direction counts


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
    patches = _saturated(patches, torch.finfo(patches.dtype).max)
    given, budget = Options(**options), _budget(chunk, patches)
    image_step, caption_step = _chunk_sizes(patches, words, logits, prefix, budget)
    batches = _split(image_step, patches, logits, prefix, keep_prob, mask)
    stable, columns = _stable(keep_prob, mask), []
    for t, (own_words, own_lengths) in _split(caption_step, words, word_lengths):
        captions = _captions(own_words[None], own_lengths[None], t, given.score)
        texts, column = slice(t, t + caption_step), []
        for i, (*features, own_mask) in batches:
            images = _images(i, given.score, stable, *features)
            own_mask = None if own_mask is None else own_mask[:, texts]
            column.append(_score(images, captions, own_mask, given, budget))
        columns.append([torch.cat(part) for part in zip(*column, strict=True)])
    scores, kept_fraction = (torch.cat(part, dim=1) for part in zip(*columns, strict=True))
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
    patches = _saturated(patches, torch.finfo(patches.dtype).max)
    given, budget = Options(**options), _budget(chunk, patches)
    step, _ = _chunk_sizes(patches, words, logits, prefix, budget, pairwise=True)
    batches = _split(step, patches, logits, prefix, keep_prob, mask, words, word_lengths)
    stable, parts = _stable(keep_prob, mask), []
    for i, (*features, own_mask, own_words, own_lengths) in batches:
        images = _images(i, given.score, stable, *features)
        captions = _captions(own_words[:, None], own_lengths[:, None], i, given.score)
        parts.append(_score(images, captions, None if own_mask is None else own_mask[:, None], given, budget))
    scores, kept_fraction = (torch.cat(part).squeeze(1) for part in zip(*parts, strict=True))
    return scores, kept_fraction


def _split(step: int, *batches: Any) -> list[tuple[int, tuple[Any, ...]]]:
    """Tensors, or None, in parts of `step`, each with its position; slices would cost more backward."""
    count = len(batches[0])
    starts = range(0, count, step)
    parts = [[None] * len(starts) if x is None else torch.split(x, step) for x in batches]
    return list(zip(starts, zip(*parts, strict=True), strict=True))


def _score(
    images: Images, captions: Captions, mask: Tensor | None, options: Options, budget: int
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (b, t) of one chunk, whose mask is (b, t, N)."""
    finite = images.finite & captions.finite
    if mask is not None and mask.is_floating_point():
        mask_finite = mask.isfinite().all(-1)
        finite, mask = finite & mask_finite, torch.where(mask_finite[..., None], mask, 0.0)
    scores = _selection_scores(images.rows, captions, images.keep_prob, options)
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


def _stable(keep_prob: Tensor | None, mask: Tensor | None) -> bool:
    """Whether aggregated tokens take the stable form."""
    return keep_prob is not None or (mask is not None and mask.is_floating_point())


def _chunk_sizes(
    patches: Tensor, words: Tensor, logits: Tensor, prefix: Tensor | None, budget: int, pairwise: bool = False
) -> tuple[int, int]:
    """How many images and captions at a time keep scratch memory below `budget` bytes.

    Three quarters of it are for the tensors counted here, which are alive together; one is for `_repair`.
    Captions come first: the more of them, the fewer times images are prepared.
    """
    (images, n, c), (captions, length, _) = patches.shape, words.shape
    aggregated, size = logits.shape[-1], patches.element_size()
    tokens = aggregated + 1 + (0 if prefix is None else prefix.shape[1])
    image = n * c * (16 + 3 * size) + n * (n + 3 * aggregated) * size
    caption = length * c * 4 * size
    pair = (3 * aggregated * n + 2 * n * length + 5 * tokens * length + 3 * c) * size + 80 * n
    available = budget // 4 * 3
    if pairwise:
        step = max(1, available // (image + caption + pair + 8 * length * c))
        return step, step
    most = min((available - image) // (caption + pair), available // (caption + 8 * length * c))
    caption_step = _even(captions, most)
    return _even(images, (available - caption_step * caption) // (image + caption_step * pair)), caption_step


def _even(count: int, most: int) -> int:
    """The size of equal parts of `count`, none above `most` unless that is below 1."""
    return math.ceil(count / math.ceil(count / max(1, most)))


def _fit(images: int, captions: int, image: int, caption: int, pair: int, budget: int) -> tuple[int, int]:
    """Halve the larger of the two numbers until the bytes for each image, caption and pair fit."""
    while images * captions > 1 and images * image + captions * caption + images * captions * pair > budget:
        if images >= captions:
            images = (images + 1) // 2
        else:
            captions = (captions + 1) // 2
    return images, captions


def _saturated(x: Tensor, limit: float) -> Tensor:
    """x, whose gradient is kept within +-limit (not when traced, where no token is computed again).

    A zero patch that all but takes the weight of a token has a gradient as large as its weight is larger than
    that of the others, which no float32 may hold; infinities would become NaN in the network behind.
    """
    if _traced(x) or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(functools.partial(torch.clamp, min=-limit, max=limit))  # type: ignore[no-untyped-call]
    return x


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
    first: int,
    score: str,
    stable: bool,
    patches: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
) -> Images:
    """Prepare images numbered from `first`."""
    rows, logits = _rows(patches, score), logits.mT.contiguous()  # for the layout of what comes of them
    prefix = patches[:, :0] if prefix is None else prefix
    given = [logits, prefix] if keep_prob is None else [logits, prefix, keep_prob]
    finite = torch.cat([rows.finite, *(x.isfinite().flatten(1).all(1, keepdim=True) for x in given)], dim=1)
    finite = finite.all(1, keepdim=True)
    logits, prefix = (_zero_unless(finite[..., None], x) for x in (logits, prefix))

    highest = logits.max(-1, keepdim=True).values
    # The stable form measures eps by it; in the hard form any constant would do.
    exponentials = (logits - (highest if stable else highest.detach())).exp()
    own_patches, norms = rows.scaled, rows.norms.to(patches.dtype)
    if stable:
        mean = own_patches.mean(1, keepdim=True)
        own_patches = torch.cat([own_patches, mean], dim=1)
        norms = torch.cat([norms, mean.detach().norm(dim=-1)], dim=1)
        exponentials = F.pad(exponentials, (0, 1), value=EPS)
    return Images(
        position=torch.arange(first, first + len(patches), device=patches.device)[:, None],
        finite=finite,
        rows=rows,
        patches=own_patches,
        norms=norms,
        gram=own_patches @ own_patches.mT,
        exponentials=exponentials,
        logits=logits,
        prefix=_polar(prefix)[0],
        keep_prob=None if keep_prob is None else _zero_unless(finite, keep_prob),
    )


def _zero_unless(finite: Tensor, x: Tensor) -> Tensor:
    """x where `finite`, which broadcasts against it, else 0."""
    if not _traced(finite) and bool(finite.all()):
        return x
    return torch.where(finite, x, 0.0)


def _rows(patches: Tensor, score: str) -> Rows:
    """Scale the patches (b, N, C) and compute their norms and self scores."""
    plain = patches.detach()
    largest = torch.maximum(plain.amax((1, 2), keepdim=True), -plain.amin((1, 2), keepdim=True))
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 1.0).clamp(min=torch.finfo(patches.dtype).tiny)
    scale = 4 * torch.frexp(largest).mantissa / largest  # exactly 2^e, and never subnormal
    scaled = _zero_unless(finite, patches) * scale
    twins = _twins(scaled.detach())
    wide = scaled.detach().double()
    norms = wide.norm(dim=-1)
    if score == "dot":
        mean = wide.mean(1) / (scale.double().square().squeeze(1) * wide.shape[-1])
        factors = torch.ones_like(norms)
        text_factors = factors / scale.double().squeeze(2)
    else:
        mean = _direction_of_sum(wide, norms[..., None])
        factors = text_factors = torch.where(norms > 0, 1 / norms, 0.0)
    self_scores = ((wide @ mean[..., None]).squeeze(-1) * factors).gather(1, twins)
    return Rows(finite.squeeze(2), scaled, norms, self_scores, text_factors, twins)


def _twins(patches: Tensor) -> Tensor:
    """The first row (b, N) that is equal to each row of patches (b, N, C)."""
    bits = torch.where(patches == 0, 0.0, patches).view(torch.int32)  # 0.0 and -0.0 are equal
    # Sums of integers do not round, so equal rows have equal sums, and others have not but once in 2^33.
    factors = _mix(torch.arange(1, bits.shape[-1] + 1, device=bits.device) * _signed(GOLDEN))
    sums = (bits * factors).sum(-1)
    return (sums[:, :, None] == sums[:, None]).to(torch.uint8).argmax(-1)


def _captions(words: Tensor, lengths: Tensor, first: int, score: str) -> Captions:
    """Prepare words (s, t, L, C) with lengths (s, t), numbered from `first`."""
    words, real, lengths, finite = _real_words(words, lengths)
    units, sizes = _polar(words)
    total = words.detach().double().sum(2)
    direction, size = _polar(total, ZERO * sizes.detach().double().sum(2))
    size = size.squeeze(-1) / (lengths * words.shape[-1]) if score == "dot" else torch.ones_like(size[..., 0])
    position = first + torch.arange(lengths.numel(), device=words.device).view_as(lengths)
    packed, places = units.flatten(1, 2), None
    if len(units) == 1 and not _traced(real):
        places = real.flatten().nonzero().squeeze(1)
        packed = packed.index_select(1, places)
    return Captions(position, finite, real, lengths, units, packed, places, direction, size)


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


def _selection_scores(rows: Rows, captions: Captions, keep_prob: Tensor | None, options: Options) -> Tensor:
    """s (b, t, N), float64, with gradient to keep_prob (b, N) only."""
    a = rows.self_scores[:, None].expand(-1, captions.lengths.shape[1], -1)
    b = None
    if options.language_context:
        patches = rows.scaled.detach()
        directions = captions.direction.to(patches.dtype).expand(len(patches), -1, -1)
        products = torch.bmm(directions, patches.mT).double()
        b = products * rows.text_factors[:, None] * captions.size[..., None]
        b = b.gather(2, rows.twins[:, None].expand_as(b))
    if keep_prob is None:
        return a if b is None else a + b
    noise = CONSTANT * torch.finfo(rows.scaled.dtype).eps
    context = _min_max(a, noise) if b is None else (_min_max(a, noise) + _min_max(b, noise)) / 2
    beta = options.attention_weight
    return (1 - beta) * keep_prob.double()[:, None] + beta * context


def _min_max(x: Tensor, noise: float) -> Tensor:
    """x (..., N) scaled to [0, 1]; zeros where it is constant but for `noise`, as a share of its largest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    spread = high - low
    constant = spread <= noise * torch.maximum(high, -low)
    return torch.where(constant, 0.0, (x - low) / torch.where(constant, 1.0, spread))


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
    return (hard + (soft - soft.detach())).to(images.logits.dtype)


def _top(values: Tensor, k: int) -> Tensor:
    """Whether a value is among the k highest of its row; ties go to the lower index."""
    values = values.detach()
    lowest = values.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = values > lowest, values == lowest
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def logistic_noise(seed: int | Tensor, image: Tensor, caption: Tensor, num_patches: int) -> Tensor:
    """Logistic noise (b, t, N), float64, that depends on nothing but (seed, image, caption, patch).

    Args:
        seed: an integer, taken modulo 2^64, or an int64 tensor ().
        image: (b, 1) int64, positions in the batch.
        caption: (s, t) int64.
        num_patches: N.
    """
    golden = _signed(GOLDEN)
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
    """l2(sum_i w_i v_i) (r, C) for weights (r, N) and patches (N, C), float64."""
    reach = weights.detach() @ _polar(patches.detach())[1]
    # What no float64 holds in full is zero as well.
    return _polar(weights @ patches, (ZERO * reach).clamp(min=torch.finfo(torch.float64).tiny))[0]


def _wide(patches: Tensor) -> Tensor:
    """The patches in float64, for tokens whose weights reach beyond the range of float32."""
    # A sixteenth leaves room for sums over the few tokens and chunks that saturate at once.
    return _saturated(patches.double(), torch.finfo(patches.dtype).max / 16)


# ---- alignment (SPA)


def _products(captions: Captions, vectors: Tensor) -> Tensor:
    """w_j . v_i (b, t, L, K) of the normalised words with vectors (b, K, C); padding is not multiplied."""
    (_, t, length, _), (b, k, _) = captions.units.shape, vectors.shape
    products = torch.bmm(captions.packed.expand(b, -1, -1), vectors.mT)
    if captions.places is not None:
        products = products.new_zeros(b, t * length, k).index_copy(1, captions.places, products)
    return products.view(b, t, length, k)


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
    vectors = torch.cat([images.patches, images.prefix], dim=1)
    sizes = [images.patches.shape[1], images.prefix.shape[1]]
    products, prefix = torch.split(_products(captions, vectors), sizes, dim=-1)
    parts = [prefix.mT, _aggregated(images, captions, products, decision, budget)]
    if fuse:
        parts.append(_fused(images, captions, decision, scores, options, budget))
    cosines = torch.cat(parts, dim=2)
    counts = torch.full_like(all_kept, cosines.shape[2], dtype=torch.int64)
    return cosines, counts - all_kept.long() if fuse else counts


def _squares(weights: Tensor, gram: Tensor) -> Tensor:
    """e^T G e (b, r) for e (b, r, N) and symmetric G (b, N, N)."""
    if not torch.compiler.is_compiling() and _check.differentiated_otherwise():
        return (torch.bmm(weights, gram) * weights).sum(-1)
    squares: Tensor = _Squares.apply(weights, gram)[0]  # type: ignore[no-untyped-call]
    return squares


class _Squares(torch.autograd.Function):
    """The squares at half of autograd's cost; a backward pass only, as the compiler wants it."""

    @staticmethod
    def forward(weights: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.bmm(weights, gram)
        return torch.linalg.vecdot(sums, weights), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        weights, gram, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # for gradients of gradients
            sums = torch.bmm(weights, gram)
        gradient = gradient[..., None]
        return 2 * gradient * sums, torch.bmm(weights.mT, gradient * weights)


def _aggregated(
    images: Images, captions: Captions, products: Tensor, decision: Tensor, budget: int
) -> Tensor:
    """u_m . w_j (b, t, N_c, L) of the aggregated tokens: (sum_i e_i P_ij) / sqrt(e^T G e) (identity 3).

    products: P^T (b, t, L, N').
    """
    (b, t, n), (_, aggregated, padded), dtype = decision.shape, images.exponentials.shape, images.logits.dtype
    chosen = F.pad(decision.to(dtype), (0, padded - n), value=1.0)  # the mean, where there is one
    weights = images.exponentials[:, None] * chosen[:, :, None]
    square = _squares(weights.flatten(1, 2), images.gram).view(b, t, aggregated)
    sums = torch.bmm(weights.flatten(0, 1), products.flatten(0, 1).mT).view(b, t, aggregated, -1)

    terms = (images.exponentials.detach() * images.norms[:, None]).mT
    most = torch.bmm(chosen.detach(), terms).square()  # the square if all patches were aligned,
    least = torch.bmm(chosen.detach().square(), terms.square())  # and if they were orthogonal
    floor, found = CANCELLED[dtype], square.detach()
    doubtful = (found < floor * most) & ((found < 0.5 * least) | (found < 0.1 * floor * most))
    underflowed = most < UNDERFLOWED**2
    doubtful = doubtful | underflowed
    unknown = (found <= torch.finfo(dtype).eps * most) | underflowed if _traced(found) else doubtful
    inverse = torch.where(unknown, 0.0, torch.where(unknown, 1.0, square).sqrt().reciprocal())

    def exact(i: int, texts: Tensor, tokens: Tensor) -> Tensor:
        return _aggregation_weights(images.logits[i].double()[tokens], decision[i, texts][:, None])

    return _repair(sums * inverse[..., None], doubtful, exact, images, captions, budget)


def _fused(
    images: Images, captions: Captions, decision: Tensor, scores: Tensor, options: Options, budget: int
) -> Tensor:
    """u_m . w_j (b, t, 1, L) of the fused token, from the token itself."""
    patches, norms = images.rows.scaled, images.rows.norms[..., None]
    weights = _fusion_weights(scores, decision).to(patches.dtype)
    tokens = torch.bmm(weights, patches)
    square = tokens.square().sum(-1, keepdim=True)
    found, most = square.detach(), torch.bmm(weights.detach(), norms.to(patches.dtype)).square()
    # Cancellation takes only the root of what it takes of e^T G e.
    underflowed = (most < UNDERFLOWED**2) & (decision != 1).any(-1, keepdim=True)
    doubtful = (found < 0.1 * CANCELLED[patches.dtype] * most) | underflowed
    unknown = (found <= torch.finfo(patches.dtype).eps ** 2 * most) | underflowed
    unknown = unknown if _traced(found) else unknown | doubtful
    tokens = tokens * torch.where(unknown, 0.0, torch.where(unknown, 1.0, square).sqrt().reciprocal())

    def exact(i: int, texts: Tensor, tokens: Tensor) -> Tensor:
        # What cancels amplifies errors of the weights too, so the scores are computed again as well.
        rows = Rows(*(x[i : i + 1] for x in images.rows))
        rows = rows._replace(scaled=rows.scaled.detach().double())
        text = 0 if len(captions.units) == 1 else i
        own = captions._replace(
            lengths=captions.lengths[text, texts][None],
            direction=captions.direction[text, texts][None],
            size=captions.size[text, texts][None],
        )
        keep_prob = None if images.keep_prob is None else images.keep_prob[i : i + 1]
        again = _selection_scores(rows, own, keep_prob, options)[0]
        return _fusion_weights(again, decision[i, texts])[:, None]

    cosines = _token_products(tokens[:, :, None], captions.units)
    return _repair(cosines, doubtful, exact, images, captions, budget)


def _repair(
    cosines: Tensor,
    doubtful: Tensor,
    exact: Callable[[int, Tensor, Tensor], Tensor],
    images: Images,
    captions: Captions,
    budget: int,
) -> Tensor:
    """Replace the doubtful rows (b, t, m) of cosines (b, t, m, L): their tokens are computed in float64.

    `exact` gives the weights (q, r, N), in float64, of the tokens `rows` (q, r) of image i before the
    captions `texts` (q,).
    """
    if _traced(doubtful) or not bool(doubtful.any()):
        return cosines
    patches, units = images.rows.scaled, captions.units
    _, n, c = patches.shape
    places, repaired = [], []
    for i in doubtful.flatten(1).any(1).nonzero().flatten().tolist():
        wide, counts = _wide(patches[i]), doubtful[i].sum(-1)
        most = int(counts.max())  # captions with fewer doubtful tokens get sound ones repaired as well
        scratch = 32 * most * (n + c) + 2 * units[0, 0].numel() * units.element_size()  # per caption
        step = max(1, budget // 4 // scratch)
        for texts in torch.split(counts.nonzero().flatten(), step):
            rows = doubtful[i, texts].int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
            weights = exact(i, texts, rows)
            tokens = _tokens(weights.flatten(0, 1), wide).to(units.dtype).reshape(*rows.shape, c)
            words = units[0 if len(units) == 1 else i, texts]
            repaired.append((tokens @ words.mT).flatten(0, 1))
            place = torch.full_like(rows, i), texts[:, None].expand_as(rows), rows
            places.append(torch.stack(place).flatten(1))
    return cosines.index_put(tuple(torch.cat(places, dim=1)), torch.cat(repaired))


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
    rows = _rows(patches, options.score)
    scores = _selection_scores(rows, captions, keep_prob, options)
    return torch.where((rows.finite & captions.finite)[..., None], scores, math.nan)


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
    they have zeros there, or M is one less if no pair drops anything (not under torch.compile). Pairs that
    are not finite have NaN for all tokens.
    """
    all_kept = (mask == 1).all(-1)
    fuse = fusion and (_traced(all_kept) or not bool(all_kept.all()))
    prefix = patches[:, :0] if prefix is None else prefix
    own = (x.isfinite().flatten(1).all(1, keepdim=True) for x in (patches, logits, prefix))
    finite = torch.cat(list(own), dim=1).all(1, keepdim=True)
    patches, logits, prefix = (_zero_unless(finite[..., None], x) for x in (patches, logits, prefix))
    finite = finite & scores.isfinite().all(-1) & mask.isfinite().all(-1)
    scores = _zero_unless(finite[..., None], scores)
    mask = _zero_unless(finite[..., None], mask) if mask.is_floating_point() else mask
    rows = []
    for i in range(len(patches)):
        weights = _aggregation_weights(logits[i].double().mT, mask[i, :, None])
        if fuse:
            weights = torch.cat([weights, _fusion_weights(scores[i].double(), mask[i])[:, None]], dim=1)
        tokens = _tokens(weights.double().flatten(0, 1), _wide(patches[i]))
        rows.append(tokens.to(patches.dtype).reshape(*weights.shape[:2], -1))
    directions = _polar(prefix)[0][:, None].expand(-1, mask.shape[1], -1, -1)
    tokens = torch.cat([directions, torch.stack(rows)], dim=2)
    tokens = torch.where(finite[..., None, None], tokens, math.nan)
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


class Stages(NamedTuple):
    """What happens between images and captions on the way to their scores; float64."""

    self_scores: Tensor  # a (b, N)
    text_scores: Tensor | None  # b (b, t, N); None where the text takes no part
    scores: Tensor  # s (b, t, N)
    decision: Tensor  # D (b, t, N), bool
    # Of each token made of patches, the fused one last; rows sum to 1, or are zeros where there is no token.
    weights: Tensor  # (b, t, N_c + 1, N)
    tokens: Tensor  # (b, t, P + N_c + 1, C), normalised, prefix first, the fused one last
    lengths: Tensor  # (b, t, N_c + 1), of sum_i weights_i v_i


@_full_precision
def stages(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Stages:
    """The steps of `similarity`, for explanations: nothing is spared, and no gradient is kept.

    A pair that drops no patch, and every pair without `fusion`, has zeros for its fused token. The features
    must be finite, and the mask (b, t, N), of the patches to keep instead, is bool.
    """
    given = Options(**options)
    with torch.no_grad():
        images = _images(0, given.score, keep_prob is not None, patches, logits, prefix, keep_prob)
        captions = _captions(words[None], word_lengths[None], 0, given.score)
        own = images.rows.self_scores
        of_text = None
        if given.language_context:
            of_text = _selection_scores(images.rows, captions, None, given) - own[:, None]
        scores = _selection_scores(images.rows, captions, images.keep_prob, given)
        decision = _decide(scores, images, captions, given) if mask is None else mask
        if keep_prob is not None:
            # The form of the weights in which the paper variant's decisions have gradients.
            decision = decision.double()
        decision = decision if decision.dtype == torch.bool else decision.double()
        weights = _aggregation_weights(images.logits.double()[:, None], decision[:, :, None])
        fused = _fusion_weights(scores, decision) * given.fusion
        weights = torch.cat([weights, fused.nan_to_num()[:, :, None]], dim=2)
        weights = F.normalize(weights, p=1, dim=-1)
        sums = weights @ patches.double()[:, None]
        reach = weights @ _polar(patches.double())[1][:, None]
        tokens, lengths = _polar(sums, (ZERO * reach).clamp(min=torch.finfo(torch.float64).tiny))
        directions = images.prefix.double()[:, None].expand(-1, tokens.shape[1], -1, -1)
        tokens = torch.cat([directions, tokens], dim=2)
    return Stages(own, of_text, scores, decision == 1, weights, tokens, lengths.squeeze(-1))


@_full_precision
def max_sim(patches: Tensor, words: Tensor, word_lengths: Tensor, *, chunk: int | None = None) -> Tensor:
    """S (B_v, B_t) = sum_j max_i v_i . w_j over the real words, vectors as they are.

    NaN for pairs that are not finite, or whose score is not: an overflow must not be the highest score.
    """
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
            best = (own_words.flatten(0, 1) @ own.mT).max(-1).values.view(len(own), len(own_words), -1)
            score = torch.where(real, best, 0.0).sum(-1)
            row.append(torch.where(own_finite & finite & score.isfinite(), score, math.nan))
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
