"""What the three scripts share, and is not the point of any: options, data, a small model, the result."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import laps
import torch
from laps.config import PRESETS
from laps.data import CaptionDataset, CaptionTokenizer, ImageTransform, RetrievalData
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

Splits = tuple[RetrievalData, RetrievalData, RetrievalData]


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="any format of laps.data.load; without it scenes are drawn")
    parser.add_argument("--preset", help="pretrained encoders, such as vit-base-224; without it small ones")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes to draw for training")
    parser.add_argument("--out", type=Path, default=Path(out), help="where the model goes")
    return parser


@contextlib.contextmanager
def open_data(options: argparse.Namespace) -> Iterator[Splits]:
    """The splits train, dev and test; drawn scenes are gone after the block."""
    regions = options.preset in PRESETS and PRESETS[options.preset].regions
    if regions and not options.data:
        raise SystemExit(
            f"--preset {options.preset} takes regions of a detector, and scenes have none: give --data"
        )
    with tempfile.TemporaryDirectory() as scratch:
        held_out = max(8, options.scenes // 5)
        path = options.data or laps.data.make_scenes(
            scratch, num_train=options.scenes, num_dev=held_out, num_test=held_out
        )
        train, dev, test = (
            laps.data.load(path, split, regions=regions) for split in ("train", "dev", "test")
        )
        yield train, dev, test


def build_model(options: argparse.Namespace, captions: list[str]) -> laps.LAPS:
    """The preset's model, or one of half a million weights that needs no download and trains on a CPU."""
    if options.preset:
        return laps.LAPS.from_preset(options.preset)
    size = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokenizer = CaptionTokenizer.train(captions, vocab_size=400)
    vit = ViTModel(ViTConfig(image_size=96, patch_size=12, **size), add_pooling_layer=False)
    bert = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **size), add_pooling_layer=False)
    images = laps.encoders.ImageEncoder(vit, embed_dim=128)
    texts = laps.encoders.TextEncoder(bert, embed_dim=128)
    head = laps.nn.LAPSHead(128, images.num_patches, selection_ratio=0.8, aggregation_ratio=0.6)
    # From scratch: tokens that differ from the start, a loss that looks at all negatives. Captions say left
    # and right, so images are not mirrored.
    torch.nn.init.constant_(head.aggregation.scale, 10.0)
    objective = laps.objective.Objective("info_nce")
    transform = ImageTransform(image_size=96, crop_scale=None, flip=0.0)
    return laps.LAPS(images, texts, head, tokenizer=tokenizer, transform=transform, objective=objective)


def training_loader(model: laps.LAPS, data: RetrievalData, options: argparse.Namespace) -> DataLoader:
    """Batches of images with one caption each. Its dataset's `set_epoch` draws other crops and words."""
    augment = 0.2 if options.preset else 0.0  # share of words that are masked, replaced or deleted
    dataset = CaptionDataset(data, model.tokenizer, model.transform, augment=augment)
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        collate_fn=dataset.collate,
    )


def make_optimizer(model: laps.LAPS, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The published rates for pretrained encoders: a tenth of the head's. Random ones learn at one rate."""
    rates = (2e-4, 0.1) if options.preset else (1e-3, 1.0)
    return torch.optim.AdamW(model.parameter_groups(*rates), weight_decay=1e-4)


def warmup(options: argparse.Namespace, epoch: int, done: float) -> float | None:
    """The published first epoch, of which `done` has passed: all negatives, the loss grows from nothing."""
    return done if options.preset and epoch == 0 else None


def show_saved(options: argparse.Namespace, test: RetrievalData) -> None:
    """What the saved model reaches."""
    print(f"saved in {options.out}; loaded again, on the test split:")
    print(laps.evaluate(laps.LAPS.from_pretrained(options.out), test, num_workers=options.workers))
