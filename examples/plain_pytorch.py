"""LAPS in a plain PyTorch loop: every line of training is here, to be changed.

    python examples/plain_pytorch.py                                    # drawn scenes, small encoders, a CPU
    python examples/plain_pytorch.py --data f30k/dataset.json --preset vit-base-224 --batch-size 64

The lines between the two rulers are the method; image_tokens and word_tokens may come from any encoders.
"""

import argparse
import tempfile
from pathlib import Path

import laps
import torch
from laps.data import CaptionDataset, CaptionTokenizer, ImageTransform, RetrievalData
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


def train(model: laps.LAPS, data: RetrievalData, dev: RetrievalData, options: argparse.Namespace) -> None:
    """The loop. One batch holds images with one caption each; they are each other's negatives."""
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
    # The published rates for pretrained encoders: a tenth of the head's. Random ones learn at one rate.
    groups = model.parameter_groups(2e-4, 0.1) if options.preset else model.parameter_groups(1e-3, 1.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    for epoch in range(options.epochs):
        dataset.set_epoch(epoch)  # draws other crops and other words
        model.train()
        total = 0.0
        for step, batch in enumerate(loader, 1):
            batch = batch.to(model.device)
            # The published first epoch: all negatives, and a loss that grows from nothing.
            warmup = step / len(loader) if options.preset and epoch == 0 else None
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="any format of laps.data.load; without it scenes are drawn")
    parser.add_argument("--preset", help="pretrained encoders, such as vit-base-224; without it small ones")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes to draw for training")
    parser.add_argument("--out", type=Path, default=Path("out/plain_pytorch"), help="where the model goes")
    options = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        held_out = max(8, options.scenes // 5)
        path = options.data or laps.data.make_scenes(
            scratch, num_train=options.scenes, num_dev=held_out, num_test=held_out
        )
        data, dev, test = (laps.data.load(path, split) for split in ("train", "dev", "test"))
        model = laps.LAPS.from_preset(options.preset) if options.preset else small_model(data.captions)
        train(model.to("cuda" if torch.cuda.is_available() else "cpu"), data, dev, options)

        model.save_pretrained(options.out)
        print(f"saved in {options.out}; loaded again, on the test split:")
        print(laps.evaluate(laps.LAPS.from_pretrained(options.out), test, num_workers=options.workers))


if __name__ == "__main__":
    main()
