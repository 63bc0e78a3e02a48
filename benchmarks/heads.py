"""Every similarity head beside its plain published form: time per pair, and memory.

    python -m benchmarks.heads                       # all heads; writes benchmarks/results/heads.json
    python -m benchmarks.heads --heads scan chan     # some of them; writes a file only with --output
    python -m benchmarks.heads --quick               # small sizes, one repetition, no memory, no file

How it is measured. Tokens are random, in the shape of ViT-B/16 at 224 pixels, float32; heads have random
weights, and are in eval mode. The clock starts at the features: what a head makes of images alone and of
captions alone is the same in both forms, and is timed by itself, as "sides". For LAPS it starts at the
tokens, because the published loop computes the aggregation network anew for each caption. Both forms take
turns in one process, and must have the same scores to 1e-4. "Step" is forward and backward of the sum of
the scores, with gradients for both sides and all weights. The published forms are those of
benchmarks.published_heads; heads whose score is one matrix product have no other form, and are timed once.

Peak extra memory comes from a fresh process for each form, as in benchmarks.head. The step of the published
form is left out where autograd would keep more than half of the memory that is free, for the backward pass
needs about as much again; one caption tells how much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from laps._loop import published_loop
from laps.features import ImageFeatures, TextFeatures
from laps.heads import build_head
from torch import Tensor

from benchmarks import machine
from benchmarks.evaluation import spread, take
from benchmarks.head import in_turns, peak_memory, summary
from benchmarks.published_heads import PUBLISHED
from benchmarks.shapes import SHAPES, Batch, Shape, make_batch

OURS, THEIRS, SIDES = "ours", "published", "sides"
SHAPE = SHAPES["vit-224"]
SMALL = Shape("small", num_patches=20, channels=32)
# Their score is one matrix product, in our form as in the published one.
ONE_FORM = ("vse", "clip", "gpo", "hrem")
# A row of the table: the head, and its options where they are not the default ones.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "laps": ("laps", {}),
    "vse": ("vse", {}),
    "clip": ("clip", {}),
    "gpo": ("gpo", {}),
    "hrem": ("hrem", {}),
    "chan": ("chan", {}),
    "tgdt": ("tgdt", {}),
    "scan": ("scan", {}),
    "scan-i2t": ("scan", {"direction": "i2t"}),
    "saf": ("saf", {}),
    "sgr": ("sgr", {}),
    "sgraf": ("sgraf", {}),
    "cpfean": ("cpfean", {}),
}

Scores = Callable[[], Tensor]


# ---- the forms


def make_head(row: str, shape: Shape) -> Any:
    """The head of one row in eval mode; the weights are the same for every call."""
    name, options = ROWS[row]
    if name == "laps":
        ratios = {key: getattr(shape, key) for key in ("selection_ratio", "aggregation_ratio")}
        options = options | ratios
    torch.manual_seed(0)
    return build_head(
        name,
        embed_dim=shape.channels,
        num_patches=shape.num_patches,
        num_prefix_tokens=shape.num_prefix_tokens,
        **options,
    ).eval()


def tensors(features: ImageFeatures | TextFeatures) -> list[Tensor]:
    """The floating tensors of features."""
    values = [getattr(features, field.name) for field in fields(features)]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def leaf(x: Tensor) -> Tensor:
    """The same numbers, which want a gradient."""
    return x.detach().requires_grad_()


def make_forms(head: Any, batch: Batch) -> tuple[dict[str, Scores], list[Tensor]]:
    """Each form of computing the scores of a batch, and the inputs that both start from."""
    if head.name == "laps":
        tokens, words = leaf(batch.images), leaf(batch.words)

        def loop() -> Tensor:
            return published_loop(
                tokens,
                words,
                batch.lengths,
                head.aggregation.logits,
                selection_ratio=head.selection_ratio,
                num_prefix_tokens=head.num_prefix_tokens,
            )

        return {OURS: lambda: head(tokens, words, batch.lengths), THEIRS: loop}, [tokens, words]
    with torch.no_grad():
        images = head.encode_image(batch.images).detach()
        texts = head.encode_text(batch.words, batch.lengths).detach()
    inputs = [x.requires_grad_() for x in tensors(images) + tensors(texts)]
    forms: dict[str, Scores] = {OURS: lambda: head.similarity(images, texts)}
    if head.name not in ONE_FORM:
        forms[THEIRS] = lambda: PUBLISHED[head.name](head, images, texts)
    return forms, inputs


def make_sides(head: Any, batch: Batch) -> tuple[Scores, list[Tensor]]:
    """The sum of what the head makes of each side alone, and its inputs."""
    tokens, words = leaf(batch.images), leaf(batch.words)

    def sides() -> Tensor:
        features = tensors(head.encode_image(tokens)) + tensors(head.encode_text(words, batch.lengths))
        return torch.stack([x.sum() for x in features]).sum()

    return sides, [tokens, words]


def forward(scores: Scores) -> None:
    """One forward pass without autograd."""
    with torch.no_grad():
        scores()


def step(scores: Scores, inputs: list[Tensor], head: torch.nn.Module) -> None:
    """One forward and backward pass into fresh gradients."""
    for x in inputs:
        x.grad = None
    head.zero_grad(set_to_none=True)
    torch.autograd.backward(scores().sum())


# ---- memory


def measure_memory_here(
    row: str, form: str, images: int, captions: int, shape: Shape = SHAPE
) -> dict[str, int]:
    """Peak extra memory of one form's forward pass and step. For a process that does nothing else."""
    head = make_head(row, shape)
    forms, inputs = make_forms(head, make_batch(shape, 2, 2))
    forward(forms[form])
    step(forms[form], inputs, head)
    forms, inputs = make_forms(head, make_batch(shape, images, captions))
    head.zero_grad(set_to_none=True)
    with peak_memory() as forward_peak:
        forward(forms[form])
    with peak_memory() as step_peak:
        step(forms[form], inputs, head)
    return {"forward_bytes": forward_peak["bytes"], "step_bytes": step_peak["bytes"]}


