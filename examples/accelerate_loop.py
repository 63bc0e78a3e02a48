"""LAPS with Hugging Face Accelerate: the same loop on a CPU, on one GPU or on several, in bf16 if asked.

python examples/accelerate_loop.py                                  # drawn scenes, small encoders, a CPU
accelerate launch examples/accelerate_loop.py --data f30k/dataset.json --preset vit-base-224 --bf16
"""

import argparse

import common
import laps
import torch
from accelerate import Accelerator
from laps.data import RetrievalData


def train(
    accelerator: Accelerator,
    model: laps.LAPS,
    data: RetrievalData,
    dev: RetrievalData,
    options: argparse.Namespace,
) -> None:
    """The loop. Each process has batches of its own, and the negatives within them."""
    loader = common.training_loader(model, data, options)
    dataset = loader.dataset
    optimizer = common.make_optimizer(model, options)
    # `parallel` is the model as this process runs it (DistributedDataParallel); `model` stays what it is.
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(options.epochs):
        dataset.set_epoch(epoch)
        parallel.train()
        total = 0.0
        for step, batch in enumerate(loader, 1):  # on the device already
            loss, _ = parallel(batch, warmup=common.warmup(options, epoch, step / len(loader)))
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parallel.parameters(), 2.0)
            optimizer.step()
            total += loss.item()
        if accelerator.is_main_process:
            found = laps.evaluate(model, dev, num_workers=options.workers, amp=options.bf16).metrics
            mean = total / len(loader)
            print(f"epoch {epoch + 1}: loss {mean:.4f}, dev rSum {found['rsum']:.1f}", flush=True)
        accelerator.wait_for_everyone()


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "out/accelerate")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16" if options.bf16 else "no")
    torch.manual_seed(0)  # the same weights in every process
    with common.open_data(options) as (data, dev, test):
        model = common.build_model(options, data.captions)
        train(accelerator, model, data, dev, options)
        if accelerator.is_main_process:
            model.save_pretrained(options.out)
            common.show_saved(options, test)
    accelerator.end_training()


if __name__ == "__main__":
    main()
