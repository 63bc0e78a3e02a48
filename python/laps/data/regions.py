"""Detector features in place of pixels: regions with boxes and labels, as files of them to tensors.

Two layouts, as the field's repositories keep them:

- ``x.npz``, one image, which its captions call x.npz or, as the photograph, x.jpg: ``features`` (or ``x``)
  (K, D); ``boxes`` (or ``bbox``) (K, 4) as x0, y0, x1, y1 in pixels with ``image_w`` and ``image_h``, or in
  [0, 1] without these; ``labels`` (or ``objects_id``) (K,);
- ``{split}_ims.npy``, all images of a split: (n, K, D); beside it perhaps ``{split}_boxes.npy`` (n, K, 4) in
  [0, 1], or in pixels with ``{split}_sizes.npy`` (n, 2), width and height; and ``{split}_labels.npy`` (n, K).
  The path of image i is ``{split}_ims.npy/i``.

Labels are whole numbers from 0 on, or -1 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from ..errors import LapsTypeError, LapsValueError

__all__ = ["BOX", "LABEL", "REGIONS_END", "RegionTransform"]

REGIONS_END = "_ims.npy"
ARCHIVE_END = ".npz"
# What follows a region's D features in its row: the box, and the number of its label or -1.
BOX, LABEL = 4, 1
NAMES = {"features": ("features", "x"), "boxes": ("boxes", "bbox"), "labels": ("labels", "objects_id")}
SPLIT_ENDS = {"boxes": "_boxes.npy", "size": "_sizes.npy", "labels": "_labels.npy"}
# Above it float32, which carries the labels to the encoder, rounds whole numbers.
HIGHEST = 2**24
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
        num_labels: how many labels have names: a higher number is refused. None refuses none. A model sets
            it to its own, so it is not saved beside one.

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
    num_labels: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_regions", "feature_dim"):
            _check.count("RegionTransform", name, getattr(self, name))
        if self.num_labels is not None:
            _check.count("RegionTransform", "num_labels", self.num_labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(K, D + 5)."""
        return self.num_regions, self.feature_dim + BOX + LABEL

    def open(self, path: str | Path) -> Tensor:
        """The rows of an image.

        Raises:
            LapsValueError: a file that is missing, damaged, of another layout or an image, or has values
                that are no regions (NaN, a box outside of the image, a label without name); with its path.
        """
        path = Path(path)
        return self._rows(path, _arrays_of(path))

    def train(self) -> Callable[[Any], Tensor]:
        """Nothing is drawn: features of a detector are what they are."""
        return self.eval()

    def eval(self) -> Callable[[Any], Tensor]:
        """The rows as they are."""
        return _as_it_is

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them, without `num_labels`, which a model's weights tell."""
        own = asdict(self)
        del own["num_labels"]
        return {"kind": "regions", **own}

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
        features = _float32(path, "features", features[:k])
        if not np.isfinite(features).all():
            raise LapsValueError(
                _check.message(OPERATION, f"{path} has features that are not finite", "finite features")
            )
        boxes, labels = boxes[:k], labels[:k]
        _require_labels(labels[None], lambda _: path, self.num_labels)
        rows = [features, self._in_image(path, boxes, found.get("size")), labels[:, None].astype(np.float32)]
        return torch.from_numpy(np.concatenate(rows, axis=1))

    def _in_image(self, path: Path, boxes: NDArray[Any], size: NDArray[Any] | None) -> NDArray[np.float32]:
        """The boxes in [0, 1]; `size` is given where they are in pixels."""
        _require_numbers(path, "boxes", boxes)
        if size is not None:
            _require_numbers(path, "a size", size)
            if size.shape != (2,) or not (np.isfinite(size) & (size > 0)).all():
                expected = "two numbers above 0: image_w and image_h, or a row of {split}_sizes.npy"
                got = size.tolist() if size.shape == (2,) else f"shape {size.shape}"
                raise LapsValueError(
                    _check.message(OPERATION, f"{path} has a size that is none", expected, got)
                )
            boxes = boxes.astype(np.float64) / np.tile(size.astype(np.float64), 2)
        # Detectors may end a box half a pixel beyond the edge. NaN is in no range.
        if not (boxes >= -0.01).all() or not (boxes <= 1.01).all():
            raise LapsValueError(
                _check.message(
                    OPERATION,
                    f"{path} has boxes outside of the image",
                    "pixels together with the image's size, or [0, 1]",
                    f"{boxes.min():g} to {boxes.max():g}",
                )
            )
        return boxes.clip(0, 1).astype(np.float32)


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


def label_names(operation: str, labels: object) -> list[str]:
    """The names of labels, given as such or as the file of them, which :func:`read_labels` reads.

    Raises:
        LapsTypeError: neither; a mapping or a set, whose order says nothing. LapsValueError: no name, or a
            file without.
    """
    if isinstance(labels, (str, Path)):
        return read_labels(labels)
    expected = "names in the order of their numbers, or a file of them"
    if not isinstance(labels, Sequence):
        raise LapsTypeError(_check.message(operation, "labels are no list", expected, _check.name_of(labels)))
    for i, name in enumerate(labels):
        if not isinstance(name, str):
            raise LapsTypeError(
                _check.message(operation, f"labels[{i}] is no string", expected, _check.name_of(name))
            )
    if not labels:
        raise LapsValueError(_check.message(operation, "labels is empty", "at least one name", 0))
    return list(labels)


