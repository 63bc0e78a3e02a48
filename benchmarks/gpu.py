"""The kernels on an NVIDIA GPU, beside the per-caption loop, batched PyTorch and torch.compile.

    python benchmarks/gpu.py --out DIR          # everything, about five minutes; writes DIR/gpu.json
    python benchmarks/gpu.py --only step        # this part anew; the others in gpu.json stay

How it is measured. All forms run in one process on the same random features with the same weights. Times are
medians of CUDA events around whole calls, Python included, after warm-up calls; memory is the highest that
torch's allocator has held during a call less what it held before. The ceilings, a copy and a matrix product,
are measured in the same run, on data far larger than the caches. What the loop would need for a whole
evaluation is extrapolated from a slice of it, and marked so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import laps
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.head import FORMS, Scores, make_form
from benchmarks.shapes import SHAPES, Batch, Shape, make_batch, similarity_flops

# Keeps what a part has measured so far.
Save = Callable[[dict[str, Any]], None]
# The evaluation takes the longest, and comes last.
PARTS = ("correct", "step", "model", "rerank", "evaluation")


# ---- measuring


def seconds(call: Callable[[], object], repetitions: int = 5, warm_up: int = 2) -> float:
    """The median time of a call on the device."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repetitions):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def memory(call: Callable[[], object]) -> int:
    """Bytes that a call needs beside what is there before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def time_and_memory(call: Callable[[], object], repetitions: int = 5) -> dict[str, Any]:
    """Both of a call."""
    return {"seconds": seconds(call, repetitions), "bytes": memory(call)}


def once(call: Callable[[], object]) -> dict[str, Any]:
    """Time and memory of one call, for what takes long; it must have been warmed up."""
    took: list[float] = []
    extra = memory(lambda: took.append(seconds(call, 1, 0)))
    return {"seconds": took[0], "bytes": extra}


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes per second of a copy, FLOP per second of a product of bf16 matrices."""
    elements, side = 2**30, 8192
    copy = _time_of_copy(elements)
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = seconds(lambda: a @ b, repetitions=10)
    return {"copy_bytes_per_s": 2 * 4 * elements / copy, "bf16_flops": 2 * side**3 / product}


def _time_of_copy(elements: int) -> float:
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source))


def cuda_batch(shape: Shape, images: int, captions: int, dtype: torch.dtype, grad: bool = False) -> Batch:
    """A batch on the device; lengths stay on the CPU."""
    batch = make_batch(shape, images, captions)
    moved = {
        name: getattr(batch, name).to("cuda", dtype).requires_grad_(grad) for name in ("images", "words")
    }
    return replace(batch, **moved, grad=batch.grad.cuda())


def make_forms(shape: Shape, names: Sequence[str] = FORMS) -> dict[str, tuple[Scores, torch.nn.Module]]:
    """Ways of computing the scores of a batch, each with the module whose weights it uses."""
    forms: dict[str, tuple[Scores, torch.nn.Module]] = {}
    for name in names:
        scores, head = make_form(name, shape)
        # In place, so that the form computes with the weights on the device.
        forms[name] = (scores, head.cuda())
    return forms


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not: a form that runs out of memory is a result."""
    try:
        return measure()
    except (RuntimeError, ImportError, laps.LapsError) as error:
        # After a fault of the device this fails too.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}


# ---- parts


def correct(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Largest differences to the torch backend in float64, of scores and of each gradient's largest entry."""
    result: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            result[f"{name} {str(dtype)[6:]}"] = attempt(partial(_difference, shape, dtype))
    return result


