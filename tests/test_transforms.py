"""What wraps tensors: other derivatives than backward(), torch.vmap, and layouts that have no strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laps
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from laps import functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LENGTHS = [5, 2, 1]
VARIANTS = {"released": {}, "paper": {"keep_prob": True, "seed": 3}, "soft mask": {"mask": True}}
variants = pytest.mark.parametrize("variant", VARIANTS)


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"patches": (2, 16, 8), "words": (3, 5, 8), "logits": (2, 16, 4)}
    return {name: torch.randn(*s, generator=g, dtype=torch.float64) for name, s in shapes.items()}


def scorer(variant: str, backend: str | None = None) -> Callable[[Tensor], Tensor]:
    """Scores as a function of the patches alone."""
    options: dict[str, Any] = dict(VARIANTS[variant])
    g = torch.Generator().manual_seed(1)
    for name, shape in (("keep_prob", (2, 16)), ("mask", (2, 3, 16))):
        if options.get(name):
            options[name] = torch.rand(*shape, generator=g, dtype=torch.float64)
    given = inputs()

    def score(patches: Tensor) -> Tensor:
        scores: Tensor = F.similarity(
            patches, given["words"], LENGTHS, given["logits"], selection_ratio=0.5, backend=backend, **options
        )
        return scores

    return score


def backward(variant: str) -> Tensor:
    """The Jacobian (2, 3, 2, 16, 8) by one backward pass per score."""
    patches = inputs()["patches"].requires_grad_()
    scores = scorer(variant, "native")(patches)
    rows = [torch.autograd.grad(s, patches, retain_graph=True)[0] for s in scores.flatten()]
    return torch.stack(rows).view(2, 3, 2, 16, 8)


@variants
def test_functional_gradients_are_those_of_backward(variant: str) -> None:
    patches, expected = inputs()["patches"], backward(variant)
    gradient = torch.func.grad(lambda p: scorer(variant)(p).sum())(patches)
    torch.testing.assert_close(gradient, expected.sum((0, 1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(scorer(variant))(patches), expected, rtol=0, atol=1e-12)


@variants
def test_forward_mode_is_not_silently_zero(variant: str) -> None:
    patches = inputs()["patches"]
    tangent = torch.randn(patches.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = (backward(variant) * tangent).sum((2, 3, 4))
    _, along = torch.func.jvp(scorer(variant), (patches,), (tangent,))
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-12)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(scorer(variant)(forward_ad.make_dual(patches, tangent)))
        assert dual.tangent is not None
        torch.testing.assert_close(dual.tangent, expected, rtol=0, atol=1e-12)


def test_native_refuses_derivatives_that_it_does_not_have() -> None:
    patches = inputs()["patches"]
    message = 'backend is "native", which has a backward pass only'
    with pytest.raises(laps.LapsValueError, match=message):
        torch.func.jvp(scorer("released", "native"), (patches,), (patches,))
    with pytest.raises(laps.LapsValueError, match=message):
        torch.func.grad(lambda p: scorer("released", "native")(p).sum())(patches)
    with forward_ad.dual_level(), pytest.raises(laps.LapsValueError, match=message):
        scorer("released", "native")(forward_ad.make_dual(patches, patches))


@variants
def test_vmap_over_images_equals_a_loop(variant: str) -> None:
    several = torch.stack([inputs()["patches"], inputs()["patches"].flip(1)])
    score = scorer(variant)
    torch.testing.assert_close(
        torch.vmap(score)(several), torch.stack([score(p) for p in several]), rtol=0, atol=1e-12
    )


def test_vmap_over_what_looks_at_values_is_refused() -> None:
    several, words = torch.stack([inputs()["patches"]] * 2), inputs()["words"]
    for call in (
        scorer("released", "torch"),
        lambda p: F.select_patches(p, words, LENGTHS, 0.5),
        lambda p: F.align_patches_words(p[:, None].expand(-1, 3, -1, -1), words, LENGTHS)[0],
    ):
        with pytest.raises(laps.LapsTypeError, match=r"torch\.vmap cannot map what looks at values"):
            torch.vmap(call)(several)


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "_mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_without_strides_are_refused_by_name(layout: str) -> None:
    given = inputs()
    v, w, logits = given["patches"], given["words"], given["logits"]
    scores = torch.randn(2, 3, 16, dtype=torch.float64)
    head = laps.nn.LAPSHead(8, 16, num_prefix_tokens=0)
    for name, call in {
        "words": lambda x: F.similarity(v, x, LENGTHS, logits, selection_ratio=0.5),
        "patches": lambda x: F.max_sim(x, w, LENGTHS),
        "logits": lambda x: F.calibrate_patches(v, x, scores > 0, scores),
        "tokens": lambda x: F.align_patches_words(x, w, LENGTHS),
        "image_tokens": lambda x: head(x, w, LENGTHS),
        "word_tokens": lambda x: head(v.float(), x, LENGTHS),
    }.items():
        with pytest.raises(laps.LapsTypeError, match=f"{name} is not dense .*got .*{layout}"):
            call(LAYOUTS[layout](logits if name == "logits" else v))


def test_tensors_with_a_sign_to_apply_are_read_with_it() -> None:
    given = inputs()
    v, w, logits = given["patches"], given["words"], given["logits"]
    negated = torch._neg_view(v)
    assert negated.is_neg()
    s = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    lengths = torch._neg_view(-torch.tensor(LENGTHS))
    tokens = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    counts = torch._neg_view(-torch.full((2, 3), 3))
    for call in (
        lambda x: F.similarity(x, w, lengths, logits, selection_ratio=0.5),
        lambda x: F.select_patches(x, w, lengths, 0.5),
        lambda x: F.selection_scores(x, w, lengths),
        lambda x: F.calibrate_patches(x, logits, s > 0, s)[0],
        lambda x: F.max_sim(x, w, lengths),
    ):
        assert torch.equal(call(negated), call(-v))
        assert not torch.equal(call(negated), call(v))
    for call in (
        lambda x: F.calibrate_patches(v, logits, s > 0, x)[0],
        lambda x: F.calibrate_patches(v, logits, s > 0, s, prefix=x[:, :, :8])[0],
    ):
        assert torch.equal(call(torch._neg_view(s)), call(-s))
    scores, alignment = F.align_patches_words(torch._neg_view(tokens), w, lengths, token_counts=counts)
    expected = F.align_patches_words(-tokens, w, LENGTHS, token_counts=torch.full((2, 3), 3))
    assert torch.equal(scores, expected[0])
    assert torch.equal(alignment, expected[1])


def test_fake_tensors_beside_a_real_head_are_refused() -> None:
    head = laps.nn.LAPSHead(8, 16, num_prefix_tokens=0)
    with FakeTensorMode() as mode:
        v, w = mode.from_tensor(torch.ones(2, 16, 8)), mode.from_tensor(torch.ones(3, 5, 8))
    with pytest.raises(
        laps.LapsTypeError, match="LAPSHead: image_tokens is a FakeTensor, but the head is none"
    ):
        head(v, w, LENGTHS)