def measure_memory(row: str, form: str, options: argparse.Namespace) -> dict[str, int]:
    """`measure_memory_here` in a fresh process; empty where the system cannot tell."""
    arguments = ["--memory-of", form, "--heads", row]
    for option in ("images", "captions", "threads"):
        arguments += [f"--{option}", str(getattr(options, option))]
    return machine.memory_of_child("heads", arguments, f"{row}, {form},")


def kept_by_autograd(scores: Scores) -> int:
    """The bytes that wait for the backward pass of one call."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scores()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def step_needs(head: Any, batch: Batch) -> int:
    """About the bytes of a published step: captions cost alike, and one of middling length tells what."""
    middle, images = spread(batch.lengths, 1), len(batch.images)
    one, two = (
        kept_by_autograd(make_forms(head, take(batch, images, middle.repeat(count)))[0][THEIRS])
        for count in (1, 2)
    )
    return one + (len(batch.lengths) - 1) * (two - one)


def free_memory() -> float:
    """Bytes; without end where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


# ---- one row


def measure(row: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one head, printed when it is done."""
    batch = make_batch(shape, options.images, options.captions)
    head = make_head(row, shape)
    forms, inputs = make_forms(head, batch)
    sides, tokens = make_sides(head, batch)
    result: dict[str, Any] = {"head": head.name, "options": ROWS[row][1]}
    stepping = dict(forms)
    if THEIRS in forms:
        with torch.no_grad():
            difference = (forms[OURS]() - forms[THEIRS]()).abs().max().item()
        # Written so that NaN fails.
        if not difference <= 1e-4:
            raise AssertionError(f"{row}: the forms disagree by {difference:g}")
        result["difference"] = difference
        needed = step_needs(head, batch)
        result["published_step_needs_bytes"] = needed
        if 2 * needed > free_memory():
            del stepping[THEIRS]
            print(f"{row}: the published step keeps {needed / 1e9:.0f} GB, more than half of what is free")

    def forward_of(scores: Scores) -> Callable[[], object]:
        return lambda: forward(scores)

    def step_of(scores: Scores, of: list[Tensor]) -> Callable[[], object]:
        return lambda: step(scores, of, head)

    seconds = {
        "forward": in_turns(
            {SIDES: forward_of(sides)} | {name: forward_of(scores) for name, scores in forms.items()},
            options.repetitions,
        ),
        "step": in_turns(
            {SIDES: step_of(sides, tokens)}
            | {name: step_of(scores, inputs) for name, scores in stepping.items()},
            options.repetitions,
        ),
    }
    result[SIDES] = {part: summary(found[SIDES]) for part, found in seconds.items()}
    result["forms"] = {
        name: {part: summary(found[name]) for part, found in seconds.items() if name in found}
        for name in forms
    }
    if options.memory:
        for name in stepping:
            result["forms"][name] |= measure_memory(row, name, options)
    print_row(row, result, options.images * options.captions)
    return result


def print_row(row: str, result: dict[str, Any], pairs: int) -> None:
    """A line for each form of one head."""
    for name, form in result["forms"].items():
        cells = [f"{row:<9} {name:<9}"]
        for part in ("forward", "step"):
            if part not in form:
                continue
            value = form[part]["median_s"]
            cells.append(f"{part} {1e3 * value:9.1f} ms {1e6 * value / pairs:9.3f} us/pair")
            if part in result["forms"].get(THEIRS, {}):
                cells.append(f"{result['forms'][THEIRS][part]['median_s'] / value:5.1f} x")
        if "step_bytes" in form:
            cells.append(f"memory {form['forward_bytes'] / 1e6:7.1f} / {form['step_bytes'] / 1e6:8.1f} MB")
        if name == OURS:
            sides = " / ".join(f"{1e3 * part['median_s']:.1f}" for part in result[SIDES].values())
            cells.append(f"sides {sides} ms")
        print("  ".join(cells), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__.split("\n\n")[0])
    parser.add_argument("--heads", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, no memory")
    machine.add_options(parser, "heads.json")
    parser.add_argument("--memory-of", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    if options.memory_of:
        [row] = options.heads
        print(json.dumps(measure_memory_here(row, options.memory_of, options.images, options.captions)))
        return 0

    shape = SHAPE
    if options.quick:
        shape, options.images, options.captions = SMALL, 4, 4
        options.repetitions, options.memory = 1, False
    full = (
        (options.images, options.captions) == (64, 64) and options.memory and set(options.heads) == set(ROWS)
    )
    output = options.output or (machine.RESULTS / "heads.json" if full else None)
    result = {
        "machine": machine.describe(),
        "settings": {
            "shape": shape.title,
            "num_patches": shape.num_patches,
            "channels": shape.channels,
            "images": options.images,
            "captions": options.captions,
            "words": [8, 30],
            "repetitions": options.repetitions,
        },
        "heads": {row: measure(row, shape, options) for row in options.heads},
    }
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
