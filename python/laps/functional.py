r"""The method as functions: all image x text pairs at once, one pair per row, or one stage at a time.

Sizes: B_v images with N patches and P prefix tokens ([CLS], registers), B_t captions with at most L words, C
channels, N_c aggregated tokens. All features are raw: normalisation belongs to the method. "Section" and
"identity" in the docstrings refer to the method's description: LPS (patch selection), SPC (calibration), SPA
(alignment).

Every function takes torch tensors and NumPy arrays (read-only ones too), and answers in NumPy arrays if it
got nothing else, in tensors otherwise. Errors are :class:`laps.LapsError`, each also a ``ValueError`` or a
``TypeError``, that name the argument.

Backends: ``"native"`` (Rust on the CPU; on NVIDIA GPUs from compute capability 8.0 CUDA kernels for the two
similarities), ``"torch"`` (batched PyTorch, any device), and ``"auto"``: native wherever it runs. The
argument ``backend`` wins over the environment variable ``LAPS_BACKEND``, which wins over ``"auto"``. On a GPU
native multiplies float32, float16 and bfloat16 features as they are, and sums in float32. Native has a
backward pass and no other derivatives: inside ``torch.func.grad`` and its kin, and under forward mode,
``"auto"`` is torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from . import _check, _cuda, _laps, ops, torch_backend
from .errors import LapsTypeError, LapsValueError

__all__ = [
    "align_patches_words",
    "calibrate_patches",
    "max_sim",
    "select_patches",
    "selection_scores",
    "similarity",
    "similarity_pairwise",
]

BACKENDS = ("auto", "torch", "native")
DIRECTIONS = ("both", "word_to_patch", "patch_to_word")
DIRECTION_REDUCTIONS = ("sum", "mean")
SCORES = ("cosine", "dot")
SAMPLINGS = ("gumbel", "topk")

# A tensor, or a NumPy array; all of one kind in one call.
ArrayT = TypeVar("ArrayT", Tensor, np.ndarray[Any, Any])
Lengths = Tensor | np.ndarray[Any, Any] | Sequence[int]

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

    class PairOptions(TypedDict, Generic[ArrayT], total=False):
        """The keyword arguments of `similarity` for its overloads, but the one that they differ in."""

        selection_ratio: Required[float]
        prefix: ArrayT | int | None
        keep_prob: ArrayT | None
        mask: ArrayT | None
        seed: int | Tensor | None
        directions: str
        direction_reduction: str
        negative_slope: float
        fusion: bool
        language_context: bool
        attention_weight: float
        score: str
        sampling: str
        temperature: float
        chunk: int | None
        backend: str | None


# ---- backends


def default_backend(operation: str) -> str:
    """What ``backend=None`` means."""
    return _check.choice(operation, "LAPS_BACKEND", os.environ.get("LAPS_BACKEND") or "auto", BACKENDS)


def _backend(
    operation: str, requested: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> str:
    """``"native"`` or ``"torch"``; `dtype` of features for which there may be kernels on GPUs."""
    if requested is None:
        source, name = "LAPS_BACKEND", default_backend(operation)
    else:
        source, name = "backend", _check.choice(operation, "backend", requested, BACKENDS)
    compiling = torch.compiler.is_compiling()
    otherwise = not compiling and _check.differentiated_otherwise()
    on_gpu = device.type == "cuda" and dtype not in (None, torch.float64)
    if name == "native" and device.type != "cpu" and not on_gpu:
        where = "the CPU, and below float64 on GPUs" if dtype is not None else "the CPU"
        got = f"{_check.name_of(dtype)} on {device}" if dtype is not None else device
        raise LapsValueError(
            _check.message(operation, f'{source} is "native", which runs on {where}', "cpu", got)
        )
    if name == "native" and otherwise:
        raise LapsValueError(
            _check.message(
                operation,
                f'{source} is "native", which has a backward pass only',
                '"auto" or "torch" for forward mode and torch.func.grad',
            )
        )
    if name == "auto":
        runs = device.type == "cpu" or (on_gpu and _cuda.usable(device))
        name = "native" if runs and not otherwise else "torch"
    if name == "torch" and not compiling:
        _refuse_vmap(operation)
    return name


def _refuse_vmap(operation: str) -> None:
    if _check.vmapped():
        raise LapsTypeError(
            _check.message(
                operation,
                "torch.vmap cannot map what looks at values",
                "all images and captions in one call, or similarity and max_sim with the native backend",
            )
        )


def _stage_backend(
    operation: str, requested: str | None, device: torch.device, tensors: Mapping[str, Tensor | None]
) -> str:
    """As `_backend`, but torch for gradients and tracing: the binding's stages are plain calls."""
    _check.fake_tensors(operation, tensors, needs_values=True)
    name = _backend(operation, requested, device)
    if torch.compiler.is_compiling():
        return "torch"
    _refuse_vmap(operation)
    return "torch" if _check.needs_grad(tensors.values()) else name


