"""Scoring 1,000 images x 5,000 captions (Flickr30K's test split) on the CPU, beside the per-caption loop.

    python -m benchmarks.evaluation            # writes benchmarks/results/evaluation.json
    python -m benchmarks.evaluation --quick    # small sizes, one repetition, no file

How it is measured. Features are random (normal, one fixed seed) in the shapes of ViT-B/16 at 224 pixels; no
encoder runs, because encoding is the same for every form. laps scores the whole matrix as `laps.evaluate`
does: the head's text-independent part once per image, then blocks of pairs by
`laps.evaluation.pairs.PairScorer`. The other forms are timed on a slice, 64 images x some captions whose
lengths are spread as those of all are, and their time for the whole matrix is extrapolated by the number of
pairs; the result says so ("extrapolated": true). The loop takes 64 images at a time, as in benchmarks.head,
and so many captions that what it does once per call no longer counts; batched PyTorch fills two blocks.
Each form has a fresh process, which also tells its peak extra memory: the highest resident memory during the
first run, less the one before it. The scores of a slice must agree with those of laps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import laps
import numpy as np
import torch
from laps._loop import published_loop
from laps.data import RetrievalData
from laps.evaluation.encode import CaptionStore
from laps.evaluation.pairs import PairScorer
from laps.evaluation.run import PAIRS_ON_CPU
from laps.features import ImageFeatures
from laps.metrics import retrieval_metrics
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import machine
from benchmarks.head import OURS, clock, make_head, peak_memory, summary
from benchmarks.shapes import SHAPES, Batch, make_batch

FORMS = ("loop", "torch", OURS)
SHAPE = "vit-224"
# Images of a slice, and of one call of the loop.
SLICE_IMAGES = 64
# Images, and captions, of one call of an encoder; `laps.evaluate` has the same default.
ENCODED_AT_ONCE = 64

Floats = NDArray[np.float32]


# ---- the forms


def prepare_images(head: laps.nn.LAPSHead, image_tokens: Tensor) -> ImageFeatures:
    """What `laps.evaluate` keeps of images: all that the head can know of them without a caption."""
    return ImageFeatures.cat([head.encode_image(part) for part in torch.split(image_tokens, ENCODED_AT_ONCE)])


def prepare_captions(head: laps.nn.LAPSHead, batch: Batch) -> CaptionStore:
    """What `laps.evaluate` keeps of captions: their words without padding."""
    parts = zip(
        torch.split(batch.words, ENCODED_AT_ONCE), torch.split(batch.lengths, ENCODED_AT_ONCE), strict=True
    )
    embedding = torch.cat([head.encode_text(words, lengths).embedding for words, lengths in parts])
    real = torch.arange(batch.words.shape[1]) < batch.lengths[:, None]
    starts = batch.lengths.cumsum(0) - batch.lengths
    return CaptionStore(embedding, batch.lengths, batch.words[real], starts)


def score_blocks(head: laps.nn.LAPSHead, images: ImageFeatures, captions: CaptionStore) -> Floats:
    """All pairs in the blocks of `laps.evaluate` on the CPU."""
    paths = [Path(f"image {i}") for i in range(len(images))]
    names = RetrievalData(paths, ["random words"] * len(captions), image_of(len(images), len(captions)))
    scorer = PairScorer(names, torch.device("cpu"), PAIRS_ON_CPU, progress=False)
    return scorer.all_pairs(head.similarity, images, captions, "score pairs")


def score_by_loop(head: laps.nn.LAPSHead, batch: Batch) -> Floats:
    """All pairs by the published loop over captions, a few images at a time."""
    rows = [
        published_loop(
            images,
            batch.words,
            batch.lengths,
            head.aggregation.logits,
            selection_ratio=head.selection_ratio,
            num_prefix_tokens=head.num_prefix_tokens,
        )
        for images in torch.split(batch.images, SLICE_IMAGES)
    ]
    scores: Floats = torch.cat(rows).numpy()
    return scores


def image_of(images: int, captions: int) -> NDArray[np.int64]:
    """The image of each caption: equally many captions for each image, in order."""
    return np.arange(captions, dtype=np.int64) * images // captions


def spread(lengths: Tensor, count: int) -> Tensor:
    """Positions of `count` captions, evenly spaced in the order of length: a slice that costs as the rest."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) * len(lengths) / count
    return torch.argsort(lengths, stable=True)[middles.long()]


def take(batch: Batch, images: int, captions: Tensor) -> Batch:
    """The first images with some of the captions, padded to the longest of them."""
    lengths = batch.lengths[captions]
    words = batch.words[captions, : int(lengths.max())]
    return Batch(batch.images[:images], words, lengths, batch.grad[:images, captions])


# ---- one form, in this process


