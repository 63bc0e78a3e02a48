"""Detector features in place of pixels: their files, the encoder, and a model that trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import laps
import numpy as np
import pytest
import torch
from _models import CAPTIONS, bert_tokenizer, text_model
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
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = archive(tmp_path / "odd.npz", **changes)
    with pytest.raises(
        laps.LapsValueError, match=rf"odd\.npz .*{message}|odd\.npz cannot be read.*{message}"
    ):
        RegionTransform(K, D).open(file)


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
    for split, images in (("train", 6), ("dev", 3)):
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
    with pytest.raises(laps.LapsError, match="ids"):
        laps.data.load(folder, "dev")


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
