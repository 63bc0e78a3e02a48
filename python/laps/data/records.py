"""What every data format becomes: images, captions, and which caption describes which image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..errors import LapsTypeError, LapsValueError

__all__ = ["RetrievalData"]


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """Images, captions and which caption describes which image.

    An image may have any number of captions, none too, in any order.

    Attributes:
        image_paths: the file of image i, B_v in all.
        captions: caption t, B_t in all.
        caption_to_image: (B_t,) int64, the image that caption t describes, in 0..B_v-1.
        name: what messages call the data, for example ``"dataset.json/test"``.

    Raises:
        LapsValueError, LapsTypeError: no image or no caption, a map of another length or with a value out of
            range.

    Example:
        >>> from pathlib import Path
        >>> from laps.data import RetrievalData
        >>> data = RetrievalData([Path("a.jpg"), Path("b.jpg")], ["a cat", "a dog", "a black dog"], [0, 1, 1])
        >>> data.num_images, data.num_captions, data.captions_of(1).tolist()
        (2, 3, [1, 2])
        >>> data.select_images([1]).captions
        ['a dog', 'a black dog']
    """

    image_paths: list[Path]
    captions: list[str]
    caption_to_image: NDArray[np.int64]
    name: str = ""

    def __post_init__(self) -> None:
        operation = f"RetrievalData {self.name}".rstrip()
        for argument, items in (("image_paths", self.image_paths), ("captions", self.captions)):
            if len(items) == 0:
                raise LapsValueError(_check.message(operation, f"{argument} is empty", "at least one", 0))
        raw = np.asarray(self.caption_to_image)
        if raw.dtype.kind not in "iu":
            raise LapsTypeError(
                _check.message(operation, "caption_to_image has the wrong dtype", "int64", raw.dtype)
            )
        images, captions = len(self.image_paths), len(self.captions)
        if raw.shape != (captions,):
            raise LapsValueError(
                _check.message(
                    operation, "caption_to_image has the wrong shape", f"(B_t={captions},)", raw.shape
                )
            )
        wrong = np.flatnonzero((raw < 0) | (raw >= images))
        if wrong.size:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"caption_to_image[{wrong[0]}] is out of range",
                    f"0 <= image < B_v={images}",
                    int(raw[wrong[0]]),
                )
            )
        object.__setattr__(self, "caption_to_image", raw.astype(np.int64))

    @property
    def num_images(self) -> int:
        """B_v."""
        return len(self.image_paths)

    @property
    def num_captions(self) -> int:
        """B_t."""
        return len(self.captions)

    def captions_of(self, image: int) -> NDArray[np.int64]:
        """The indices of the captions that describe `image`, ascending; LapsValueError if out of range."""
        _check_images("RetrievalData.captions_of", [image], self.num_images)
        return np.flatnonzero(self.caption_to_image == image).astype(np.int64)

    def select_images(self, indices: Sequence[int] | NDArray[np.int64]) -> RetrievalData:
        """Some of the images, in the order of `indices`, with their captions, in the order they have here.

        Raises:
            LapsValueError: an index out of range or given twice, or images that have no caption at all.
        """
        operation = "RetrievalData.select_images"
        chosen = [int(index) for index in indices]
        _check_images(operation, chosen, self.num_images)
        new_index = np.full(self.num_images, -1, dtype=np.int64)
        new_index[chosen] = np.arange(len(chosen))
        if (new_index >= 0).sum() != len(chosen):
            twice = next(index for i, index in enumerate(chosen) if index in chosen[:i])
            raise LapsValueError(_check.message(operation, f"image {twice} is given twice", "once each"))
        kept = np.flatnonzero(new_index[self.caption_to_image] >= 0)
        return RetrievalData(
            [self.image_paths[i] for i in chosen],
            [self.captions[t] for t in kept],
            new_index[self.caption_to_image[kept]],
            self.name,
        )


def _check_images(operation: str, indices: Sequence[int], images: int) -> None:
    wrong = [index for index in indices if not 0 <= index < images]
    if wrong:
        raise LapsValueError(
            _check.message(operation, "there is no such image", f"0 <= image < B_v={images}", wrong[0])
        )
