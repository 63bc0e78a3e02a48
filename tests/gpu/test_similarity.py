"""The fused similarity on a GPU, beside the CPU in float64."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import _cuda_cases
import laps
import pytest
import torch
from _cuda_cases import KINDS, TOLERANCE, Case, arguments, make, selected
from laps import functional as F
from torch import Tensor

# N, N_c, P, C of the encoders in the paper's tables.
ENCODERS = {
    "vit-224": (196, 39, 1, 512),
    "vit-384": (576, 115, 1, 512),
    "swin-224": (49, 23, 0, 512),
    "clip-l": (256, 51, 1, 768),
}


def on_gpu(case: Case) -> list[Any]:
    i = case.inputs
    tensors = [i.patches, i.words, i.logits, i.prefix, i.keep_prob, i.mask]
    patches, words, logits, prefix, keep_prob, mask = (None if x is None else x.cuda() for x in tensors)
    seed = None if i.seed is None else torch.tensor(i.seed)
    return [patches, words, i.word_lengths, logits, prefix, keep_prob, mask, seed]


def options_of(case: Case) -> dict[str, Any]:
    return arguments(case)[1] | {"chunk": case.options.chunk}


def forward(case: Case) -> tuple[Tensor, ...]:
    outputs = torch.ops.laps.similarity(*on_gpu(case), **options_of(case))
    assert outputs[0].dtype == torch.float32
    return tuple(output.cpu() for output in outputs)


def backward(case: Case, saved: list[Tensor], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [None if x is None else x.cuda() for x in (*saved, *grads)]
    found = torch.ops.laps.similarity_backward(*on_gpu(case), *given, **options_of(case))
    return tuple(gradient.cpu() if gradient.numel() else None for gradient in found)


def check(case: Case, **how: Any) -> None:
    _cuda_cases.check(case, forward, backward, **how)


@pytest.mark.parametrize("pairwise", [False, True], ids=["all pairs", "pairwise"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("element", TOLERANCE, ids=str)
def test_scores_and_gradients(element: torch.dtype, kind: str, pairwise: bool) -> None:
    check(make(kind, element, pairwise=pairwise, channels=64))


@pytest.mark.parametrize("kind", ["scores", "gumbel"])
@pytest.mark.parametrize("element", TOLERANCE, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_of_the_encoders(encoder: str, element: torch.dtype, kind: str) -> None:
    patches, aggregated, prefix, channels = ENCODERS[encoder]
    sizes = {"patches": patches, "aggregated": aggregated, "prefix": prefix, "channels": channels}
    check(make(kind, element, images=5, texts=11, length=30, **sizes))


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sizes = {
        "images": draw(1, 9), "patches": draw(1, 130), "channels": draw(4, 90), "texts": draw(1, 20),
        "length": draw(1, 50), "aggregated": draw(1, 100), "prefix": draw(0, 4),
    }  # fmt: skip
    case = make(KINDS[seed % len(KINDS)], seed=seed, pairwise=seed % 5 == 0, **sizes)
    check(case, degenerate=True)


def test_largest_sizes() -> None:
    check(make(images=2, patches=1024, channels=1024, texts=3, aggregated=409, length=8))


@pytest.mark.parametrize("kind", KINDS)
def test_small_budgets_cut_the_work_into_chunks(kind: str) -> None:
    check(make(kind, images=5, texts=40, patches=33, aggregated=9, chunk=200_000))


@pytest.mark.parametrize("kind", ["scores", "gumbel"])
def test_the_same_numbers_in_every_run(kind: str) -> None:
    case = make(kind, images=40, texts=70, patches=196, channels=128, aggregated=39, length=20)
    first = forward(case)
    grads = torch.randn(first[0].shape)
    wanted = backward(case, list(first[2:]), grads, grads)
    for _ in range(3):
        again = forward(case)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        gradients = backward(case, list(first[2:]), grads, grads)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_opposed_patches_are_computed_exactly() -> None:
    case = make(patches=24, channels=48)
    patches = case.inputs.patches
    patches[:, 1::2] = -patches[:, ::2] + 1e-4 * patches[:, 1::2]
    case.inputs.logits.fill_(0.0)
    scores, _, *saved = forward(case)
    tensors, options = arguments(case)
    tensors[6] = selected(saved[0], 24)
    expected = torch.ops.laps.similarity(*tensors, **options)[0]
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_number_touches_its_own_pairs_only(kind: str) -> None:
    case = make(kind, images=4, texts=5)
    sound = forward(case)[0]
    case.inputs.patches[1, 2, 3] = math.nan
    case.inputs.words[2, 0, 0] = math.inf
    scores = forward(case)[0]
    bad = torch.zeros(4, 5, dtype=torch.bool)
    bad[1], bad[:, 2] = True, True
    assert torch.equal(scores.isnan(), bad)
    torch.testing.assert_close(scores[~bad], sound[~bad])


# ---- as functions and modules


def features(element: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    case = make(images=6, texts=8, patches=49, channels=64, aggregated=11, length=12)
    i = case.inputs
    assert i.prefix is not None
    tensors = [i.patches.to(element), i.words.to(element), i.word_lengths, i.logits]
    return tensors, {"prefix": i.prefix.to(element), "selection_ratio": 0.5}


def cuda(tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    patches, words, lengths, logits = tensors
    return [patches.cuda(), words.cuda(), lengths, logits.cuda()], options | {
        "prefix": options["prefix"].cuda()
    }


def test_functions_choose_the_kernels_and_agree_with_both_other_backends() -> None:
    tensors, options = features()
    on_cpu = F.similarity(*tensors, **options)
    tensors, options = cuda(tensors, options)
    ours = F.similarity(*tensors, **options, backend="native")
    assert torch.equal(F.similarity(*tensors, **options), ours)
    torch.testing.assert_close(ours.cpu(), on_cpu, atol=1e-5, rtol=0)
    torch.testing.assert_close(F.similarity(*tensors, **options, backend="torch"), ours, atol=1e-5, rtol=0)
    assert laps.info()["backends"]["cuda"] is True


def test_float64_takes_the_torch_backend() -> None:
    tensors, options = cuda(*features())
    tensors = [x.double() if x.is_floating_point() else x for x in tensors]
    options["prefix"] = options["prefix"].double()
    assert F.similarity(*tensors, **options).dtype == torch.float64
    with pytest.raises(laps.LapsValueError, match="native"):
        F.similarity(*tensors, **options, backend="native")


def head() -> tuple[laps.nn.LAPSHead, list[Tensor]]:
    torch.manual_seed(0)
    module = laps.nn.LAPSHead(embed_dim=64, num_patches=49, num_prefix_tokens=1, variant="paper")
    return module, [torch.randn(8, 50, 64), torch.randn(8, 12, 64), torch.randint(3, 13, (8,))]


def step(module: torch.nn.Module, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    images, words, lengths = tensors
    torch.manual_seed(3)  # The head draws the seed of its noise on the CPU.
    images, words = images.clone().requires_grad_(), words.clone().requires_grad_()
    scores = module(images, words, lengths)
    ids = torch.arange(len(images), device=images.device)
    laps.losses.hinge_loss(scores, ids, ids).backward()
    gradients = [parameter.grad.cpu() for parameter in module.parameters() if parameter.grad is not None]
    assert images.grad is not None
    assert words.grad is not None
    return scores.detach().cpu(), [images.grad.cpu(), words.grad.cpu(), *gradients]


def test_a_training_step_of_the_head_is_that_of_the_cpu() -> None:
    module, tensors = head()
    scores, gradients = step(module, tensors)
    module.zero_grad()
    on_gpu = [tensors[0].cuda(), tensors[1].cuda(), tensors[2]]
    found, ours = step(module.cuda(), on_gpu)
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=0)
    # The gradient of fc2.bias is zero but for rounding: each softmax takes no notice of a constant.
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item() + 1e-5 * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    module, tensors = head()
    module, tensors = module.cuda().eval(), [tensors[0].cuda(), tensors[1].cuda(), tensors[2]]
    expected = module(*tensors)
    with torch.autocast("cuda", dtype=dtype):
        scores = module(*(x.to(dtype) if x.is_floating_point() else x for x in tensors))
    assert scores.dtype == torch.float32
    # Rounded tokens choose other patches where two are close, which moves single scores by more.
    assert (scores - expected).abs().mean() < 5e-3
    torch.testing.assert_close(scores, expected, atol=1e-1, rtol=0)


def test_compile_with_the_whole_graph() -> None:
    module, tensors = head()
    module, tensors = module.cuda().eval(), [tensors[0].cuda(), tensors[1].cuda(), tensors[2].cuda()]
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), module(*tensors), atol=1e-5, rtol=0)


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    tensors, options = cuda(*features())
    patches, words, lengths, logits = tensors
    patches, words = patches.requires_grad_(), words.requires_grad_()
    lengths = lengths.cuda()  # Lengths on the CPU would have to be copied over.

    def run() -> tuple[Tensor, ...]:
        scores = F.similarity(patches, words, lengths, logits, **options)
        return scores, *torch.autograd.grad(scores.sum(), (patches, words))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        patches.copy_(torch.randn_like(patches))
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_side_stream_is_used() -> None:
    tensors, options = cuda(*features())
    expected = F.similarity(*tensors, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Were the kernel launched elsewhere, it would overtake these.
        large = torch.randn(8192, 8192, device="cuda")
        for _ in range(4):
            large = large @ large
        late = tensors[0] + 0 * large[:1, :1].nan_to_num(0, 0, 0).sum()
        scores = F.similarity(late, *tensors[1:], **options)
    stream.synchronize()
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensors, options = cuda(*features())
    expected = F.similarity(*tensors, **options)
    moved = [x.to("cuda:1") if x.is_cuda else x for x in tensors]
    options["prefix"] = options["prefix"].to("cuda:1")
    assert torch.equal(F.similarity(*moved, **options).cpu(), expected.cpu())


def test_opcheck() -> None:
    tensors, options = cuda(*features())
    patches, words, lengths, logits = tensors
    arguments = (patches.requires_grad_(), words.requires_grad_(), lengths, logits, options["prefix"])
    torch.library.opcheck(
        torch.ops.laps.similarity.default, (*arguments, None, None, None), {"selection_ratio": 0.5}
    )


def test_scratch_memory_keeps_to_its_budget() -> None:
    case = make(images=64, texts=256, patches=196, channels=512, aggregated=39, length=20)
    case = Case(case.inputs, replace(case.options, chunk=32 * 2**20))
    given = on_gpu(case)
    torch.ops.laps.similarity(*given, **options_of(case))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.laps.similarity(*given, **options_of(case), save_for_backward=False)
    extra = torch.cuda.max_memory_allocated() - before
    words = case.inputs.words.numel() * 4
    # All captions are prepared at once: their words twice, beside the budget.
    assert extra < 1.5 * 32 * 2**20 + 3 * words


@pytest.mark.parametrize("name", ["select_patches", "selection_scores", "max_sim"])
def test_single_stages_on_cuda_tensors(name: str) -> None:
    (patches, words, lengths, _), _ = features()
    ratio = (0.5,) if name == "select_patches" else ()
    expected = getattr(F, name)(patches, words, lengths, *ratio)
    found = getattr(F, name)(patches.cuda(), words.cuda(), lengths, *ratio)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch; from gpu import test_similarity as t; "
        "case = t.make('gumbel', torch.bfloat16, images=2, texts=3, patches=33, aggregated=20, length=18); "
        "out = t.forward(case); g = torch.randn(2, 3); t.backward(case, list(out[2:]), g, g)"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    # Of ours alone: all of torch's kernels would take too long.
    command += ["--kernel-name", "kernel_substring=similarity", sys.executable, "-c", code]
    # torch's own allocator would hide what lies past the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    if "not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
