"""LAPS as a LightningModule: Lightning owns the loop, the devices (all of them) and the logs.

python examples/lightning_module.py                                 # drawn scenes, small encoders, a CPU
python examples/lightning_module.py --data f30k/dataset.json --preset vit-base-224 --batch-size 64
"""

import argparse
import tempfile
from pathlib import Path

import laps
import lightning
import torch
from laps.data import Batch, CaptionDataset, CaptionTokenizer, ImageTransform, RetrievalData
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, ViTConfig, ViTModel


def small_model(captions: list[str]) -> laps.LAPS:
    """Encoders of half a million weights, random at first: no download, and a CPU trains them."""
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


class Retrieval(lightning.LightningModule):
    """Trains a model; after each epoch its rSum on the dev split is logged, and the best model is kept."""

    def __init__(self, model: laps.LAPS, dev: RetrievalData, options: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.dev, self.options = model, dev, options
        self.best = -1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The published rates for pretrained encoders: a tenth of the head's. Random ones learn at one rate.
        rates = (2e-4, 0.1) if self.options.preset else (1e-3, 1.0)
        return torch.optim.AdamW(self.model.parameter_groups(*rates), weight_decay=1e-4)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.set_epoch(
            self.current_epoch
        )  # draws other crops and other words

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # The published first epoch: all negatives, and a loss that grows from nothing.
        done = (batch_idx + 1) / self.trainer.num_training_batches
        warmup = done if self.options.preset and self.current_epoch == 0 else None
        loss, values = self.model(batch, warmup=warmup)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch))
        self.log("accuracy", values["accuracy"], prog_bar=True, batch_size=len(batch))
        return loss

    def on_train_epoch_end(self) -> None:
        # Recall is of the whole split at once, so there is no validation_step per batch.
        if self.trainer.is_global_zero:
            rsum = laps.evaluate(self.model, self.dev, num_workers=self.options.workers).metrics["rsum"]
            self.log("val_rsum", rsum, rank_zero_only=True)
            if rsum > self.best:
                self.best = rsum
                self.model.save_pretrained(self.options.out)
            loss = self.trainer.callback_metrics["loss"]
            print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}, dev rSum {rsum:.1f}", flush=True)
        self.trainer.strategy.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="any format of laps.data.load; without it scenes are drawn")
    parser.add_argument("--preset", help="pretrained encoders, such as vit-base-224; without it small ones")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes to draw for training")
    parser.add_argument("--out", type=Path, default=Path("out/lightning"), help="where the model goes")
    options = parser.parse_args()

    lightning.seed_everything(0)
    with tempfile.TemporaryDirectory() as scratch:
        held_out = max(8, options.scenes // 5)
        path = options.data or laps.data.make_scenes(
            scratch, num_train=options.scenes, num_dev=held_out, num_test=held_out
        )
        data, dev, test = (laps.data.load(path, split) for split in ("train", "dev", "test"))
        model = laps.LAPS.from_preset(options.preset) if options.preset else small_model(data.captions)
        augment = 0.2 if options.preset else 0.0  # share of words that are masked, replaced or deleted
        dataset = CaptionDataset(data, model.tokenizer, model.transform, augment=augment)
        loader = DataLoader(
            dataset,
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=options.workers,
            collate_fn=dataset.collate,
        )
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            gradient_clip_val=2.0,
            logger=False,
            enable_checkpointing=False,  # the best model is kept by `Retrieval`
        )
        trainer.fit(Retrieval(model, dev, options), loader)

        if trainer.is_global_zero:
            print(f"saved in {options.out}; loaded again, on the test split:")
            print(laps.evaluate(laps.LAPS.from_pretrained(options.out), test, num_workers=options.workers))


if __name__ == "__main__":
    main()
