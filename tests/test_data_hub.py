"""Data sets and parquet files that the library `datasets` has written are found, and used as files are."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import laps
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from _models import tiny_laps
from _refused import refused
from laps import LapsTypeError
from laps.data import (
    CaptionTokenizer,
    ImageDataset,
    ImageTransform,
    RetrievalData,
    check,
    from_dataset,
    load,
    open_image,
)
from laps.errors import LapsImportError
from PIL import Image
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets")

COLOURS = ["red", "green", "blue", "white", "black", "gold"]
TEXTS = [[f"a {colour} square", f"{colour} all over"][: 1 + i % 2] for i, colour in enumerate(COLOURS)]
WORDS = datasets.List(datasets.Value("string"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library copies parquet files into its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encoded(colour: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(stream, kind)
    return stream.getvalue()


def rows(first: int = 0, last: int = 6, **columns: Any) -> Any:
    """A data set as the hub has them, with images of type Image and lists of captions."""
    content = {"image": [{"bytes": encoded(c), "path": f"{c}.png"} for c in COLOURS[first:last]], **columns}
    features = {"image": datasets.Image()}
    if not columns:
        content["caption"], features["caption"] = TEXTS[first:last], WORDS
    for name, values in columns.items():
        features[name] = WORDS if isinstance(values[0], list) else datasets.Value("string")
        if isinstance(values[0], int):
            features[name] = datasets.Value("int64")
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def colours(data: RetrievalData) -> list[tuple[int, ...]]:
    return [open_image(path).getpixel((0, 0)) for path in data.image_paths]


def pixels(first: int = 0, last: int = 6) -> list[tuple[int, ...]]:
    return [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS[first:last]]


# ---- what is read


def test_a_saved_data_set_is_read_with_its_images(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "set")
    data = load(tmp_path / "set", "all")
    assert data.image_paths[4] == tmp_path / "set" / "4"
    assert data.captions == [text for texts in TEXTS for text in texts]
    assert data.caption_to_image.tolist() == [i for i, texts in enumerate(TEXTS) for _ in texts]
    assert colours(data) == pixels()


def test_a_saved_dictionary_has_its_splits_and_restval_is_training_data(tmp_path: Path) -> None:
    parts = {"train": rows(0, 2), "restval": rows(2, 3), "validation": rows(3, 4), "test": rows(4, 6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert colours(load(tmp_path / "set", "train")) == pixels(0, 3)
    assert colours(load(tmp_path / "set", "dev")) == pixels(3, 4)
    assert load(tmp_path / "set", "test").captions == [text for texts in TEXTS[4:6] for text in texts]
    refused(lambda: load(tmp_path / "set", "testall"), "no split 'testall'", "train, validation, test")


@pytest.mark.parametrize("folder", [".", "data"])
def test_parquet_files_of_the_hub_are_one_split_for_each_name(tmp_path: Path, folder: str) -> None:
    place = tmp_path / "set" / folder
    place.mkdir(parents=True)
    rows(0, 2).to_parquet(place / "train-00000-of-00002.parquet")
    rows(2, 4).to_parquet(place / "train-00001-of-00002.parquet")
    rows(4, 6).to_parquet(place / "test-00000-of-00001.parquet")
    train = load(tmp_path / "set", "train")
    assert colours(train) == pixels(0, 4)
    assert [path.name for path in train.image_paths] == ["0", "1", "0", "1"]
    assert colours(load(tmp_path / "set", "test")) == pixels(4, 6)
    assert colours(load(place / "test-00000-of-00001.parquet", "test")) == pixels(4, 6)


def test_a_column_tells_the_split_where_the_files_do_not(tmp_path: Path) -> None:
    """As nlphuji/flickr30k: all of it in a test split."""
    splits = ["train", "train", "val", "test", "restval", "test"]
    whole = rows(caption=TEXTS, split=splits, img_id=[str(i) for i in range(6)])
    whole.to_parquet(tmp_path / "TEST-00000-of-00001.parquet")
    datasets.DatasetDict(test=whole).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "TEST-00000-of-00001.parquet", tmp_path / "saved"):
        assert [int(p.name) for p in load(path, "train").image_paths] == [0, 1, 4]
        assert [int(p.name) for p in load(path, "test").image_paths] == [3, 5]


def test_numbered_columns_are_captions_in_their_order() -> None:
    """As the hub's sets of Flickr8k; more than ten, to tell numbers from letters."""
    columns = {f"caption_{t}": [f"{t} of {c}" for c in COLOURS] for t in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    data = from_dataset(rows(**columns))
    assert data.captions[:11] == [f"{t} of red" for t in range(11)]


def test_rows_of_one_caption_each_are_one_image_where_their_ids_are_equal() -> None:
    whole = rows(0, 4, caption=["a", "b", "c", "d"], image_id=[7, 8, 7, 8])
    data = from_dataset(whole)
    assert (colours(data), data.caption_to_image.tolist()) == (pixels(0, 2), [0, 1, 0, 1])
    assert from_dataset(whole.remove_columns("image_id")).num_images == 4


def test_columns_can_be_named() -> None:
    whole = rows(caption=TEXTS, alt=["x"] * 6).rename_column("image", "photo").add_column("thumb", [b"x"] * 6)
    assert from_dataset(whole).captions[0] == "a red square"
    data = from_dataset(whole, image_column="photo", caption_column=["alt", "caption"])
    assert data.captions[:2] == ["x", "a red square"]
    refused(lambda: from_dataset(whole, caption_column="title"), "no column 'title'", "photo", "alt (string)")
    refused(lambda: from_dataset(whole, caption_column="photo"), "no captions in the column 'photo'")
    refused(lambda: from_dataset(whole, image_column="alt"), "no images in the column 'alt'")
    refused(lambda: from_dataset(whole.remove_columns(["caption"])), "no column of captions", "alt (string)")
    refused(lambda: from_dataset(whole.remove_columns(["photo"])), "no column of images", "thumb (binary)")


def test_parquet_of_other_writers_is_read_by_arrows_types(tmp_path: Path) -> None:
    """As img2dataset's output_format="parquet": bytes in jpg, the text in txt, null for a failed download."""
    table = pyarrow.table(
        {"key": ["0", "1"], "jpg": [encoded("red", "JPEG"), encoded("blue", "JPEG")], "txt": ["red", "blue"]}
    )
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "00000.parquet")
    data = load(tmp_path / "set", "all")
    assert data.captions == ["red", "blue"]
    assert open_image(data.image_paths[1]).getpixel((0, 0))[2] > 250


