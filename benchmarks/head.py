"""The head beside the per-caption loop, batched PyTorch and torch.compile: time, memory, FLOP/s.

    python -m benchmarks.head                      # all shapes; writes benchmarks/results/head.json
    python -m benchmarks.head --shape vit-224      # one shape; writes a file only with --output
    python -m benchmarks.head --quick              # two repetitions, no memory

How it is measured. All forms run in one process on the same inputs with the same weights, in turns, so that a
slow moment of the machine hits all of them; figures are medians. "Step" is forward and backward, with
gradients for image tokens, words and the aggregation network. Peak extra memory comes from a fresh process
for each form: the highest resident memory during the call less the resident memory before it, after a call at
a tiny shape has loaded what is loaded at first use (for torch.compile: after a call at the same shape, so
that compiling does not count).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import laps
import torch
from laps._loop import published_loop
from torch import Tensor

from benchmarks import machine
from benchmarks.shapes import SHAPES, Batch, Shape, make_batch, network_flops, similarity_flops

FORMS = ("loop", "torch", "compile", "laps")
OURS = "laps"
# For every caption the loop's autograd keeps about this many tensors of the size of the kept patches.
LOOP_COPIES = 6

Scores = Callable[[Batch], Tensor]


# ---- the forms


def make_head(shape: Shape, backend: str) -> laps.nn.LAPSHead:
    """The head of one backend; the weights are the same for every call."""
    torch.manual_seed(0)
    return laps.nn.LAPSHead(
        shape.channels,
        shape.num_patches,
        selection_ratio=shape.selection_ratio,
        aggregation_ratio=shape.aggregation_ratio,
        num_prefix_tokens=shape.num_prefix_tokens,
        backend=backend,
    )


def make_form(name: str, shape: Shape) -> tuple[Scores, torch.nn.Module]:
    """One way of computing the scores of a batch, and the module whose weights it uses."""
    head = make_head(shape, "native" if name == OURS else "torch")
    if name == "loop":

        def loop(batch: Batch) -> Tensor:
            return published_loop(
                batch.images,
                batch.words,
                batch.lengths,
                head.aggregation.logits,
                selection_ratio=shape.selection_ratio,
                num_prefix_tokens=shape.num_prefix_tokens,
            )

        return loop, head
    call = torch.compile(head, dynamic=False) if name == "compile" else head
    return lambda batch: call(batch.images, batch.words, batch.lengths), head


def forward(scores: Scores, batch: Batch) -> None:
    """One forward pass without autograd."""
    with torch.no_grad():
        scores(batch)


def step(scores: Scores, batch: Batch, module: torch.nn.Module) -> None:
    """One forward and backward pass into fresh gradients."""
    batch.images.grad = batch.words.grad = None
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(scores(batch), batch.grad)


def make_inputs(shape: Shape, images: int, captions: int, requires_grad: bool = True) -> Batch:
    """A batch whose image tokens and words want gradients."""
    batch = make_batch(shape, images, captions)
    batch.images.requires_grad_(requires_grad)
    batch.words.requires_grad_(requires_grad)
    return batch


def similarity_alone(shape: Shape, batch: Batch) -> Callable[[], object]:
    """`laps.functional.similarity` on given logits: the part whose operations `similarity_flops` counts."""
    head = make_head(shape, "native")
    with torch.no_grad():
        patches = batch.images[:, shape.num_prefix_tokens :].contiguous()
        prefix = batch.images[:, : shape.num_prefix_tokens].contiguous() if shape.num_prefix_tokens else None
        logits = head.aggregation.logits(patches)
        words = batch.words.detach()
    return lambda: laps.functional.similarity(
        patches,
        words,
        batch.lengths,
        logits,
        selection_ratio=shape.selection_ratio,
        prefix=prefix,
        backend="native",
    )


def matrix_product(shape: Shape, batch: Batch) -> Callable[[], object]:
    """`torch.mm` at the shape of P: every patch of every image with every word."""
    left = torch.randn(len(batch.images) * shape.num_patches, shape.channels)
    right = torch.randn(shape.channels, batch.total_words)
    out = torch.empty(len(left), batch.total_words)
    return lambda: torch.mm(left, right, out=out)


# ---- time


def clock(call: Callable[[], object]) -> float:
    """The seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, `repetitions` rounds of all of them; quick calls run several times in a round.

    The call before the first round is not counted; one that takes over 2 s runs in every second round only.
    """
    first = {name: clock(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repetitions):
        for name, call in calls.items():
            if first[name] > 2.0 and turn % 2:
                continue
            seconds[name] += [clock(call) for _ in range(min(5, 1 + int(0.3 / first[name])))]
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    """The median with what it is the median of."""
    return {"median_s": statistics.median(seconds), "all_s": [float(f"{value:.4g}") for value in seconds]}


# ---- memory


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Fills {"bytes": highest resident memory inside the block less the one before it}. Linux only."""
    found: dict[str, int] = {}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield found
    found["bytes"] = max(0, resident("VmHWM") - before)


def measure_memory_here(shape: Shape, name: str, images: int, captions: int) -> dict[str, int]:
    """Peak extra memory of one form's forward pass and step. For a process that does nothing else."""
    scores, module = make_form(name, shape)
    warm = make_inputs(shape, images, captions) if name == "compile" else make_inputs(shape, 2, 2)
    forward(scores, warm)
    step(scores, warm, module)
    module.zero_grad(set_to_none=True)
    del warm

    batch = make_inputs(shape, images, captions)
    with peak_memory() as forward_peak:
        forward(scores, batch)
    with peak_memory() as step_peak:
        step(scores, batch, module)
    return {"forward_bytes": forward_peak["bytes"], "step_bytes": step_peak["bytes"]}


