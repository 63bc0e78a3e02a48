"""A training step of ViT-B/16 at 224 pixels and BERT-base with the head, beside the per-caption loop.

    python -m benchmarks.training            # writes benchmarks/results/training.json
    python -m benchmarks.training --quick    # encoders of one small layer, one step, no file

How it is measured. The model is the preset "vit-base-224" with random weights, the batch random pixels and
token ids, 8 to 30 tokens a caption. A step is forward, published loss, backward, clipping and AdamW, float32.
It is timed in four parts (encoders forward; head and loss, forward and backward down to the tokens; encoders
backward; optimizer), which together are the whole step: the graph is cut at the tokens and their gradients
are handed on, which changes no gradient. Both forms share one model and take turns, so that a slow moment of
the machine hits both; figures are medians. Memory comes from a fresh process for each form: the highest
resident memory of a step's forward and backward pass less the one before it, when weights and AdamW's moments
are there; and the same for the head alone, on random tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import laps
import torch
from laps._loop import published_loop
from laps.config import PRESETS
from laps.data import Batch
from laps.encoders import ImageEncoder, TextEncoder
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks import machine
from benchmarks.head import OURS, peak_memory

FORMS = ("loop", OURS)
PRESET = "vit-base-224"
PARTS = ("encoders_forward", "head", "encoders_backward", "optimizer")
WORDS = (8, 30)

# Image tokens (B, P + N, C), word tokens (B, L, C) and lengths (B,) to scores (B, B).
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- what is measured


def make_model(quick: bool) -> laps.LAPS:
    """The preset with random weights; `quick`: its head on encoders of one small layer."""
    torch.manual_seed(0)
    if not quick:
        return laps.LAPS.from_preset(PRESET, pretrained=False, head_options={"backend": "native"}).train()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    images = ImageEncoder(ViTModel(ViTConfig(**small), add_pooling_layer=False), embed_dim=512)
    texts = TextEncoder(BertModel(BertConfig(**small), add_pooling_layer=False), embed_dim=512)
    head = laps.nn.LAPSHead(512, images.num_patches, backend="native", **PRESETS[PRESET].head_options)
    return laps.LAPS(images, texts, head).train()


def make_batch(model: laps.LAPS, size: int, seed: int = 0) -> Batch:
    """Random pixels and token ids; caption i describes image i."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(WORDS[0], WORDS[1] + 1, (size,), generator=generator)
    side = model.image_encoder.image_size
    return Batch(
        pixel_values=torch.randn(size, 3, side, side, generator=generator),
        # From 1,000 on the vocabulary of BERT holds words.
        input_ids=torch.randint(1000, 30_000, (size, int(lengths.max())), generator=generator),
        lengths=lengths,
        image_ids=torch.arange(size),
        caption_ids=torch.arange(size),
    )


def make_form(name: str, model: laps.LAPS) -> Scores:
    """The model's head itself, or the loop with its weights."""
    head = model.head
    assert isinstance(head, laps.nn.LAPSHead)
    if name == OURS:
        return head

    def loop(image_tokens: Tensor, word_tokens: Tensor, lengths: Tensor) -> Tensor:
        return published_loop(
            image_tokens,
            word_tokens,
            lengths,
            head.aggregation.logits,
            selection_ratio=head.selection_ratio,
            num_prefix_tokens=head.num_prefix_tokens,
        )

    return loop


def forward_and_backward(model: laps.LAPS, scores: Scores, batch: Batch) -> dict[str, float]:
    """Leaves the gradients of the loss in the parameters; the seconds of each part."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    images = model.image_encoder(batch.pixel_values)
    words = model.text_encoder(batch.input_ids, batch.lengths)
    encoded = time.perf_counter()
    # The head's graph ends at leaves, so that its backward pass can be timed apart from the encoders'.
    leaves = images.detach().requires_grad_(), words.detach().requires_grad_()
    loss, _ = model.objective(scores(leaves[0], leaves[1], batch.lengths), batch.image_ids)
    torch.autograd.backward(loss)
    scored = time.perf_counter()
    torch.autograd.backward((images, words), (leaves[0].grad, leaves[1].grad))
    done = time.perf_counter()
    return {
        "encoders_forward": encoded - started,
        "head": scored - encoded,
        "encoders_backward": done - scored,
    }


def step(
    model: laps.LAPS, scores: Scores, batch: Batch, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One training step; the seconds of each part, and of all."""
    seconds = forward_and_backward(model, scores, batch)
    started = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    seconds["optimizer"] = time.perf_counter() - started
    return seconds | {"whole": sum(seconds.values())}