def test_chosen_rows_of_an_object_are_those(tmp_path: Path) -> None:
    """A selection is a list of indices on top of the files; a transform is not for us."""
    chosen = rows().select([4, 1]).with_transform(lambda batch: {"image": ["none"]})
    data = from_dataset(chosen)
    assert colours(data) == [pixels()[4], pixels()[1]]
    assert data.captions == ["a black square", "a green square", "green all over"]


def test_images_that_are_named_by_path_are_read_from_there(tmp_path: Path) -> None:
    for colour in COLOURS[:2]:
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
    content = {"image": [str(tmp_path / f"{c}.png") for c in COLOURS[:2]], "text": ["a", "b"]}
    whole = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    data = from_dataset(whole)
    assert colours(data) == pixels(0, 2)
    (tmp_path / "red.png").unlink()
    refused(lambda: open_image(data.image_paths[0]), str(data.image_paths[0]), "red.png")


# ---- what uses it


def test_workers_forked_and_spawned_read_what_this_process_reads(tmp_path: Path) -> None:
    rows(0, 3).save_to_disk(tmp_path / "set")
    rows(3, 6).to_parquet(tmp_path / "test.parquet")
    places = [load(tmp_path / "set", "all"), load(tmp_path / "test.parquet", "test"), from_dataset(rows())]
    images = ImageDataset([p for data in places for p in data.image_paths], ImageTransform(image_size=8))
    alone = torch.stack([images[i][1] for i in range(len(images))])  # type: ignore[index]
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        loader = DataLoader(
            images, batch_size=5, num_workers=1, collate_fn=images.collate, multiprocessing_context=context
        )
        assert torch.equal(torch.cat([batch for _, batch in loader]), alone)