def require_fit(transform: RegionTransform, path: Path, labels: Sequence[str] | None) -> None:
    """Refuse data whose regions the model cannot take, or whose labels have no name.

    Asked of the first image of a split, before weights are read: of its sizes, and of the labels of all
    images where one file has them (it is small). Files of one image each are not all read for it: a number
    too high comes out when the image is opened, or by `laps data check --regions --labels FILE`.

    Raises:
        LapsValueError: regions of other sizes, a number without a name, no labels though there are names.
    """
    named = transform.num_labels if labels is None else len(labels)
    transform.open(path)
    numbers: NDArray[Any] | None
    if path.parent.name.endswith(REGIONS_END):
        numbers = _arrays_of(path, whole=True).get("labels")
        if numbers is not None:
            numbers = numbers[:, : transform.num_regions]
            _require_labels(numbers, lambda row: path.parent / str(row), named)
            # Not one region of any image.
            numbers = numbers if numbers.max() >= 0 else None
    else:
        # An image in which nothing was recognised says nothing of the others.
        numbers = _arrays_of(path).get("labels")
        if numbers is not None:
            _require_labels(numbers[None, : transform.num_regions], lambda _: path, named)
    if numbers is None and labels is not None:
        expected = "an array labels or objects_id, or {split}_labels.npy"
        raise LapsValueError(
            _check.message(OPERATION, f"labels have names, but {path} has no label", expected)
        )


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


# ---- values


def _require_numbers(path: Path, name: str, array: NDArray[Any]) -> None:
    # Complex ones would lose a part, and text, dates and records are none.
    if array.dtype.kind not in "fiu":
        raise LapsValueError(
            _check.message(OPERATION, f"{path} has {name} of the wrong dtype", "real numbers", array.dtype)
        )


def _float32(path: Path, name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    _require_numbers(path, name, array)
    # What is too large becomes infinite, and is refused as that.
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _require_labels(labels: NDArray[Any], path_of: Callable[[int], Path], named: int | None) -> None:
    """Refuse what are no numbers of labels in (n, K), the labels of n images."""
    _require_numbers(path_of(0), "labels", labels)
    # Half precision holds none of the bounds.
    labels = labels.astype(np.float64)
    wrong = ~((labels >= -1) & (labels <= HIGHEST) & (labels == np.floor(labels)))
    if wrong.any():
        row, region = np.argwhere(wrong)[0]
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{path_of(row)} has a label that is no number of one",
                f"a whole number, -1 (none) to {HIGHEST}",
                labels[row, region],
            )
        )
    if named is not None and labels.size and labels.max() >= named:
        row, region = np.argwhere(labels >= named)[0]
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{path_of(row)} has the label {labels[row, region]:g}, which has no name",
                f"a number below {named}, as many labels have names",
            )
        )


# ---- files


def _arrays_of(path: Path, *, whole: bool = False) -> dict[str, NDArray[Any]]:
    """What the files have for an image, unchecked; `whole`: for all images of its split.

    Raises:
        LapsValueError: no path of regions, or nothing that can be read, with the path.
    """
    if not is_regions(path):
        expected = "a detector's .npz, or a row of *_ims.npy: this model takes no pixels"
        raise LapsValueError(_check.message(OPERATION, f"{path} has no regions", expected))
    try:
        of_split = path.parent.name.endswith(REGIONS_END)
        return _of_split(path, whole=whole) if of_split else _of_image(path)
    # zipfile and NumPy raise almost any error on a damaged file: RuntimeError for an encrypted one,
    # MemoryError for a header that claims what is not there.
    except Exception as error:
        expected = "features of a detector (.npz, or a row of *_ims.npy)"
        reason = " ".join(str(error).split()) or _check.name_of(error)
        raise LapsValueError(_check.message(OPERATION, f"{path} cannot be read", expected, reason)) from error


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
            sides = [file[name] for name in ("image_w", "image_h")]
            if any(side.size != 1 for side in sides):
                raise ValueError(f"image_w and image_h are of shape {sides[0].shape} and {sides[1].shape}")
            found["size"] = np.stack([side.reshape(()) for side in sides])
    if "features" not in found:
        raise ValueError("it has no features")
    return found


def _of_split(path: Path, *, whole: bool = False) -> dict[str, NDArray[Any]]:
    """What a row of a split's files holds, or with `whole` all rows, still on the disk."""
    file, row = path.parent, int(path.name)
    if row < 0:
        raise ValueError("a negative row")
    start = str(file).removesuffix(REGIONS_END)
    beside = {name: Path(start + end) for name, end in SPLIT_ENDS.items()}
    files = {"features": file} | {name: other for name, other in beside.items() if other.is_file()}
    found = {}
    for name, one in files.items():
        try:
            array = np.load(one, mmap_mode="r", allow_pickle=False)
            found[name] = array if whole else np.array(array[row])
        except Exception as error:
            raise ValueError(f"{one.name}: {error}") from error
    return found
