"""The native encoders beside those of transformers, whole models of the paper's sizes with random weights.

    python -m benchmarks.encoders                  # benchmarks/results/encoders.json; about ten minutes
    python -m benchmarks.encoders --device cuda    # on a GPU: encoders_gpu.json
    python -m benchmarks.encoders --quick          # encoders of one small layer, no file

How it is measured. Both hold the same weights, and take turns on the same random batch, so that a slow moment
of the machine hits both: forward in eval mode without gradient, then forward and backward of the sum of all
tokens in training mode (with dropout and stochastic depth, as they were published), and one step of SGD.
float32 (on a GPU, --dtype bfloat16 runs under autocast); captions of 8 to 30 tokens, padded. Figures are
medians; a GPU is waited for before and after each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from laps.config import PRESETS
from laps.encoders import ImageEncoder, TextEncoder, transformers_backbone
from laps.encoders.native import NativeBackbone
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.training import WORDS

FORMS = ("hf", "native")
# Title: the preset and the side of it that is measured.
ENCODERS = {
    "ViT-B/16, 224": ("vit-base-224", "image"),
    "ViT-B/16, 384": ("vit-base-384", "image"),
    "Swin-B, 224": ("swin-base-224", "image"),
    "CLIP ViT-B/16, 224": ("clip-vit-base-224", "image"),
    "BERT-base": ("vit-base-224", "text"),
    "CLIP text": ("clip-vit-base-224", "text"),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def make_encoders(preset: str, side: str, quick: bool, device: str) -> dict[str, nn.Module]:
    """The same encoder by both, with the same random weights."""
    values: dict[str, Any] = dict(getattr(PRESETS[preset], f"{side}_encoder"))
    if quick:
        swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
        values |= swin if values["model_type"] == "swin" else SMALL
    torch.manual_seed(0)
    theirs = transformers_backbone.build(transformers_backbone.config_from_dict(values))
    ours = NativeBackbone(values, random=False)
    ours.load_state_dict(transformers_backbone.weights(theirs))
    wrap: Any = ImageEncoder if side == "image" else TextEncoder
    return {"hf": wrap(theirs).to(device), "native": wrap(ours).to(device)}


def make_input(encoder: Any, size: int, device: str) -> tuple[Tensor, ...]:
    """Random pixels, or ids and lengths (which stay on the CPU)."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(encoder, ImageEncoder):
        side = encoder.image_size
        return (torch.randn(size, 3, side, side, generator=generator).to(device),)
    lengths = torch.randint(WORDS[0], WORDS[1] + 1, (size,), generator=generator)
    ids = torch.randint(1000, 30_000, (size, int(lengths.max())), generator=generator)
    return ids.to(device), lengths


def forward(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.inference_mode():
        encoder.eval()(*inputs)


def step(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.SGD((p for p in encoder.parameters() if p.requires_grad), 1e-6)
    tokens = encoder.train()(*inputs)
    with torch.autocast(tokens.device.type, enabled=False):
        tokens.float().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def nothing() -> None:
    """What a CPU has to be waited for."""


def medians(
    work: Callable[[nn.Module, tuple[Tensor, ...]], None],
    encoders: dict[str, nn.Module],
    inputs: tuple[Tensor, ...],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Median seconds of each form, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    wait: Callable[[], None] = torch.cuda.synchronize if options.device == "cuda" else nothing
    dtype = getattr(torch, options.dtype)
    for repetition in range(options.repetitions + 1):
        for name, encoder in encoders.items():
            wait()
            started = time.perf_counter()
            with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
                work(encoder, inputs)
            wait()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def largest_difference(encoders: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> float:
    """Of the tokens that are not padding."""
    with torch.inference_mode():
        theirs, ours = (encoders[name].eval()(*inputs) for name in FORMS)
    difference: Tensor = (theirs - ours).abs().amax(-1)
    if len(inputs) == 2:
        difference = difference[
            (torch.arange(difference.shape[1]) < inputs[1][:, None]).to(difference.device)
        ]
    return float(difference.max())


def measure(title: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both forms of one encoder."""
    preset, side = ENCODERS[title]
    encoders = make_encoders(preset, side, options.quick, options.device)
    size = 2 if options.quick else options.images if side == "image" else options.captions
    inputs = make_input(encoders["hf"], size, options.device)
    entry: dict[str, Any] = {
        "batch": size,
        "largest_difference": largest_difference(encoders, inputs),
        "forward_s": medians(forward, encoders, inputs, options),
        "step_s": medians(step, encoders, inputs, options),
    }
    print(title, entry, flush=True)
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    machine.add_options(parser, "encoders.json")
    parser.add_argument("--images", type=int, default=8, help="of a batch (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=32, help="of a batch (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="encoders of one small layer, no file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    result = {
        "machine": machine.describe() | {"transformers": transformers.__version__},
        "settings": {"words": WORDS, "repetitions": options.repetitions, "dtype": options.dtype},
        "encoders": {title: measure(title, options) for title in ENCODERS},
    }
    name = "encoders_gpu.json" if options.device == "cuda" else "encoders.json"
    output = options.output or (None if options.quick else machine.RESULTS / name)
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
