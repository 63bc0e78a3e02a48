"""The demo runs as a user runs it, and the loop that it is timed against computes the same scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from laps import demo
from laps._loop import published_loop
from laps.nn import LAPSHead


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("num_patches", "num_prefix_tokens", "selection_ratio", "aggregation_ratio"),
    [(49, 0, 0.8, 0.6), (36, 1, 0.5, 0.4), (16, 5, 1.0, 0.5)],
    ids=["swin", "vit", "keep-all"],
)
def test_head_equals_the_per_caption_loop(
    backend: str, num_patches: int, num_prefix_tokens: int, selection_ratio: float, aggregation_ratio: float
) -> None:
    torch.manual_seed(0)
    head = LAPSHead(
        32,
        num_patches,
        selection_ratio,
        aggregation_ratio,
        num_prefix_tokens=num_prefix_tokens,
        backend=backend,
    ).double()
    images = torch.randn(4, num_prefix_tokens + num_patches, 32, dtype=torch.float64, requires_grad=True)
    words = torch.randn(5, 9, 32, dtype=torch.float64, requires_grad=True)
    lengths, grad = torch.tensor([9, 1, 4, 7, 2]), torch.randn(4, 5, dtype=torch.float64)
    inputs = [images, words, *head.parameters()]

    ours = head(images, words, lengths)
    loop = published_loop(
        images,
        words,
        lengths,
        head.aggregation.logits,
        selection_ratio=selection_ratio,
        num_prefix_tokens=num_prefix_tokens,
    )

    torch.testing.assert_close(ours, loop, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(loop, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_demo_prints_scores_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")

    assert demo.main(["--out", str(tmp_path), "--batch", "2"]) == 0

    output = capsys.readouterr().out
    captions = [caption for pair in demo.PHOTOS.values() for caption in pair]
    assert all(caption in output for caption in captions)
    assert "per-caption loop" in output
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "demo.png" in output.splitlines()[-1]


def test_dimming_leaves_kept_patches_as_they_are_and_takes_the_colour_of_the_others() -> None:
    pixels = np.zeros((demo.IMAGE_SIZE, demo.IMAGE_SIZE, 3))
    pixels[..., 0] = 1.0
    kept = np.zeros(demo.NUM_PATCHES, dtype=bool)
    kept[1] = True

    shown = demo.dim_dropped(pixels, kept)

    assert (shown[:16, 16:32] == pixels[:16, 16:32]).all()
    assert math.isclose(shown[0, 0, 0], shown[100, 100, 0])
    assert shown[0, 0].max() - shown[0, 0].min() < 0.2