def make_optimizer(model: laps.LAPS) -> torch.optim.Optimizer:
    """The published one."""
    preset = PRESETS[PRESET]
    groups = model.parameter_groups(preset.learning_rate, preset.backbone_lr_ratio)
    return torch.optim.AdamW(groups, weight_decay=1e-4)


# ---- memory


def measure_memory_here(name: str, options: argparse.Namespace) -> dict[str, int]:
    """Peak extra memory of one form's head and of its step. For a process that does nothing else."""
    model = make_model(options.quick)
    optimizer = make_optimizer(model)
    scores = make_form(name, model)
    # Loads what is loaded at first use, and makes AdamW's moments.
    step(model, scores, make_batch(model, 2), optimizer)
    model.zero_grad(set_to_none=True)

    batch = make_batch(model, options.batch)
    tokens = model.image_encoder.num_prefix_tokens + model.image_encoder.num_patches
    channels = model.image_encoder.embed_dim
    images = torch.randn(options.batch, tokens, channels, requires_grad=True)
    words = torch.randn(*batch.input_ids.shape, channels, requires_grad=True)
    with peak_memory() as head_peak:
        torch.autograd.backward(model.objective(scores(images, words, batch.lengths), batch.image_ids)[0])
    del images, words
    model.zero_grad(set_to_none=True)
    with peak_memory() as step_peak:
        forward_and_backward(model, scores, batch)
    return {"head_bytes": head_peak["bytes"], "step_bytes": step_peak["bytes"]}


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, int]:
    """`measure_memory_here` in a fresh process; empty where the system cannot tell."""
    arguments = ["--memory-of", name, "--batch", str(options.batch), "--threads", str(options.threads)]
    return machine.memory_of_child("training", arguments + ["--quick"] * options.quick, name)


# ---- time


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every form's seconds by part, in turns, printed as they come."""
    model = make_model(options.quick)
    batch, optimizer = make_batch(model, options.batch), make_optimizer(model)
    forms = {name: make_form(name, model) for name in FORMS}
    for name, scores in forms.items():
        step(model, scores, make_batch(model, 2), optimizer)
        print(f"  {name} is ready", flush=True)
    step(model, forms[OURS], batch, optimizer)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for _ in range(options.repetitions):
        for name, scores in forms.items():
            seconds = step(model, scores, batch, optimizer)
            rounds[name].append(seconds)
            parts = ", ".join(f"{part} {seconds[part]:.2f} s" for part in (*PARTS, "whole"))
            print(f"  {name:<5} {parts}", flush=True)
    return {name: summarise(steps) for name, steps in rounds.items()}


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of each part and of the whole step, and what they are the medians of."""
    return {
        "median_s": {part: statistics.median(step[part] for step in steps) for part in (*PARTS, "whole")},
        "all_s": [{part: float(f"{step[part]:.4g}") for part in step} for step in steps],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch (default: %(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=2, help="steps of each form (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small encoders, one step, no memory")
    machine.add_options(parser, "training.json")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory_here(options.memory_of, options)))
        return 0
    if options.quick:
        options.repetitions, options.memory = 1, False
    full = not options.quick and options.memory and options.batch == 32
    output = options.output or (machine.RESULTS / "training.json" if full else None)
    encoders = "two small encoders" if options.quick else "ViT-B/16 at 224 pixels + BERT-base"
    print(f"{encoders}, batch {options.batch}", flush=True)
    forms = measure(options)
    if options.memory:
        for name, form in forms.items():
            form |= measure_memory(name, options)
            if "step_bytes" in form:
                head, whole = form["head_bytes"] / 1e6, form["step_bytes"] / 1e6
                print(f"  {name:<5} memory: head {head:,.0f} MB, step {whole:,.0f} MB", flush=True)
    result = {
        "machine": machine.describe(),
        "settings": {
            "encoders": encoders,
            "batch": options.batch,
            "words": list(WORDS),
            "repetitions": options.repetitions,
        },
        "forms": forms,
    }
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