def _difference(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    p = shape.num_prefix_tokens
    batch = cuda_batch(shape, 12, 16, dtype)
    aggregated = shape.aggregated
    logits = torch.randn(12, shape.num_patches, aggregated, device="cuda")
    inputs = [batch.images.detach(), batch.words.detach(), logits]
    saved = torch.ops.laps.similarity(
        inputs[0], inputs[1], batch.lengths, inputs[2], None, None, None, None,
        selection_ratio=shape.selection_ratio, num_prefix_tokens=p,
    )  # fmt: skip
    bits = (saved[2][..., None] >> torch.arange(8, device="cuda", dtype=torch.uint8)) & 1
    mask = bits.flatten(-2)[..., : shape.num_patches].bool()

    def run(tensors: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        # The same selection for both: where two scores are closer than rounding, either is right.
        scores = laps.functional.similarity(
            leaves[0], leaves[1], batch.lengths, leaves[2],
            selection_ratio=shape.selection_ratio, prefix=p or None, mask=mask, backend=backend,
        )  # fmt: skip
        grad = torch.linspace(-1, 1, scores.numel(), device="cuda").view(scores.shape).to(scores.dtype)
        return scores.detach(), *torch.autograd.grad(scores, leaves, grad)

    ours, exact = run(inputs, "native"), run([x.double() for x in inputs], "torch")
    images, words, own_logits = (x.double().cpu() for x in inputs)
    own = torch.ops.laps.similarity(
        images, words, batch.lengths, own_logits, None, None, None, None,
        selection_ratio=shape.selection_ratio, num_prefix_tokens=p,
    )  # fmt: skip
    names = ("scores", "patches", "words", "logits")
    return {
        name: float((a.double() - b).abs().max() / (1.0 if name == "scores" else b.abs().max()))
        for name, a, b in zip(names, ours, exact, strict=True)
    } | {"selections_equal_to_cpu": float((own[2] == saved[2].cpu()).all(-1).double().mean())}


def evaluation(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """(a) COCO-5K: 5,000 images x 25,000 captions, features on the device."""
    images, captions = (500, 2500) if options.quick else (5000, 25_000)
    result: dict[str, Any] = {"images": images, "captions": captions}
    for name in ("vit-224", "swin-224"):
        shape = SHAPES[name]
        forms = make_forms(shape, ("loop", "torch", "laps"))
        entry: dict[str, Any] = {}
        for dtype in (torch.bfloat16, torch.float32):
            batch = cuda_batch(shape, images, captions, dtype)
            slice_ = cuda_batch(shape, min(images, 1000), 64, dtype)
            for form, (scores, head) in forms.items():
                head.to(dtype)
                whole = form == "laps"
                given = batch if whole else slice_

                def call(scores: Scores = scores, given: Batch = given) -> Tensor:
                    with torch.no_grad():
                        return scores(given)

                def measure(
                    given: Batch = given, few: Batch = slice_, whole: bool = whole, call: Any = call
                ) -> dict[str, Any]:
                    pairs = len(given.images) * len(given.words)
                    if whole:
                        call(given=few)
                        measured = once(call)
                    else:
                        measured = time_and_memory(call, 3)
                    whole_seconds = measured["seconds"] * images * captions / pairs
                    return {
                        "pairs": pairs, **measured, "whole_seconds": whole_seconds, "extrapolated": not whole
                    }  # fmt: skip

                entry[f"{form} {str(dtype)[6:]}"] = measured = attempt(measure)
                if whole and "seconds" in measured:
                    flops = similarity_flops(shape, images, captions, int(batch.lengths.sum()))
                    measured["flops_per_s"] = sum(flops.values()) / measured["seconds"]
                print(f"  {name} {form} {dtype}: {measured}", flush=True)
                save(result | {name: entry})
            del batch, slice_
            torch.cuda.empty_cache()
        result[name] = entry
    return result


def step(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """(b) Forward and backward of the head, ViT-224."""
    shape, result = SHAPES["vit-224"], {}
    for size in (64, 128) if options.quick else (64, 128, 256, 1024):
        names = FORMS if size == 64 else tuple(name for name in FORMS if name != "compile")
        for dtype in (torch.bfloat16, torch.float32):
            batch = cuda_batch(shape, size, size, dtype, grad=True)
            for form, (scores, head) in make_forms(shape, names).items():
                if form == "loop" and size > 256:
                    continue  # minutes, and more memory than there is
                head.to(dtype)

                def call(scores: Scores = scores, head: Any = head, batch: Batch = batch) -> None:
                    batch.images.grad = batch.words.grad = None
                    head.zero_grad(set_to_none=True)
                    found = scores(batch)
                    torch.autograd.backward(found, batch.grad.to(found.dtype))

                result[f"{size} {form} {str(dtype)[6:]}"] = measured = attempt(partial(time_and_memory, call))
                print(f"  step {size} {form} {dtype}: {measured}", flush=True)
            del batch
            torch.cuda.empty_cache()
    return result


def model(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """(c) A whole step of ViT-B/16 + BERT-base in bf16 autocast, with each form of the head."""
    size, result = 64, {}
    for form in FORMS:
        if options.quick and form == "compile":
            continue
        result[form] = measured = attempt(partial(_model_step, form, size, options.quick))
        print(f"  model {form}: {measured}", flush=True)
        torch.cuda.empty_cache()
    return {"batch": size, **result}


def _model_step(form: str, size: int, quick: bool) -> dict[str, Any]:
    # It needs transformers.
    from benchmarks import training

    built = training.make_model(quick).cuda()
    head = built.head
    assert isinstance(head, laps.nn.LAPSHead)
    head.backend = "native" if form == "laps" else "torch"
    optimizer = training.make_optimizer(built)
    batch = training.make_batch(built, size).to("cuda")
    scores: Any = training.make_form("loop" if form == "loop" else "laps", built)
    scores = torch.compile(scores, dynamic=False) if form == "compile" else scores

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            images = built.image_encoder(batch.pixel_values)
            words = built.text_encoder(batch.input_ids, batch.lengths)
            loss, _ = built.objective(scores(images, words, batch.lengths), batch.image_ids)
        loss.backward()
        optimizer.step()

    return time_and_memory(call)


def rerank(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """(d) One query against 1,000 images, features on the device."""
    shape, result = SHAPES["vit-224"], {}
    batch = cuda_batch(shape, 1000, 1, torch.bfloat16)
    for form, (scores, head) in make_forms(shape, ("loop", "torch", "laps")).items():
        head.to(torch.bfloat16)

        def call(scores: Scores = scores) -> Tensor:
            with torch.no_grad():
                return scores(batch)

        result[form] = measured = attempt(partial(time_and_memory, call, 10))
        print(f"  rerank {form}: {measured}", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=machine.RESULTS, help="folder for gpu.json (default: results)"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeatable)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no GPU here", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    file = options.out / "gpu.json"
    result: dict[str, Any] = json.loads(file.read_text()) if options.only and file.exists() else {}
    result |= {
        "machine": machine.describe()
        | {"gpu": properties.name, "multiprocessors": properties.multi_processor_count},
        "ceilings": ceilings(),
    }
    print(result["ceilings"], flush=True)
    parts = {"correct": correct, "evaluation": evaluation, "step": step, "model": model, "rerank": rerank}
    for name in options.only or PARTS:
        print(name, flush=True)

        def save(measured: dict[str, Any], name: str = name) -> None:
            result[name] = measured
            machine.write(file, result)

        save(parts[name](options, save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
