"""The operators work wherever PyTorch takes operators: autograd, torch.compile, autocast, checkpointing."""

from __future__ import annotations

import shutil
from typing import Any

import laps
import pytest
import torch
from laps import functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

FORMS = ("released", "prefix", "paper", "paper_top_k", "bool_mask", "float_mask")
FLOATS = ("patches", "words", "logits", "prefix", "keep_prob", "mask")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def make(
    form: str,
    *,
    pairwise: bool = False,
    dtype: torch.dtype = torch.float64,
    images: int = 2,
    captions: int = 3,
    requires_grad: tuple[str, ...] = FLOATS,
) -> dict[str, Any]:
    """Arguments of `laps.functional.similarity` for one form of the method."""
    generator = torch.Generator().manual_seed(0)
    captions, n, c, words, tokens = images if pairwise else captions, 9, 6, 5, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return (0.05 + 0.9 * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    pairs = (images,) if pairwise else (images, captions)
    arguments: dict[str, Any] = {
        "patches": normal(images, n, c),
        "words": normal(captions, words, c),
        "word_lengths": torch.tensor([5, 1, 3, 4, 2]).repeat(3)[:captions],
        "logits": normal(images, n, tokens),
        "selection_ratio": 0.5,
    }
    if form == "prefix":
        arguments["prefix"] = normal(images, 2, c)
    if form.startswith("paper"):
        arguments["keep_prob"] = uniform(images, n)
        arguments["seed"] = torch.tensor(7) if form == "paper" else None
    if form == "float_mask":
        arguments["mask"] = uniform(*pairs, n)
    if form == "bool_mask":
        arguments["mask"] = uniform(*pairs, n) > 0.4
    for name in requires_grad:
        if name in arguments and arguments[name].is_floating_point():
            arguments[name].requires_grad_()
    return arguments


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}


def call(arguments: dict[str, Any], *, pairwise: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    function = F.similarity_pairwise if pairwise else F.similarity
    return function(**arguments, **options, return_kept_fraction=True)


def loss(scores: Tensor, kept_fraction: Tensor) -> Tensor:
    """Weighs every pair differently, so that gradients cannot land on the wrong one unnoticed."""
    weights = torch.arange(1, scores.numel() + 1, dtype=scores.dtype).view_as(scores)
    return (weights * scores).sum() + (weights.sqrt() * kept_fraction).sum()


def gradients(arguments: dict[str, Any], *, pairwise: bool = False, **options: Any) -> dict[str, Tensor]:
    inputs = leaves(arguments)
    total = loss(*call(arguments, pairwise=pairwise, **options))
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))


