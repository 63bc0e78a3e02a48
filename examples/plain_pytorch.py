"""LAPS in a plain PyTorch loop: every line of a training step is here, to be changed.

    python examples/plain_pytorch.py                                    # drawn scenes, small encoders, a CPU
    python examples/plain_pytorch.py --data f30k/dataset.json --preset vit-base-224 --batch-size 64

The lines between the two rulers are the method; image_tokens and word_tokens may come from any encoders.
"""

import argparse

import common
import laps
import torch
from laps.data import RetrievalData


def train(model: laps.LAPS, data: RetrievalData, dev: RetrievalData, options: argparse.Namespace) -> None:
    """The loop. One batch holds images with one caption each; they are each other's negatives."""
    loader = common.training_loader(model, data, options)
    optimizer = common.make_optimizer(model, options)
    for epoch in range(options.epochs):
        loader.dataset.set_epoch(epoch)
        model.train()
        total = 0.0
        for step, batch in enumerate(loader, 1):
            batch = batch.to(model.device)
            warmup = common.warmup(options, epoch, step / len(loader))
            # ------------------------------------------------------------------------------------------
            image_tokens = model.image_encoder(batch.pixel_values)  # (B, P + N, C)
            word_tokens = model.text_encoder(batch.input_ids, batch.lengths)  # (B, L, C)
            scores = model.head(image_tokens, word_tokens, batch.lengths)  # (B, B), every pair
            loss, _ = model.objective(scores, batch.image_ids, warmup=warmup)  # pairs on the diagonal
            # ------------------------------------------------------------------------------------------
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            total += loss.item()
        found = laps.evaluate(model, dev, num_workers=options.workers).metrics
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}, dev rSum {found['rsum']:.1f}", flush=True)


def main() -> None:
    options = common.parser(__doc__.splitlines()[0], "out/plain_pytorch").parse_args()
    torch.manual_seed(0)
    with common.open_data(options) as (data, dev, test):
        model = common.build_model(options, data.captions)
        train(model.to("cuda" if torch.cuda.is_available() else "cpu"), data, dev, options)
        model.save_pretrained(options.out)
        common.show_saved(options, test)


if __name__ == "__main__":
    main()