def test_training_evaluation_and_explanation_take_a_saved_data_set(tmp_path: Path) -> None:
    parts = {"train": rows(0, 4), "validation": rows(4, 6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    train, dev = load(tmp_path / "set", "train"), load(tmp_path / "set", "dev")
    tokenizer = CaptionTokenizer.train([text for texts in TEXTS for text in texts], vocab_size=90)
    config = laps.train.TrainConfig(epochs=1, batch_size=2, device="cpu", progress=False, num_workers=1)
    trainer = laps.train.Trainer(tiny_laps(tokenizer=tokenizer), train, dev, tmp_path / "run", config)
    history = trainer.fit()
    assert np.isfinite(history[0]["loss"])
    result = laps.evaluate(trainer.model.eval(), dev, num_workers=1, progress=False)
    assert result.metrics["t2i_r10"] == 100
    why = laps.explain(trainer.model, dev.image_paths[0], dev.captions[0])
    assert why.picture.getpixel((0, 0)) == pixels(4, 5)[0]


def test_a_check_counts_and_finds_what_is_wrong(tmp_path: Path) -> None:
    broken = rows(caption=[["a"], ["b", " "], [], ["d"], ["e"], ["f"]])
    broken = broken.map(
        lambda row, i: {"image": {"bytes": b"no image"} if i == 3 else row["image"]},
        with_indices=True,
        features=broken.features,
    )
    datasets.DatasetDict(train=broken, test=rows(0, 1)).save_to_disk(tmp_path / "set")
    report = check(tmp_path / "set", progress=False)
    train = report.splits["train"]
    assert (train.images, train.captions, train.captions_per_image["min"]) == (6, 6, 0)
    assert train.empty_captions == [str(tmp_path / "set" / "train" / "1")]
    assert list(train.unreadable) == [str(tmp_path / "set" / "train" / "3")]
    (leak,) = report.leaks
    assert leak.images == [(str(tmp_path / "set" / "train" / "0"), str(tmp_path / "set" / "test" / "0"))]
    refused(lambda: check(tmp_path / "set", images=tmp_path, progress=False), "holds its images itself")
    refused(lambda: load(tmp_path / "set", "train", regions=True), "has images", "regions")


# ---- what is refused


def test_a_row_without_image_or_beyond_the_end_is_named(tmp_path: Path) -> None:
    content = {"image": [{"bytes": encoded("red"), "path": None}, None], "caption": ["a", "b"]}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set")
    data = load(tmp_path / "set", "all")
    refused(lambda: open_image(data.image_paths[1]), f"{tmp_path / 'set' / '1'} has no image")
    refused(lambda: open_image(tmp_path / "set" / "2"), f"{tmp_path / 'set' / '2'} is missing", "below 2")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    rows().to_parquet(file)
    file.write_bytes(file.read_bytes()[:-200])
    refused(lambda: load(file, "train"), f"{file} cannot be read")
    file.write_bytes(b"")
    refused(lambda: load(tmp_path, "train"), f"{file} cannot be read")
    rows().save_to_disk(tmp_path / "set")
    arrow = tmp_path / "set" / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:300])
    refused(lambda: load(tmp_path / "set", "all"), f"{tmp_path / 'set'} cannot be read")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset_dict.json").write_text(json.dumps({"splits": ["../set"]}))
    refused(lambda: load(tmp_path / "other", "all"), "dataset_dict.json", "'../set'")


def test_empty_captions_are_refused_or_kept() -> None:
    whole = rows(0, 2, caption=["a", " "])
    refused(lambda: from_dataset(whole), "/1 has an empty caption")
    assert from_dataset(whole, on_empty="keep").captions == ["a", ""]


def test_only_one_finite_split_is_taken() -> None:
    for wrong, part in (
        (datasets.DatasetDict(train=rows()), "dataset['train']"),
        (rows().to_iterable_dataset(), "IterableDataset"),
        ([{"image": 1}], "list"),
    ):
        with pytest.raises(LapsTypeError, match="dataset") as caught:
            from_dataset(wrong)
        assert part in str(caught.value)


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows().to_parquet(tmp_path / "train.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]  # what import takes for absent
    with pytest.raises(LapsImportError, match=re.escape("pip install 'laps-rs[data]'")) as caught:
        load(tmp_path, "train")
    assert isinstance(caught.value, laps.LapsError)
    assert isinstance(caught.value, ImportError)