@torch.inference_mode()
def measure_here(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one form. For a process that does nothing else."""
    whole = make_batch(SHAPES[SHAPE], options.images, options.captions)
    head = make_head(SHAPES[SHAPE], "torch" if name == "torch" else "native")
    started = time.perf_counter()
    images, captions = prepare_images(head, whole.images), prepare_captions(head, whole)
    prepare_s = time.perf_counter() - started
    batch = whole
    if name != OURS:
        count = options.loop_captions if name == "loop" else options.torch_captions
        batch = take(whole, SLICE_IMAGES, spread(whole.lengths, min(count, options.captions)))
        images, captions = images[:SLICE_IMAGES], prepare_captions(head, batch)
    tiny = take(batch, 2, torch.arange(2))
    found: dict[str, Any] = {}
    if name == "loop":
        prepare_s = 0.0  # it does nothing once
        score_by_loop(head, tiny)
        seconds, scores = time_runs(lambda: score_by_loop(head, batch), options.repetitions, found, options)
    else:
        score_blocks(head, images[:2], prepare_captions(head, tiny))
        repetitions = 1 if name == OURS else options.repetitions
        seconds, scores = time_runs(lambda: score_blocks(head, images, captions), repetitions, found, options)
    if name == OURS:
        pairs = image_of(options.images, options.captions)
        measured = [clock(lambda: retrieval_metrics(scores, pairs)) for _ in range(options.repetitions)]
        found["metrics"] = summary(measured)
    else:
        expected = score_blocks(make_head(SHAPES[SHAPE], "native"), images, captions)
        differences = np.abs(scores - expected)
        found["difference"] = float(np.median(differences))
        # Of this many pairs a few have two patches whose scores differ in the last digit of float32 only;
        # where these stand at the threshold, each form may keep another one.
        found["other_selections"] = float((differences > 1e-4).mean())
        if found["difference"] > 1e-5 or found["other_selections"] > 1e-3:
            raise AssertionError(f"{name} differs from laps: {found}")
    pairs_s = statistics.median(seconds)
    return found | {
        "pairs_measured": scores.size,
        "mean_words": float(batch.lengths.float().mean()),
        "prepare_s": prepare_s,
        "pairs": summary(seconds),
        "pairs_per_s": scores.size / pairs_s,
        "extrapolated": scores.size < options.images * options.captions,
        "whole_s": prepare_s + pairs_s * options.images * options.captions / scores.size,
    }


def time_runs(
    score: Callable[[], Floats], repetitions: int, found: dict[str, Any], options: argparse.Namespace
) -> tuple[list[float], Floats]:
    """Seconds of each run and the scores; the peak memory of the first goes into `found`."""
    runs: list[Floats] = []
    if options.memory and os.access("/proc/self/clear_refs", os.W_OK):
        with peak_memory() as peak:
            seconds = [clock(lambda: runs.append(score()))]
        found["extra_bytes"] = peak["bytes"]
    else:
        seconds = [clock(lambda: runs.append(score()))]
    return seconds + [clock(score) for _ in range(repetitions - 1)], runs[0]


# ---- all forms


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """`measure_here` in a fresh process, printed when it is done."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--form", name]
    for option in ("images", "captions", "loop_captions", "torch_captions", "threads", "repetitions"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    if not options.memory:
        command.append("--no-memory")
    answer = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT, check=False)
    if answer.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{answer.stderr}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    seconds = result["pairs"]["median_s"]
    rate = f"{result['pairs_per_s']:10,.0f} pairs/s"
    whole = f"whole matrix {result['whole_s']:8.1f} s{' (extrapolated)' if result['extrapolated'] else ''}"
    memory = f"memory {result['extra_bytes'] / 1e6:,.0f} MB" if "extra_bytes" in result else ""
    measured = f"{result['pairs_measured']:>9,} pairs in {seconds:7.2f} s"
    print(f"  {name:<6} {measured}  {rate}  {whole}  {memory}", flush=True)
    if "metrics" in result:
        print(f"  metrics of the matrix: {result['metrics']['median_s']:.2f} s", flush=True)
    return result


def report(forms: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The result with the machine and the settings."""
    shape = SHAPES[SHAPE]
    settings = {
        "shape": shape.title,
        "num_patches": shape.num_patches,
        "channels": shape.channels,
        "images": options.images,
        "captions": options.captions,
        "words": [8, 30],
        "repetitions": options.repetitions,
        "features": "random normal, not from an encoder",
        "pair_chunk": PAIRS_ON_CPU,
        "slice_images": SLICE_IMAGES,
    }
    return {"machine": machine.describe(), "settings": settings, "forms": forms}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=5000)
    parser.add_argument("--loop-captions", type=int, default=128, help="of the slice (default: %(default)s)")
    parser.add_argument(
        "--torch-captions", type=int, default=1024, help="of the slice (default: %(default)s)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, help="of a slice; the whole matrix is done once"
    )
    parser.add_argument("--quick", action="store_true", help="128 x 256 pairs, one repetition, no memory")
    machine.add_options(parser, "evaluation.json")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.form:
        print(json.dumps(measure_here(options.form, options)))
        return 0
    if options.quick:
        options.images, options.captions, options.repetitions, options.memory = 128, 256, 1, False
        options.loop_captions, options.torch_captions = 8, 32
    full = (options.images, options.captions) == (1000, 5000) and options.memory
    output = options.output or (machine.RESULTS / "evaluation.json" if full else None)
    print(f"{SHAPES[SHAPE].title}: {options.images:,} images x {options.captions:,} captions", flush=True)
    result = report({name: measure(name, options) for name in FORMS}, options)
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
