"""What the demo trains, and how: two small models with the same encoders that differ in their head alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, ResNetConfig

from ..data import CaptionTokenizer, ImageTransform, RetrievalData
from ..encoders import ImageEncoder, TextEncoder
from ..encoders.transformers_backbone import build
from ..heads import build_head
from ..model import LAPS
from ..nn import LAPSHead
from ..objective import Objective
from ..train import Trainer, TrainingStoppedError
from ..train_config import TrainConfig

__all__ = ["HEADS", "TITLES", "Sizes", "Trained", "build_model", "settings", "train"]

HEADS = ("laps", "vse")
TITLES = {"laps": "LAPS", "vse": "global embedding"}

IMAGE_SIZE = 96
WIDTH, EMBED_DIM = 96, 128
# Each stage halves the side of the feature map, from a quarter of the image's: 6 x 6 patches.
STAGES = (32, 64, WIDTH)
BERT_LAYERS = 2
VOCABULARY = 400

TEMPERATURE = 0.1
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    # The score net has most of the say. Attention to the mean of the patches prefers what most of the picture
    # is, and that is background here.
    "laps": {
        "selection_ratio": 0.7,
        "aggregation_ratio": 0.8,
        "variant": "paper",
        "sampling": "topk",
        "attention_weight": 0.2,
    },
    "vse": {"pooling": "mean"},
}
# Of the pretraining.
PRETRAINING_HEAD = "vse"
# From 1, where every aggregated token starts as the mean of the patches, it would take longer than the demo
# has until the tokens look at different patches.
AGGREGATION_SCALE = 10.0
# The models are small, and no photographs taught their encoders: nothing learns more slowly than the rest.
PRETRAINING_RATE, TRAINING_RATE = 2e-3, 1.5e-3
TRAINING: dict[str, Any] = {
    "backbone_lr_ratio": 1.0,
    "schedule": "one_cycle",
    "warmup_epochs": 0,
    "augment": 0.0,
    "device": "cpu",
    # Two cores are busy with the steps themselves; a worker would only take turns with them.
    "num_workers": 0,
}


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and trained.

    Attributes:
        train, dev, test: images.
        pretraining_epochs: of the encoders that both models start from.
        epochs: of each model.
        batch_size: of all of them.
    """

    train: int = 2000
    dev: int = 200
    test: int = 500
    pretraining_epochs: int = 2
    epochs: int = 3
    batch_size: int = 64


@dataclass(frozen=True)
class Trained:
    """A model after its training, at its best epoch.

    Attributes:
        model: in eval mode.
        history: of :meth:`laps.train.Trainer.fit`, a dictionary per epoch.
        steps: of the optimizer, over all epochs.
    """

    model: LAPS
    history: list[dict[str, Any]]
    steps: int


def settings() -> dict[str, Any]:
    """What results depend on beside the sizes and the seed, for the record."""
    return {
        "image_size": IMAGE_SIZE,
        "stages": STAGES,
        "bert_layers": BERT_LAYERS,
        "width": WIDTH,
        "embed_dim": EMBED_DIM,
        "vocabulary": VOCABULARY,
        "temperature": TEMPERATURE,
        "head_options": HEAD_OPTIONS,
        "aggregation_scale": AGGREGATION_SCALE,
        "pretraining": {"head": PRETRAINING_HEAD, "learning_rate": PRETRAINING_RATE},
        "training": TRAINING | {"learning_rate": TRAINING_RATE},
    }


def build_model(
    head: str, tokenizer: CaptionTokenizer, seed: int, options: Mapping[str, Any] | None = None
) -> LAPS:
    """An untrained model of half a million weights; the encoders of all heads start equal.

    `options` of the head go before the demo's own.
    """
    torch.manual_seed(seed)
    # A convolutional network: from random weights it learns in half a minute what a vision transformer of
    # this size learns in two. And it has no [CLS] token: that sees the whole scene, and all words match it.
    resnet = ResNetConfig(
        embedding_size=STAGES[0],
        hidden_sizes=list(STAGES),
        depths=[1] * len(STAGES),
        layer_type="basic",
    )
    bert = BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=64,
        num_hidden_layers=BERT_LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 32,
        intermediate_size=2 * WIDTH,
        # A few passes over the data cannot be learnt by heart.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    # Channels last: its convolutions take half the time on a CPU.
    images = ImageEncoder(build(resnet), embed_dim=EMBED_DIM, image_size=IMAGE_SIZE)
    images.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    texts = TextEncoder(build(bert), embed_dim=EMBED_DIM)
    built = build_head(
        head,
        embed_dim=EMBED_DIM,
        num_patches=images.num_patches,
        num_prefix_tokens=images.num_prefix_tokens,
        **HEAD_OPTIONS.get(head, {}) | dict(options or {}),
    )
    if isinstance(built, LAPSHead) and built.calibration == "aggregation":
        torch.nn.init.constant_(built.aggregation.scale, AGGREGATION_SCALE)
    return LAPS(
        images,
        texts,
        built,
        tokenizer=tokenizer,
        # Scenes fill the image, and captions speak of left and right: neither crops nor flips.
        transform=ImageTransform(image_size=IMAGE_SIZE, crop_scale=None, flip=0.0),
        objective=Objective("info_nce", temperature=TEMPERATURE),
    )


def train(
    head: str,
    train_data: RetrievalData,
    dev_data: RetrievalData,
    folder: Path,
    *,
    start: LAPS | None = None,
    options: Mapping[str, Any] | None = None,
    sizes: Sizes,
    seed: int,
    progress: bool,
) -> Trained:
    """Train a model with this head, in the same order of captions for every head.

    Args:
        head: one of `HEADS`.
        train_data: scenes to learn from.
        dev_data: scenes to choose the best epoch by.
        folder: of the run, empty.
        start: what the encoders are copied from; its head is left behind. None for random weights: this is
            the pretraining. The encoders of the paper, too, know pictures and sentences before they meet its
            head; words that each look for their best patch learn little from random ones in a few minutes.
        options: of the head, before the demo's own.
        sizes: how long.
        seed: of the weights and the order.
        progress: whether bars are shown.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. TrainingStoppedError: a loss that is not finite.
    """
    if start is None:
        tokenizer = CaptionTokenizer.train(train_data.captions, vocab_size=VOCABULARY)
        model = build_model(head, tokenizer, seed, options)
        epochs, rate = sizes.pretraining_epochs, PRETRAINING_RATE
    else:
        assert start.tokenizer is not None
        # Another order than the pretraining's, in which every caption would meet the same negatives again.
        seed += 1
        model = build_model(head, start.tokenizer, seed, options)
        model.image_encoder.load_state_dict(start.image_encoder.state_dict())
        model.text_encoder.load_state_dict(start.text_encoder.state_dict())
        epochs, rate = sizes.epochs, TRAINING_RATE
    config = TrainConfig(
        epochs=epochs,
        batch_size=sizes.batch_size,
        seed=seed,
        progress=progress,
        learning_rate=rate,
        **TRAINING,
    )
    trainer = Trainer(model, train_data, dev_data, folder, config)
    try:
        history = trainer.fit()
    except TrainingStoppedError:
        if (folder / "bad_batch.json").exists():
            raise
        # On a signal. To go on from here is the Trainer's offer, but the demo starts anew.
        raise KeyboardInterrupt from None
    return Trained(LAPS.from_pretrained(folder / "best").eval(), history, trainer.progress.step)
