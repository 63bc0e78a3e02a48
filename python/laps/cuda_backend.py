"""The fused similarity on NVIDIA GPUs: what is prepared in torch, and the launches of the kernels in between.

What depends on the image or the caption alone, and the large products, are torch's (cuBLAS); what happens per
pair is one kernel (`src/cuda/kernels`), which writes nothing pair-sized but the result. The layouts of the
tables that the two share stand in ``kernels/call.cuh``. All scratch memory is torch's, all work goes to the
current stream, and nothing waits for the device.

Sizes: b images with N patches and P prefix tokens, t captions, L words, C channels, N_c aggregated tokens. An
image has rows: its patches, their mean in the stable form, its prefix tokens; zeros pad them to `stride`.

Limits, which the CPU does not have. A token that only patches with logits more than 37 below the best dropped
patch would form has a score, but no gradient. Where the dropped patches cancel each other to 1e-4 of their
lengths and less, the fused token has the digits of float32 scores: about 1e-5 there, 1e-3 at 1e-6.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _cuda, _laps
from ._check import message
from .errors import LapsValueError
from .torch_backend import _even

__all__ = ["ELEMENTS", "Options", "backward", "forward"]

ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = 1e-6  # floor of the stable weights
NOISE = 1e-12  # a sum shorter than this share of its terms is rounding noise, not a direction
CONSTANT = 16  # epsilons of its largest value: what a row of scores must spread to count as more than noise
SCRATCH = 2**30  # bytes
SCRATCH_BACKWARD = 192 * 2**20
MOST_IMAGES = 2**15  # of a launch: blocks of a grid's second dimension

TOP, GUMBEL, PERTURBED, MASK, SOFT_MASK, SAVED = range(6)


@dataclass(frozen=True)
class Options:
    """The options of :func:`laps.functional.similarity` that are not tensors."""

    selection_ratio: float
    directions: str = "both"
    direction_reduction: str = "sum"
    negative_slope: float = 0.1
    fusion: bool = True
    language_context: bool = True
    attention_weight: float = 0.8
    score: str = "cosine"
    sampling: str = "gumbel"
    temperature: float = 1.0
    chunk: int | None = None
    pairwise: bool = False
    num_prefix_tokens: int = 0


@dataclass
class Inputs:
    """The tensors of a call, as the operators take them."""

    patches: Tensor  # (B_v, N, C), or with leading prefix tokens
    words: Tensor  # (B_t, L, C)
    word_lengths: Tensor  # (B_t,) int64
    logits: Tensor  # (B_v, N, N_c)
    prefix: Tensor | None  # (B_v, P, C)
    keep_prob: Tensor | None  # (B_v, N)
    mask: Tensor | None  # (B_v, B_t, N), or (B, N)
    seed: int | None

    @property
    def soft(self) -> bool:
        """Whether weights are of the stable form."""
        return self.keep_prob is not None or self.soft_mask

    @property
    def soft_mask(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point()


@dataclass
class Images:
    """What depends on the image alone."""

    first: int
    finite: Tensor  # (b,)
    scale: Tensor  # (b, 1, 1), a power of two that brings the largest patch entry near 1
    rows: Tensor  # (b, stride, C) of the element type
    norms: Tensor  # (b, stride) float32; of the mean, the mean of the patches' lengths
    prefix_inverse: Tensor  # (b, P, 1), 0 for a zero token
    self_scores: Tensor  # (b, N)
    text_factor: Tensor  # (b, N)
    logits: Tensor  # (b, N, N_c) float32
    exponentials: Tensor  # (b, N_c, N) float32: E
    weights: Tensor  # (b, slots, pitch): tokens over rows
    gram: Tensor  # (b, stride, pitch)
    keep_prob: Tensor | None  # (b, N) float32
    num_prefix: int

    @property
    def num_patches(self) -> int:
        return self.self_scores.shape[1]


@dataclass
class Texts:
    """What depends on the caption alone, for all captions."""

    words: Tensor  # (W, C) of the element type, times a power of two per caption; packed, or padded
    scale: Tensor  # (W, 1), that power of two
    inverse: Tensor  # (W,) 1 / |word|, 0 for a zero word
    first: Tensor  # (t,) int64 on the device: the first of each caption's words
    count: Tensor  # (t,) int64 on the device
    finite: Tensor  # (t,)
    direction: Tensor  # (k, t, C): parts that sum to the direction of the mean word
    size: Tensor | None  # (t,), what products with it count for; None for 1
    starts: list[int]  # where each caption's words begin, and where the last one's end
    places: Tensor | None  # (W,) of (t * L); None where words are padded
    length: int  # L of the padded form


def forward(inputs: Inputs, options: Options, outputs: tuple[Tensor, ...]) -> None:
    """Write scores, kept fraction, selection, best token, best word: the operator's; empty ones are not
    wanted."""
    where = _where(inputs)
    if inputs.soft_mask:
        inputs, where = _widened(inputs)
    texts = _prepare_texts(inputs, options)
    for images, parts in _chunks(inputs, options, texts, backward=False):
        for part in parts:
            products, text_products = _products(images, texts, part, options)
            mode = _mode(inputs, options)
            launch = _launch(inputs, options, images, texts, part, products, text_products, outputs, mode)
            _laps.cuda_forward(*where, launch)
            # Before the next part is made: torch hands its memory out again in the order of the stream.
            del products, text_products, launch
        del images


def backward(
    inputs: Inputs,
    options: Options,
    saved: tuple[Tensor, Tensor, Tensor],
    grad_scores: Tensor,
    grad_fraction: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of patches, words, logits, prefix, keep_prob and mask; None for what is not there."""
    grad_scores = grad_scores.float().contiguous()
    grad_fraction = grad_fraction.float().contiguous() if grad_fraction is not None and inputs.soft else None
    given, (inputs, where) = inputs, _widened(inputs)
    texts = _prepare_texts(inputs, options)
    d_words = torch.zeros(texts.words.shape, dtype=torch.float32, device=texts.words.device)
    poisoned_texts = torch.zeros(len(texts.count), dtype=torch.bool, device=texts.words.device)
    d_mask = None
    if inputs.mask is not None and inputs.soft_mask:
        d_mask = torch.zeros(inputs.mask.shape, dtype=torch.float32, device=inputs.mask.device)
    mode = MASK if inputs.mask is not None and not inputs.soft_mask else SAVED
    mode = SOFT_MASK if inputs.soft_mask else mode
    outputs = (grad_scores, grad_scores, *saved)
    gradients: list[_ImageGradients] = []
    for images, parts in _chunks(inputs, options, texts, backward=True):
        sums: _Sums | None = None
        # The largest part first: its launch adds up in as many places as any.
        for part in parts:
            products, text_products = _products(images, texts, part, options)
            launch = _launch(inputs, options, images, texts, part, products, text_products, outputs, mode)
            if sums is None:
                warps = _laps.cuda_warps_per_image(where[0], where[2], launch)
                sums = _Sums.zeros(images, warps, keep=inputs.keep_prob is not None)
            tokens = products.new_empty(
                (launch.images, 1 if options.pairwise else launch.texts, *launch.token_shape)
            )
            gradient = _cuda.Gradient(
                grad_scores=grad_scores,
                grad_fraction=grad_fraction,
                # Between padded words there are rows that no pair writes.
                grad_products=(torch.empty_like if texts.places is not None else torch.zeros_like)(products),
                tokens=tokens,
                shrunk_tokens=torch.empty_like(tokens),
                grad_weights=sums.weights,
                grad_keep=sums.keep,
                grad_mask=None if d_mask is None or launch.mask is None else torch.empty_like(launch.mask),
                poisoned_images=sums.poisoned,
                poisoned_texts=poisoned_texts[part],
                warps_per_image=warps,
            )
            _laps.cuda_backward(*where, launch, gradient)
            sums.add(launch, gradient, images, d_words[launch.word_offset :][: launch.word_rows])
            if d_mask is not None and gradient.grad_mask is not None:
                own = slice(images.first, images.first + launch.images)
                d_mask[own if options.pairwise else (own, part)] = gradient.grad_mask
            # As in `forward`.
            del products, text_products, launch, tokens, gradient
        assert sums is not None
        gradients.append(sums.finish(images, inputs))
        del images, sums
    d_patches = torch.cat([part[0] for part in gradients])
    d_logits = torch.cat([part[1] for part in gradients])
    d_prefix, d_keep = (_joined([part[i] for part in gradients]) for i in (2, 3))
    d_words = _through_words(d_words, texts, inputs, poisoned_texts)

    def like(gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if gradient is None or other is None else gradient.to(other.dtype)

    if options.num_prefix_tokens and d_prefix is not None:
        d_patches, d_prefix = torch.cat([d_prefix, d_patches], dim=1), None
    return (
        like(d_patches, given.patches),
        like(d_words, given.words),
        like(d_logits, given.logits),
        like(d_prefix, given.prefix),
        like(d_keep, given.keep_prob),
        like(d_mask, given.mask),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


# ---- one side only


def _power(largest: Tensor) -> Tensor:
    """The power of two that brings values of at most `largest` (finite, > 0) to [2, 4); never subnormal."""
    largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
    return 4 * torch.frexp(largest).mantissa / largest


def _direction(total: Tensor, reach: Tensor) -> Tensor:
    """The direction of a sum of vectors (..., C) whose lengths sum to `reach` (..., 1); zero where they
    cancel."""
    length = total.norm(dim=-1, keepdim=True)
    direction = total / length.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(length > NOISE * reach, direction, 0.0)


def _prepare_images(
    first: int,
    patches: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    soft: bool,
    options: Options,
) -> Images:
    element, p = patches.dtype, options.num_prefix_tokens
    if p:
        prefix, patches = patches[:, :p], patches[:, p:]
    elif prefix is None:
        prefix = patches[:, :0]
    p, (b, n, c), aggregated = prefix.shape[1], patches.shape, logits.shape[2]
    wide, logits, prefix = patches.float(), logits.float().contiguous(), prefix.float()
    keep_prob = None if keep_prob is None else keep_prob.float().contiguous()
    largest = wide.abs().amax((1, 2))
    finite = largest.isfinite() & logits.isfinite().flatten(1).all(1)
    for given in (prefix, keep_prob):
        if given is not None and given.shape[1]:
            finite = finite & given.isfinite().flatten(1).all(1)
    there = finite[:, None, None]
    wide, logits, prefix = (torch.where(there, x, 0.0) for x in (wide, logits, prefix))
    scale = _power(torch.where(finite & (largest > 0), largest, 1.0))[:, None, None]
    wide = wide * scale

    lengths = wide.norm(dim=-1)
    # In float64: where patches cancel nothing must be left, not rounding noise with a direction.
    exact_mean, reach = wide.mean(1, dtype=torch.float64), lengths.mean(1, keepdim=True)
    mean = exact_mean.float()
    if options.score == "cosine":
        direction = _direction(exact_mean, reach).float()
        text_factor = torch.where(lengths > 0, 1 / lengths, 0.0)
        self_scores = (wide @ direction[..., None]).squeeze(-1) * text_factor
    else:
        text_factor = (1 / scale[..., 0]).expand(b, n).contiguous()
        self_scores = (wide @ mean[..., None]).squeeze(-1) / (scale[..., 0].square() * c)
    if keep_prob is not None:
        self_scores = _min_max(self_scores)

    stable = int(soft)
    stride = _round_up(n + stable + p, 16)
    pitch = stride if stride % 32 == 16 else stride + 16
    slots = _round_up(p + aggregated + 1, 16)
    longest = prefix.abs().amax(-1, keepdim=True)
    prefix_scale = _power(torch.where(longest > 0, longest, 1.0))
    prefix_length = (prefix * prefix_scale).norm(dim=-1, keepdim=True)
    prefix_inverse = torch.where(prefix_length > 0, prefix_scale / prefix_length, 0.0)
    rows = wide.new_zeros((b, stride, c), dtype=element)
    rows[:, :n] = wide
    norms = wide.new_zeros((b, stride))
    norms[:, :n] = lengths
    if soft:
        rows[:, n] = mean
        norms[:, n] = reach[:, 0]
    if p:
        rows[:, n + stable : n + stable + p] = prefix * prefix_scale * (prefix_inverse / prefix_scale)
        norms[:, n + stable : n + stable + p] = 1.0
    exponentials = (logits - logits.amax(1, keepdim=True)).exp().mT
    weights = wide.new_zeros((b, slots, pitch), dtype=element)
    weights[:, p : p + aggregated, :n] = exponentials
    if soft:
        weights[:, p : p + aggregated, n] = EPSILON
    for token in range(p):
        weights[:, token, n + stable + token] = 1.0
    gram = wide.new_zeros((b, stride, pitch), dtype=element)
    gram[:, :, :stride] = rows @ rows.mT
    return Images(
        first, finite, scale, rows, norms, prefix_inverse, self_scores.contiguous(), text_factor.contiguous(),
        logits, exponentials, weights, gram, keep_prob, p,
    )  # fmt: skip


def _min_max(scores: Tensor) -> Tensor:
    """Scores (b, N) scaled to [0, 1]; zeros where they are constant but for rounding."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    spread = high - low
    constant = spread <= CONSTANT * torch.finfo(scores.dtype).eps * torch.maximum(high, -low)
    return torch.where(constant, 0.0, (scores - low) / torch.where(constant, 1.0, spread))


def _prepare_texts(inputs: Inputs, options: Options) -> Texts:
    words, lengths = inputs.words, inputs.word_lengths
    (t, length, c), device = words.shape, words.device
    if _known(lengths) and words.is_cuda and torch.cuda.is_current_stream_capturing():
        raise LapsValueError(
            message(
                "similarity",
                "word_lengths is on the CPU, which a CUDA graph cannot follow",
                "word_lengths on the GPU while a graph is captured",
            )
        )
    if _known(lengths) and bool(((lengths < 1) | (lengths > length)).any()):
        # Under torch.compile nobody has looked at them yet.
        raise LapsValueError(
            message("similarity", "word_lengths is out of range", f"1 to L={length}", lengths.tolist())
        )
    counts = lengths.to(device, non_blocking=True)
    if _known(lengths) and not options.pairwise:
        places = (torch.arange(length) < lengths[:, None]).flatten().nonzero().squeeze(1)
        starts = [0, *lengths.cumsum(0).tolist()]
        owner = (places // length).to(device, non_blocking=True)
        places = places.to(device, non_blocking=True)
        packed = words.flatten(0, 1).index_select(0, places)
        first = torch.tensor(starts[:-1]).to(device, non_blocking=True)
    else:
        # Lengths on the device are not known here, and pairs take their words where they are.
        places, starts = None, [length * i for i in range(t + 1)]
        first = length * torch.arange(t, device=device)
        owner = torch.arange(t, device=device).repeat_interleave(length, output_size=t * length)
        inside = torch.arange(length, device=device) < counts[:, None]
        packed = torch.where(inside[..., None], words, 0.0).flatten(0, 1).contiguous()
    per_text = functools.partial(_per_text, counts=counts if places is not None else None, texts=t)
    wide = packed.float()
    sound = wide.isfinite().all(1)
    wide = torch.where(sound[:, None], wide, 0.0)
    finite = per_text((~sound).float(), "max") == 0
    largest = per_text(wide.abs().amax(1), "max")
    text_scale = _power(torch.where(finite & (largest > 0), largest, 1.0))
    scale = text_scale[owner, None]
    wide = torch.where(finite[owner, None], wide, 0.0) * scale
    norms = wide.norm(dim=1)
    # In float64 as the mean of patches is, some channels at a time.
    total = torch.cat([per_text(part.double(), "sum") for part in torch.split(wide, 64, dim=1)], dim=1)
    if options.score == "cosine":
        direction, size = _direction(total, per_text(norms, "sum")[:, None]).float(), None
    else:
        # Apart from the direction, which would underflow in halves.
        direction, size = total.float() / counts.clamp(min=1)[:, None], 1 / (c * text_scale)
    element = inputs.patches.dtype
    if element == torch.float32:
        parts = direction[None]
    else:
        # What rounding to halves loses of the direction, and with it of the selection, is a second part.
        high = direction.to(element)
        parts = torch.stack([high, (direction - high.float()).to(element)])
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return Texts(
        wide.to(element), scale, inverse, first, counts.long(), finite, parts, size, starts, places, length
    )


def _per_text(values: Tensor, reduction: str, *, counts: Tensor | None, texts: int) -> Tensor:
    """Reduce values (W, ...) over each text's words; without counts, words are padded.

    Not by index_add and its kin, whose order of summation, and with it the selection, would differ from run
    to run.
    """
    if counts is None:
        padded = values.view(texts, -1, *values.shape[1:])
        return padded.sum(1) if reduction == "sum" else padded.amax(1)
    return torch.segment_reduce(values, reduction, lengths=counts, axis=0, unsafe=True)


def _known(lengths: Tensor) -> bool:
    """Whether looking at the lengths is free."""
    return lengths.device.type == "cpu"


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


# ---- pairs


def _chunks(
    inputs: Inputs, options: Options, texts: Texts, *, backward: bool
) -> Iterator[tuple[Images, list[slice]]]:
    """Images a chunk at a time, each with the slices of captions that fit the scratch memory beside them."""
    budget = (SCRATCH_BACKWARD if backward else SCRATCH) if options.chunk is None else options.chunk
    (b, n, c), aggregated = inputs.patches.shape, inputs.logits.shape[2]
    p = options.num_prefix_tokens or (0 if inputs.prefix is None else inputs.prefix.shape[1])
    size = inputs.patches.element_size()
    stride, slots = _round_up(n + 1 + p, 16), _round_up(p + aggregated + 1, 16)
    word = stride * size * (2 if backward else 1)  # per image
    # Backward: its tokens twice, and its share of the partial sums where few images meet many warps.
    pair = 8 * stride + (slots * stride * (2 * size + 4) if backward else 0)
    image = stride * c * (size + (8 if backward else 4)) + (slots + stride) * (stride + 16) * size
    if backward:
        image += 4 * stride * (stride + 16 * slots)
    if options.pairwise:
        step = max(1, budget // (image + pair + texts.length * (word + c * size)))
        for first in range(0, b, step):
            own = slice(first, first + step)
            yield _images_of(inputs, options, own), [own]
        return
    average = max(1, math.ceil(texts.starts[-1] / max(1, len(texts.count))))
    # A share of the budget for the images, so that many captions meet them in a launch.
    least = image + min(len(texts.count), 16) * (average * word + pair)
    share = 2 if backward else 4
    step = min(MOST_IMAGES, _even(b, min(budget // least, budget // share // image)))
    for first in range(0, b, step):
        images = _images_of(inputs, options, slice(first, first + step))
        held = len(images.finite)
        most = (budget - held * image) // (held * (average * word + pair))
        count = _even(len(texts.count), most)
        starts = range(0, len(texts.count), count)
        yield images, [slice(t, min(t + count, len(texts.count))) for t in starts]
        del images


def _images_of(inputs: Inputs, options: Options, own: slice) -> Images:
    part = (None if x is None else x[own] for x in (inputs.logits, inputs.prefix, inputs.keep_prob))
    logits, prefix, keep_prob = part
    assert logits is not None
    return _prepare_images(own.start, inputs.patches[own], logits, prefix, keep_prob, inputs.soft, options)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of halves or floats, (..., n, m), in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        product = torch.bmm if a.dim() == 3 else torch.mm
        return product(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _products(images: Images, texts: Texts, part: slice, options: Options) -> tuple[Tensor, Tensor]:
    """P^T and the products with the directions, for the captions of `part`."""
    directions = texts.direction[:, part]
    words = texts.words[texts.starts[part.start] : texts.starts[min(part.stop, len(texts.count))]]
    if options.pairwise:
        words = words.view(len(images.finite), texts.length, -1)
        text_products = _mm(directions.transpose(0, 1).contiguous(), images.rows.mT).sum(1)
        return words @ images.rows.mT, _sized(text_products, texts, part)
    rows = images.rows.flatten(0, 1)
    text_products = _mm(directions.flatten(0, 1), rows.T)
    if len(directions) > 1:
        text_products = text_products.view(len(directions), -1, len(rows)).sum(0)
    return words @ rows.T, _sized(text_products, texts, part)


def _sized(text_products: Tensor, texts: Texts, part: slice) -> Tensor:
    return text_products if texts.size is None else text_products * texts.size[part, None]


def _mode(inputs: Inputs, options: Options) -> int:
    if inputs.mask is not None:
        return SOFT_MASK if inputs.soft_mask else MASK
    if inputs.keep_prob is None or inputs.seed is None:
        return TOP
    return PERTURBED if options.sampling == "topk" else GUMBEL


def _where(inputs: Inputs) -> tuple[int, int, str, bool]:
    """Device, stream, element type and whether TF32 is allowed, as the binding takes them."""
    element = str(inputs.patches.dtype).removeprefix("torch.")
    return *_cuda.device_and_stream(inputs.patches.device), element, _cuda.tf32_allowed()


def _widened(inputs: Inputs) -> tuple[Inputs, tuple[int, int, str, bool]]:
    """The same, with halves of float16 as float32 that may be rounded to TF32; and where it runs.

    TF32 has the digits of float16 and the range of float32, which gradients need.
    """
    where = _where(inputs)
    if inputs.patches.dtype != torch.float16:
        return inputs, where
    prefix = None if inputs.prefix is None else inputs.prefix.float()
    wide = replace(inputs, patches=inputs.patches.float(), words=inputs.words.float(), prefix=prefix)
    return wide, (where[0], where[1], "float32", True)


def _launch(
    inputs: Inputs,
    options: Options,
    images: Images,
    texts: Texts,
    part: slice,
    products: Tensor,
    text_products: Tensor,
    outputs: tuple[Tensor, ...],
    mode: int,
) -> _cuda.Launch:
    scores, fraction, selection, best_token, best_word = outputs
    stop = min(part.stop, len(texts.count))
    words = slice(texts.starts[part.start], texts.starts[stop])
    n, p = images.num_patches, images.num_prefix
    mask = None
    if inputs.mask is not None:
        own = slice(images.first, images.first + len(images.finite))
        mask = inputs.mask[own] if options.pairwise else inputs.mask[own, part]
        mask = (mask.float() if inputs.soft_mask else mask).contiguous()
    share = 0.5 if options.directions == "both" and options.direction_reduction == "mean" else 1.0
    return _cuda.Launch(
        weights=images.weights,
        gram=images.gram,
        rows=images.rows,
        norms=images.norms,
        self_scores=images.self_scores,
        text_factor=images.text_factor,
        keep_prob=images.keep_prob,
        logits=images.logits,
        image_finite=images.finite,
        words=texts.words[words],
        word_inverse=texts.inverse[words],
        first_word=texts.first[part],
        word_count=texts.count[part],
        text_finite=texts.finite[part],
        products=products,
        text_products=text_products,
        mask=mask,
        scores=scores,
        fraction=fraction,
        selection=selection if selection.numel() else None,
        best_token=best_token if best_token.numel() else None,
        best_word=best_word if best_word.numel() else None,
        word_offset=words.start,
        word_rows=words.stop - words.start,
        product_pitch=products.shape[-1],
        product_image=0 if options.pairwise else images.rows.shape[1],
        text_pitch=text_products.shape[-1],
        text_image=0 if options.pairwise else images.rows.shape[1],
        seed=0 if inputs.seed is None else inputs.seed,
        images=len(images.finite),
        texts=stop - part.start,
        first_image=images.first,
        first_text=part.start,
        result_rows=len(scores),
        columns=1 if options.pairwise else scores.shape[1],
        diagonal=options.pairwise,
        patches=n,
        stride=images.rows.shape[1],
        pitch=images.gram.shape[2],
        slots=images.weights.shape[1],
        aggregated=images.logits.shape[2],
        prefix_tokens=p,
        channels=images.rows.shape[2],
        max_words=inputs.words.shape[1],
        kept=min(n, max(1, math.ceil(n * options.selection_ratio))),
        selection_mode=mode,
        soft=inputs.soft,
        seeded=inputs.seed is not None,
        paper=inputs.keep_prob is not None,
        language_context=options.language_context,
        fusion=options.fusion,
        attention_weight=options.attention_weight,
        temperature=options.temperature,
        negative_slope=options.negative_slope,
        word_to_patch=share if options.directions != "patch_to_word" else 0.0,
        patch_to_word=share if options.directions != "word_to_patch" else 0.0,
    )


# ---- gradients

_ImageGradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class _Sums:
    """Gradients of one chunk of images, summed over the captions."""

    rows: Tensor  # (b, stride, C) float32
    gram: Tensor  # (b, stride, stride) float32: sum of h a a^T
    weights: Tensor  # (b, warps, slots, stride) float32
    keep: Tensor | None  # (b, warps, N) float32
    poisoned: Tensor  # (b,)

    @classmethod
    def zeros(cls, images: Images, warps: int, *, keep: bool) -> _Sums:
        (b, stride, c), slots, device = images.rows.shape, images.weights.shape[1], images.rows.device
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        return cls(
            zeros((b, stride, c)),
            zeros((b, stride, stride)),
            zeros((b, warps, slots, stride)),
            zeros((b, warps, images.num_patches)) if keep else None,
            torch.zeros(b, dtype=torch.bool, device=device),
        )

    def add(self, launch: _cuda.Launch, gradient: _cuda.Gradient, images: Images, d_words: Tensor) -> None:
        """What a launch left behind, into the sums and into the (w, C) gradients of its words."""
        b, stride, _ = images.rows.shape
        products, words = gradient.grad_products, launch.words
        if launch.diagonal:
            self.rows += _mm(products.mT, words.view(b, -1, words.shape[1]))
            d_words += _mm(products, images.rows).flatten(0, 1)
        else:
            self.rows += _mm(products.T, words).view(self.rows.shape)
            d_words += _mm(products, images.rows.flatten(0, 1))
        tokens, shrunk = (x.view(b, -1, stride) for x in (gradient.tokens, gradient.shrunk_tokens))
        self.gram += _mm(shrunk.mT, tokens)

    def finish(self, images: Images, inputs: Inputs) -> _ImageGradients:
        """From the rows to patches, logits, prefix tokens and the keep probability."""
        n, p = images.num_patches, images.num_prefix
        aggregated, stable = images.logits.shape[2], int(inputs.soft)
        rows = self.rows - self.gram @ images.rows.float()
        patches = rows[:, :n]
        if inputs.soft:
            patches = patches + rows[:, n : n + 1] / n
        patches = patches * images.scale
        prefix = None
        if p:
            units = images.rows[:, n + stable : n + stable + p].float()
            prefix = _through_unit(rows[:, n + stable : n + stable + p], units) * images.prefix_inverse
        weights = self.weights.sum(1)[:, p : p + aggregated]
        logits = images.exponentials * weights[..., :n]
        if inputs.soft:
            # The stable form fixes the scale of E against eps, so its maximum carries minus the sum of these
            # gradients. As a direction has no scale, that is what eps, the weight of the mean, has: with less
            # rounding noise.
            highest = images.logits.argmax(1)[..., None]
            logits = logits.scatter_add(2, highest, EPSILON * weights[..., n : n + 1])
        logits = logits.mT
        keep = None if self.keep is None else self.keep.sum(1)
        nothing, poison = ~images.finite, self.poisoned

        def told(gradient: Tensor) -> Tensor:
            shape = (-1, *(1,) * (gradient.dim() - 1))
            gradient = torch.where(nothing.view(shape), 0.0, gradient)
            return torch.where(poison.view(shape), math.nan, gradient)

        return (
            told(patches),
            told(logits),
            None if prefix is None else told(prefix),
            None if keep is None else told(keep),
        )


def _through_unit(gradient: Tensor, unit: Tensor) -> Tensor:
    """The part of a gradient that changes a vector's direction."""
    return gradient - unit * (gradient * unit).sum(-1, keepdim=True)


def _through_words(gradient: Tensor, texts: Texts, inputs: Inputs, poisoned: Tensor) -> Tensor:
    """From the words of all captions (W, C) to the padded ones (B_t, L, C)."""
    units = texts.words.float() * texts.inverse[:, None]
    gradient = _through_unit(gradient, units) * texts.scale
    t, length, c = inputs.words.shape
    if texts.places is None:
        padded = gradient
    else:
        padded = gradient.new_zeros((t * length, c)).index_copy_(0, texts.places, gradient)
    padded = padded.view(t, length, c)
    real = (torch.arange(length, device=padded.device) < texts.count[:, None])[..., None]
    return torch.where(real & poisoned[:, None, None], math.nan, padded)
