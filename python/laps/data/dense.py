"""Dense captions: a second, longer text for each training image, from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from .. import _check
from ..errors import LapsTypeError, LapsValueError
from .listing import is_blank
from .pairs import PAIR_SUFFIXES, Pair, listed_pairs, pair_rows
from .parsers import field_of, json_of, text_of, unrepeated
from .records import RetrievalData
from .regions import ARCHIVE_END
from .tokenizer import CaptionTokenizer

__all__ = ["check_dense_captions", "read_dense_captions"]

OPERATION = "read_dense_captions"


def read_dense_captions(file: str | Path, data: RetrievalData) -> list[str]:
    """The dense caption of every image of `data`, in its order, for :class:`laps.data.CaptionDataset`.

    They are texts of a captioning model or of people that tell more than a caption does. They guide training
    alone: an evaluation has no place for them, as the dense caption of a query's own image would tell the
    answer.

    Args:
        file: a JSON object ``{"image.jpg": "text", ...}``, a JSON list of ``{"image": ..., "caption": ...}``,
            or csv, tsv or JSONL with columns ``image`` and ``caption``, or others of the names that
            docs/data.md lists. An image is named by its path or the
            end of that; regions in an ``.npz`` file by its photograph too, rows of ``train_ims.npy`` as
            ``train_ims.npy/7``. Images that `data` has not are passed over.
        data: the training split.

    Raises:
        LapsValueError: a missing or malformed file, an image with two texts, a name that fits two images, an
            empty text, or images of `data` without one (how many, and the first).

    Example:
        >>> import json, pathlib, tempfile
        >>> from laps.data import RetrievalData, read_dense_captions
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "dense.json"
        >>> _ = file.write_text(json.dumps({"a.jpg": "a black cat that sleeps on a red chair"}))
        >>> read_dense_captions(file, RetrievalData([pathlib.Path("photos/a.jpg")], ["a cat"], [0]))
        ['a black cat that sleeps on a red chair']
    """
    file = Path(file)
    texts = _texts(file)
    # Regions of a detector lie in files of other endings than the photographs that others describe.
    stems = {_stem(name): name for name in texts}
    found: list[str] = []
    missing: list[Path] = []
    users: dict[str, Path] = {}
    for path in data.image_paths:
        names = [str(PurePosixPath(*path.parts[start:])) for start in range(len(path.parts))]
        entry = next((name for name in names if name in texts), None)
        if entry is None and path.suffix == ARCHIVE_END:
            entry = next((stems[_stem(name)] for name in names if _stem(name) in stems), None)
        if entry is None:
            missing.append(path)
            continue
        if users.setdefault(entry, path) != path:
            raise LapsValueError(
                _check.message(
                    OPERATION,
                    f"{file}: {entry} fits several images",
                    "names with their folders",
                    f"{users[entry]} and {path}",
                )
            )
        found.append(texts[entry])
    if missing:
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{file} has no text for {len(missing)} of the {data.num_images} images of {data.name}",
                "one for each",
                f"none for {missing[0]}",
            )
        )
    return found


def check_dense_captions(
    operation: str, texts: Sequence[str], data: RetrievalData, tokenizer: CaptionTokenizer
) -> list[str]:
    """The dense captions as a list, one for each image.

    Raises:
        LapsValueError: another number of them, or one without tokens. LapsTypeError: no list of strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        got = "a string" if isinstance(texts, str) else "other items"
        raise LapsTypeError(_check.message(operation, "dense_captions is wrong", "a list of strings", got))
    if len(texts) != data.num_images:
        raise LapsValueError(
            _check.message(
                operation,
                "dense_captions does not fit",
                f"{data.num_images} texts, one per image",
                len(texts),
            )
        )
    for path, text in zip(data.image_paths, texts, strict=True):
        # Two tokens: the start and the end.
        if is_blank(text) or tokenizer.count(text) == 2:
            raise LapsValueError(
                _check.message(operation, f"the dense caption of {path} has no token", "text", repr(text))
            )
    return list(texts)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name


def _texts(file: Path) -> dict[str, str]:
    """Text by image name."""
    texts: dict[str, str] = {}
    for place, image, text in _entries(file):
        name = str(PurePosixPath(image))
        if is_blank(text):
            raise LapsValueError(_check.message(OPERATION, f"{place} is empty", "text", repr(text)))
        if texts.setdefault(name, text) != text:
            raise LapsValueError(_check.message(OPERATION, f"{place} is a second text of {name}", "one each"))
    return texts


def _entries(file: Path) -> Iterator[tuple[str, str, str]]:
    """Place, image and text of every entry."""
    rows: Iterable[tuple[str, Pair]]
    if file.suffix in PAIR_SUFFIXES:
        rows = ((f"{file}:{line}", pair) for line, pair in pair_rows(OPERATION, file))
    else:
        hook = partial(unrepeated, OPERATION, str(file))
        content = json_of(OPERATION, text_of(OPERATION, file), file, object_pairs_hook=hook)
        if isinstance(content, dict):
            for image, text in content.items():
                place = f"{file}: {image}"
                yield place, image, field_of(OPERATION, place, {"caption": text}, "caption")
            return
        if not isinstance(content, list):
            raise LapsValueError(
                _check.message(OPERATION, f"{file} lists nothing", "a list or an object", content)
            )
        rows = listed_pairs(OPERATION, file, content)
    for place, pair in rows:
        for text in pair.captions:
            yield place, pair.image, text
