"""The native operations as PyTorch operators: ``torch.ops.laps.similarity``, ``similarity_backward`` and
``max_sim``.

Importing this module registers schema, CPU kernel, fake kernel, autograd and autocast, so that the operators
work under ``torch.compile(fullgraph=True)``, AOT autograd, checkpointing, autocast and DDP. They are the
layer beneath :mod:`laps.functional`, which checks arguments and should be called instead. On the CPU all
floating tensors have one dtype (float32 or float64), and the rest is checked by the Rust core. On a GPU
patches, words and prefix have one dtype (float32, float16 or bfloat16), which is the one that products are
computed in; scores are float32.

``similarity`` returns five tensors: the scores, the kept fraction, and what the backward pass needs beside
the inputs (selection bits and arg-maxes; of shape (0,) with ``save_for_backward=False``). Gradients of
gradients do not exist: the backward operator raises :class:`laps.LapsError` when it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from . import _laps, cuda_backend
from ._check import message
from .errors import LapsTypeError, LapsValueError

__all__: list[str] = []

_INPUTS = (
    "Tensor patches, Tensor words, Tensor word_lengths, Tensor logits, "
    "Tensor? prefix, Tensor? keep_prob, Tensor? mask, Tensor? seed"
)
_OPTIONS = (
    "float selection_ratio, str directions='both', str direction_reduction='sum', float negative_slope=0.1, "
    "bool fusion=True, bool language_context=True, float attention_weight=0.8, str score='cosine', "
    "str sampling='gumbel', float temperature=1.0, int? chunk=None, bool pairwise=False, "
    # Leading rows of `patches` that are prefix tokens, in place of `prefix`: their gradient is one tensor.
    "int num_prefix_tokens=0"
)

# FRAGMENT and not DEF: the wheel laps-rs-native adds its own operators to the same namespace.
_LIBRARY: Any = torch.library.Library("laps", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    f"similarity({_INPUTS}, *, {_OPTIONS}, bool save_for_backward=True) -> "
    "(Tensor scores, Tensor kept_fraction, Tensor selection, Tensor best_token, Tensor best_word)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"similarity_backward({_INPUTS}, Tensor selection, Tensor best_token, Tensor best_word, "
    f"Tensor grad_scores, Tensor? grad_kept_fraction, *, {_OPTIONS}) -> "
    "(Tensor grad_patches, Tensor grad_words, Tensor grad_logits, "
    "Tensor grad_prefix, Tensor grad_keep_prob, Tensor grad_mask)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "max_sim(Tensor patches, Tensor words, Tensor word_lengths) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


@lru_cache(maxsize=256)
def native_options(**options: Any) -> _laps.SimilarityOptions:
    """The options object of the binding; building one checks every value, so equal ones are kept."""
    return _laps.SimilarityOptions(**options)


@overload
def native_tensor(tensor: Tensor) -> Tensor: ...
@overload
def native_tensor(tensor: Tensor | None) -> Tensor | None: ...
def native_tensor(tensor: Tensor | None) -> Tensor | None:
    """What the binding takes: no autograd history (DLPack refuses it), and no sign that is still to be
    applied (DLPack would lose it). Strides are read as they are."""
    return None if tensor is None else tensor.detach().resolve_neg()


def _seed_word(seed: Tensor | None) -> int | None:
    """The binding's unsigned 64-bit seed from the signed one that a tensor can hold."""
    return None if seed is None else int(seed.item()) & (2**64 - 1)


# ---- similarity


