"""Training pairs and images as plain PyTorch datasets, for any DataLoader."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .containers import carried, restore
from .dense import check_dense_captions
from .records import RetrievalData
from .regions import RegionTransform
from .tokenizer import CaptionTokenizer
from .transforms import ImageTransform

__all__ = ["Batch", "CaptionDataset", "Example", "ExampleMaker", "ImageDataset", "shared"]

Transform: TypeAlias = ImageTransform | RegionTransform

ON_ERROR = ("raise", "skip")


@dataclass
class Batch:
    """What a training step takes: B captions, each with its image.

    Attributes:
        pixel_values: (B, 3, S, S) float32; of regions (B, K, D + 5), see :class:`laps.data.RegionTransform`.
        input_ids: (B, L) int64, padded.
        lengths: (B,) int64, always on the CPU, where the head reads them without waiting for the device.
        image_ids: (B,) int64, which image of the data row i shows.
        caption_ids: (B,) int64, which caption of the data row i has.
        dense_ids: (B, L') int64, padded: the dense captions of the images; None where there are none.
        dense_lengths: (B,) int64, on the CPU, or None.
    """

    pixel_values: Tensor
    input_ids: Tensor
    lengths: Tensor
    image_ids: Tensor
    caption_ids: Tensor
    dense_ids: Tensor | None = None
    dense_lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; the lengths stay on the CPU."""
        return self._map(
            lambda name, tensor: tensor
            if name.endswith("lengths")
            else tensor.to(device, non_blocking=non_blocking)
        )

    def part(self, first: int, last: int) -> Batch:
        """Rows `first` to `last`, exclusive, as padded as here."""
        return self._map(lambda _, tensor: tensor[first:last])

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._map(lambda _, tensor: tensor.pin_memory())

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """The batch with other tensors in place of those that are there."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if x is None else change(name, x) for name, x in own.items()}
        return Batch(**changed)


@dataclass
class Example:
    """One caption with its image: pixels (3, S, S), token ids, both indices, ids of the dense caption."""

    pixel_values: Tensor
    token_ids: list[int]
    image_id: int
    caption_id: int
    dense_ids: list[int] | None = None


def shared(tensor: Tensor) -> Tensor:
    """The tensor in memory that DataLoader workers and the main process share."""
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


class ExampleMaker:
    """Makes an example of an image and a caption, and batches of examples.

    All randomness of an example depends on its key alone: not on the number of workers, the order, or the
    generators of the process, which are left as they were.

    Args:
        operation: for messages.
        tokenizer, transform, train, augment: as of :class:`CaptionDataset`.
    """

    def __init__(
        self, operation: str, tokenizer: CaptionTokenizer, transform: Transform, train: bool, augment: float
    ) -> None:
        augment = _check.number(operation, "augment", augment, 0.0, 1.0)
        self.operation, self.tokenizer = operation, tokenizer
        self.augment = augment if _check.flag(operation, "train", train) else 0.0
        if self.augment > 0 and tokenizer.mask_id is None:
            raise LapsValueError(
                _check.message(
                    operation, "the tokenizer has no mask token", "augment=0", f"augment={augment:g}"
                )
            )
        self._to_pixels = transform.train() if train else transform.eval()

    def make(
        self, key: str, image: Any, caption: str, image_id: int, caption_id: int, dense: str | None = None
    ) -> Example:
        """The example of an opened image. LapsValueError for a caption without tokens."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        # One seed for the texts and one for the image.
        words, pixels = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        generator = random.Random(words)
        token_ids = self.tokenizer.augment(caption, generator, self.augment)
        dense_ids = None if dense is None else self.tokenizer.augment(dense, generator, self.augment)
        # torchvision draws from the global generator. Only the CPU's is touched: seeding all devices is slow.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(pixels)
            return Example(self._to_pixels(image), token_ids, image_id, caption_id, dense_ids)

    def collate(self, examples: Sequence[Example | None]) -> Batch:
        """Examples as one padded batch, without skipped ones. LapsValueError if nothing is left."""
        kept = [example for example in examples if example is not None]
        if not kept:
            raise LapsValueError(
                _check.message(
                    f"{self.operation}.collate",
                    "no example of the batch is left",
                    "at least one readable image with a caption",
                    f"{len(examples)} skipped",
                )
            )
        input_ids, lengths = self.tokenizer.pad([example.token_ids for example in kept])
        dense = [example.dense_ids for example in kept if example.dense_ids is not None]
        dense_ids, dense_lengths = self.tokenizer.pad(dense) if dense else (None, None)
        return Batch(
            pixel_values=torch.stack([example.pixel_values for example in kept]),
            input_ids=input_ids,
            lengths=lengths,
            image_ids=torch.tensor([example.image_id for example in kept]),
            caption_ids=torch.tensor([example.caption_id for example in kept]),
            dense_ids=dense_ids,
            dense_lengths=dense_lengths,
        )


class _Images:
    """Opens images by index; what happens to an unreadable one is the caller's choice."""

    def __init__(self, operation: str, paths: Sequence[Path], transform: Transform, on_error: str) -> None:
        if not isinstance(transform, (ImageTransform, RegionTransform)):
            raise LapsTypeError(
                _check.message(
                    operation,
                    "transform is none of laps.data",
                    "an ImageTransform or a RegionTransform",
                    _check.name_of(transform),
                )
            )
        self.paths, self._open = paths, transform.open
        self.skip = _check.choice(operation, "on_error", on_error, ON_ERROR) == "skip"
        # Shared: all workers together warn once per path.
        self.warned = shared(torch.zeros(len(paths), dtype=torch.bool))

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: what it needs to find images inside of other files."""
        return {**self.__dict__, "carried": carried(self.paths)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(state.pop("carried"))
        self.__dict__.update(state)

    def open(self, index: int) -> Any:
        """What the transform takes, or None."""
        try:
            return self._open(self.paths[index])
        except LapsValueError as error:
            if not self.skip:
                raise
            if not self.warned[index]:
                self.warned[index] = True
                warnings.warn(f"skipped: {error}", stacklevel=3)
            return None


class CaptionDataset(Dataset[Example | None]):
    """For training: item t is caption t with its image.

    All randomness of an item (image crop, flip, caption augmentation) depends on (seed, epoch, t) alone: not
    on the number of workers, the order, or the generators of the process, which are left as they were.

    Use it with its own :meth:`collate`: ``DataLoader(dataset, batch_size=64, collate_fn=dataset.collate)``.

    Args:
        data: of :func:`laps.data.load`.
        tokenizer, transform: what makes ids of captions and pixels of images.
        seed: any integer.
        train: False for neither image nor caption augmentation.
        augment: the probability that a word is changed; see :meth:`CaptionTokenizer.augment`.
        on_error: "raise" for an image that cannot be read or a caption without tokens, "skip" to warn once
            for each and go on without.
        dense_captions: a longer text for each image of `data`, in its order, of
            :func:`read_dense_captions`; augmented as captions are. Or None.

    Raises:
        LapsValueError, LapsTypeError: a wrong argument; dense captions of another number than the images, or
            one without tokens; augmentation with a vocabulary without mask token.
            Items raise LapsValueError for an unreadable image (with its path) or a caption without tokens
            (with its index).

    Example:
        >>> import tempfile, pathlib, PIL.Image
        >>> from laps.data import CaptionDataset, CaptionTokenizer, ImageTransform, RetrievalData
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "cat.png"
        >>> PIL.Image.new("RGB", (40, 30)).save(path)
        >>> data = RetrievalData([path], ["a cat", "the black cat"], [0, 0])
        >>> tokenizer = CaptionTokenizer.train(data.captions, vocab_size=60)
        >>> dataset = CaptionDataset(data, tokenizer, ImageTransform(image_size=32), augment=0)
        >>> batch = dataset.collate([dataset[0], dataset[1]])
        >>> batch.pixel_values.shape, batch.lengths.tolist(), batch.image_ids.tolist()
        (torch.Size([2, 3, 32, 32]), [4, 5], [0, 0])
    """

    def __init__(
        self,
        data: RetrievalData,
        tokenizer: CaptionTokenizer,
        transform: Transform,
        *,
        seed: int = 0,
        train: bool = True,
        augment: float = 0.2,
        on_error: str = "raise",
        dense_captions: Sequence[str] | None = None,
    ) -> None:
        operation = "CaptionDataset"
        self.data, self.tokenizer = data, tokenizer
        self.seed = int(_check.count(operation, "seed", seed, -(2**63)))
        self._images = _Images(operation, data.image_paths, transform, on_error)
        self._maker = ExampleMaker(operation, tokenizer, transform, train, augment)
        self.augment = self._maker.augment
        self.dense_captions = None
        if dense_captions is not None:
            self.dense_captions = check_dense_captions(operation, dense_captions, data, tokenizer)
        self._blank = shared(torch.zeros(data.num_captions, dtype=torch.bool))
        # Shared: workers that outlive an epoch see the next one.
        self._epoch = shared(torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return self.data.num_captions

    @property
    def skipped_images(self) -> list[Path]:
        """The images that could not be read so far, by this process and its loader's workers."""
        paths = self.data.image_paths
        return [path for path, skipped in zip(paths, self._images.warned.tolist(), strict=True) if skipped]

    @property
    def epoch(self) -> int:
        """The epoch that items are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations: call it before each epoch's iteration over the DataLoader."""
        self._epoch.fill_(_check.count("CaptionDataset.set_epoch", "epoch", epoch, 0))

    def __getitem__(self, t: int) -> Example | None:
        image_id = int(self.data.caption_to_image[t])
        image = self._images.open(image_id)
        if image is None:
            return None
        dense = None if self.dense_captions is None else self.dense_captions[image_id]
        key = f"{self.seed},{self.epoch},{t}"
        try:
            return self._maker.make(key, image, self.data.captions[t], image_id, t, dense)
        except LapsValueError as error:
            message = f"CaptionDataset: caption {t} of {self.data.name}: {error}"
            if not self._images.skip:
                raise LapsValueError(message) from error
            if not self._blank[t]:
                self._blank[t] = True
                warnings.warn(f"skipped: {message}", stacklevel=2)
            return None

    def collate(self, examples: Sequence[Example | None]) -> Batch:
        """Examples as one padded batch, without skipped ones. LapsValueError if nothing is left."""
        return self._maker.collate(examples)


class ImageDataset(Dataset[tuple[int, Tensor] | None]):
    """For evaluation and indexing: item i is (i, the pixels of image i), without augmentation.

    Args:
        data: of :func:`laps.data.load`, or a list of image files.
        transform: what makes pixels of images.
        on_error: "raise" for an image that cannot be read, "skip" to warn once per path and go on without.

    Raises:
        LapsValueError, LapsTypeError: a wrong argument. Items raise LapsValueError, with the path, for an
            image that cannot be read.

    Example:
        >>> import tempfile, pathlib, PIL.Image
        >>> from laps.data import ImageDataset, ImageTransform
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "cat.png"
        >>> PIL.Image.new("RGB", (40, 30)).save(path)
        >>> images = ImageDataset([path], ImageTransform(image_size=32))
        >>> indices, pixels = images.collate([images[0]])
        >>> indices.tolist(), pixels.shape
        ([0], torch.Size([1, 3, 32, 32]))
    """

    def __init__(
        self, data: RetrievalData | Sequence[Path], transform: Transform, *, on_error: str = "raise"
    ) -> None:
        paths = data.image_paths if isinstance(data, RetrievalData) else [Path(path) for path in data]
        self._images = _Images("ImageDataset", paths, transform, on_error)
        self._shape, self._to_pixels = transform.input_shape, transform.eval()

    def __len__(self) -> int:
        return len(self._images.paths)

    def __getitem__(self, i: int) -> tuple[int, Tensor] | None:
        image = self._images.open(i)
        return None if image is None else (i, self._to_pixels(image))

    def collate(self, items: Sequence[tuple[int, Tensor] | None]) -> tuple[Tensor, Tensor]:
        """Indices (B,) int64 and pixels (B, 3, S, S), without skipped images; B may be 0."""
        kept = [item for item in items if item is not None]
        indices = torch.tensor([index for index, _ in kept], dtype=torch.int64)
        if not kept:
            return indices, torch.empty(0, *self._shape)
        return indices, torch.stack([pixels for _, pixels in kept])