def measure_memory(shape_name: str, name: str, options: argparse.Namespace) -> dict[str, int]:
    """`measure_memory_here` in a fresh process; empty where the system cannot tell."""
    arguments = ["--memory-of", name, "--shape", shape_name]
    for option in ("images", "captions", "threads"):
        arguments += [f"--{option}", str(getattr(options, option))]
    return machine.memory_of_child("head", arguments, f"{name} at {shape_name}")


def fits(shape: Shape, options: argparse.Namespace) -> bool:
    """Whether a training step of the loop fits the memory that is free (true where that is unknown)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return loop_bytes(shape, options.images, options.captions) < free


def loop_bytes(shape: Shape, images: int, captions: int) -> int:
    """About what autograd keeps for the loop's training step."""
    return LOOP_COPIES * captions * images * shape.kept * shape.channels * 4


# ---- one shape


def measure(shape_name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape, printed as it comes."""
    shape = SHAPES[shape_name]
    batch = make_inputs(shape, options.images, options.captions)
    pairs = options.images * options.captions
    print(
        f"\n{shape.title}: N={shape.num_patches} C={shape.channels} k={shape.kept} N_c={shape.aggregated} "
        f"P={shape.num_prefix_tokens}, {options.images} images x {options.captions} captions, "
        f"{batch.total_words} words",
        flush=True,
    )
    names = [name for name in FORMS if name in options.forms]
    if "loop" in names and not fits(shape, options):
        needed = loop_bytes(shape, options.images, options.captions) / 1e9
        print(f"  the loop is left out: its training step needs about {needed:.0f} GB, more than is free")
        names.remove("loop")
    forms = {name: make_form(name, shape) for name in names}

    with torch.no_grad():
        expected = forms[names[0]][0](batch)
        differences = {
            name: (scores(batch) - expected).abs().max().item() for name, (scores, _) in forms.items()
        }
    if max(differences.values()) > 1e-4:
        raise AssertionError(f"the forms disagree by more than 1e-4: {differences}")

    def forward_of(name: str) -> Callable[[], object]:
        return lambda: forward(forms[name][0], batch)

    def step_of(name: str) -> Callable[[], object]:
        return lambda: step(forms[name][0], batch, forms[name][1])

    forward_calls: dict[str, Callable[[], object]] = {name: forward_of(name) for name in names}
    if OURS in names:
        forward_calls["similarity"] = similarity_alone(shape, batch)
    forward_calls["mm"] = matrix_product(shape, batch)
    forward_seconds = in_turns(forward_calls, options.repetitions)
    step_seconds = in_turns({name: step_of(name) for name in names}, options.repetitions)
    forward_calls.clear()

    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = {
            "forward": summary(forward_seconds[name]),
            "step": summary(step_seconds[name]),
            "difference": differences[name],
        }
        if options.memory:
            results[name] |= measure_memory(shape_name, name, options)
        print_form(name, results[name], results.get("loop"), pairs)

    flops = similarity_flops(shape, options.images, options.captions, batch.total_words)
    needed = sum(flops.values())
    alone = {name: summary(forward_seconds[name]) for name in ("similarity", "mm") if name in forward_seconds}
    mm_flops = 2 * options.images * shape.num_patches * shape.channels * batch.total_words
    rates = {"mm": mm_flops / alone["mm"]["median_s"]}
    if OURS in results:
        rates["similarity"] = needed / alone["similarity"]["median_s"]
        network = network_flops(shape, options.images)
        rates["head"] = (needed + network) / results[OURS]["forward"]["median_s"]
    for name, what in (
        ("similarity", "the fused similarity alone"),
        ("head", "the whole head, with its network"),
    ):
        if name in rates:
            share = rates[name] / rates["mm"]
            rate = f"{rates[name] / 1e9:.0f} GFLOP/s, {share:.0%} of torch.mm ({rates['mm'] / 1e9:.0f})"
            print(f"  {what}: {rate}")
    return {
        "shape": asdict(shape) | {"kept": shape.kept, "aggregated": shape.aggregated},
        "total_words": batch.total_words,
        "forms": results,
        **alone,
        "flops": flops,
        "network_flops": network_flops(shape, options.images),
        "flops_per_s": rates,
    }


def print_form(name: str, result: dict[str, Any], loop: dict[str, Any] | None, pairs: int) -> None:
    """One line about one form."""
    cells = [f"  {name:<8}"]
    for part in ("forward", "step"):
        seconds = result[part]["median_s"]
        ratio = f"{loop[part]['median_s'] / seconds:6.1f} x" if loop else ""
        cells.append(f"{part} {1e3 * seconds:8.1f} ms {1e6 * seconds / pairs:8.2f} us/pair {ratio}")
    if "step_bytes" in result:
        cells.append(f"memory {result['forward_bytes'] / 1e6:7.1f} / {result['step_bytes'] / 1e6:7.1f} MB")
    print("   ".join(cells), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this shape (repeatable)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="only these forms")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds, no memory")
    machine.add_options(parser, "head.json")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    if options.memory_of:
        [name] = options.shape
        print(
            json.dumps(measure_memory_here(SHAPES[name], options.memory_of, options.images, options.captions))
        )
        return 0

    if options.quick:
        options.repetitions, options.memory = 2, False
    full = not options.shape and not options.quick and options.memory and tuple(options.forms) == FORMS
    output = options.output or (machine.RESULTS / "head.json" if full else None)
    result = {
        "machine": machine.describe(),
        "settings": {
            "images": options.images,
            "captions": options.captions,
            "words": [8, 30],
            "repetitions": options.repetitions,
        },
        "shapes": {name: measure(name, options) for name in options.shape or SHAPES},
    }
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