# ---- all pairs


def _pairs(
    operation: str,
    pairwise: bool,
    patches: object,
    words: object,
    word_lengths: object,
    logits: object,
    *,
    selection_ratio: float,
    prefix: object,
    keep_prob: object,
    mask: object,
    seed: object,
    directions: str,
    direction_reduction: str,
    negative_slope: float,
    fusion: bool,
    language_context: bool,
    attention_weight: float,
    score: str,
    sampling: str,
    temperature: float,
    return_kept_fraction: bool,
    chunk: int | None,
    backend: str | None,
) -> Any:
    """Check everything, choose the backend, call it, and answer in the caller's kind of array."""
    options: dict[str, Any] = {
        "selection_ratio": _check.number(
            operation, "selection_ratio", selection_ratio, 0.0, 1.0, open_low=True
        ),
        "directions": _check.choice(operation, "directions", directions, DIRECTIONS),
        "direction_reduction": _check.choice(
            operation, "direction_reduction", direction_reduction, DIRECTION_REDUCTIONS
        ),
        "negative_slope": _check.number(operation, "negative_slope", negative_slope, 0.0, 1.0),
        "fusion": _check.flag(operation, "fusion", fusion),
        "language_context": _check.flag(operation, "language_context", language_context),
        "attention_weight": _check.number(operation, "attention_weight", attention_weight, 0.0, 1.0),
        "score": _check.choice(operation, "score", score, SCORES),
        "sampling": _check.choice(operation, "sampling", sampling, SAMPLINGS),
        "temperature": _check.number(operation, "temperature", temperature, 0.0, open_low=True),
        "chunk": None if chunk is None else _check.count(operation, "chunk", chunk),
    }
    joined = _check.count(operation, "prefix", prefix, low=0) if _check.is_integer(prefix) else None
    given, as_numpy = _check.to_tensors(
        operation,
        {
            "patches": patches,
            "words": words,
            "logits": logits,
            "prefix": None if joined is not None else prefix,
            "keep_prob": keep_prob,
            "mask": mask,
        },
    )
    v = _check.required(operation, "patches", given["patches"])
    w = _check.required(operation, "words", given["words"])
    e = _check.required(operation, "logits", given["logits"])
    p, q, m = given["prefix"], given["keep_prob"], given["mask"]

    if q is not None and m is not None:
        raise LapsValueError(
            _check.message(operation, "keep_prob and mask exclude each other", "one", "both")
        )
    noise_seed = _check.seed(operation, seed)
    if noise_seed is not None and q is None:
        raise LapsValueError(
            _check.message(operation, "seed has no use without keep_prob", "both", "seed alone")
        )

    device = _check.same_device(operation, given)
    dtype = _check.common_dtype(operation, given, may_be_bool="mask")

    sizes, images, captions = _check.Sizes(operation), *(("B", "B") if pairwise else ("B_v", "B_t"))
    features, tokens = v, v.to(dtype)
    p, v = _split_prefix(operation, tokens, joined) if joined else (p, tokens)
    sizes.match("patches", v, f"{images} N C")
    sizes.match("words", w, f"{captions} L C")
    sizes.match("logits", e, f"{images} N N_c")
    if p is not None:
        sizes.match("prefix", p, f"{images} P C", may_be_empty="P")
    if q is not None:
        sizes.match("keep_prob", q, f"{images} N")
        _check.probabilities(operation, "keep_prob", q)
    if m is not None:
        sizes.match("mask", m, "B N" if pairwise else "B_v B_t N")
        _check.mask_values(operation, m)
    lengths = _check.word_lengths(operation, word_lengths, sizes[captions], sizes["L"], device)

    name = _backend(operation, backend, device, dtype)
    _check.fake_tensors(operation, given | {"word_lengths": lengths}, needs_values=name == "torch")

    # On a GPU halves are multiplied as they are; all sums are of float32.
    as_they_are = name == "native" and device.type == "cuda" and features.dtype == w.dtype
    element = w.dtype if as_they_are else dtype
    tokens = features if as_they_are else tokens
    w, e = w.to(element), e.to(dtype)
    p = None if p is None or p.shape[1] == 0 else p.to(element)
    q = None if q is None else _within_unit_interval(q.to(dtype))
    m = _within_unit_interval(m.to(dtype)) if m is not None and _is_soft(m) else m
    if name == "native":
        save = _check.needs_grad((tokens, w, e, p, q, m))
        scores, kept_fraction, *_ = torch.ops.laps.similarity(
            tokens,
            w,
            lengths,
            e,
            None if joined else p,
            q,
            m,
            noise_seed,
            **options,
            pairwise=pairwise,
            num_prefix_tokens=joined or 0,
            save_for_backward=save,
        )
    else:
        call = torch_backend.similarity_pairwise if pairwise else torch_backend.similarity
        scores, kept_fraction = call(
            v, w, lengths, e, prefix=p, keep_prob=q, mask=m, seed=noise_seed, **options
        )
    if as_numpy:
        scores, kept_fraction = scores.numpy(), kept_fraction.numpy()
    return (scores, kept_fraction) if return_kept_fraction else scores


