"""Whatever an image file holds becomes upright RGB, or an error with its path; then come the transforms."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laps import LapsError, LapsTypeError, LapsValueError
from laps.data import ImageTransform, open_image
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, and different under every rotation and mirroring."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x / 2 - y / 2], axis=-1).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def assert_close(image: Image.Image, expected: Image.Image, tolerance: float) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float))
    assert difference.mean() <= tolerance


# ---- what is converted


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGB", "jpg", 4),
        ("RGB", "webp", 8),
        ("CMYK", "jpg", 6),
        ("CMYK", "tif", 2),
        ("YCbCr", "jpg", 4),
        ("P", "png", 20),
        ("P", "gif", 20),
        ("RGBA", "png", 0),
    ],
)
def test_colour_survives_every_mode(tmp_path: Path, mode: str, suffix: str, tolerance: float) -> None:
    path = save(gradient().convert(mode), tmp_path / f"a.{suffix}")
    assert_close(open_image(path), gradient(), tolerance)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("LA", "png")])
def test_grey_stays_grey(tmp_path: Path, mode: str, suffix: str) -> None:
    image = open_image(save(gradient().convert(mode), tmp_path / f"a.{suffix}"))
    assert_close(image, gradient().convert("L"), 3 if suffix == "jpg" else 0)
    assert image.getpixel((3, 3)) == (image.getpixel((3, 3))[0],) * 3  # type: ignore[index]


def test_black_and_white_becomes_0_and_255(tmp_path: Path) -> None:
    bits = Image.fromarray(np.array([[True, False]]))
    image = open_image(save(bits, tmp_path / "a.png"))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    image = open_image(save(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert [image.getpixel((x, 0)) for x in range(5)] == [(v, v, v) for v in (0, 0, 1, 128, 255)]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    layer = Image.fromarray(np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 51]]], np.uint8))
    image = open_image(save(layer, tmp_path / "a.png"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 0), (204, 204, 204)]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = open_image(save(palette, tmp_path / "a.png", transparency=0))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = save(gradient(), tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored)
    assert expected.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert_close(open_image(path), expected, 0)


def test_damaged_exif_data_does_not_spoil_the_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for content in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"):
        path = save(gradient(), tmp_path / "a.jpg", exif=content)
        assert_close(open_image(path), gradient(), 4)
    # The unit of resolution, an integer, is said to be text, which Pillow reads but cannot write again.
    exif[0x0128] = 2
    content = exif.tobytes().replace(b"\x01\x28\x00\x03", b"\x01\x28\x00\x02")
    path = save(gradient(), tmp_path / "b.jpg", exif=content)
    assert content != exif.tobytes()
    assert open_image(path).size == (16, 24)


# ---- what is refused


def refused(path: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(LapsValueError) as caught:
        open_image(path, **options)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif"])
def test_a_truncated_image_is_refused_with_its_path(tmp_path: Path, suffix: str) -> None:
    path = save(gradient(200, 150), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "cannot be read")


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    refused(tmp_path / "a.jpg", "cannot be read")
    (tmp_path / "b.jpg").write_bytes(b"")
    refused(tmp_path / "b.jpg", "cannot be read")
    refused(tmp_path / "c.jpg", "missing")
    refused(tmp_path, "is a folder")


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    refused(save(Image.new("F", (2, 2), 0.5), tmp_path / "a.tif"), "floating-point")
    refused(save(Image.new("I", (2, 2), 70000), tmp_path / "b.tif"), "70000")


def test_too_large_an_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = save(gradient(30, 20), tmp_path / "a.png")
    refused(path, "30 x 20", "599", max_pixels=599)
    assert open_image(path, max_pixels=600).size == (30, 20)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_rgb_or_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    gradient().save(buffer, data.draw(st.sampled_from(["jpeg", "png", "gif", "webp", "tiff"])), exif=exif)
    content = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(LapsValueError):
        assert open_image(path).mode == "RGB"


# ---- transforms


def test_the_published_defaults() -> None:
    assert ImageTransform() == ImageTransform(
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_scale=(0.6, 1.0),
        flip=0.5,
        interpolation="bicubic",
    )


def test_evaluation_resizes_the_whole_image_and_normalises() -> None:
    pixels = ImageTransform(image_size=8).eval()(gradient())
    assert (pixels.shape, pixels.dtype, type(pixels)) == ((3, 8, 8), torch.float32, torch.Tensor)
    resized = np.asarray(gradient().resize((8, 8), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)


def test_training_without_crop_and_flip_is_evaluation() -> None:
    transform = ImageTransform(image_size=8, crop_scale=None, flip=0.0)
    assert torch.equal(transform.train()(gradient()), transform.eval()(gradient()))


def test_training_always_mirrors_at_flip_1() -> None:
    transform = ImageTransform(image_size=8, crop_scale=None, flip=1.0)
    mirrored = transform.eval()(ImageOps.mirror(gradient()))
    # A resize of the mirrored image rounds at other places than a mirrored resize.
    torch.testing.assert_close(transform.train()(gradient()), mirrored, rtol=0, atol=0.02)


def test_training_crops_keep_at_least_the_smallest_share() -> None:
    # Red grows along x, green along y: their ranges show how much of each side a crop kept.
    transform = ImageTransform(
        image_size=16, mean=(0, 0, 0), std=(1, 1, 1), flip=0.0, interpolation="nearest"
    )
    torch.manual_seed(0)
    train, image = transform.train(), gradient(256, 256)
    kept = []
    for _ in range(200):
        pixels = train(image)
        width, height = (float(pixels[c].max() - pixels[c].min()) * 16 / 15 for c in (0, 1))
        kept.append(width * height)
    # Each side is known to one sixteenth.
    assert 0.6 * 0.85 < min(kept) < 0.75
    assert 0.9 < max(kept) < 1.15


def test_settings_survive_json() -> None:
    for transform in (ImageTransform(), ImageTransform(32, (0, 0, 0), (1, 1, 1), None, 0, "bilinear")):
        assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert ImageTransform.from_dict({"image_size": 64}) == ImageTransform(64)


def test_unknown_settings_are_listed() -> None:
    with pytest.raises(LapsValueError, match=r"unknown keys .*image_size.* got size, colour"):
        ImageTransform.from_dict({"size": 224, "flip": 0.5, "colour": 1})


@pytest.mark.parametrize(
    ("settings_", "error", "part"),
    [
        ({"image_size": 0}, LapsValueError, "image_size"),
        ({"image_size": 22.4}, LapsTypeError, "image_size"),
        ({"mean": (0.5, 0.5)}, LapsValueError, "mean"),
        ({"mean": 0.5}, LapsTypeError, "mean"),
        ({"std": (0.1, 0.0, 0.1)}, LapsValueError, "std"),
        ({"crop_scale": (0.0, 1.0)}, LapsValueError, "crop_scale"),
        ({"crop_scale": (0.9, 0.6)}, LapsValueError, "crop_scale"),
        ({"crop_scale": (0.6, 1.1)}, LapsValueError, "crop_scale"),
        ({"flip": 1.5}, LapsValueError, "flip"),
        ({"interpolation": "cubic"}, LapsValueError, "interpolation"),
    ],
)
def test_impossible_settings_are_refused(
    settings_: dict[str, Any], error: type[LapsError], part: str
) -> None:
    with pytest.raises(error, match=f"ImageTransform: {part}"):
        ImageTransform(**settings_)
