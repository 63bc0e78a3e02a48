"""Detector features in place of pixels: their files, the encoder, and a model that trains on them."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import laps
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from _models import CAPTIONS, bert_tokenizer, text_model, tiny_laps
from laps.cli import main
from laps.config import PRESETS
from laps.data import RegionTransform
from laps.encoders import ImageEncoder, RegionBackbone, TextEncoder, label_embeddings
from laps.heads import build_head
from laps.train import Trainer
from laps.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

K, D = 5, 6


def archive(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (K, 2, 2)), axis=1).reshape(K, 4)
    arrays = {
        "features": rng.standard_normal((K, D)).astype(np.float32),
        "boxes": corners * [40, 20, 40, 20],
        "image_w": 40,
        "image_h": 20,
        "labels": np.array([2, 0, 1, -1, 2]),
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_a_file_of_one_image(tmp_path: Path) -> None:
    rows = RegionTransform(K, D).open(archive(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz") as file:
        assert rows.shape == (K, D + 5)
        assert rows.dtype == torch.float32
        np.testing.assert_array_equal(rows[:, :D], file["features"])
        np.testing.assert_allclose(rows[:, D:-1], file["boxes"] / [40, 20, 40, 20], rtol=1e-6)
        np.testing.assert_array_equal(rows[:, -1], file["labels"])
    fewer = RegionTransform(3, D).open(tmp_path / "a.npz")
    assert torch.equal(fewer, rows[:3])
    bare = archive(tmp_path / "b.npz", boxes=None, labels=None, image_w=None, features=np.ones((K, D)))
    rows = RegionTransform(K, D).open(bare)
    assert rows[:, D:].tolist() == [[0, 0, 1, 1, -1]] * K


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((K - 1, D)), "boxes": None, "labels": None}, "does not fit the model"),
        ({"features": np.zeros((K, D + 1))}, "does not fit the model"),
        ({"features": None}, "it has no features"),
        ({"boxes": np.zeros((K, 3))}, "boxes or labels of another number"),
        ({"labels": np.zeros(K + 1)}, "boxes or labels of another number"),
        ({"image_w": None}, "boxes outside of the image"),
        ({"boxes": np.full((K, 4), np.nan)}, "boxes outside of the image"),
        ({"features": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
        ({"features": np.full((K, D), 1 + 2j)}, "has features of the wrong dtype"),
        ({"features": np.full((K, D), "1")}, "has features of the wrong dtype"),
        ({"features": np.full((K, D), np.nan)}, "has features that are not finite"),
        ({"features": np.full((K, D), 1e300)}, "has features that are not finite"),
        ({"boxes": np.full((K, 4), "1")}, "has boxes of the wrong dtype"),
        ({"boxes": np.full((K, 4), 1j)}, "has boxes of the wrong dtype"),
        ({"labels": np.full(K, "person")}, "has labels of the wrong dtype"),
        ({"labels": np.full(K, 2.7)}, r"has a label that is no number of one .*got 2\.7"),
        ({"labels": np.full(K, -2)}, "has a label that is no number of one"),
        ({"labels": np.full(K, np.nan)}, "has a label that is no number of one"),
        ({"labels": np.full(K, 2**24 + 1)}, "has a label that is no number of one"),
        ({"image_w": [40, 40]}, r"image_w and image_h are of shape \(2,\) and \(\)"),
        ({"image_w": "40"}, "has a size of the wrong dtype"),
        ({"image_w": -40, "image_h": -20, "boxes": np.full((K, 4), -9.0)}, "has a size that is none"),
        ({"image_w": 0}, r"has a size that is none .*got \[0, 20\]"),
        ({"image_w": np.nan}, "has a size that is none"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = archive(tmp_path / "odd.npz", **changes)
    with pytest.raises(
        laps.LapsValueError, match=rf"odd\.npz .*{message}|odd\.npz cannot be read.*{message}"
    ):
        RegionTransform(K, D).open(file)


def test_what_lies_beyond_the_first_regions_does_not_count(tmp_path: Path) -> None:
    features = np.ones((K, D))
    features[-1] = np.nan
    archive(tmp_path / "a.npz", features=features, labels=np.array([0, 1, 2, 0, 9]))
    assert RegionTransform(K - 1, D, num_labels=3).open(tmp_path / "a.npz").shape == (K - 1, D + 5)


def damaged(path: Path, kind: str) -> Path:
    """An archive that its reader cannot take."""
    if kind == "a header that claims too much":
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**13, D)}
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("features.npy", content.getvalue())
        return path
    archive(path, boxes=None, labels=None, image_w=None, image_h=None)
    content_of_file = bytearray(path.read_bytes())
    # The flags, or the method, of the entry and of its copy in the directory at the end.
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content_of_file.index(signature) + flags
        if kind == "encrypted":
            content_of_file[at] |= 1
        else:
            content_of_file[at + 2] = 97
    path.write_bytes(content_of_file)
    return path


@pytest.mark.parametrize("kind", ["encrypted", "compressed otherwise", "a header that claims too much"])
def test_archives_that_cannot_be_unpacked_are_named(tmp_path: Path, kind: str) -> None:
    file = damaged(tmp_path / "odd.npz", kind)
    with pytest.raises(laps.LapsValueError, match=r"odd\.npz cannot be read"):
        RegionTransform(K, D).open(file)


@pytest.mark.parametrize(
    ("end", "array", "message"),
    [
        ("sizes", np.full((3, 2), "40"), "has a size of the wrong dtype"),
        ("sizes", np.full(3, 40), r"has a size that is none .*got shape \(\)"),
        ("sizes", np.full((3, 3), 40), "has a size that is none"),
        ("sizes", -np.full((3, 2), 40), "has a size that is none"),
        ("sizes", np.full((1, 2), 400), r"cannot be read .*dev_sizes\.npy: index 2"),
        ("labels", np.full((3, K), "star"), "has labels of the wrong dtype"),
        ("boxes", np.full((3, K, 4), 1j), "has boxes of the wrong dtype"),
        ("ims", np.full((3, K, D), np.inf), "has features that are not finite"),
    ],
)
def test_arrays_of_a_split_that_do_not_fit_are_named(
    folder: Path, end: str, array: np.ndarray[Any, Any], message: str
) -> None:
    np.save(folder / f"dev_{end}.npy", array)
    with pytest.raises(laps.LapsValueError, match=rf"dev_ims\.npy/2 {message}"):
        RegionTransform(K, D).open(folder / "dev_ims.npy" / "2")


def test_images_that_are_damaged_can_be_skipped(archives: Path, tmp_path: Path) -> None:
    archive(archives / "images" / "train0.npz", image_w=[40, 40])
    archive(archives / "images" / "train1.npz", features=np.full((K, D), np.nan))
    damaged(archives / "images" / "train2.npz", "encrypted")
    archive(archives / "images" / "train3.npz", labels=np.full(K, 3))
    train = laps.data.load(archives, "train", regions=True)
    options = {"epochs": 1, "batch_size": 30, "augment": 0.0, "num_workers": 0, "progress": False}
    config = TrainConfig(**options, on_error="skip")
    trainer = Trainer(model("vse", torch.randn(3, 4)), train, None, tmp_path / "run", config)
    with pytest.warns(UserWarning, match=r"skipped: regions: .*train\d\.npz"):
        trainer.fit()
    skipped = trainer.source.dataset.skipped_images
    assert [path.name for path in skipped] == [f"train{i}.npz" for i in range(4)]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("no archive")
    np.save(tmp_path / "x_ims.npy", np.zeros((2, K, D)))
    names = ("a.npz", "missing.npz", "x_ims.npy/2", "x_ims.npy/one", "x_ims.npy/-1", "y_ims.npy/0")
    for name in names:
        with pytest.raises(laps.LapsValueError, match="cannot be read"):
            RegionTransform(K, D).open(tmp_path / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Caption files and regions, as SCAN's data has them: five captions a row; boxes and labels beside."""
    rng = np.random.default_rng(1)
    for split, images in (("train", 6), ("dev", 3), ("test", 4)):
        np.save(tmp_path / f"{split}_ims.npy", rng.standard_normal((images, K, D)).astype(np.float32))
        corners = np.sort(rng.uniform(0, 1, (images, K, 2, 2)), axis=2).reshape(images, K, 4)
        np.save(tmp_path / f"{split}_boxes.npy", corners * [300, 200, 300, 200])
        np.save(tmp_path / f"{split}_sizes.npy", np.tile([300, 200], (images, 1)))
        np.save(tmp_path / f"{split}_labels.npy", rng.integers(-1, 3, (images, K)))
        lines = [CAPTIONS[(i + t) % 3] for i in range(images) for t in range(5)]
        (tmp_path / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def model(head: str, labels: torch.Tensor | None = None, **options: Any) -> laps.LAPS:
    tokenizer = bert_tokenizer()
    images = ImageEncoder(RegionBackbone(K, D, labels=labels), embed_dim=16)
    texts = TextEncoder(text_model(vocab_size=tokenizer.vocab_size), embed_dim=16)
    built = build_head(head, embed_dim=16, num_patches=K, num_prefix_tokens=0, **options)
    return laps.LAPS(images, texts, built, tokenizer=tokenizer).eval()


def test_rows_of_a_split_are_its_images(folder: Path) -> None:
    data = laps.data.load(folder, "train", regions=True)
    assert (data.num_images, data.num_captions) == (6, 30)
    assert data.caption_to_image.tolist() == [i for i in range(6) for _ in range(5)]
    rows = RegionTransform(K, D).open(data.image_paths[4])
    np.testing.assert_array_equal(rows[:, :D], np.load(folder / "train_ims.npy")[4])
    expected = np.load(folder / "train_boxes.npy")[4] / [300, 200, 300, 200]
    np.testing.assert_allclose(rows[:, D:-1], expected, rtol=1e-6)
    np.testing.assert_array_equal(rows[:, -1], np.load(folder / "train_labels.npy")[4])
    (folder / "train_caps.txt").write_text("one\ntwo\n")
    with pytest.raises(laps.LapsValueError, match="6 rows and 2 captions"):
        laps.data.load(folder, "train", regions=True)
    (folder / "train_ims.npy").unlink()
    with pytest.raises(laps.LapsValueError, match=r"train_ims\.npy cannot be read"):
        laps.data.load(folder, "train", regions=True)
    with pytest.raises(laps.LapsValueError, match=r"dev_ims\.npy has regions of a detector .expected images"):
        laps.data.load(folder, "dev")


def test_rows_that_are_repeated_for_each_caption_are_one_image(folder: Path) -> None:
    def rows(data: laps.data.RetrievalData) -> torch.Tensor:
        return torch.stack([RegionTransform(K, D).open(path) for path in data.image_paths])

    before = laps.data.load(folder, "test", regions=True)
    expected, once = rows(before), np.load(folder / "test_ims.npy")
    for end in ("ims", "boxes", "sizes", "labels"):
        file = folder / f"test_{end}.npy"
        np.save(file, np.load(file).repeat(5, axis=0))
    data = laps.data.load(folder, "test", regions=True)
    assert data.caption_to_image.tolist() == before.caption_to_image.tolist()
    assert [path.name for path in data.image_paths] == ["0", "5", "10", "15"]
    assert torch.equal(rows(data), expected)
    # An image that comes back later is another one: `laps data check` tells of it.
    np.save(folder / "test_ims.npy", once[[0, 1] * 10])
    assert laps.data.load(folder, "test", regions=True).num_images == 20


def test_images_whose_first_and_last_regions_agree_are_two(folder: Path) -> None:
    # Zeros follow where a detector found less, and the first region may be the whole image.
    rows = np.load(folder / "test_ims.npy")
    rows[:, [0, -1]] = 0
    np.save(folder / "test_ims.npy", rows.repeat(5, axis=0))
    assert laps.data.load(folder, "test", regions=True).num_images == 4


def test_rows_are_found_in_the_folder_of_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = RegionTransform(K, D).open(laps.data.load(folder, "dev", regions=True).image_paths[1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in folder.glob("*.npy"):
        shutil.move(file, elsewhere / file.name)
    for data in (
        laps.data.load(folder, "dev", regions=True, images=elsewhere),
        laps.data.read_caption_files(folder, "dev", elsewhere, regions=True),
    ):
        assert data.image_paths[1] == elsewhere / "dev_ims.npy" / "1"
        assert torch.equal(RegionTransform(K, D).open(data.image_paths[1]), expected)
    with pytest.raises(laps.LapsValueError, match=r"w_ims\.npy cannot be read|dev_ims\.npy cannot be read"):
        laps.data.load(folder, "dev", regions=True)
    with pytest.raises(laps.LapsValueError, match=r"elsewhere/dev_ims\.npy has regions of a detector"):
        laps.data.load(folder, "dev", images=elsewhere)
    check = ["data", "check", folder, "--regions", *SIZES, "--images", elsewhere]
    status, output, error = called(capsys, *check)
    assert (status, error) == (0, "")
    assert "dev: 3 images, 15 captions" in output


@pytest.mark.parametrize("name", [".", "a/..", ".."])
def test_a_file_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "test.csv").write_text(f"image,caption\nb.jpg,a dog\n{name},a cat\n")
    archive(tmp_path / "b.npz")
    with pytest.raises(laps.LapsValueError, match=r"test\.csv:3 names \.+ \(expected the name of a file"):
        laps.data.load(tmp_path, "test", regions=True)


def test_tokens_are_a_map_of_features_position_and_label() -> None:
    table = torch.randn(3, 4)
    encoder = ImageEncoder(RegionBackbone(K, D, labels=table), embed_dim=7)
    rows = torch.rand(2, K, D + 5)
    rows[..., -1] = torch.tensor([0, 2, -1, 1, 0])
    for image, tokens in zip(rows, encoder(rows), strict=True):
        for row, token in zip(image, tokens, strict=True):
            x0, y0, x1, y1 = row[D:-1]
            label = table[int(row[-1])] if row[-1] >= 0 else torch.zeros(4)
            place = torch.stack([x0, y0, x1, y1, (x1 - x0) * (y1 - y0)])
            torch.testing.assert_close(token, encoder.projection(torch.cat([row[:D], place, label])))
    assert encoder.boxes(rows).tolist() == rows[..., D:-1].tolist()
    plain = ImageEncoder(RegionBackbone(K, D, position=False), embed_dim=7)
    torch.testing.assert_close(plain(rows), plain.projection(rows[..., :D]))
    rows[0, 0, -1] = 3
    with pytest.raises(laps.LapsValueError, match="a label has no embedding"):
        encoder(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_labels_are_found_exactly_whatever_the_weights_dtype_is(dtype: torch.dtype) -> None:
    # bfloat16 knows 300 and 302, and float16 no 2049.
    table = torch.randn(3000, 4)
    encoder = ImageEncoder(RegionBackbone(K, D, labels=table), embed_dim=7).to(dtype)
    rows = torch.rand(1, K, D + 5)
    rows[0, :, -1] = torch.tensor([301, 2049, -1, 299, 2999])
    found = encoder.backbone(rows)[0, :, -4:]
    assert torch.equal(found[[0, 1, 3, 4]], table.to(dtype)[[301, 2049, 299, 2999]].float())
    assert not found[2].any()
    tokens = encoder(rows)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, encoder.projection(encoder.backbone(rows).to(dtype)))


def test_rows_with_labels_in_half_precision_are_refused() -> None:
    rows = torch.rand(1, K, D + 5).to(torch.bfloat16)
    encoder = ImageEncoder(RegionBackbone(K, D, labels=torch.randn(3, 4)), embed_dim=7)
    with pytest.raises(laps.LapsTypeError, match=r"regions with labels have the wrong dtype .*got bfloat16"):
        encoder(rows)
    # Without labels nothing of it is a number to be looked up.
    plain = ImageEncoder(RegionBackbone(K, D), embed_dim=7)
    assert plain(rows).dtype == torch.float32


@pytest.mark.parametrize("head", ["chan", "cpfean", "laps"])
def test_a_model_of_regions_in_half_precision_is_evaluated(head: str, folder: Path) -> None:
    options = {"aggregation_ratio": 1.0} if head == "laps" else {}
    half = model(head, torch.randn(3, 4), **options).to(torch.bfloat16)
    test = laps.data.load(folder, "test", regions=True)
    result = laps.evaluate(half, test, progress=False, num_workers=0)
    assert 0 <= result.metrics["rsum"] <= 600


def test_autocast_takes_regions_as_it_takes_pixels() -> None:
    encoder = ImageEncoder(RegionBackbone(K, D), embed_dim=7)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.rand(1, K, D + 5)).dtype == torch.bfloat16


def test_labels_are_the_mean_of_their_pieces() -> None:
    tokenizer = bert_tokenizer()
    texts = TextEncoder(text_model(vocab_size=tokenizer.vocab_size), embed_dim=16)
    table = label_embeddings(["red circle", "star"], texts, tokenizer)
    ids = tokenizer.encode(["red circle"]).input_ids
    states = texts.backbone(ids).last_hidden_state[0, 1:-1]
    torch.testing.assert_close(table[0], states.mean(0))
    assert table.shape == (2, 32)


@pytest.mark.parametrize("head", ["vse", "scan", "tgdt", "cpfean", "laps"])
def test_a_model_trains_on_regions_and_is_kept(head: str, folder: Path, tmp_path: Path) -> None:
    options = {"aggregation_ratio": 1.0} if head == "laps" else {}
    trained = model(head, torch.randn(3, 4), **options)
    train, dev = (laps.data.load(folder, split, regions=True) for split in ("train", "dev"))
    config = TrainConfig(epochs=1, batch_size=8, augment=0.0, num_workers=0, progress=False)
    history = Trainer(trained, train, dev, tmp_path / "run", config).fit()
    assert np.isfinite(history[0]["loss"])
    again = laps.LAPS.from_pretrained(tmp_path / "run" / "best")
    assert isinstance(again.transform, RegionTransform)
    assert torch.equal(again.image_encoder.backbone.labels, trained.image_encoder.backbone.labels)
    images, texts = again.encode_files(dev.image_paths), again.encode_captions(CAPTIONS)
    expected = trained.eval().similarity(
        trained.encode_files(dev.image_paths), trained.encode_captions(CAPTIONS)
    )
    assert torch.equal(again.similarity(images, texts), expected)
    result = laps.evaluate(again, dev, progress=False)
    assert 0 <= result.metrics["rsum"] <= 600


def test_boxes_reach_the_head_that_looks_at_them(folder: Path) -> None:
    one = model("cpfean")
    dev = laps.data.load(folder, "dev", regions=True)
    rows = torch.stack([one.transform.open(path) for path in dev.image_paths])
    boxes = rows[..., D:-1]
    expected = one.head.encode_image(one.image_encoder(rows), boxes=boxes)
    found = one.encode_image(rows)
    assert torch.equal(found.patches, expected.patches)
    assert not torch.equal(found.patches, one.head.encode_image(one.image_encoder(rows)).patches)


def test_regions_can_be_explained(folder: Path) -> None:
    one = model("tgdt")
    dev = laps.data.load(folder, "dev", regions=True)
    why = laps.explain(one, dev.image_paths[0], "the large blue square left of a green star")
    assert why.grid == (1, K)
    assert sum(word.share for word in why.words) == pytest.approx(why.score, abs=1e-6)
    assert "laps-why" in why.to_html()


# ---- a file for each image, under the image's name


@pytest.fixture
def archives(folder: Path, tmp_path: Path) -> Path:
    """The same data as a Karpathy file that names photographs, with the regions of each in a folder."""
    entries = []
    (tmp_path / "archives" / "images").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        data = laps.data.load(folder, split, regions=True)
        for i, row in enumerate(data.image_paths):
            rows = RegionTransform(K, D).open(row).numpy()
            file = tmp_path / "archives" / "images" / f"{split}{i}.npz"
            np.savez(file, x=rows[:, :D], bbox=rows[:, D:-1], objects_id=rows[:, -1])
            sentences = [{"raw": data.captions[t]} for t in data.captions_of(i)]
            entries.append({"filename": f"{split}{i}.jpg", "split": split, "sentences": sentences})
    (tmp_path / "archives" / "dataset.json").write_text(json.dumps({"images": entries}))
    return tmp_path / "archives"


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    """Images, as pairs."""
    path = tmp_path / "pixels"
    path.mkdir()
    lines = ["image,caption,split"]
    for i in range(8):
        PIL.Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(path / f"{i}.png")
        lines.append(f"{i}.png,{CAPTIONS[i % 3]},{('train', 'dev')[i % 2]}")
    (path / "pairs.csv").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("split", ["train", "dev"])
def test_both_layouts_are_the_same_data(split: str, folder: Path, archives: Path) -> None:
    rows, files = (laps.data.load(path, split, regions=True) for path in (folder, archives))
    assert files.captions == rows.captions
    assert files.caption_to_image.tolist() == rows.caption_to_image.tolist()
    assert files.image_paths[0] == archives / "images" / f"{split}0.npz"
    transform = RegionTransform(K, D)
    for one, other in zip(rows.image_paths, files.image_paths, strict=True):
        assert torch.equal(transform.open(one), transform.open(other))


def test_ids_lead_to_regions_where_there_are_no_rows(tmp_path: Path) -> None:
    archive(tmp_path / "a.npz")
    (tmp_path / "id_mapping.json").write_text('{"7": "a.jpg"}')
    (tmp_path / "dev_ids.txt").write_text("7")
    (tmp_path / "dev_caps.txt").write_text("a cat\na dog\n")
    data = laps.data.load(tmp_path, "dev", regions=True)
    assert (data.image_paths, data.num_captions) == ([tmp_path / "a.npz"], 2)


def test_images_that_share_regions_are_refused(tmp_path: Path) -> None:
    archive(tmp_path / "a.npz")
    (tmp_path / "test.csv").write_text("image,caption\na.jpg,a cat\na.png,a dog\n")
    with pytest.raises(
        laps.LapsValueError, match=r"has a\.jpg and a\.png \(expected images of different names"
    ):
        laps.data.load(tmp_path, "test", regions=True)


def test_regions_and_pixels_are_told_apart(archives: Path, pixels: Path) -> None:
    with pytest.raises(
        laps.LapsValueError, match=r"no region of pairs.csv/dev was found, for example 1\.npz"
    ):
        laps.data.load(pixels, "dev", regions=True)
    (archives / "test.csv").write_text("image,caption\ndev0.npz,a cat\n")
    with pytest.raises(laps.LapsValueError, match=r"dev0\.npz has regions of a detector"):
        laps.data.load(archives / "test.csv", "test")
    with pytest.raises(laps.LapsValueError, match=r"1\.png has no regions .*this model takes no pixels"):
        model("vse").encode_files([pixels / "1.png"])
    with pytest.raises(
        laps.LapsValueError, match=r"dev0\.npz has regions of a detector .*a model of regions"
    ):
        tiny_laps().encode_files([archives / "images" / "dev0.npz"])


# ---- presets


@pytest.fixture
def bert(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny text checkpoint, which the preset starts from."""
    tokenizer = bert_tokenizer()
    text_model(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "bert")
    tokenizer.save(tmp_path / "bert" / "tokenizer.json")
    preset = replace(PRESETS["region-36"], text_checkpoint=str(tmp_path / "bert"))
    monkeypatch.setitem(PRESETS, "region-36", preset)
    return tmp_path / "bert"


NAMES = ["star", "red circle", "blue square"]


def test_the_preset_is_that_of_bottom_up_regions(bert: Path) -> None:
    built = laps.LAPS.from_preset("region-36", head="chan")
    assert isinstance(built.transform, RegionTransform)
    assert built.transform.input_shape == (36, 2053)
    assert (built.head.embed_dim, built.head.num_patches, built.head.num_prefix_tokens) == (1024, 36, 0)
    assert built.image_encoder.backbone.labels.numel() == 0
    assert isinstance(laps.LAPS.from_preset("region-36").head, laps.nn.LAPSHead)


def test_the_preset_takes_other_sizes_and_labels(bert: Path, tmp_path: Path) -> None:
    built = laps.LAPS.from_preset("region-36", head="cpfean", num_regions=K, feature_dim=D, labels=NAMES)
    assert built.transform == RegionTransform(K, D, num_labels=len(NAMES))
    table = label_embeddings(NAMES, built.text_encoder, bert_tokenizer())
    assert torch.equal(built.image_encoder.backbone.labels, table)
    built.save_pretrained(tmp_path / "kept")
    again = laps.LAPS.from_pretrained(tmp_path / "kept")
    assert torch.equal(again.image_encoder.backbone.labels, table)
    built.gradient_checkpointing()
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    for labels in (tmp_path / "names.txt", str(tmp_path / "names.txt"), tuple(NAMES)):
        other = laps.LAPS.from_preset("region-36", num_regions=K, feature_dim=D, labels=labels)
        assert torch.equal(other.image_encoder.backbone.labels, table)
    for name, options, message in (
        ("region-36", {"image_checkpoint": "x"}, "image_checkpoint does not go with region-36 .*of pixels"),
        ("vit-base-224", {"num_regions": 3}, "num_regions does not go with vit-base-224 .*region-36"),
        ("vit-base-224", {"labels": NAMES}, "labels does not go with vit-base-224"),
        ("region-36", {"labels": NAMES, "pretrained": False}, "labels without a tokenizer"),
    ):
        with pytest.raises(laps.LapsValueError, match=message):
            laps.LAPS.from_preset(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": dict.fromkeys(NAMES, 0)}, r"labels are no list \(expected names in the order .*got dict"),
        ({"labels": set(NAMES)}, "labels are no list"),
        ({"labels": ["star", 3]}, r"labels\[1\] is no string .*got int"),
        ({"labels": []}, "labels is empty"),
        ({"labels": "labels.txt"}, r"labels labels\.txt cannot be read"),
        ({"feature_dim": "6"}, r"feature_dim is no integer \(expected int, got str\)"),
        ({"num_regions": 0}, "num_regions is out of range"),
    ],
)
def test_sizes_and_labels_that_are_none_are_told_before_weights_are_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(laps.LapsError, match=message):
        laps.LAPS.from_preset("region-36", text_checkpoint="nobody/has-this", **options)


def test_a_config_with_a_wrong_size_is_told_as_that() -> None:
    with pytest.raises(laps.LapsTypeError, match="feature_dim is no integer"):
        RegionBackbone.from_config({"num_regions": K, "feature_dim": "6"})
    with pytest.raises(laps.LapsValueError, match="the config has other keys"):
        RegionBackbone.from_config({"colour": 3})


def test_a_model_refuses_labels_that_it_has_no_name_for_with_the_file(tmp_path: Path) -> None:
    one = model("vse", torch.randn(2, 4))
    with pytest.raises(laps.LapsValueError, match=r"a\.npz has the label 2, which has no name .*below 2"):
        one.encode_files([archive(tmp_path / "a.npz")])
    # The model's labels say it: nothing of it is beside them, and what was kept before knows it too.
    one.save_pretrained(tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / "transform.json").read_text())
    assert kept == {"kind": "regions", "num_regions": K, "feature_dim": D}
    assert laps.LAPS.from_pretrained(tmp_path / "kept").transform == RegionTransform(K, D, 2)
    assert model("vse").transform == RegionTransform(K, D)


def test_the_embeddings_of_labels_have_no_dropout() -> None:
    tokenizer = bert_tokenizer()
    texts = TextEncoder(text_model(vocab_size=tokenizer.vocab_size), embed_dim=16)
    expected = label_embeddings(NAMES, texts, tokenizer)
    assert torch.equal(label_embeddings(NAMES, texts.train(), tokenizer), expected)
    assert texts.backbone.training


# ---- the commands


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """What a command prints and how it ends."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


SIZES = ["--num-regions", K, "--feature-dim", D]
FAST = ["--epochs", 1, "--batch-size", 8, "--num-workers", 0, "--device", "cpu", "--no-progress"]


@pytest.mark.parametrize("layout", ["folder", "archives"])
def test_check_train_and_eval(
    layout: str,
    bert: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = request.getfixturevalue(layout)
    status, output, error = called(capsys, "data", "check", data, "--regions", *SIZES)
    assert (status, error) == (0, "")
    assert "train: 6 images, 30 captions; per image 5 to 5" in output

    (tmp_path / "names.txt").write_text("star\nred circle\nblue square\n")
    run = ["train", data, "--out", tmp_path / "run", "--preset", "region-36", *SIZES, *FAST]
    run += ["--text-checkpoint", bert, "--head", "cpfean", "--labels", tmp_path / "names.txt"]
    status, output, error = called(capsys, *run)
    assert (status, error) == (0, "")
    assert "best epoch 1 of 1, dev rSum " in output
    kept = laps.LAPS.from_pretrained(tmp_path / "run" / "best")
    assert kept.transform == RegionTransform(K, D, num_labels=3)
    assert kept.image_encoder.backbone.labels.shape == (3, 32)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["learning_rate"] == 5e-4

    options = ["--num-workers", 0, "--device", "cpu", "--quiet", "--json", tmp_path / "r.json"]
    status, _, error = called(capsys, "eval", tmp_path / "run" / "best", data, *options)
    assert (status, error) == (0, "")
    expected = laps.evaluate(kept, laps.data.load(data, "test", regions=True), progress=False).metrics
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == expected
    # On with the model that is there, which says itself that it takes regions.
    again = ["train", data, "--out", tmp_path / "on", "--model", tmp_path / "run" / "best", *FAST]
    assert called(capsys, *again)[0] == 0


def test_check_finds_what_is_wrong_with_regions(
    folder: Path, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["data", "check", archives, "--regions", *SIZES]
    images = archives / "images"
    (images / "train1.npz").write_bytes((images / "train1.npz").read_bytes()[:200])
    (images / "train2.npz").unlink()
    shutil.copy(images / "train0.npz", images / "dev0.npz")
    archive(images / "test0.npz", features=np.zeros((K, D + 1)))
    status, output, _ = called(capsys, *check)
    assert status == 1
    for said in (
        "missing images: 1",
        f"{images / 'train1.npz'}: cannot be read",
        f"{images / 'test0.npz'}: does not fit the model",
        "share images:",
        f"{images / 'train0.npz'} = {images / 'dev0.npz'}",
    ):
        assert said in output
    rows = np.load(folder / "test_ims.npy")
    for end in ("ims", "boxes", "sizes", "labels"):
        file = folder / f"test_{end}.npy"
        np.save(file, np.load(file)[[0, 1, 2, 0]])
    status, output, _ = called(capsys, "data", "check", folder, "--regions", *SIZES)
    assert (status, rows.shape) == (0, (4, K, D))
    assert f"{folder / 'test_ims.npy' / '0'} = {folder / 'test_ims.npy' / '3'}" in output


Arguments = Callable[[Path, Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda f, _: ["train", f], "train_ims.npy has regions of a detector (expected images; for regions"),
        (lambda _, p: ["train", p, "--preset", "region-36"], "no region of pairs.csv/train was found"),
        (
            lambda f, _: ["train", f, "--preset", "region-36"],
            "num_regions=36 of feature_dim=2048, got (5, 6)",
        ),
        (lambda _, p: ["train", p, "--num-regions", 9], "--num-regions with a preset of pixels (expected"),
        (lambda f, _: ["train", f, "--labels", "x"], "--labels with a preset of pixels"),
        (lambda f, _: ["train", f, "--model", "m", *SIZES], "--num-regions, --feature-dim with --model"),
        (
            lambda f, _: ["train", f, "--preset", "region-36", "--image-checkpoint", "x", *SIZES],
            "image_checkpoint does not go with region-36",
        ),
        (
            lambda f, _: ["train", f, "--preset", "region-36", *SIZES, "--labels", f / "absent"],
            "absent cannot be read (expected a text file, a name a line",
        ),
        (
            lambda f, _: ["train", f, "--preset", "region-36", *SIZES, "--labels", f / "dev_caps.txt"],
            "dev_caps.txt:2 is empty",
        ),
        (
            lambda f, _: ["train", f, "--preset", "region-36", *SIZES, "--labels", f / "few.txt"],
            "which has no name (expected a number below 1, as many labels have names)",
        ),
        (lambda f, _: ["data", "check", f], "dev_ims.npy has regions of a detector"),
        (lambda _, p: ["data", "check", p, "--regions"], "no region of pairs.csv/train was found"),
        (lambda _, p: ["data", "check", p, "--num-regions", 9], "--num-regions without --regions"),
        (lambda _, p: ["data", "check", p, "--labels", "x"], "--labels without --regions"),
        (lambda f, _: ["eval", f / "of-pixels", f], "test_ims.npy has regions of a detector"),
        (
            lambda f, p: ["eval", f / "of-regions", p, "--split", "dev"],
            "no region of pairs.csv/dev was found",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(
    arguments: Arguments,
    said: str,
    folder: Path,
    pixels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = arguments(folder, pixels)
    if line[0] == "eval":
        tiny_laps().save_pretrained(folder / "of-pixels")
        model("vse").save_pretrained(folder / "of-regions")
    (folder / "few.txt").write_text("star\n")
    if folder / "dev_caps.txt" in line:
        (folder / "dev_caps.txt").write_text("star\n \n")
    more = ["--out", tmp_path / "run"] if line[0] == "train" else []
    status, output, error = called(capsys, *line, *more)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert said in error
    assert not (tmp_path / "run").exists()


def test_labels_without_numbers_are_told(
    folder: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train_labels.npy").unlink()
    (tmp_path / "names.txt").write_text("star\n")
    run = ["train", folder, "--preset", "region-36", *SIZES, "--out", tmp_path / "run", *FAST]
    status, _, error = called(capsys, *run, "--labels", tmp_path / "names.txt")
    assert status == 2
    assert "labels have names, but " in error
    assert (
        "train_ims.npy/0 has no label (expected an array labels or objects_id, or {split}_labels.npy)"
        in error
    )


@pytest.mark.parametrize("split", ["train", "dev"])
def test_all_labels_of_a_split_are_looked_at_first(
    split: str, folder: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.zeros((6 if split == "train" else 3, K), np.int64)
    labels[0] = -1
    (tmp_path / "names.txt").write_text("star\ncircle\n")
    run = ["train", folder, "--preset", "region-36", *SIZES, "--out", tmp_path / "run", *FAST]
    run += ["--labels", tmp_path / "names.txt", "--head", "vse"]
    labels[2, 1] = 2
    np.save(folder / f"{split}_labels.npy", labels)
    others = {"train": 6, "dev": 3, "test": 4}
    del others[split]
    for other, images in others.items():
        np.save(folder / f"{other}_labels.npy", np.ones((images, K), np.int64))
    status, _, error = called(capsys, *run)
    assert status == 2
    assert f"{split}_ims.npy/2 has the label 2, which has no name (expected a number below 2" in error
    assert not (tmp_path / "run").exists()
    check = ["data", "check", folder, "--regions", *SIZES, "--labels", tmp_path / "names.txt"]
    status, output, _ = called(capsys, *check)
    assert status == 1
    assert f"{split}_ims.npy/2: has the label 2, which has no name" in output

    # An image in which nothing was recognised, though it is the first, is one.
    labels[2, 1] = 1
    np.save(folder / f"{split}_labels.npy", labels)
    assert called(capsys, *check)[0] == 0
    assert called(capsys, *run)[0] == 0
    # A split without any is none.
    np.save(folder / f"{split}_labels.npy", np.full_like(labels, -1))
    status, output, _ = called(capsys, *check)
    assert status == 1
    assert f"images without a label on any region: {len(labels)}" in output
    run[run.index(tmp_path / "run")] = tmp_path / "again"
    status, _, error = called(capsys, *run)
    assert status == 2
    assert f"{split}_ims.npy/0 has no label" in error


def test_the_first_of_the_archives_may_have_nothing_that_was_recognised(
    archives: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(archives / "images" / "train0.npz", labels=np.full(K, -1))
    (tmp_path / "names.txt").write_text("star\ncircle\nsquare\n")
    run = ["train", archives, "--preset", "region-36", *SIZES, *FAST, "--labels", tmp_path / "names.txt"]
    status, _, error = called(capsys, *run, "--head", "vse", "--out", tmp_path / "run")
    assert (status, error) == (0, "")
    # One that comes later is named when it comes.
    archive(archives / "images" / "train4.npz", labels=np.full(K, 3))
    status, _, error = called(capsys, *run, "--head", "vse", "--out", tmp_path / "again")
    assert status == 2
    assert "train4.npz has the label 3, which has no name (expected a number below 3" in error


def test_the_examples_take_a_preset_of_regions(
    archives: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    common = pytest.importorskip("common")
    monkeypatch.delitem(sys.modules, "common")
    options = common.parser("", "out").parse_args(["--preset", "region-36", "--data", str(archives)])
    with common.open_data(options) as (train, _, _):
        assert train.image_paths[0].name == "train0.npz"
    options.data = None
    with pytest.raises(SystemExit, match="region-36 takes regions of a detector"), common.open_data(options):
        pass


def test_heads_are_compared_on_regions(
    folder: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "title": "Regions",
        "model": "region-36",
        "regions": {"num_regions": K, "feature_dim": D},
        "seeds": [0],
        "train": {"epochs": 1, "batch_size": 16, "warmup_epochs": 0},
        "rows": [{"name": "CHAN", "head": "chan", "published": "CHAN"}, {"name": "SCAN", "head": "scan"}],
        "published": {"all": "Flickr30K 1K", "backbone": "Faster R-CNN"},
    }
    file = tmp_path / "regions.yaml"
    file.write_text(yaml.safe_dump(settings))
    out = tmp_path / "runs"
    line = ["compare", file, "--data", folder, "--out", out, "--quiet", "--num-workers", 0, "--device", "cpu"]
    status, output, error = called(capsys, *line)
    assert status == 0, error
    assert "| CHAN, published | 80.6 |" in output
    assert laps.LAPS.from_pretrained(out / "scan" / "seed-0" / "best").transform == RegionTransform(K, D)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    status, _, error = called(capsys, *line, "--labels", tmp_path / "names.txt")
    assert status == 2
    assert "holds a run with other settings" in error
    file.write_text(yaml.safe_dump(settings | {"regions": None}))
    status, _, error = called(capsys, *line)
    assert status == 2
    assert "num_regions=36 of feature_dim=2048, got (5, 6)" in error
