"""Calls of the CUDA backend on drawn features, and what the CPU says to them: emulated or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from laps.cuda_backend import Inputs, Options
from torch import Tensor

GRADIENTS = ("patches", "words", "logits", "prefix", "keep_prob", "mask")
KINDS = ("scores", "keep_prob", "gumbel", "topk", "mask", "soft_mask")
TOLERANCE = {torch.float32: (1e-6, 5e-6), torch.float16: (2e-3, 6e-3), torch.bfloat16: (1e-2, 5e-2)}


@dataclass
class Case:
    inputs: Inputs
    options: Options

    @property
    def element(self) -> torch.dtype:
        return self.inputs.patches.dtype


def make(
    kind: str = "scores",
    element: torch.dtype = torch.float32,
    *,
    images: int = 3,
    patches: int = 20,
    channels: int = 16,
    texts: int = 4,
    length: int = 7,
    aggregated: int = 5,
    prefix: int = 1,
    joined: bool = False,
    pairwise: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    texts = images if pairwise else texts
    tokens = (normal(images, patches, channels) + 0.3).to(element)
    leading = normal(images, prefix, channels).to(element) if prefix else None
    shape = (images, patches) if pairwise else (images, texts, patches)
    mask = None
    if kind == "mask":
        mask = uniform(*shape) < 0.5
        mask[..., 0] = True
    elif kind == "soft_mask":
        mask = uniform(*shape) * (uniform(*shape) < 0.7)
        mask[..., 0] = 1.0
    if joined:
        assert leading is not None
        tokens, leading = torch.cat([leading, tokens], dim=1), None
    inputs = Inputs(
        patches=tokens,
        words=normal(texts, length, channels).to(element),
        word_lengths=torch.randint(1, length + 1, (texts,), generator=generator),
        logits=normal(images, patches, aggregated),
        prefix=leading,
        keep_prob=uniform(images, patches) if kind in ("keep_prob", "gumbel", "topk") else None,
        mask=mask,
        seed=17 if kind in ("gumbel", "topk") else None,
    )
    options.setdefault("sampling", "topk" if kind == "topk" else "gumbel")
    options.setdefault("selection_ratio", 0.5)
    return Case(inputs, Options(pairwise=pairwise, num_prefix_tokens=prefix if joined else 0, **options))


def wide(tensor: Tensor | None) -> Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def arguments(case: Case) -> tuple[list[Any], dict[str, Any]]:
    """The same call for the CPU's operators, in float64."""
    i, o = case.inputs, case.options
    seed = None if i.seed is None else torch.tensor(i.seed)
    tensors = [i.patches, i.words, i.word_lengths, i.logits, i.prefix, i.keep_prob, i.mask]
    names = ("selection_ratio", "directions", "direction_reduction", "negative_slope", "fusion", "pairwise")
    names += ("language_context", "attention_weight", "score", "sampling", "temperature", "num_prefix_tokens")
    return [*map(wide, tensors), seed], {name: getattr(o, name) for name in names}


def selected(bits: Tensor, patches: int) -> Tensor:
    """Selection bits (..., ceil(N / 8)) as bool (..., N)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :patches].bool()


def check(
    case: Case,
    forward: Callable[[Case], tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    degenerate: bool = False,
) -> None:
    """Compare with the CPU in float64.

    forward: the operator's five outputs. backward: takes the case, the three saved ones, the gradients of
    scores and of fractions. Gradients of `degenerate` sizes may vanish but for rounding.
    """
    scores, fraction, *saved = forward(case)
    tensors, options = arguments(case)
    score_tolerance, gradient_tolerance = TOLERANCE[case.element]
    if case.element != torch.float32 and case.inputs.mask is None and case.inputs.keep_prob is None:
        # Rounded scores may choose other patches where two are close: the same ones then, by mask.
        tensors[6] = selected(saved[0], case.inputs.logits.shape[1])
    expected, expected_fraction, *theirs = torch.ops.laps.similarity(*tensors, **options)
    torch.testing.assert_close(scores.double(), expected, atol=score_tolerance, rtol=0)
    torch.testing.assert_close(fraction.double(), expected_fraction, atol=1e-6, rtol=0)
    if case.element == torch.float32:
        torch.testing.assert_close(saved[0], theirs[0], atol=0, rtol=0)

    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(scores.shape, generator=generator) for _ in range(2)]
    # Their gradient at our arg-maxes: rounding may have made another match the best.
    wanted = torch.ops.laps.similarity_backward(*tensors, *saved, *(g.double() for g in grads), **options)
    found = backward(case, saved, grads[0], grads[1] if case.inputs.soft else None)
    # A gradient that vanishes, as that of the weights of a single patch, has no size of its own.
    least = (1.0 if degenerate else 0.1) * max(other.abs().max() for other in wanted if other.numel())
    for name, ours, other in zip(GRADIENTS, found, wanted, strict=True):
        if ours is not None:
            error = (ours.double() - other).abs().max() / max(least, other.abs().max())
            # Through the log-odds of s, whose digits 1 / (s (1 - s)) takes where s is near 0 or 1.
            tolerance = gradient_tolerance * (5 if name == "keep_prob" else 1)
            assert error < tolerance, f"{name}: {error}"
