"""One image file to RGB pixels, whatever was stored and wherever, or an error that has the file's path."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from .. import _check
from ..errors import LapsValueError
from .containers import content_of
from .regions import is_regions

__all__ = ["as_rgb", "decode_image", "open_image"]

# Pillow's own threshold of a suspiciously large image: a quarter of a GiB as RGB.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# Sixteen-bit grey: Pillow's plain conversion would clip everything above 255 to white.
SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# The EXIF orientation, and what undoes it.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file as RGB, 8 bits per channel, upright.

    The EXIF rotation is applied; grey, palette and CMYK images are converted; transparency is laid on white;
    16-bit grey is scaled to 8 bits. Of an animation, the first frame.

    Args:
        path: the file, or a path into a file of many: ``shard.tar/000123.jpg``, ``train.parquet/17``, see
            :func:`laps.data.load`.
        max_pixels: refuse larger images before they are decoded. Pillow's own ``PIL.Image.MAX_IMAGE_PIXELS``
            holds as well.

    Raises:
        LapsValueError: a missing, truncated, damaged or too large file, floating-point pixels; with the path.

    Example:
        >>> import tempfile, PIL.Image
        >>> from laps.data import open_image
        >>> file = tempfile.NamedTemporaryFile(suffix=".png")
        >>> PIL.Image.new("L", (4, 2), 128).save(file.name)
        >>> open_image(file.name).getpixel((0, 0))
        (128, 128, 128)
    """
    return _open(Path(path), _check.count("open_image", "max_pixels", max_pixels))[0]


def as_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened, as `open_image` gives a file: RGB, upright, transparency on white.

    Raises:
        LapsValueError: a truncated file, floating-point pixels.
    """
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:
        reason = f"{_check.name_of(error)}: {error}"
        raise LapsValueError(
            _check.message("as_rgb", "the image cannot be read", "a whole image", reason)
        ) from error


def open_with_mode(path: Path) -> tuple[Image.Image, str]:
    """The image as `open_image` gives it, and the Pillow mode that the file has."""
    return _open(path, MAX_PIXELS)


def _open(path: Path, max_pixels: int) -> tuple[Image.Image, str]:
    operation = "open_image"
    if is_regions(path):
        expected = "an image file, or a model of regions in place of one of pixels"
        raise LapsValueError(_check.message(operation, f"{path} has regions of a detector", expected))
    content = content_of(path)
    if content is not None:
        return decode_image(content, path, max_pixels=max_pixels)
    if path.is_dir():
        raise LapsValueError(_check.message(operation, f"{path} is a folder", "an image file"))
    if not path.is_file():
        raise LapsValueError(_check.message(operation, f"{path} is missing", "an image file"))
    return _decoded(path, path, max_pixels)


def decode_image(content: bytes, name: object, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """The image in the bytes of a file, as `open_image` gives it, and its Pillow mode; `name` is of messages.

    Raises:
        LapsValueError: as `open_image`.
    """
    return _decoded(io.BytesIO(content), name, max_pixels)


def _decoded(source: Path | IO[bytes], name: object, max_pixels: int) -> tuple[Image.Image, str]:
    operation = "open_image"
    try:
        with Image.open(source) as image:
            if image.width * image.height > max_pixels:
                raise LapsValueError(
                    _check.message(
                        operation,
                        f"{name} is too large",
                        f"at most {max_pixels} pixels",
                        f"{image.width} x {image.height}",
                    )
                )
            mode = image.mode
            # A file that ends early raises here.
            image.load()
            return _rgb(_upright(image)), mode
    except LapsValueError:
        raise
    # Pillow's readers raise almost any error on a damaged file, not OSError alone.
    except Exception as error:
        raise LapsValueError(
            _check.message(
                operation, f"{name} cannot be read", "a whole image file", f"{_check.name_of(error)}: {error}"
            )
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF data, and fails where that is damaged elsewhere.
    method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit pixels from {values.min()} to {values.max()}, outside of 0..65535")
        grey = ((values + 128) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
