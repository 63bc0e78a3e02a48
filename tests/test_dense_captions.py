"""Dense captions: read from files as others write them, in training's batches and loss, nowhere else."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import scenes, tiny_laps
from laps import LapsTypeError, LapsValueError
from laps.cli import main
from laps.data import CaptionDataset, CaptionTokenizer, RetrievalData, read_dense_captions
from laps.train import TrainConfig, Trainer
from torch.utils.data import DataLoader

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "num_workers": 0,
    "device": "cpu",
    "progress": False,
    "warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[RetrievalData, RetrievalData]:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def texts(data: tuple[RetrievalData, RetrievalData]) -> list[str]:
    """All captions of an image as one text."""
    train = data[0]
    return [" and ".join(train.captions[t] for t in train.captions_of(i)) for i in range(train.num_images)]


@pytest.fixture(scope="module")
def tokenizer(data: tuple[RetrievalData, RetrievalData]) -> CaptionTokenizer:
    return CaptionTokenizer.train(data[0].captions, vocab_size=150)


# ---- files


def write(file: Path, names: list[str], texts: list[str]) -> Path:
    rows = [{"image": name, "caption": text} for name, text in zip(names, texts, strict=True)]
    if file.name == "object.json":
        file.write_text(json.dumps(dict(zip(names, texts, strict=True))))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(
                stream, ["image", "caption"], delimiter="\t" if file.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("name", ["object.json", "list.json", "rows.jsonl", "rows.csv", "rows.tsv"])
def test_every_format_gives_the_texts_in_the_order_of_the_images(tmp_path: Path, name: str) -> None:
    paths = [Path("photos/train/b.jpg"), Path("photos/a.jpg"), Path("photos/val/b.jpg")]
    data = RetrievalData(paths, ["one", "two", "three"], [0, 1, 2])
    names = ["a.jpg", "val/b.jpg", "elsewhere.jpg", "photos/train/b.jpg"]
    file = write(tmp_path / name, names, ["a, with a comma", "of val", "unused", "of train"])
    assert read_dense_captions(file, data) == ["of train", "a, with a comma", "of val"]


def test_a_whole_path_or_the_photograph_of_a_file_of_regions_is_a_name_too(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jpg", Path("regions/b.c.npz"), Path("regions/train_ims.npy/7")]
    data = RetrievalData(paths, ["one", "two", "three"], [0, 1, 2])
    names = [str(tmp_path / "a.jpg"), "b.c.jpg", "train_ims.npy/7"]
    file = write(tmp_path / "dense.csv", names, ["of a", "of b", "of row 7"])
    assert read_dense_captions(file, data) == ["of a", "of b", "of row 7"]


def test_a_name_that_fits_two_images_is_refused(tmp_path: Path) -> None:
    data = RetrievalData([Path("train/1.jpg"), Path("val/1.jpg")], ["one", "two"], [0, 1])
    file = write(tmp_path / "dense.jsonl", ["1.jpg"], ["text"])
    with pytest.raises(LapsValueError, match=r"1\.jpg fits several images .*got train/1\.jpg and val/1\.jpg"):
        read_dense_captions(file, data)
    write(file, ["1.jpg", "val/1.jpg"], ["of train", "of val"])
    assert read_dense_captions(file, data) == ["of train", "of val"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.jpg": "text"}', r"has no text for 1 of the 2 images .* got none for .*b\.jpg"),
        ('{"a.jpg": "text", "b.jpg": " "}', r"b\.jpg is empty"),
        ('{"a.jpg": "text", "b.jpg": 3}', r"b\.jpg has no usable 'caption'"),
        (
            '[{"image": "a.jpg", "caption": "x"}, {"image": "./a.jpg", "caption": "y"}]',
            "second text of a.jpg",
        ),
        ('{"a.jpg": "one", "b.jpg": "two", "a.jpg": "three"}', "names 'a.jpg' twice"),
        ("[" * 100_000, "cannot be read"),
        ('"text"', "lists nothing"),
        ("{", "is malformed"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: str, message: str) -> None:
    data = RetrievalData([Path("a.jpg"), Path("b.jpg")], ["one", "two"], [0, 1])
    file = tmp_path / "dense.json"
    file.write_text(content)
    with pytest.raises(LapsValueError, match=message):
        read_dense_captions(file, data)
    with pytest.raises(LapsValueError, match=r"absent\.json cannot be read"):
        read_dense_captions(tmp_path / "absent.json", data)


# ---- batches


def without_and_with(
    data: RetrievalData, tokenizer: CaptionTokenizer, texts: list[str], augment: float
) -> list[CaptionDataset]:
    transform = tiny_laps(tokenizer=tokenizer).transform
    return [
        CaptionDataset(data, tokenizer, transform, augment=augment, dense_captions=given)
        for given in (None, texts)
    ]


def test_a_batch_holds_the_dense_captions_of_its_images(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer
) -> None:
    plain, dense = without_and_with(data[0], tokenizer, texts, augment=0)
    loader = DataLoader(dense, batch_size=6, collate_fn=dense.collate, num_workers=2)
    for number, batch in enumerate(loader):
        without = plain.collate([plain[t] for t in range(number * 6, min(number * 6 + 6, len(plain)))])
        assert (without.dense_ids, without.dense_lengths) == (None, None)
        assert torch.equal(batch.input_ids, without.input_ids)
        assert torch.equal(batch.pixel_values, without.pixel_values)
        expected = tokenizer.encode([texts[i] for i in batch.image_ids.tolist()])
        assert torch.equal(batch.dense_ids, expected.input_ids)
        assert torch.equal(batch.dense_lengths, expected.lengths)
        moved = batch.to("cpu")
        assert torch.equal(moved.dense_ids, batch.dense_ids)


def test_captions_are_augmented_as_without_dense_captions(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer
) -> None:
    plain, dense = without_and_with(data[0], tokenizer, texts, augment=0.5)
    changed = 0
    for t in range(8):
        one, other = plain[t], dense[t]
        assert one is not None
        assert other is not None
        assert one.token_ids == other.token_ids
        assert torch.equal(one.pixel_values, other.pixel_values)
        exact = tokenizer.encode([texts[other.image_id]]).input_ids[0].tolist()
        changed += other.dense_ids != exact
    assert changed > 4


def test_texts_that_do_not_fit_are_refused(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    model = tiny_laps(tokenizer=tokenizer)
    message = rf"dense_captions does not fit \(expected {len(texts)} texts, one per image, got 1\)"
    with pytest.raises(LapsValueError, match=message):
        CaptionDataset(data[0], tokenizer, model.transform, dense_captions=texts[:1])
    with pytest.raises(LapsValueError, match=message):
        Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS), dense_captions=texts[:1])
    for unseen in (" ", "\ufffd"):
        given = [*texts[:-1], unseen]
        with pytest.raises(LapsValueError, match=r"the dense caption of .*\.jpg has no token"):
            CaptionDataset(data[0], tokenizer, model.transform, dense_captions=given)
        with pytest.raises(LapsValueError, match="Trainer: the dense caption of"):
            Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS), dense_captions=given)
    for wrong in ("a" * len(texts), [None] * len(texts)):
        with pytest.raises(LapsTypeError, match=r"dense_captions is wrong .expected a list of strings"):
            CaptionDataset(data[0], tokenizer, model.transform, dense_captions=wrong)  # type: ignore[arg-type]


# ---- the loss


def test_the_loss_is_the_sum_of_both_texts_losses(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer
) -> None:
    model = tiny_laps(tokenizer=tokenizer).double().eval()
    dataset = CaptionDataset(data[0], tokenizer, model.transform, augment=0, dense_captions=texts)
    batch = dataset.collate([dataset[t] for t in (0, 5, 11, 12)])
    batch.pixel_values = batch.pixel_values.double()
    assert batch.dense_ids is not None
    assert batch.dense_lengths is not None
    captions = replace(batch, dense_ids=None, dense_lengths=None)
    dense = replace(captions, input_ids=batch.dense_ids, lengths=batch.dense_lengths)
    parameters = [p for p in model.parameters() if p.requires_grad]

    both, values = model(batch, dense_weight=0.3)
    separate = model(captions)[0] + 0.3 * model(dense)[0]
    torch.testing.assert_close(both, separate, rtol=1e-12, atol=0)
    torch.testing.assert_close(values["loss"], both.detach())
    torch.testing.assert_close(values["dense_loss"], model(dense)[0].detach())
    for one, other in zip(
        *(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (both, separate)), strict=True
    ):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", ["vse", "chan", "hrem", "cpfean"])
def test_other_heads_train_with_them_too(
    head: str, data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer
) -> None:
    model = tiny_laps(tokenizer=tokenizer, head=head).train()
    dataset = CaptionDataset(data[0], tokenizer, model.transform, dense_captions=texts)
    loss, values = model(dataset.collate([dataset[t] for t in (0, 5, 11, 12)]))
    loss.backward()
    assert values["dense_loss"] > 0
    assert values["loss"] > values["dense_loss"]


def test_hrem_counts_a_batch_with_dense_captions_once(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer
) -> None:
    model = tiny_laps(tokenizer=tokenizer, head="hrem", num_heads=2, interaction_start=2).train()
    dataset = CaptionDataset(data[0], tokenizer, model.transform, dense_captions=texts)
    batch = dataset.collate([dataset[t] for t in (0, 5, 11, 12)])
    interactions = []
    original = model.head.training_scores

    def watched(*arguments: Any) -> Any:
        result = original(*arguments)
        interactions.append(bool(result.loss_scores))
        return result

    model.head.training_scores = watched  # type: ignore[method-assign]
    for _ in range(3):
        model(batch)
    assert int(model.head.steps) == 3
    assert interactions == [False, False, False, False, True, True]


# ---- runs


def test_a_run_with_them_differs_and_another_text_is_another_run(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    config = TrainConfig(**OPTIONS)
    losses = []
    for name, given in (("without", None), ("with", texts)):
        model = tiny_laps(tokenizer=tokenizer)
        history = Trainer(model, *data, tmp_path / name, config, dense_captions=given).fit()
        losses.append(history[0]["loss"])
    assert losses[1] > 1.5 * losses[0]

    def resume(given: list[str] | None) -> None:
        model = tiny_laps(tokenizer=tokenizer)
        Trainer(model, *data, tmp_path / "with", config, dense_captions=given).fit(resume=True)

    resume(texts)
    for other in (None, [*texts[1:], texts[0]]):
        with pytest.raises(LapsValueError, match="dense_captions: "):
            resume(other)


def test_images_that_are_left_out_take_their_texts_with_them(
    data: tuple[RetrievalData, RetrievalData], texts: list[str], tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    train = data[0]
    paths = [tmp_path / "absent.jpg", *train.image_paths[1:]]
    gap = RetrievalData(paths, train.captions, train.caption_to_image, train.name)
    config = TrainConfig(**OPTIONS | {"on_error": "skip"})
    model = tiny_laps(tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="skipped 1 of"):
        trainer = Trainer(model, gap, None, tmp_path / "run", config, dense_captions=texts)
    assert trainer.source.dataset.dense_captions == texts[1:]
    # As many texts as images are left are another image's each.
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(LapsValueError, match="does not fit"):
        Trainer(model, gap, None, tmp_path / "other", config, dense_captions=texts[1:])


def test_the_command_trains_with_a_file_of_them_and_evaluates_without(
    texts: list[str],
    tokenizer: CaptionTokenizer,
    data: tuple[RetrievalData, RetrievalData],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_laps(tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    names = [path.name for path in data[0].image_paths]
    file = write(tmp_path / "dense.jsonl", names, texts)
    folder = data[0].image_paths[0].parents[1]
    arguments = ["--epochs", 1, "--batch-size", 8, "--num-workers", 0, "--device", "cpu", "--no-progress"]
    run = ["train", folder, "--model", tmp_path / "model", "--out", tmp_path / "run", *arguments]
    assert main([str(x) for x in [*run, "--dense-captions", file, "--dense-weight", 0.5]]) == 0
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["train"]["dense_weight"] == 0.5
    assert described["dense_captions"]
    capsys.readouterr()

    best = tmp_path / "run" / "best"
    evaluation = ["eval", best, folder, "--split", "dev", "--device", "cpu", "--num-workers", 0, "--quiet"]
    assert main([str(x) for x in evaluation]) == 0
    assert "rSum" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # it has no such option
        main([str(x) for x in [*evaluation, "--dense-captions", file]])


def test_a_run_without_them_does_not_depend_on_their_weight(
    data: tuple[RetrievalData, RetrievalData], tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    Trainer(tiny_laps(tokenizer=tokenizer), *data, tmp_path, TrainConfig(**OPTIONS)).fit()
    described = json.loads((tmp_path / "config.json").read_text())
    assert "dense_weight" not in described["train"]
    config = TrainConfig(**OPTIONS, dense_weight=0.5)
    Trainer(tiny_laps(tokenizer=tokenizer), *data, tmp_path, config).fit(resume=True)


def test_the_command_refuses_a_weight_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", str(tmp_path), "--out", str(tmp_path / "run"), "--dense-weight", "0.5"]
    assert main(run) == 2
    assert "--dense-weight is given alone (expected --dense-captions too" in capsys.readouterr().err


def test_the_command_names_the_file_that_does_not_fit(
    data: tuple[RetrievalData, RetrievalData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "dense.json", ["other.jpg"], ["text"])
    folder = data[0].image_paths[0].parents[1]
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), "--dense-captions", str(file)]) == 2
    assert "dense.json has no text for" in capsys.readouterr().err
