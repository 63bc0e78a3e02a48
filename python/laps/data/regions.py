"""Detector features in place of pixels: regions with boxes and labels, as files of them to tensors.

Two layouts, as the field's repositories keep them:

- ``x.npz``, one image, which its captions call x.npz or, as the photograph, x.jpg: ``features`` (or ``x``)
  (K, D); ``boxes`` (or ``bbox``) (K, 4) as x0, y0, x1, y1 in pixels with ``image_w`` and ``image_h``, or in
  [0, 1] without these; ``labels`` (or ``objects_id``) (K,);
- ``{split}_ims.npy``, all images of a split: (n, K, D); beside it perhaps ``{split}_boxes.npy`` (n, K, 4) in
  [0, 1], or in pixels with ``{split}_sizes.npy`` (n, 2), width and height; and ``{split}_labels.npy`` (n, K).
  The path of image i is ``{split}_ims.npy/i``.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from ..errors import LapsValueError

__all__ = ["BOX", "LABEL", "REGIONS_END", "RegionTransform"]

REGIONS_END = "_ims.npy"
ARCHIVE_END = ".npz"
# What follows a region's D features in its row: the box, and the number of its label or -1.
BOX, LABEL = 4, 1
NAMES = {"features": ("features", "x"), "boxes": ("boxes", "bbox"), "labels": ("labels", "objects_id")}
OPERATION = "regions"


@dataclass(frozen=True)
class RegionTransform:
    """How a file of detector features becomes what a region encoder takes, (K, D + 5) float32.

    A row has the D features of a region, its box as x0, y0, x1, y1 in [0, 1] (the whole image where there is
    none) and the number of its label (-1 where there is none). Of more regions than K the first count:
    detectors sort them by confidence.

    Attributes:
        num_regions: K.
        feature_dim: D.

    Raises:
        LapsValueError, LapsTypeError: a value out of range or of the wrong type.

    Example:
        >>> import numpy as np, pathlib, tempfile
        >>> from laps.data import RegionTransform
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
        >>> np.savez(path, features=np.zeros((36, 8), np.float32))
        >>> RegionTransform(36, 8).open(path).shape
        torch.Size([36, 13])
    """

    num_regions: int = 36
    feature_dim: int = 2048

    def __post_init__(self) -> None:
        for name in ("num_regions", "feature_dim"):
            _check.count("RegionTransform", name, getattr(self, name))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(K, D + 5)."""
        return self.num_regions, self.feature_dim + BOX + LABEL

    def open(self, path: str | Path) -> Tensor:
        """The rows of an image.

        Raises:
            LapsValueError: a file that is missing, damaged, of another layout or an image, with its path.
        """
        path = Path(path)
        if not is_regions(path):
            expected = "a detector's .npz, or a row of *_ims.npy: this model takes no pixels"
            raise LapsValueError(_check.message(OPERATION, f"{path} has no regions", expected))
        try:
            found = _of_split(path) if path.parent.name.endswith(REGIONS_END) else _of_image(path)
        except (OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            expected = "features of a detector (.npz, or a row of *_ims.npy)"
            raise LapsValueError(
                _check.message(OPERATION, f"{path} cannot be read", expected, error)
            ) from error
        return self._rows(path, found)

    def train(self) -> Callable[[Any], Tensor]:
        """Nothing is drawn: features of a detector are what they are."""
        return self.eval()

    def eval(self) -> Callable[[Any], Tensor]:
        """The rows as they are."""
        return _as_it_is

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {"kind": "regions", **asdict(self)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RegionTransform:
        """The reverse of `to_dict`. LapsValueError lists unknown keys."""
        own = {name: value for name, value in settings.items() if name != "kind"}
        known = [field.name for field in fields(cls)]
        unknown = [key for key in own if key not in known]
        if unknown:
            raise LapsValueError(
                _check.message(
                    "RegionTransform.from_dict", "unknown keys", ", ".join(known), ", ".join(unknown)
                )
            )
        return cls(**own)

    def _rows(self, path: Path, found: Mapping[str, NDArray[Any]]) -> Tensor:
        features = found["features"]
        k, d = self.num_regions, self.feature_dim
        if features.ndim != 2 or features.shape[0] < k or features.shape[1] != d:
            raise LapsValueError(
                _check.message(
                    OPERATION,
                    f"{path} does not fit the model",
                    f"at least num_regions={k} of feature_dim={d}",
                    features.shape,
                )
            )
        count = len(features)
        boxes = found.get("boxes", np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (count, 1)))
        labels = found.get("labels", np.full(count, -1))
        if boxes.shape != (count, BOX) or labels.shape != (count,):
            raise LapsValueError(
                _check.message(
                    OPERATION,
                    f"{path} has boxes or labels of another number",
                    f"({count}, 4) and ({count},)",
                    f"{boxes.shape} and {labels.shape}",
                )
            )
        if "size" in found:
            boxes = boxes / np.tile(found["size"], 2)
        # Detectors may end a box half a pixel beyond the edge.
        if not (boxes >= -0.01).all() or not (boxes <= 1.01).all():
            raise LapsValueError(
                _check.message(
                    OPERATION,
                    f"{path} has boxes outside of the image",
                    "pixels together with the image's size, or [0, 1]",
                    f"{boxes.min():g} to {boxes.max():g}",
                )
            )
        rows = np.concatenate([features, boxes.clip(0, 1), labels[:, None]], axis=1)[:k]
        return torch.from_numpy(rows.astype(np.float32))


def is_regions(path: Path) -> bool:
    """Whether the path is that of one image's regions, in either layout."""
    return path.suffix == ARCHIVE_END or path.parent.name.endswith(REGIONS_END)


def read_labels(path: str | Path) -> list[str]:
    """The names of a detector's labels, line i (from 0) that of number i.

    Raises:
        LapsValueError: a file that cannot be read, or has a line without a name.
    """
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LapsValueError(
            _check.message(OPERATION, f"labels {path} cannot be read", "a text file, a name a line", error)
        ) from None
    for line, name in enumerate(names or [""], 1):
        if not name.strip():
            raise LapsValueError(_check.message(OPERATION, f"labels {path}:{line} is empty", "a name"))
    return [name.strip() for name in names]


def require_fit(transform: RegionTransform, path: Path, labels: Sequence[str] | None) -> None:
    """Refuse an image whose regions the model cannot take, or whose labels have no name.

    Asked of one image of a data set, before weights are read.

    Raises:
        LapsValueError: regions of other sizes, no labels though there are names, a number without a name.
    """
    numbers = transform.open(path)[:, -1]
    if labels is None:
        return
    highest = int(numbers.max())
    if highest < 0:
        expected = "an array labels or objects_id, or {split}_labels.npy"
        raise LapsValueError(
            _check.message(OPERATION, f"labels have names, but {path} has no label", expected)
        )
    if highest >= len(labels):
        expected = f"at least {highest + 1}, for {path} has the label {highest}"
        raise LapsValueError(_check.message(OPERATION, "labels have too few names", expected, len(labels)))


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _of_image(path: Path) -> dict[str, NDArray[Any]]:
    """What a file of one image holds, by our names."""
    # Nothing that a pickle could run.
    with np.load(path, allow_pickle=False) as file:
        if not hasattr(file, "files"):
            raise ValueError("no archive of arrays")
        found = {
            name: file[alias] for name, aliases in NAMES.items() for alias in aliases if alias in file.files
        }
        if "image_w" in file.files and "image_h" in file.files:
            found["size"] = np.array([float(file["image_w"]), float(file["image_h"])])
    if "features" not in found:
        raise ValueError("it has no features")
    return found


def _of_split(path: Path) -> dict[str, NDArray[Any]]:
    """What a row of a split's files holds."""
    file, row = path.parent, int(path.name)
    if row < 0:
        raise ValueError("a negative row")
    found = {"features": np.array(np.load(file, mmap_mode="r", allow_pickle=False)[row])}
    start = str(file).removesuffix(REGIONS_END)
    for name, end in (("boxes", "_boxes.npy"), ("size", "_sizes.npy"), ("labels", "_labels.npy")):
        beside = Path(start + end)
        if beside.is_file():
            found[name] = np.array(np.load(beside, mmap_mode="r", allow_pickle=False)[row])
    return found
