"""Training pairs from shards that are read front to back, for data too large to shuffle as a whole."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .dataset import ON_ERROR, Batch, Example, ExampleMaker, Transform, shared
from .images import decode_image
from .shards import holds, shard_files, shards_of_split
from .tar_files import members_of
from .tar_samples import Sample, SampleNames
from .tokenizer import CaptionTokenizer
from .transforms import ImageTransform

__all__ = ["CaptionStream"]

OPERATION = "CaptionStream"
# Counters that workers of one loader share; a worker's number is taken modulo this.
COUNTERS = 1024


@dataclass(frozen=True)
class _Pair:
    """A caption of a sample, undecoded. The captions of an image share its bytes."""

    image: str
    content: bytes
    caption: str
    number: int
    image_id: int


class CaptionStream(IterableDataset[Example]):
    """For training on shards: samples of tar files, in which every caption with its image is an example.

    Tar files are read from front to back and never searched, so pipes and compressed files will do; the
    members of a sample have to lie side by side, as all writers of shards leave them. Shards are drawn in
    another order in each epoch and divided among ranks and loader workers; where there are more of these than
    shards, some share a shard and divide its captions. Examples are drawn from a buffer. When all shards have
    been read and the epoch is not over, they are read again, in another order.

    What comes out is known from `seed`, the epoch, and the numbers of ranks and workers; the augmentation of
    an example from `seed`, the epoch and how often the shards were read alone.

    Use it with its own :meth:`collate`: ``DataLoader(stream, batch_size=64, num_workers=4,
    collate_fn=stream.collate)``. Captions of one image may meet in a batch; their `image_ids` are equal then,
    as losses want it. Both ids are digests of the sample's place among the shards, not indices.

    Args:
        shards: a folder of ``*.tar`` or of folders of them that are called as splits, a file, a name with
            braces (``shards/{00000..00009}.tar``), or a list.
        tokenizer, transform: what makes ids of captions and pixels of images.
        epoch_length: how many examples an epoch has, over all ranks; each rank has an equal number, so a
            remainder is left out.
        split: takes those shards alone whose name, or whose folder's, speaks of this split; shards of which
            none names any are training data. None takes all, and refuses those of several splits.
        seed: any integer.
        shuffle_buffer: of how many examples one is drawn, in each worker; their files are kept in memory.
        rank, world_size: this process among those that train; None: as torch.distributed says, if it is
            initialised, else one process.
        train, augment: as of :class:`CaptionDataset`.
        on_error: "raise" for a shard, an image or a caption that cannot be read, "skip" to warn, to count it
            in :attr:`skipped` and go on: after a damaged member with the next one, after a damaged shard with
            the next shard.

    Raises:
        LapsValueError, LapsTypeError: a wrong argument, a missing shard, shards of several splits or none of
            the one that was asked for, a transform of regions.
            Iteration raises LapsValueError with the shard and its member; also where all that a worker has to
            read gives no example.

    Example:
        >>> import io, pathlib, tarfile, tempfile, PIL.Image
        >>> from laps.data import CaptionStream, CaptionTokenizer, ImageTransform
        >>> path, image = pathlib.Path(tempfile.mkdtemp()) / "0.tar", io.BytesIO()
        >>> PIL.Image.new("RGB", (40, 30)).save(image, "PNG")
        >>> with tarfile.open(path, "w") as tar:
        ...     for name, content in (("7.png", image.getvalue()), ("7.txt", b"a cat")):
        ...         member = tarfile.TarInfo(name)
        ...         member.size = len(content)
        ...         tar.addfile(member, io.BytesIO(content))
        >>> tokenizer = CaptionTokenizer.train(["a cat"], vocab_size=60)
        >>> stream = CaptionStream(path, tokenizer, ImageTransform(image_size=32), epoch_length=3)
        >>> stream.collate(list(stream)).pixel_values.shape
        torch.Size([3, 3, 32, 32])
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        tokenizer: CaptionTokenizer,
        transform: Transform,
        *,
        epoch_length: int,
        split: str | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
        train: bool = True,
        augment: float = 0.2,
        on_error: str = "raise",
    ) -> None:
        if not isinstance(transform, ImageTransform):
            got = _check.name_of(transform)
            raise LapsTypeError(_check.message(OPERATION, "transform is wrong", "an ImageTransform", got))
        self.shards = shard_files(OPERATION, shards)
        if not self.shards:
            raise LapsValueError(_check.message(OPERATION, "shards is empty", "at least one", 0))
        self.shards = shards_of_split(OPERATION, self.shards, split)
        self.rank, self.world_size = _place(rank, world_size)
        self.epoch_length = _check.count(OPERATION, "epoch_length", epoch_length, self.world_size)
        self.seed = _check.count(OPERATION, "seed", seed, -(2**63))
        self.shuffle_buffer = _check.count(OPERATION, "shuffle_buffer", shuffle_buffer)
        self.skip = _check.choice(OPERATION, "on_error", on_error, ON_ERROR) == "skip"
        self._maker = ExampleMaker(OPERATION, tokenizer, transform, train, augment)
        # Shared: workers that outlive an epoch see the next one, and this process their counts.
        self._epoch = shared(torch.zeros((), dtype=torch.int64))
        self._skipped = shared(torch.zeros(COUNTERS, dtype=torch.int64))

    @property
    def augment(self) -> float:
        """The probability that a word of a caption is changed."""
        return self._maker.augment

    @property
    def epoch(self) -> int:
        """The epoch that examples are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other examples in another order: call it before each epoch's iteration over the DataLoader."""
        self._epoch.fill_(_check.count(f"{OPERATION}.set_epoch", "epoch", epoch, 0))

    @property
    def skipped(self) -> int:
        """How often something could not be read so far, by this process and its loader's workers."""
        return int(self._skipped.sum())

    def collate(self, examples: Sequence[Example | None]) -> Batch:
        """Examples as one padded batch, as :meth:`CaptionDataset.collate`."""
        return self._maker.collate(examples)

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = self.epoch
        own = self.epoch_length // self.world_size
        wanted = own // workers + (worker < own % workers)
        # Shards go to ranks first, so that ranks differ in number of shards as little as can be.
        reader, readers = worker * self.world_size + self.rank, workers * self.world_size
        given = turn = 0
        while given < wanted:
            before = given
            for example in self._pass(f"{self.seed},{epoch},{turn}", reader, readers, worker):
                yield example
                given += 1
                if given == wanted:
                    return
            if given == before:
                raise LapsValueError(
                    _check.message(
                        OPERATION,
                        f"worker {worker} of rank {self.rank} finds no example in {_shown(self.shards)}",
                        "images with captions; fewer workers where shards are few and small",
                        holds(self.shards[0]),
                    )
                )
            turn += 1

    def _pass(self, key: str, reader: int, readers: int, worker: int) -> Iterator[Example]:
        """Every example of this reader's shards once."""
        # Of a string the generator takes a digest, which is the same in every process.
        order = random.Random(f"{key},order").sample(range(len(self.shards)), len(self.shards))
        draw = random.Random(f"{key},{reader}")
        buffer: list[_Pair] = []
        for pair in self._pairs(_part(order, reader, readers), worker):
            if len(buffer) < self.shuffle_buffer:
                buffer.append(pair)
                continue
            chosen = draw.randrange(len(buffer))
            pair, buffer[chosen] = buffer[chosen], pair
            yield from self._examples(key, pair, worker)
        draw.shuffle(buffer)
        while buffer:
            yield from self._examples(key, buffer.pop(), worker)

    def _pairs(self, shards: list[tuple[int, int, int]], worker: int) -> Iterator[_Pair]:
        """The captions of some shards: of each (its number, which of how many equal parts)."""
        for number, part, parts in shards:
            count = 0
            names = SampleNames()
            try:
                for sample in self._samples(self.shards[number], worker):
                    for pair in self._captions(number, sample, names, worker):
                        if count % parts == part:
                            yield pair
                        count += 1
            except LapsValueError as error:
                self._fault(error, worker)

    def _samples(self, file: Path, worker: int) -> Iterator[Sample]:
        """The samples of a shard, each when the next one begins."""
        sample: Sample | None = None

        def fault(error: LapsValueError) -> None:
            self._fault(error, worker)

        for member in members_of(OPERATION, file, stream=True, on_fault=fault):
            if sample is None or sample.key != member.key:
                if sample is not None:
                    yield sample
                sample = Sample(file, member.key)
            sample.add(member, with_content=True)
        if sample is not None:
            yield sample

    def _captions(self, number: int, sample: Sample, names: SampleNames, worker: int) -> Iterator[_Pair]:
        if sample.image is not None:
            names.add(sample.key)
        try:
            _, captions = sample.captions(OPERATION, names)
            if sample.image is None:
                return
            if not captions:
                raise LapsValueError(
                    _check.message(
                        OPERATION,
                        f"{sample.file}/{sample.image} has no caption",
                        f"{sample.key}.txt or .json",
                    )
                )
        except LapsValueError as error:
            self._fault(error, worker)
            return
        image_id = _digest(f"{number}/{sample.image}")
        for i, caption in enumerate(captions):
            yield _Pair(f"{sample.file}/{sample.image}", sample.content or b"", caption.strip(), i, image_id)

    def _examples(self, key: str, pair: _Pair, worker: int) -> Iterator[Example]:
        """The example of a pair, or none where it is skipped."""
        caption_id = _digest(f"{pair.image_id},{pair.number}")
        try:
            image, _ = decode_image(pair.content, pair.image)
            try:
                example = self._maker.make(
                    f"{key},{caption_id}", image, pair.caption, pair.image_id, caption_id
                )
            except LapsValueError as error:
                raise LapsValueError(
                    f"{OPERATION}: caption {pair.number} of {pair.image}: {error}"
                ) from error
        except LapsValueError as error:
            self._fault(error, worker)
            return
        yield example

    def _fault(self, error: LapsValueError, worker: int) -> None:
        """Raise the error, or warn and count."""
        if not self.skip:
            raise error
        self._skipped[worker % COUNTERS] += 1
        warnings.warn(f"skipped: {error}", stacklevel=2)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise LapsValueError(_check.message(OPERATION, "rank or world_size is given alone", "both or none"))
    if rank is None:
        here = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
    size, place = _check.count(OPERATION, "world_size", world_size), _check.count(OPERATION, "rank", rank, 0)
    if place >= size:
        raise LapsValueError(_check.message(OPERATION, "rank is out of range", f"rank < {size}", place))
    return place, size


def _shown(shards: Sequence[Path]) -> str:
    return f"{shards[0]}" + (f" and {len(shards) - 1} more shards" if len(shards) > 1 else "")


def _part(order: list[int], reader: int, readers: int) -> list[tuple[int, int, int]]:
    """A reader's shards, each with the part of it that is the reader's; of too many readers some share one.

    Example:
        >>> from laps.data.stream import _part
        >>> [_part([4, 2, 9], reader, 2) for reader in range(2)]
        [[(4, 0, 1), (9, 0, 1)], [(2, 0, 1)]]
        >>> [_part([4, 2], reader, 3) for reader in range(3)]
        [[(4, 0, 2)], [(2, 0, 1)], [(4, 1, 2)]]
    """
    if readers <= len(order):
        return [(shard, 0, 1) for shard in order[reader::readers]]
    place = reader % len(order)
    sharing = len(range(place, readers, len(order)))
    return [(order[place], reader // len(order), sharing)]


def _digest(text: str) -> int:
    """63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
