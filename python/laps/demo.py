"""The head on real photographs: scores, kept patches as a picture, and the time beside the per-caption loop.

Run it with ``make demo`` or ``python -m laps.demo``. Nothing is downloaded: the photographs ship inside
scikit-image, and the encoders are small and randomly initialised. So it shows the mechanism of the method
(which patches a caption keeps, and how fast), not an understanding of the photographs.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laps

from ._loop import published_loop

IMAGE_SIZE = 224
PATCH_SIZE = 16
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = GRID * GRID
CHANNELS = 512
SELECTION_RATIO = 0.5

# A loader of skimage.data, and two captions that ask for different parts of its photograph.
PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut": (
        "a smiling woman in an orange space suit",
        "a flag and a model of the space shuttle",
    ),
    "chelsea": ("the green eyes of a tabby cat", "soft grey fur and long white whiskers"),
    "coffee": ("an espresso in a white cup", "a spoon on a red saucer on a wooden table"),
    "rocket": (
        "a rocket on its launch pad at dusk",
        "tall steel towers and bright lights under a dark blue sky",
    ),
    "hubble_deep_field": ("hundreds of distant galaxies", "a bright orange star on black"),
}
DRAWN = ("astronaut", "chelsea", "coffee")

# Okabe and Ito's palette, told apart under every common form of colour blindness.
ONLY_HERE = "#F0E442"
# The tint of dropped patches: a blue that no neutral grey is taken for.
DIM = np.array([0.88, 0.96, 1.12])


class TinyViT(nn.Module):
    """A vision transformer of 1.9 million random weights: (B, 3, 224, 224) pixels to (B, 1+196, C) tokens."""

    def __init__(self, channels: int, width: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + NUM_PATCHES, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.project = nn.Linear(width, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1)
        projected: Tensor = self.project(self.blocks(tokens + self.position))
        return projected


class Words:
    """Captions as random word vectors: one vector for each different word, between [CLS] and [SEP]."""

    def __init__(self, captions: Sequence[str], channels: int) -> None:
        self.captions = [["[CLS]", *caption.split(), "[SEP]"] for caption in captions]
        vocabulary = sorted({word for caption in self.captions for word in caption})
        self.index = {word: i for i, word in enumerate(vocabulary)}
        self.embed = nn.Embedding(len(vocabulary), channels)

    def encode(self) -> tuple[Tensor, Tensor]:
        """The (B_t, L, C) word vectors, zero where padded, and the (B_t,) lengths."""
        rows = [self.embed(torch.tensor([self.index[word] for word in caption])) for caption in self.captions]
        lengths = torch.tensor([len(row) for row in rows])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def load_photo(name: str) -> Tensor:
    """The middle square of a photograph that ships with scikit-image: (3, 224, 224) in [0, 1]."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255
    side = min(pixels.shape[1:])
    top, left = ((size - side) // 2 for size in pixels.shape[1:])
    square = pixels[None, :, top : top + side, left : left + side]
    return F.interpolate(square, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)[0].clamp(0, 1)


def score_table(scores: Tensor, names: Sequence[str], captions: Sequence[str]) -> str:
    """Captions down, photographs across; each caption's best photograph is marked."""
    width = max(map(len, captions))
    lines = [" " * width + "".join(f"{name.split('_')[0]:>11}" for name in names)]
    for caption, column in zip(captions, scores.T, strict=True):
        best = int(column.argmax())
        cells = (f"{value:>10.4f}{'*' if i == best else ' '}" for i, value in enumerate(column.tolist()))
        lines.append(f"{caption:<{width}}" + "".join(cells))
    return "\n".join(lines)


def draw_kept(
    path: Path, photos: Sequence[Tensor], captions: Sequence[tuple[str, str]], kept: Tensor, scores: Tensor
) -> None:
    """Draw each photograph beside itself under its two captions, dropped patches dimmed.

    Args:
        path: the PNG to write.
        photos: R photographs (3, 224, 224).
        captions: the two captions of each.
        kept: (R, 2, N) bool.
        scores: (R, 2).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    rows = len(photos)
    figure, axes = plt.subplots(
        rows, 3, figsize=(10.2, 3.7 * rows + 1.0), squeeze=False, layout="constrained"
    )
    for row, photo in enumerate(photos):
        pixels = photo.permute(1, 2, 0).numpy()
        axes[row, 0].imshow(pixels)
        axes[row, 0].set_title("photograph", fontsize=10, color="0.35")
        for column in (0, 1):
            axis = axes[row, 1 + column]
            here, other = kept[row, column], kept[row, 1 - column]
            axis.imshow(dim_dropped(pixels, here.numpy()))
            for patch in (here & ~other).nonzero().flatten().tolist():
                corner = (patch % GRID * PATCH_SIZE - 0.5, patch // GRID * PATCH_SIZE - 0.5)
                for colour, linewidth in (("black", 2.6), (ONLY_HERE, 1.3)):
                    square = Rectangle(
                        corner, PATCH_SIZE, PATCH_SIZE, fill=False, edgecolor=colour, linewidth=linewidth
                    )
                    axis.add_patch(square)
            axis.set_title(
                f"“{captions[row][column]}”\nscore {scores[row, column]:.4f}", fontsize=10, wrap=True
            )
    for axis in axes.flat:
        axis.set_axis_off()

    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr, call-arg]
    share = kept.float().mean().item()
    figure.suptitle(
        f"Patches that LAPS keeps for two captions ({share:.0%} of {NUM_PATCHES})\n"
        "The encoders' weights are random: this shows the mechanism, not understanding.",
        fontsize=12,
    )
    legend = [
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=ONLY_HERE, linewidth=2.0, label="kept here only"),
        Rectangle((0, 0), 1, 1, facecolor=tuple(0.55 * DIM), label="dropped"),
    ]
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=2,
        handlelength=1.0,
        handleheight=1.0,
        facecolor="0.2",
        labelcolor="white",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def dim_dropped(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The (H, W, 3) photograph with every patch that is not kept turned to a flat bluish mid-grey."""
    mask = np.kron(kept.reshape(GRID, GRID), np.ones((PATCH_SIZE, PATCH_SIZE)))[..., None]
    grey = (0.4 + 0.3 * pixels.mean(axis=-1, keepdims=True)) * DIM
    return np.asarray(np.where(mask, pixels, grey))


def time_side_by_side(forms: dict[str, Callable[[], object]], patience: float = 5.0) -> dict[str, float]:
    """The median seconds of each form, in turns, so that a slow moment of the machine hits all of them.

    Three rounds; fewer on a slow machine, where they would take longer than `patience` seconds.
    """
    for form in forms.values():
        form()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    began = time.perf_counter()
    while len(seconds[next(iter(forms))]) < 3 and time.perf_counter() - began < patience:
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_speed(head: laps.nn.LAPSHead, images: Tensor, words: Tensor, lengths: Tensor, batch: int) -> None:
    """Print the head's time beside the per-caption loop's, for `batch` images x `batch` captions."""
    images = images[torch.arange(batch) % len(images)].detach().requires_grad_()
    order = torch.arange(batch) % len(words)
    words, lengths = words[order].detach().requires_grad_(), lengths[order]

    def ours() -> Tensor:
        result: Tensor = head(images, words, lengths)
        return result

    def loop() -> Tensor:
        return published_loop(
            images, words, lengths, head.aggregation.logits, selection_ratio=SELECTION_RATIO
        )

    def forward(scores: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(scores)

    def step(scores: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.backward(scores().sum())

    with torch.no_grad():
        difference = (ours() - loop()).abs().max().item()
    print(
        f"\nTime for {batch} images x {batch} captions (the photographs above, repeated), C={CHANNELS}, "
        f"{torch.get_num_threads()} threads on {platform.machine()}; largest difference {difference:.1e}\n"
    )
    print(f"{'':<20}{'per-caption loop':>18}{'laps':>12}{'ratio':>10}")
    for label, form in (("forward", forward), ("forward + backward", step)):
        seconds = time_side_by_side({"loop": form(loop), "laps": form(ours)})
        ratio = seconds["loop"] / seconds["laps"]
        print(f"{label:<20}{1e3 * seconds['loop']:>15.1f} ms{1e3 * seconds['laps']:>9.1f} ms{ratio:>8.1f} x")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m laps.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the picture (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, help="images and captions to time (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    names = list(PHOTOS)
    captions = [caption for pair in PHOTOS.values() for caption in pair]
    try:
        photos = torch.stack([load_photo(name) for name in names])
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(
            f"laps.demo: {error}. It needs two more packages: pip install scikit-image matplotlib",
            file=sys.stderr,
        )
        return 1

    vit, text = TinyViT(CHANNELS).eval(), Words(captions, CHANNELS)
    head = laps.nn.LAPSHead(CHANNELS, NUM_PATCHES, selection_ratio=SELECTION_RATIO).eval()
    with torch.no_grad():
        images = vit((photos - 0.5) / 0.5)
        words, lengths = text.encode()
        scores = head(images, words, lengths)
        kept = laps.functional.select_patches(images[:, 1:], words, lengths, SELECTION_RATIO)

    print(
        f"{len(names)} photographs, {len(captions)} captions, random weights (seed {options.seed}). "
        "Scores of all pairs,\n"
        "the best photograph of each caption starred (by chance: nothing is trained):\n"
    )
    print(score_table(scores, names, captions))
    compare_speed(head, images, words, lengths, options.batch)

    mask = torch.zeros(len(names), len(captions), NUM_PATCHES, dtype=torch.bool)
    mask.scatter_(2, torch.as_tensor(kept), True)
    rows = torch.tensor([names.index(name) for name in DRAWN])
    own = torch.stack([2 * rows, 2 * rows + 1], dim=1)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "demo.png"
    draw_kept(
        picture,
        [photos[row] for row in rows.tolist()],
        [PHOTOS[name] for name in DRAWN],
        mask[rows[:, None], own],
        scores[rows[:, None], own],
    )
    print(
        f"\nWrote {os.path.relpath(picture)}: the patches kept for two captions of {len(DRAWN)} photographs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
