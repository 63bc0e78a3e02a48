"""Items depend on (seed, epoch, index) alone, in real DataLoader workers, and unreadable images are named."""

from __future__ import annotations

import multiprocessing
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laps import LapsTypeError, LapsValueError
from laps.data import Batch, CaptionDataset, CaptionTokenizer, ImageDataset, ImageTransform, RetrievalData
from laps.data.dataset import Example
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, DistributedSampler

COLOURS = ["red", "green", "blue", "white", "black", "orange"]
TRANSFORM = ImageTransform(image_size=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RetrievalData:
    """Six images with one to three captions of different lengths, in an order that mixes the images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = []
    for i, colour in enumerate(COLOURS):
        pixels = np.asarray(Image.new("RGB", (40 + i, 30), colour)) // 2 + generator.integers(
            0, 128, (30, 40 + i, 3)
        )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    to_image = [0, 1, 1, 2, 0, 3, 4, 4, 4, 5]
    captions = [f"{'a very ' * (t % 3)}{COLOURS[i]} noisy picture number {t}" for t, i in enumerate(to_image)]
    return RetrievalData(paths, captions, np.array(to_image), "mine/train")


@pytest.fixture(scope="module")
def tokenizer(data: RetrievalData) -> CaptionTokenizer:
    return CaptionTokenizer.train(data.captions, vocab_size=120)


@pytest.fixture
def dataset(data: RetrievalData, tokenizer: CaptionTokenizer) -> CaptionDataset:
    dense = data.captions[: data.num_images]  # any texts, one for each image
    return CaptionDataset(data, tokenizer, TRANSFORM, seed=3, dense_captions=dense)


def batches(dataset: CaptionDataset, **options: Any) -> list[Batch]:
    return list(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate, **options))


def assert_equal(some: Iterable[Batch], others: Iterable[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        for name, tensor in vars(one).items():
            expected = getattr(other, name)
            assert expected is None if tensor is None else torch.equal(tensor, expected), name


def rows(some: Iterable[Batch]) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    for batch in some:
        for i in range(len(batch)):
            ids = batch.input_ids[i, : batch.lengths[i]].tolist()
            yield int(batch.caption_ids[i]), ids, batch.pixel_values[i]


# ---- what a batch holds


def test_a_batch_holds_captions_with_their_images(data: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    dataset = CaptionDataset(data, tokenizer, TRANSFORM, train=False)
    whole = batches(dataset)
    assert [len(batch) for batch in whole] == [4, 4, 2]
    first = whole[0]
    tokens = tokenizer.encode(data.captions[:4])
    assert torch.equal(first.input_ids, tokens.input_ids)
    assert torch.equal(first.lengths, tokens.lengths)
    assert (first.image_ids.tolist(), first.caption_ids.tolist()) == ([0, 1, 1, 2], [0, 1, 2, 3])
    assert (first.pixel_values.shape, first.pixel_values.dtype) == ((4, 3, 16, 16), torch.float32)
    for tensor in (first.input_ids, first.lengths, first.image_ids, first.caption_ids):
        assert tensor.dtype == torch.int64
    with Image.open(data.image_paths[1]) as image:
        assert torch.equal(first.pixel_values[2], TRANSFORM.eval()(image))
    moved = first.to("meta")
    assert {name: None if tensor is None else tensor.device.type for name, tensor in vars(moved).items()} == {
        "pixel_values": "meta",
        "input_ids": "meta",
        "lengths": "cpu",
        "image_ids": "meta",
        "caption_ids": "meta",
        "dense_ids": None,
        "dense_lengths": None,
    }


def test_images_come_with_their_indices(data: RetrievalData) -> None:
    for images in (ImageDataset(data, TRANSFORM), ImageDataset(data.image_paths, TRANSFORM)):
        loader = DataLoader(images, batch_size=4, num_workers=2, collate_fn=images.collate)
        indices, pixels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert indices.tolist() == list(range(6)) == list(range(len(images)))
        for path, row in zip(data.image_paths, pixels, strict=True):
            with Image.open(path) as image:
                assert torch.equal(row, TRANSFORM.eval()(image))


# ---- randomness


def test_batches_do_not_depend_on_the_number_of_workers(dataset: CaptionDataset) -> None:
    alone = batches(dataset)
    assert_equal(alone, batches(dataset, num_workers=2))
    assert_equal(alone, batches(dataset, num_workers=1, prefetch_factor=1))


def test_items_do_not_depend_on_their_order(dataset: CaptionDataset) -> None:
    torch.manual_seed(1)
    for t, ids, pixels in rows(batches(dataset, shuffle=True)):
        example = dataset[t]
        assert example is not None
        assert example.token_ids == ids
        assert torch.equal(example.pixel_values, pixels)


def test_a_spawned_worker_gives_the_same_batches(dataset: CaptionDataset) -> None:
    dataset.set_epoch(2)
    context = multiprocessing.get_context("spawn")
    assert_equal(batches(dataset), batches(dataset, num_workers=1, multiprocessing_context=context))


def test_items_change_with_seed_and_epoch_and_come_back_with_them(
    data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    def draw(seed: int, epoch: int) -> list[Batch]:
        dataset = CaptionDataset(data, tokenizer, TRANSFORM, seed=seed)
        dataset.set_epoch(epoch)
        assert dataset.epoch == epoch
        return batches(dataset)

    drawn = [draw(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (-1, 0), (2**62, 1))]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert all(not torch.equal(a[2], b[2]) for a, b in zip(rows(one), rows(other), strict=True))
            assert [ids for _, ids, _ in rows(one)] != [ids for _, ids, _ in rows(other)]
    assert_equal(drawn[1], draw(0, 1))


def test_captions_of_one_image_get_different_crops(dataset: CaptionDataset) -> None:
    crops = [pixels for t, _, pixels in rows(batches(dataset)) if t in (6, 7, 8)]
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[1], crops[2])


def test_persistent_workers_see_the_next_epoch(dataset: CaptionDataset) -> None:
    loader = DataLoader(
        dataset, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=dataset.collate
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert_equal(loader, batches(dataset))


def test_the_generators_of_the_process_are_left_alone(dataset: CaptionDataset) -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate())
    _ = dataset[0], dataset[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_distributed_ranks_share_out_the_items_of_one_process(dataset: CaptionDataset) -> None:
    alone = {t: (ids, pixels) for t, ids, pixels in rows(batches(dataset))}
    seen: list[int] = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=7)
        sampler.set_epoch(1)
        for t, ids, pixels in rows(batches(dataset, sampler=sampler, num_workers=1)):
            seen.append(t)
            assert ids == alone[t][0]
            assert torch.equal(pixels, alone[t][1])
    assert sorted(seen) == list(range(len(dataset)))


def test_pinning_keeps_the_batch(dataset: CaptionDataset) -> None:
    # Without an accelerator the DataLoader warns and leaves the batch where it is.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pinned = batches(dataset, pin_memory=True)
    assert_equal(pinned, batches(dataset))
    if torch.cuda.is_available():
        assert all(tensor.is_pinned() for tensor in vars(pinned[0]).values())


def test_without_augmentation_only_the_images_change(
    data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    plain = CaptionDataset(data, tokenizer, TRANSFORM, augment=0)
    fixed = CaptionDataset(data, tokenizer, TRANSFORM, train=False)
    for one, other in zip(rows(batches(plain)), rows(batches(fixed)), strict=True):
        assert one[1] == other[1]
        assert not torch.equal(one[2], other[2])
    fixed.set_epoch(9)
    assert_equal(batches(fixed), batches(CaptionDataset(data, tokenizer, TRANSFORM, seed=5, train=False)))


# ---- what goes wrong


@pytest.fixture
def damaged(data: RetrievalData, tmp_path: Path) -> RetrievalData:
    """Image 1 is truncated, image 4 is missing: captions 1, 2, 6, 7 and 8."""
    (tmp_path / "1.png").write_bytes(data.image_paths[1].read_bytes()[:200])
    paths = [tmp_path / path.name if i in (1, 4) else path for i, path in enumerate(data.image_paths)]
    return RetrievalData(paths, data.captions, data.caption_to_image, data.name)


def test_an_unreadable_image_is_raised_with_its_path_through_the_workers(
    damaged: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    dataset = CaptionDataset(damaged, tokenizer, TRANSFORM)
    for workers in (0, 1):
        with pytest.raises(LapsValueError, match=str(damaged.image_paths[1])):
            batches(dataset, num_workers=workers)
    with pytest.raises(LapsValueError, match=f"{damaged.image_paths[4]} is missing"):
        dataset[8]


def test_skipped_images_leave_the_rest_and_warn_once(
    damaged: RetrievalData, data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    dataset = CaptionDataset(damaged, tokenizer, TRANSFORM, on_error="skip")
    assert dataset.skipped_images == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = batches(dataset) + batches(dataset)
    assert dataset.skipped_images == [damaged.image_paths[1], damaged.image_paths[4]]
    assert sorted(str(damaged.image_paths[i]) in str(w.message) for i in (1, 4) for w in caught) == [
        False, False, True, True
    ]  # fmt: skip
    assert [batch.caption_ids.tolist() for batch in kept[:3]] == [[0, 3], [4, 5], [9]]
    whole = {t: pixels for t, _, pixels in rows(batches(CaptionDataset(data, tokenizer, TRANSFORM)))}
    assert all(torch.equal(pixels, whole[t]) for t, _, pixels in rows(kept))


def test_workers_together_warn_once_per_path(
    damaged: RetrievalData,
    tokenizer: CaptionTokenizer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pytest collects warnings in memory, which a worker's end would lose.
    monkeypatch.setattr(warnings, "showwarning", lambda shown, *rest: os.write(2, f"{shown}\n".encode()))
    dataset = CaptionDataset(damaged, tokenizer, TRANSFORM, on_error="skip")
    for _ in range(2):
        assert sum(len(batch) for batch in batches(dataset, num_workers=2)) == 5
    assert dataset.skipped_images == [damaged.image_paths[1], damaged.image_paths[4]]
    shown = capfd.readouterr().err
    assert [shown.count(f"skipped: open_image: {damaged.image_paths[i]}") for i in (1, 4)] == [1, 1]
    assert "tokenizers" not in shown


def test_a_batch_with_nothing_left_is_refused(damaged: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    dataset = CaptionDataset(damaged, tokenizer, TRANSFORM, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(LapsValueError, match="2 skipped"):
        dataset.collate([dataset[6], dataset[7]])


def test_skipped_images_are_left_out_of_an_index(damaged: RetrievalData) -> None:
    images = ImageDataset(damaged, TRANSFORM, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        items = [images[i] for i in range(6)]
    indices, pixels = images.collate(items)
    assert (indices.tolist(), len(pixels)) == ([0, 2, 3, 5], 4)
    indices, pixels = images.collate([None, None])
    assert (indices.shape, pixels.shape) == ((0,), (0, 3, 16, 16))
    with pytest.raises(LapsValueError, match=str(damaged.image_paths[1])):
        ImageDataset(damaged, TRANSFORM)[1]


def test_a_caption_without_tokens_is_named(data: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    blank = RetrievalData(data.image_paths, ["\u200b", *data.captions[1:]], data.caption_to_image, data.name)
    for train in (True, False):
        with pytest.raises(LapsValueError, match=r"caption 0 of mine/train: .* has no token"):
            CaptionDataset(blank, tokenizer, TRANSFORM, train=train)[0]


def test_a_caption_without_tokens_is_skipped_with_one_warning_if_asked(
    data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    blank = RetrievalData(data.image_paths, ["\u200b", *data.captions[1:]], data.caption_to_image, data.name)
    dataset = CaptionDataset(blank, tokenizer, TRANSFORM, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = batches(dataset) + batches(dataset)
    assert [batch.caption_ids.tolist() for batch in kept[:3]] == [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(caught) == 1
    assert "skipped: CaptionDataset: caption 0 of mine/train" in str(caught[0].message)
    assert dataset.skipped_images == []


def test_wrong_arguments_are_refused(data: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(LapsValueError, match="on_error is unknown"):
        CaptionDataset(data, tokenizer, TRANSFORM, on_error="ignore")
    with pytest.raises(LapsValueError, match="augment is out of range"):
        CaptionDataset(data, tokenizer, TRANSFORM, augment=1.2)
    for transform in (TRANSFORM.eval(), None):
        with pytest.raises(LapsTypeError, match="CaptionDataset: transform is none"):
            CaptionDataset(data, tokenizer, transform)  # type: ignore[arg-type]
        with pytest.raises(LapsTypeError, match="ImageDataset: transform is none"):
            ImageDataset(data, transform)  # type: ignore[arg-type]
    with pytest.raises(LapsTypeError, match="seed is no integer"):
        CaptionDataset(data, tokenizer, TRANSFORM, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(LapsValueError, match="epoch is out of range"):
        CaptionDataset(data, tokenizer, TRANSFORM).set_epoch(-1)


def test_augmentation_with_a_vocabulary_without_mask_token_is_refused_at_once(
    data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    maskless = CaptionTokenizer(Tokenizer.from_str(tokenizer.backend.to_str().replace("[MASK]", "[LOST]")))
    with pytest.raises(LapsValueError, match="no mask token"):
        CaptionDataset(data, maskless, TRANSFORM)
    assert len(CaptionDataset(data, maskless, TRANSFORM, augment=0)[0].token_ids) > 3  # type: ignore[union-attr]
    assert isinstance(CaptionDataset(data, maskless, TRANSFORM, train=False)[0], Example)
