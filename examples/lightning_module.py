"""LAPS as a LightningModule: Lightning owns the loop, the devices (all of them) and the logs.

python examples/lightning_module.py                                 # drawn scenes, small encoders, a CPU
python examples/lightning_module.py --data f30k/dataset.json --preset vit-base-224 --batch-size 64
"""

import argparse

import common
import laps
import lightning
import torch
from laps.data import Batch, RetrievalData
from torch import Tensor


class Retrieval(lightning.LightningModule):
    """Trains a model; after each epoch its rSum on the dev split is logged, and the best model is kept."""

    def __init__(self, model: laps.LAPS, dev: RetrievalData, options: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.dev, self.options = model, dev, options
        self.best = -1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return common.make_optimizer(self.model, self.options)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        done = (batch_idx + 1) / self.trainer.num_training_batches
        loss, values = self.model(batch, warmup=common.warmup(self.options, self.current_epoch, done))
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
    options = common.parser(__doc__.splitlines()[0], "out/lightning").parse_args()
    lightning.seed_everything(0)
    with common.open_data(options) as (data, dev, test):
        model = common.build_model(options, data.captions)
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            gradient_clip_val=2.0,
            logger=False,
            enable_checkpointing=False,  # the best model is kept by `Retrieval`
        )
        trainer.fit(Retrieval(model, dev, options), common.training_loader(model, data, options))
        if trainer.is_global_zero:
            common.show_saved(options, test)


if __name__ == "__main__":
    main()