def _split_prefix(operation: str, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` tokens of each image, and the others."""
    if tokens.dim() != 3 or tokens.shape[1] <= count:
        raise LapsValueError(
            _check.message(
                operation,
                f"prefix is {count}, the number of leading rows of patches",
                f"patches (B_v, {count} + N, C) with N >= 1",
                tuple(tokens.shape),
            )
        )
    # One split and not two slices: its gradient is one concatenation.
    prefix, patches = tokens.split([count, tokens.shape[1] - count], dim=1)  # type: ignore[no-untyped-call]
    return prefix, patches


def _is_soft(mask: Tensor | None) -> bool:
    return mask is not None and mask.is_floating_point()


def _within_unit_interval(values: Tensor) -> Tensor:
    """Take back what rounding has added; unlike `clamp` with its gradient, and infinity becomes NaN."""
    plain = values.detach()
    return values + (plain.clamp(0, 1) - plain)


@overload
def similarity(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    logits: ArrayT,
    *,
    return_kept_fraction: Literal[False] = ...,
    **options: Unpack[PairOptions[ArrayT]],
) -> ArrayT: ...
@overload
def similarity(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    logits: ArrayT,
    *,
    return_kept_fraction: Literal[True],
    **options: Unpack[PairOptions[ArrayT]],
) -> tuple[ArrayT, ArrayT]: ...
def similarity(
    patches: Any,
    words: Any,
    word_lengths: Lengths,
    logits: Any,
    *,
    selection_ratio: float,
    prefix: Any = None,
    keep_prob: Any = None,
    mask: Any = None,
    seed: int | Tensor | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
    fusion: bool = True,
    language_context: bool = True,
    attention_weight: float = 0.8,
    score: str = "cosine",
    sampling: str = "gumbel",
    temperature: float = 1.0,
    return_kept_fraction: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
) -> Any:
    """LAPS similarity of every image with every caption, differentiable.

    Per pair (i, t), with D in {0, 1}^N (or [0, 1]^N) the selection, A_mj = leaky_relu(u_m . l2(w_j)) and the
    tokens u = [prefix; c_1..c_Nc; r], each l2-normalised::

        s_i = l2(v_i) . l2(mean v) + l2(v_i) . l2(mean_{j<l} w_j)             (LPS; no gradient)
        c_j = sum_{D=1} softmax_kept(logits_ij) v_i                           (SPC)
        r   = sum_{D=0} softmax_dropped(s_i) v_i                              (SPC; absent if none is dropped)
        S   = mean_{j<l} max_m A_mj + mean_m max_{j<l} A_mj                   (SPA)

    The selection is one of three: without `keep_prob` and `mask` the k = ceil(selection_ratio * N) highest s,
    ties to the lower index (the released method); with `keep_prob` p the paper's method, s = (1-beta) p +
    beta (a' + b') / 2 with a', b' min-max scaled over the image's patches, sampled with straight-through
    gradient if there is a `seed` and the top k if not; with `mask` the caller's own.

    Args:
        patches: (B_v, N, C) raw spatial patch features.
        words: (B_t, L, C) raw word features; rows past a caption's length may hold anything.
        word_lengths: (B_t,) integers in 1..L: an int64 or int32 CPU tensor, a list, or a NumPy array. Beside
            tensors on another device it may lie on that device; its values are then not checked.
        logits: (B_v, N, N_c) aggregation logits, one column per aggregated token.
        selection_ratio: share of patches to keep, in (0, 1]. Without effect on a given `mask`.
        prefix: (B_v, P, C) tokens that take part in the alignment and not in the selection, or None. Or P
            itself, if they are the first rows of `patches`, (B_v, P + N, C): its gradient is then one tensor.
        keep_prob: (B_v, N) in [0, 1], the score net's keep probability (paper variant), or None.
        mask: (B_v, B_t, N), the selection itself: bool, or floating in [0, 1] and then with a gradient. None
            to select.
        seed: noise seed of the paper variant's sampling, an int or a 0-d int64 CPU tensor (which does not
            recompile under ``torch.compile``). None: no noise, top-k. The noise depends on (seed, image,
            caption, patch) only.
        directions: ``"both"``, ``"word_to_patch"`` (first term of S) or ``"patch_to_word"`` (second term).
        direction_reduction: ``"sum"`` or ``"mean"`` of the two directions.
        negative_slope: slope of the leaky ReLU, in [0, 1]; 1.0 switches it off.
        fusion: whether dropped patches form the fused token r.
        language_context: whether the text score b takes part in s.
        attention_weight: beta, in [0, 1]; paper variant only.
        score: ``"cosine"``, or ``"dot"``: raw products over C, for a and b.
        sampling: with a seed, ``"gumbel"`` (keep where the noisy logit is positive) or ``"topk"`` (k highest
            of them).
        temperature: of the soft value whose gradient the sampled D carries, > 0.
        return_kept_fraction: also return mean_i D_i per pair, for the ratio loss.
        chunk: scratch memory in bytes; None for 24 MiB (native), 48 MiB (torch), on a GPU
            1 GiB forward and 192 MiB backward (native). One caption and, native,
            one image per thread are held in any case.
        backend: ``"auto"``, ``"torch"`` or ``"native"``; see the module's description.

    Returns:
        Scores (B_v, B_t), and with `return_kept_fraction` the pair (scores, kept fraction), both (B_v, B_t):
        float64 for float64 inputs, float32 for all others. A pair with a non-finite input scores NaN; no
        other pair is touched.

    Raises:
        LapsValueError: wrong rank, unequal sizes or devices, an empty batch, a length outside 1..L, a value
        outside
            its range, a mask that keeps no patch of some pair, `keep_prob` together with `mask`, a seed
            alone.
        LapsTypeError: wrong types or dtypes, NumPy arrays beside a tensor that requires grad.

    Source: sections LPS, SPC, SPA; identities 1 to 5 in the native backend. Gradients of gradients do not
    exist there.

    Example:
        >>> import laps, torch
        >>> v, w, logits = torch.randn(2, 16, 8), torch.randn(3, 5, 8), torch.randn(2, 16, 4)
        >>> laps.functional.similarity(v, w, [5, 2, 1], logits, selection_ratio=0.5).shape
        torch.Size([2, 3])
    """
    return _pairs(
        "similarity", False, patches, words, word_lengths, logits, selection_ratio=selection_ratio,
        prefix=prefix, keep_prob=keep_prob, mask=mask, seed=seed, directions=directions,
        direction_reduction=direction_reduction, negative_slope=negative_slope, fusion=fusion,
        language_context=language_context, attention_weight=attention_weight, score=score, sampling=sampling,
        temperature=temperature, return_kept_fraction=return_kept_fraction, chunk=chunk, backend=backend,
    )  # fmt: skip


@overload
def similarity_pairwise(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    logits: ArrayT,
    *,
    return_kept_fraction: Literal[False] = ...,
    **options: Unpack[PairOptions[ArrayT]],
) -> ArrayT: ...
@overload
def similarity_pairwise(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    logits: ArrayT,
    *,
    return_kept_fraction: Literal[True],
    **options: Unpack[PairOptions[ArrayT]],
) -> tuple[ArrayT, ArrayT]: ...
def similarity_pairwise(
    patches: Any,
    words: Any,
    word_lengths: Lengths,
    logits: Any,
    *,
    selection_ratio: float,
    prefix: Any = None,
    keep_prob: Any = None,
    mask: Any = None,
    seed: int | Tensor | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
    fusion: bool = True,
    language_context: bool = True,
    attention_weight: float = 0.8,
    score: str = "cosine",
    sampling: str = "gumbel",
    temperature: float = 1.0,
    return_kept_fraction: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
) -> Any:
    """LAPS similarity of image i with caption i, differentiable: the diagonal of :func:`similarity`, and only
    that.

    Args:
        patches: (B, N, C) raw spatial patch features.
        words: (B, L, C) raw word features.
        word_lengths: (B,) integers in 1..L.
        logits: (B, N, N_c) aggregation logits.
        selection_ratio: share of patches to keep, in (0, 1].
        prefix: (B, P, C) or None.
        keep_prob: (B, N) in [0, 1], or None.
        mask: (B, N), bool or floating in [0, 1], or None.
        seed: as in :func:`similarity`; the noise of pair i is that of image i with caption i.
        directions: ``"both"``, ``"word_to_patch"`` or ``"patch_to_word"``.
        direction_reduction: ``"sum"`` or ``"mean"``.
        negative_slope: slope of the leaky ReLU, in [0, 1].
        fusion: whether dropped patches form the fused token.
        language_context: whether the text takes part in the selection.
        attention_weight: beta, in [0, 1]; paper variant only.
        score: ``"cosine"`` or ``"dot"``.
        sampling: ``"gumbel"`` or ``"topk"``.
        temperature: of the soft value, > 0.
        return_kept_fraction: also return mean_i D_i per pair.
        chunk: scratch memory in bytes; None for 24 MiB (native), 48 MiB (torch), on a GPU
            1 GiB forward and 192 MiB backward (native). One caption and, native,
            one image per thread are held in any case.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Returns:
        Scores (B,), and with `return_kept_fraction` the pair (scores, kept fraction), both (B,); dtypes as
        there.

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`; also for unequal numbers of images and captions.

    Source: sections LPS, SPC, SPA.

    Example:
        >>> import laps, torch
        >>> v, w, logits = torch.randn(2, 16, 8), torch.randn(2, 5, 8), torch.randn(2, 16, 4)
        >>> laps.functional.similarity_pairwise(v, w, [5, 2], logits, selection_ratio=0.5).shape
        torch.Size([2])
    """
    return _pairs(
        "similarity_pairwise", True, patches, words, word_lengths, logits, selection_ratio=selection_ratio,
        prefix=prefix, keep_prob=keep_prob, mask=mask, seed=seed, directions=directions,
        direction_reduction=direction_reduction, negative_slope=negative_slope, fusion=fusion,
        language_context=language_context, attention_weight=attention_weight, score=score, sampling=sampling,
        temperature=temperature, return_kept_fraction=return_kept_fraction, chunk=chunk, backend=backend,
    )  # fmt: skip


# ---- one stage at a time


def _patches_and_words(
    operation: str, patches: object, words: object, word_lengths: object
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """What three stages share, checked and of one dtype: patches, words, lengths; whether NumPy came."""
    given, as_numpy = _check.to_tensors(operation, {"patches": patches, "words": words})
    v = _check.required(operation, "patches", given["patches"])
    w = _check.required(operation, "words", given["words"])
    device, dtype = _check.same_device(operation, given), _check.common_dtype(operation, given)
    sizes = _check.Sizes(operation)
    sizes.match("patches", v, "B_v N C")
    sizes.match("words", w, "B_t L C")
    lengths = _check.word_lengths(operation, word_lengths, sizes["B_t"], sizes["L"], device)
    return v.to(dtype), w.to(dtype), lengths, as_numpy


def _answer(result: Any, as_numpy: bool) -> Any:
    """The backend's tensor or the binding's array, as what the caller gave."""
    if as_numpy:
        return result.numpy() if isinstance(result, Tensor) else result
    return result if isinstance(result, Tensor) else torch.from_numpy(result)


def _selection(
    operation: str,
    native: Callable[..., Any],
    portable: Callable[..., Any],
    patches: object,
    words: object,
    word_lengths: object,
    ratio: tuple[float, ...],
    language_context: bool,
    score: str,
    backend: str | None,
) -> Any:
    """The two functions about selection; neither has a gradient."""
    _check.flag(operation, "language_context", language_context)
    _check.choice(operation, "score", score, SCORES)
    v, w, lengths, as_numpy = _patches_and_words(operation, patches, words, word_lengths)
    v, w = v.detach(), w.detach()
    given = {"patches": v, "words": w, "word_lengths": lengths}
    if _stage_backend(operation, backend, v.device, given) == "native":
        natives = ops.native_tensor(v), ops.native_tensor(w), lengths
        result = native(*natives, *ratio, bool(language_context), score, torch.get_num_threads())
    else:
        result = portable(v, w, lengths, *ratio, language_context=bool(language_context), score=score)
    return _answer(result, as_numpy)


def selection_scores(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    *,
    language_context: bool = True,
    score: str = "cosine",
    backend: str | None = None,
) -> ArrayT:
    """The significance s of every patch for every caption, by which the released method selects.

    s_i = l2(v_i) . l2(mean v) + l2(v_i) . l2(mean_{j<l} w_j), the second term only with `language_context`.
    With ``score="dot"`` raw products over C replace the cosines: s_i = (v_i . mean v + v_i . mean w) / C.

    Args:
        patches: (B_v, N, C) raw spatial patch features.
        words: (B_t, L, C) raw word features.
        word_lengths: (B_t,) integers in 1..L.
        language_context: whether the text takes part; without it all captions see the same scores.
        score: ``"cosine"`` or ``"dot"``.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Returns:
        Scores (B_v, B_t, N), float64 for float64 inputs, else float32; without gradient (section LPS).

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`.

    Source: section LPS.

    Example:
        >>> import laps, torch
        >>> v, w = torch.randn(2, 16, 8), torch.randn(3, 5, 8)
        >>> laps.functional.selection_scores(v, w, [5, 2, 1]).shape
        torch.Size([2, 3, 16])
    """
    result: ArrayT = _selection(
        "selection_scores", _laps.selection_scores, torch_backend.selection_scores,
        patches, words, word_lengths, (), language_context, score, backend,
    )  # fmt: skip
    return result


def select_patches(
    patches: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    selection_ratio: float,
    *,
    language_context: bool = True,
    score: str = "cosine",
    backend: str | None = None,
) -> ArrayT:
    """Which patches of each image matter for each caption: the k = ceil(selection_ratio * N) highest scores.

    Args:
        patches: (B_v, N, C) raw spatial patch features.
        words: (B_t, L, C) raw word features.
        word_lengths: (B_t,) integers in 1..L.
        selection_ratio: share of patches to keep, in (0, 1].
        language_context: whether the text takes part; without it all captions keep the same patches.
        score: ``"cosine"`` or ``"dot"``.
        backend: ``"auto"``, ``"torch"`` or ``"native"``.

    Returns:
        Indices (B_v, B_t, k), int64, ascending; among equal scores the lower index is kept.

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`.

    Source: section LPS, released variant.

    Example:
        >>> import laps, torch
        >>> v, w = torch.randn(2, 16, 8), torch.randn(3, 5, 8)
        >>> laps.functional.select_patches(v, w, [5, 2, 1], 0.25).shape
        torch.Size([2, 3, 4])
    """
    ratio = _check.number("select_patches", "selection_ratio", selection_ratio, 0.0, 1.0, open_low=True)
    result: ArrayT = _selection(
        "select_patches", _laps.select_patches, torch_backend.select_patches,
        patches, words, word_lengths, (ratio,), language_context, score, backend,
    )  # fmt: skip
    return result


def calibrate_patches(
    patches: ArrayT,
    logits: ArrayT,
    mask: ArrayT,
    scores: ArrayT,
    *,
    prefix: ArrayT | None = None,
    fusion: bool = True,
    backend: str | None = None,
) -> tuple[ArrayT, ArrayT]:
    """The few calibrated tokens that represent each image before each caption, each l2-normalised.

    u = [prefix; c_1..c_Nc; r] with c_j = sum_kept softmax_kept(logits_ij) v_i and r = sum_dropped
    softmax_dropped(s_i) v_i; with a floating mask the stable form c_j ~ sum_i (e^{l_ij - max l} D_i + eps/N)
    v_i, r ~ sum_i e^{s_i} (1-D_i) v_i, eps = 1e-6.

    Args:
        patches: (B_v, N, C) raw spatial patch features.
        logits: (B_v, N, N_c) aggregation logits.
        mask: (B_v, B_t, N) selection: bool, or floating in [0, 1].
        scores: (B_v, B_t, N) of :func:`selection_scores`; they weigh the dropped patches in r.
        prefix: (B_v, P, C) or None.
        fusion: whether there is a fused token r.
        backend: ``"auto"``, ``"torch"`` or ``"native"``. Gradients and floating masks always take the torch
            path.

    Returns:
        Tokens (B_v, B_t, M, C) with M = P + N_c + 1, or P + N_c without `fusion` or where no pair drops a
        patch (under ``torch.compile`` only without `fusion`), zero past a pair's count; and counts (B_v,
        B_t), int64: M, or one less for a pair that drops none where others do.

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`.

    Source: section SPC.

    Example:
        >>> import laps, torch
        >>> v, logits, s = torch.randn(2, 16, 8), torch.randn(2, 16, 4), torch.randn(2, 3, 16)
        >>> tokens, counts = laps.functional.calibrate_patches(v, logits, s > 0, s)
        >>> tokens.shape, counts.shape
        (torch.Size([2, 3, 5, 8]), torch.Size([2, 3]))
    """
    operation = "calibrate_patches"
    _check.flag(operation, "fusion", fusion)
    given, as_numpy = _check.to_tensors(
        operation, {"patches": patches, "logits": logits, "mask": mask, "scores": scores, "prefix": prefix}
    )
    v = _check.required(operation, "patches", given["patches"])
    e = _check.required(operation, "logits", given["logits"])
    d = _check.required(operation, "mask", given["mask"])
    s = _check.required(operation, "scores", given["scores"])
    p = given["prefix"]
    device = _check.same_device(operation, given)
    dtype = _check.common_dtype(operation, given, may_be_bool="mask")
    sizes = _check.Sizes(operation)
    sizes.match("patches", v, "B_v N C")
    sizes.match("logits", e, "B_v N N_c")
    sizes.match("mask", d, "B_v B_t N")
    sizes.match("scores", s, "B_v B_t N")
    if p is not None:
        sizes.match("prefix", p, "B_v P C", may_be_empty="P")
    _check.mask_values(operation, d)

    v, e, s = v.to(dtype), e.to(dtype), s.to(dtype)
    p = None if p is None or p.shape[1] == 0 else p.to(dtype)
    name = _stage_backend(operation, backend, device, given)
    tokens: Any
    counts: Any
    if name == "native" and not _is_soft(d):
        tokens, counts = _laps.calibrate_patches(
            ops.native_tensor(v),
            ops.native_tensor(e),
            ops.native_tensor(d),
            ops.native_tensor(s),
            ops.native_tensor(p),
            bool(fusion),
            torch.get_num_threads(),
        )
    else:
        d = _within_unit_interval(d.to(dtype)) if _is_soft(d) else d
        tokens, counts = torch_backend.calibrate_patches(v, e, d, s, prefix=p, fusion=bool(fusion))
    return _answer(tokens, as_numpy), _answer(counts, as_numpy)


def align_patches_words(
    tokens: ArrayT,
    words: ArrayT,
    word_lengths: Lengths,
    *,
    token_counts: ArrayT | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Scores and the alignment matrices behind them, from calibrated tokens.

    A_mj = leaky_relu(l2(u_m) . l2(w_j)); S = mean_{j<l} max_m A_mj ("word_to_patch") + mean_m max_{j<l} A_mj
    ("patch_to_word").

    Args:
        tokens: (B_v, B_t, M, C), for example of :func:`calibrate_patches`.
        words: (B_t, L, C) raw word features.
        word_lengths: (B_t,) integers in 1..L.
        token_counts: (B_v, B_t), int64, how many of the M tokens each pair has, in 1..M; None for all.
        directions: ``"both"``, ``"word_to_patch"`` or ``"patch_to_word"``.
        direction_reduction: ``"sum"`` or ``"mean"``.
        negative_slope: slope of the leaky ReLU, in [0, 1].
        backend: ``"auto"``, ``"torch"`` or ``"native"``. Gradients always take the torch path.

    Returns:
        Scores (B_v, B_t) and alignment A (B_v, B_t, M, L), zero at tokens past the count and words past the
        length.

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`.

    Source: section SPA.

    Example:
        >>> import laps, torch
        >>> tokens, w = torch.randn(2, 3, 4, 8), torch.randn(3, 5, 8)
        >>> scores, alignment = laps.functional.align_patches_words(tokens, w, [5, 2, 1])
        >>> scores.shape, alignment.shape
        (torch.Size([2, 3]), torch.Size([2, 3, 4, 5]))
    """
    operation = "align_patches_words"
    _check.choice(operation, "directions", directions, DIRECTIONS)
    _check.choice(operation, "direction_reduction", direction_reduction, DIRECTION_REDUCTIONS)
    slope = _check.number(operation, "negative_slope", negative_slope, 0.0, 1.0)
    given, as_numpy = _check.to_tensors(
        operation, {"tokens": tokens, "words": words, "token_counts": token_counts}
    )
    u = _check.required(operation, "tokens", given["tokens"])
    w = _check.required(operation, "words", given["words"])
    counts = given.pop("token_counts")
    device, dtype = _check.same_device(operation, given), _check.common_dtype(operation, given)
    sizes = _check.Sizes(operation)
    sizes.match("tokens", u, "B_v B_t M C")
    sizes.match("words", w, "B_t L C")
    lengths = _check.word_lengths(operation, word_lengths, sizes["B_t"], sizes["L"], device)
    if counts is not None:
        sizes.match("token_counts", counts, "B_v B_t")
        counts = _check.token_counts(operation, counts, sizes["M"], device)

    u, w = u.to(dtype), w.to(dtype)
    scores: Any
    alignment: Any
    given |= {"word_lengths": lengths, "token_counts": counts}
    if _stage_backend(operation, backend, device, given) == "native":
        options = ops.native_options(
            selection_ratio=1.0,
            directions=directions,
            direction_reduction=direction_reduction,
            negative_slope=slope,
        )
        scores, alignment = _laps.align_patches_words(
            ops.native_tensor(u), ops.native_tensor(w), lengths, counts, options, torch.get_num_threads()
        )
    else:
        scores, alignment = torch_backend.align_patches_words(
            u,
            w,
            lengths,
            token_counts=counts,
            directions=directions,
            direction_reduction=direction_reduction,
            negative_slope=slope,
        )
    return _answer(scores, as_numpy), _answer(alignment, as_numpy)


def max_sim(patches: ArrayT, words: ArrayT, word_lengths: Lengths, *, backend: str | None = None) -> ArrayT:
    """Late interaction (ColBERT's MaxSim) of every image with every caption: S = sum_{j<l} max_i v_i . w_j.

    Raw products: normalise the inputs for cosines. A caption takes the role of the query.

    Args:
        patches: (B_v, N, C) patch features.
        words: (B_t, L, C) word features.
        word_lengths: (B_t,) integers in 1..L.
        backend: ``"auto"``, ``"torch"`` or ``"native"``. Gradients always take the torch path.

    Returns:
        Scores (B_v, B_t), float64 for float64 inputs, else float32.

    Raises:
        LapsValueError, LapsTypeError: as :func:`similarity`.

    Source: Khattab and Zaharia, ColBERT (2020), equation 3.

    Example:
        >>> import laps, torch
        >>> v, w = torch.randn(2, 16, 8), torch.randn(3, 5, 8)
        >>> laps.functional.max_sim(v, w, [5, 2, 1]).shape
        torch.Size([2, 3])
    """
    operation = "max_sim"
    v, w, lengths, as_numpy = _patches_and_words(operation, patches, words, word_lengths)
    # An operator, so unlike the stages it needs no values and can be traced.
    native = _backend(operation, backend, v.device) == "native" and not _check.needs_grad((v, w))
    given = {"patches": v, "words": w, "word_lengths": lengths}
    _check.fake_tensors(operation, given, needs_values=not native)
    result = (torch.ops.laps.max_sim if native else torch_backend.max_sim)(v, w, lengths)
    answer: ArrayT = _answer(result, as_numpy)
    return answer