def operator_arguments(
    arguments: dict[str, Any], *, pairwise: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("patches", "words", "word_lengths", "logits", "prefix", "keep_prob", "mask", "seed")
    options = {"selection_ratio": arguments["selection_ratio"], "pairwise": pairwise}
    return tuple(arguments.get(name) for name in names), options


every_form = pytest.mark.parametrize("form", FORMS)
both_shapes = pytest.mark.parametrize("pairwise", [False, True], ids=["all_pairs", "pairwise"])


@every_form
@both_shapes
def test_similarity_passes_opcheck(form: str, pairwise: bool) -> None:
    args, options = operator_arguments(make(form, pairwise=pairwise), pairwise=pairwise)
    torch.library.opcheck(torch.ops.laps.similarity.default, args, options, test_utils=OPCHECKS)


def test_similarity_passes_opcheck_without_saved_tensors() -> None:
    args, options = operator_arguments(make("prefix", requires_grad=()), pairwise=False)
    options["save_for_backward"] = False
    torch.library.opcheck(torch.ops.laps.similarity.default, args, options, test_utils=OPCHECKS)


@every_form
@both_shapes
def test_similarity_backward_passes_opcheck(form: str, pairwise: bool) -> None:
    arguments = make(form, pairwise=pairwise, requires_grad=())
    args, options = operator_arguments(arguments, pairwise=pairwise)
    scores, kept_fraction, *saved = torch.ops.laps.similarity(*args, **options)
    soft = form.startswith("paper") or form == "float_mask"
    grads = torch.randn_like(scores), torch.randn_like(kept_fraction) if soft else None
    torch.library.opcheck(
        torch.ops.laps.similarity_backward.default, (*args, *saved, *grads), options, test_utils=OPCHECKS
    )


def join(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same input with the prefix tokens in front of the patches."""
    prefix, patches = arguments["prefix"].detach(), arguments["patches"].detach()
    tokens = torch.cat([prefix, patches], dim=1).requires_grad_()
    return arguments | {"patches": tokens, "prefix": prefix.shape[1]}


@both_shapes
def test_joined_tokens_pass_opcheck(pairwise: bool) -> None:
    arguments = join(make("prefix", pairwise=pairwise))
    args, options = operator_arguments(arguments | {"prefix": None}, pairwise=pairwise)
    options["num_prefix_tokens"] = arguments["prefix"]
    torch.library.opcheck(torch.ops.laps.similarity.default, args, options, test_utils=OPCHECKS)


@pytest.mark.parametrize("count", [-1, 8, 30])
def test_leading_prefix_rows_that_do_not_fit_are_refused(count: int) -> None:
    arguments = make("released", requires_grad=())
    args, options = operator_arguments(arguments, pairwise=False)
    count = count if count != 8 else arguments["patches"].shape[1]
    with pytest.raises(laps.LapsValueError, match="num_prefix_tokens do not fit"):
        torch.ops.laps.similarity(*args, **options, num_prefix_tokens=count)


@both_shapes
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_joined_tokens_score_and_learn_as_two_tensors_do(backend: str, pairwise: bool) -> None:
    apart = make("prefix", pairwise=pairwise)
    joined = join(apart)
    scores, _ = call(apart, pairwise=pairwise, backend=backend)
    assert torch.equal(call(joined, pairwise=pairwise, backend=backend)[0], scores)
    expected = gradients(apart, pairwise=pairwise, backend=backend)
    actual = gradients(joined, pairwise=pairwise, backend=backend)
    both = torch.cat([expected.pop("prefix"), expected["patches"]], dim=1)
    assert torch.equal(actual.pop("patches"), both)
    assert actual.keys() == expected.keys() - {"patches"}
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name])


def test_max_sim_passes_opcheck() -> None:
    arguments = make("released", requires_grad=())
    args = tuple(arguments[name] for name in ("patches", "words", "word_lengths"))
    torch.library.opcheck(torch.ops.laps.max_sim.default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        # Without the fused token, whose weights e^s depend on patches and words but pass no gradient.
        ("released", ("patches", "words", "logits")),
        ("prefix", ("patches", "words", "logits", "prefix")),
        ("bool_mask", ("patches", "words", "logits")),
        ("float_mask", ("patches", "words", "logits", "mask")),
    ],
)
@both_shapes
def test_gradients_are_those_of_finite_differences(form: str, names: tuple[str, ...], pairwise: bool) -> None:
    arguments = make(form, pairwise=pairwise, requires_grad=names)
    assert tuple(leaves(arguments)) == names

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = arguments | dict(zip(names, tensors, strict=True))
        scores, kept_fraction = call(changed, pairwise=pairwise, fusion=False, backend="native")
        return (scores, kept_fraction) if "mask" in names else (scores,)

    assert gradcheck(function, tuple(leaves(arguments).values()))


@pytest.mark.parametrize("form", ["released", "prefix", "bool_mask", "float_mask"])
def test_gradients_through_the_fused_token_are_those_of_finite_differences(form: str) -> None:
    names = tuple(name for name in ("logits", "prefix", "mask") if name in leaves(make(form)))
    arguments = make(form, requires_grad=names)

    def function(*tensors: Tensor) -> Tensor:
        return call(arguments | dict(zip(names, tensors, strict=True)), backend="native")[0]

    assert gradcheck(function, tuple(leaves(arguments).values()))


@every_form
@both_shapes
def test_gradients_equal_those_of_the_torch_backend(form: str, pairwise: bool) -> None:
    arguments = make(form, pairwise=pairwise)
    native = gradients(arguments, pairwise=pairwise, backend="native")
    for name, expected in gradients(arguments, pairwise=pairwise, backend="torch").items():
        torch.testing.assert_close(native[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FLOATS)
def test_one_input_alone_can_require_a_gradient(name: str) -> None:
    form = {"prefix": "prefix", "keep_prob": "paper", "mask": "float_mask"}.get(name, "prefix")
    alone = gradients(make(form, requires_grad=(name,)), backend="native")
    assert list(alone) == [name]
    torch.testing.assert_close(alone[name], gradients(make(form), backend="native")[name])


@pytest.mark.parametrize("form", ["paper", "float_mask"])
def test_kept_fraction_alone_has_a_gradient(form: str) -> None:
    name = "keep_prob" if form == "paper" else "mask"
    arguments = make(form)
    kept_fraction = call(arguments, backend="native")[1]
    expected = call(arguments, backend="torch")[1]
    (native,) = torch.autograd.grad(kept_fraction.sum(), arguments[name])
    (portable,) = torch.autograd.grad(expected.sum(), arguments[name])
    torch.testing.assert_close(native, portable)
    assert native.abs().sum() > 0


@pytest.mark.parametrize("form", ["released", "bool_mask"])
def test_kept_fraction_of_a_hard_selection_is_a_constant(form: str) -> None:
    scores, kept_fraction = call(make(form), backend="native")
    assert scores.requires_grad
    assert not kept_fraction.requires_grad


def test_a_second_derivative_is_refused() -> None:
    arguments = make("paper")
    inputs = list(leaves(arguments).values())
    first = torch.autograd.grad(loss(*call(arguments, backend="native")), inputs, create_graph=True)
    with pytest.raises(laps.LapsError, match="similarity: the gradient has no gradient"):
        torch.autograd.grad(first[0].square().sum(), inputs)


def test_max_sim_operator_refuses_a_gradient() -> None:
    arguments = make("released")
    scores = torch.ops.laps.max_sim(*(arguments[name] for name in ("patches", "words", "word_lengths")))
    with pytest.raises(laps.LapsError, match="max_sim: the native operator has no gradient"):
        scores.sum().backward()


def test_nothing_is_saved_when_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    original = laps.ops._laps.similarity_forward
    monkeypatch.setattr(
        laps.ops._laps, "similarity_forward", lambda *args: (saved.append(args[-3:]), original(*args))
    )
    call(make("released", requires_grad=()), backend="native")
    with torch.no_grad():
        call(make("released"), backend="native")
    assert saved == [(None, None, None)] * 2
    call(make("released"), backend="native")
    assert all(tensor is not None for tensor in saved[2])


def test_a_gradient_without_saved_tensors_is_refused() -> None:
    args, options = operator_arguments(make("released"), pairwise=False)
    scores, *_ = torch.ops.laps.similarity(*args, **options, save_for_backward=False)
    with pytest.raises(laps.LapsError, match="save_for_backward is False"):
        scores.sum().backward()


@every_form
def test_strides_do_not_matter(form: str) -> None:
    plain = make(form)
    strided = dict(plain)
    for name, tensor in plain.items():
        if isinstance(tensor, Tensor) and tensor.dim():
            # Every second element of the last axis of something larger, transposed.
            wide = (
                tensor.detach().repeat_interleave(2, dim=-1).mT.contiguous().mT if tensor.dim() > 1 else None
            )
            strided[name] = (wide if wide is not None else tensor.repeat_interleave(2))[..., ::2]
            assert not strided[name].is_contiguous()
            assert torch.equal(strided[name], tensor)
            strided[name].requires_grad_(tensor.requires_grad)
    for a, b in zip(call(strided, backend="native"), call(plain, backend="native"), strict=True):
        assert torch.equal(a, b)
    expected = gradients(plain, backend="native")
    for name, gradient in gradients(strided, backend="native").items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("form", ["paper", "float_mask"])
def test_gradients_of_expanded_outputs_arrive(form: str) -> None:
    # sum() sends a gradient with stride 0 into the operator.
    arguments = make(form)
    scores, kept_fraction = call(arguments, backend="native")
    expected = torch.autograd.grad(
        (torch.ones_like(scores) * scores).sum() + (torch.ones_like(scores) * kept_fraction).sum(),
        arguments["patches"],
        retain_graph=True,
    )
    assert torch.equal(
        torch.autograd.grad(scores.sum() + kept_fraction.sum(), arguments["patches"])[0], expected[0]
    )


@every_form
@pytest.mark.parametrize("requires_grad", [True, False], ids=["with_gradient", "without_gradient"])
def test_compiles_to_one_graph(form: str, requires_grad: bool) -> None:
    torch.compiler.reset()
    arguments = make(form, requires_grad=FLOATS if requires_grad else ())
    compiled = torch.compile(
        lambda **kwargs: call(kwargs, backend="native"), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(compiled(**arguments), call(arguments, backend="native"), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    if requires_grad:
        inputs = list(leaves(arguments).values())
        expected = gradients(arguments, backend="native")
        actual = torch.autograd.grad(loss(*compiled(**arguments)), inputs)
        for gradient, wanted in zip(actual, expected.values(), strict=True):
            assert torch.equal(gradient, wanted)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    arguments = make("paper")
    compiled = torch.compile(lambda **kwargs: call(kwargs, backend="native")[0], fullgraph=True)
    scores = compiled(**arguments)
    assert torch.equal(scores, call(arguments, backend="native")[0])
    (gradient,) = torch.autograd.grad(scores[0, 0], arguments["keep_prob"])
    (expected,) = torch.autograd.grad(call(arguments, backend="native")[0][0, 0], arguments["keep_prob"])
    torch.testing.assert_close(gradient, expected)


def test_one_graph_serves_all_sizes_and_seeds() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda **kwargs: call(kwargs, backend="native"), fullgraph=True, dynamic=True, backend=counter
    )
    graphs = []
    # No two sizes are equal in the first call, or torch would take them for the same.
    for images, captions, seed in ((7, 8, 7), (2, 5, 8), (4, 4, 9)):
        arguments = make("paper", images=images, captions=captions) | {"seed": torch.tensor(seed)}
        for a, b in zip(compiled(**arguments), call(arguments, backend="native"), strict=True):
            assert torch.equal(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_scores_in_float32(dtype: torch.dtype) -> None:
    arguments = make("prefix", dtype=dtype)
    args, options = operator_arguments(arguments, pairwise=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct = torch.ops.laps.similarity(*args, **options)[0]
        scores, _ = call(arguments, backend="native")
        max_sim = torch.ops.laps.max_sim(*args[:3])
    assert direct.dtype == scores.dtype == max_sim.dtype == torch.float32
    float32 = {
        k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()
    }
    assert torch.equal(scores, call(float32, backend="native")[0])
    assert torch.equal(direct, scores)
    assert {x.dtype for x in gradients(arguments, backend="native").values()} == {dtype}


def test_autocast_compiles() -> None:
    torch.compiler.reset()
    arguments = make("prefix", dtype=torch.bfloat16)

    def function(**kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            args, options = operator_arguments(kwargs, pairwise=False)
            return torch.ops.laps.similarity(*args, **options)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), function(**arguments))
    inputs = list(leaves(arguments).values())
    actual = torch.autograd.grad(compiled(**arguments)[0, 0], inputs)
    for gradient, expected in zip(
        actual, torch.autograd.grad(function(**arguments)[0, 0], inputs), strict=True
    ):
        assert torch.equal(gradient, expected)


def test_autocast_leaves_float64_alone() -> None:
    arguments = make("released", requires_grad=())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = call(arguments, backend="native")
    assert torch.equal(scores, call(arguments, backend="native")[0])
    assert scores.dtype == torch.float64


@every_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(form: str, use_reentrant: bool) -> None:
    arguments = make(form)
    inputs = leaves(arguments)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(arguments | dict(zip(inputs, tensors, strict=True)), backend="native")

    total = loss(*checkpoint(function, *inputs.values(), use_reentrant=use_reentrant))
    total.backward()
    for name, expected in gradients(make(form), backend="native").items():
        assert torch.equal(arguments[name].grad, expected)


def test_seeds_of_all_sixty_four_bits_are_told_apart() -> None:
    arguments = make("paper", requires_grad=())
    scores = [call(arguments | {"seed": seed}, backend="native")[0] for seed in (1, 2**63 + 1, 2**64 - 1, -1)]
    assert not torch.equal(scores[0], scores[1])
    assert torch.equal(scores[2], scores[3])
    assert torch.equal(scores[0], call(arguments | {"seed": torch.tensor(1)}, backend="native")[0])