def _forward_outputs(
    patches: Tensor,
    words: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    pairwise: bool,
    num_prefix_tokens: int,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten outputs of the forward operator: scores, kept_fraction, selection, best_token, best_word."""
    pairs = (patches.shape[0],) if pairwise else (patches.shape[0], words.shape[0])
    num_patches = patches.shape[1] - num_prefix_tokens
    tokens = (num_prefix_tokens if prefix is None else prefix.shape[1]) + logits.shape[2] + 1
    saved = (((num_patches + 7) // 8, torch.uint8), (words.shape[1], torch.int16), (tokens, torch.int16))
    selection, best_token, best_word = (
        patches.new_empty((*pairs, size) if save_for_backward else (0,), dtype=dtype) for size, dtype in saved
    )
    dtype = torch.float32 if _is_half(patches) else patches.dtype
    scores, kept_fraction = (patches.new_empty(pairs, dtype=dtype) for _ in range(2))
    return scores, kept_fraction, selection, best_token, best_word


def _similarity_cpu(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *,
    pairwise: bool = False,
    num_prefix_tokens: int = 0,
    save_for_backward: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_unfit(patches, words, logits, prefix, num_prefix_tokens)
    outputs = _forward_outputs(patches, words, logits, prefix, pairwise, num_prefix_tokens, save_for_backward)
    scores, kept_fraction, selection, best_token, best_word = outputs
    _laps.similarity_forward(
        native_tensor(patches),
        native_tensor(words),
        native_tensor(word_lengths),
        native_tensor(logits),
        native_tensor(prefix),
        native_tensor(keep_prob),
        native_tensor(mask),
        _seed_word(seed),
        native_options(num_prefix_tokens=num_prefix_tokens, **options),
        pairwise,
        torch.get_num_threads(),
        scores,
        kept_fraction,
        selection if save_for_backward else None,
        best_token if save_for_backward else None,
        best_word if save_for_backward else None,
    )
    return outputs


def _similarity_cuda(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *,
    pairwise: bool = False,
    num_prefix_tokens: int = 0,
    save_for_backward: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_unfit(patches, words, logits, prefix, num_prefix_tokens)
    _refuse_elements(patches, words, prefix)
    outputs = _forward_outputs(patches, words, logits, prefix, pairwise, num_prefix_tokens, save_for_backward)
    cuda_backend.forward(
        cuda_backend.Inputs(patches, words, word_lengths, logits, prefix, keep_prob, mask, _seed_word(seed)),
        cuda_backend.Options(pairwise=pairwise, num_prefix_tokens=num_prefix_tokens, **options),
        outputs,
    )
    return outputs


def _refuse_elements(patches: Tensor, words: Tensor, prefix: Tensor | None) -> None:
    for name, tensor in (("patches", patches), ("words", words), ("prefix", prefix)):
        if tensor is not None and (
            tensor.dtype not in cuda_backend.ELEMENTS or tensor.dtype != patches.dtype
        ):
            expected = "float32, float16 or bfloat16, as patches"
            raise LapsTypeError(message("similarity", f"{name} has the wrong dtype", expected, tensor.dtype))


def _refuse_unfit(
    patches: Tensor, words: Tensor, logits: Tensor, prefix: Tensor | None, num_prefix_tokens: int
) -> None:
    # The outputs are allocated from these shapes before Rust, which checks all else, sees the inputs.
    for name, tensor in (("patches", patches), ("words", words), ("logits", logits), ("prefix", prefix)):
        if tensor is not None and tensor.dim() != 3:
            raise LapsValueError(message("similarity", f"{name} has the wrong rank", "3", tensor.dim()))
        if tensor is not None and name != "prefix" and not tensor.numel():
            raise LapsValueError(
                message("similarity", f"{name} is empty", "no size of 0", tuple(tensor.shape))
            )
    if num_prefix_tokens and not 0 < num_prefix_tokens < patches.shape[1]:
        expected = f"fewer than the {patches.shape[1]} rows of patches"
        raise LapsValueError(
            message("similarity", "num_prefix_tokens do not fit", expected, num_prefix_tokens)
        )


def _similarity_fake(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *,
    pairwise: bool = False,
    num_prefix_tokens: int = 0,
    save_for_backward: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_unfit(patches, words, logits, prefix, num_prefix_tokens)
    return _forward_outputs(patches, words, logits, prefix, pairwise, num_prefix_tokens, save_for_backward)


def _similarity_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    keep_prob, mask = inputs[5], inputs[6]
    _, kept_fraction, *saved = output
    ctx.save_for_backward(*inputs, *saved)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "save_for_backward"}
    ctx.saved = keyword_only_inputs["save_for_backward"]
    ctx.set_materialize_grads(False)
    if keep_prob is None and (mask is None or not mask.is_floating_point()):
        # A hard selection: the fraction is a constant of the caller's choice.
        ctx.mark_non_differentiable(kept_fraction, *saved)
    else:
        ctx.mark_non_differentiable(*saved)


def _similarity_autograd(
    ctx: Any, grad_scores: Tensor | None, grad_kept_fraction: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_scores is None and grad_kept_fraction is None:
        return (None,) * 8
    if not ctx.saved:
        raise LapsValueError(
            message("similarity", "save_for_backward is False", "True for the backward pass", "a gradient")
        )
    if grad_scores is None:
        assert grad_kept_fraction is not None
        grad_scores = torch.zeros_like(grad_kept_fraction)
    inputs = ctx.saved_tensors
    prefix, keep_prob, mask = inputs[4:7]
    patches_, words_, logits_, prefix_, keep_prob_, mask_ = torch.ops.laps.similarity_backward(
        *inputs, grad_scores, grad_kept_fraction, **ctx.options
    )
    return (
        patches_,
        words_,
        None,
        logits_,
        None if prefix is None else prefix_,
        None if keep_prob is None else keep_prob_,
        mask_ if mask is not None and mask.is_floating_point() else None,
        None,
    )


# ---- similarity_backward


def _backward_outputs(
    patches: Tensor,
    words: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """Unwritten gradients of the six floating inputs; of shape (0,) for an absent one and for a bool mask."""
    return tuple(
        patches.new_empty((0,))
        if tensor is None or not tensor.is_floating_point()
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (patches, words, logits, prefix, keep_prob, mask)
    )


def _similarity_backward_cpu(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    selection: Tensor,
    best_token: Tensor,
    best_word: Tensor,
    grad_scores: Tensor,
    grad_kept_fraction: Tensor | None,
    *,
    pairwise: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    outputs = _backward_outputs(patches, words, logits, prefix, keep_prob, mask)
    grad_patches, grad_words, grad_logits, grad_prefix, grad_keep_prob, grad_mask = outputs
    _laps.similarity_backward(
        native_tensor(patches),
        native_tensor(words),
        native_tensor(word_lengths),
        native_tensor(logits),
        native_tensor(prefix),
        native_tensor(keep_prob),
        native_tensor(mask),
        _seed_word(seed),
        native_options(**options),
        pairwise,
        torch.get_num_threads(),
        native_tensor(selection),
        native_tensor(best_token),
        native_tensor(best_word),
        native_tensor(grad_scores),
        native_tensor(grad_kept_fraction),
        grad_patches,
        grad_words,
        grad_logits,
        None if prefix is None else grad_prefix,
        None if keep_prob is None else grad_keep_prob,
        grad_mask if mask is not None and mask.is_floating_point() else None,
    )
    return outputs


def _similarity_backward_cuda(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    selection: Tensor,
    best_token: Tensor,
    best_word: Tensor,
    grad_scores: Tensor,
    grad_kept_fraction: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    # A backward pass under autocast would round what is summed here.
    with torch.autocast("cuda", enabled=False):
        gradients = cuda_backend.backward(
            cuda_backend.Inputs(
                patches, words, word_lengths, logits, prefix, keep_prob, mask, _seed_word(seed)
            ),
            cuda_backend.Options(**options),
            (selection, best_token, best_word),
            grad_scores,
            grad_kept_fraction,
        )
    return tuple(patches.new_empty((0,)) if gradient is None else gradient for gradient in gradients)


def _similarity_backward_fake(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *_: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _backward_outputs(patches, words, logits, prefix, keep_prob, mask)


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
    raise LapsTypeError(
        message(
            "similarity",
            "the gradient has no gradient of its own",
            "one backward pass",
            "a second one through a gradient made with create_graph=True",
        )
    )


# ---- max_sim


def _max_sim_cpu(patches: Tensor, words: Tensor, word_lengths: Tensor) -> Tensor:
    scores = _max_sim_fake(patches, words, word_lengths)
    _laps.max_sim(
        native_tensor(patches),
        native_tensor(words),
        native_tensor(word_lengths),
        torch.get_num_threads(),
        scores,
    )
    return scores


def _max_sim_fake(patches: Tensor, words: Tensor, word_lengths: Tensor) -> Tensor:
    return patches.new_empty((patches.shape[0], words.shape[0]))


def _max_sim_has_no_gradient(ctx: Any, _: Tensor) -> tuple[None, ...]:
    raise LapsTypeError(
        message(
            "max_sim",
            "the native operator has no gradient",
            "laps.functional.max_sim, which chooses the torch backend where one is needed",
            "torch.ops.laps.max_sim",
        )
    )


# ---- autocast


def _autocast(device: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator in float32: half-precision sums over hundreds of patches would lose the ranking.

    By hand because `torch.library.register_autocast` takes no operator with keyword arguments.
    """

    def kernel(*inputs: Any, **options: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*(x.float() if _is_half(x) else x for x in inputs), **options)

    return kernel


def _autocast_cuda(patches: Tensor, words: Tensor, *inputs: Any, **options: Any) -> Any:
    """The kernels sum in float32 whatever the factors are, so the features keep the dtype that they have."""
    with torch.autocast("cuda", enabled=False):
        if patches.dtype != words.dtype:
            patches, words = patches.float(), words.float()
        lengths, logits, prefix, *rest = inputs
        prefix = None if prefix is None else prefix.to(patches.dtype)
        return torch.ops.laps.similarity(patches, words, lengths, logits, prefix, *rest, **options)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


# ---- registration

_LIBRARY.impl("similarity", _similarity_cpu, "CPU")
_LIBRARY.impl("similarity_backward", _similarity_backward_cpu, "CPU")
_LIBRARY.impl("similarity", _similarity_cuda, "CUDA")
_LIBRARY.impl("similarity_backward", _similarity_backward_cuda, "CUDA")
_LIBRARY.impl("max_sim", _max_sim_cpu, "CPU")
torch.library.register_fake("laps::similarity", _similarity_fake, lib=_LIBRARY)
torch.library.register_fake("laps::similarity_backward", _similarity_backward_fake, lib=_LIBRARY)
torch.library.register_fake("laps::max_sim", _max_sim_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "laps::similarity", _similarity_autograd, setup_context=_similarity_setup, lib=_LIBRARY
)
torch.library.register_autograd("laps::similarity_backward", _no_second_derivative, lib=_LIBRARY)
torch.library.register_autograd("laps::max_sim", _max_sim_has_no_gradient, lib=_LIBRARY)
_LIBRARY.impl("similarity", _autocast("cpu", torch.ops.laps.similarity), "AutocastCPU")
_LIBRARY.impl("max_sim", _autocast("cpu", torch.ops.laps.max_sim), "AutocastCPU")
_LIBRARY.impl("similarity", _autocast_cuda, "AutocastCUDA")
_LIBRARY.impl("max_sim", _autocast("cuda", torch.ops.laps.max_sim), "AutocastCUDA")
