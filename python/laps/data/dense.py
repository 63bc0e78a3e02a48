"""Dense captions: a second, longer text for each training image, from a file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from .. import _check
from ..errors import LapsValueError
from .listing import is_blank
from .parsers import PAIR_SUFFIXES, field_of, json_of, pair_rows, text_of
from .records import RetrievalData

__all__ = ["read_dense_captions"]

OPERATION = "read_dense_captions"


def read_dense_captions(file: str | Path, data: RetrievalData) -> list[str]:
    """The dense caption of every image of `data`, in its order, for :class:`laps.data.CaptionDataset`.

    They are texts of a captioning model or of people that tell more than a caption does. They guide training
    alone: an evaluation has no place for them, as the dense caption of a query's own image would tell the
    answer.

    Args:
        file: a JSON object ``{"image.jpg": "text", ...}``, a JSON list of ``{"image": ..., "caption": ...}``,
            or csv, tsv or JSONL with columns ``image`` and ``caption``. An image is named as in `data`, or by
            the end of its path. Images that `data` has not are passed over.
        data: the training split.

    Raises:
        LapsValueError: a missing or malformed file, an image with two texts, an empty text, or images of
            `data` without one (how many, and the first).

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
    found: list[str] = []
    missing: list[Path] = []
    for path in data.image_paths:
        names = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
        text = next((texts[name] for name in names if name in texts), None)
        if text is None:
            missing.append(path)
        else:
            found.append(text)
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


def _entries(file: Path) -> list[tuple[str, str, str]]:
    """Place, image and text of every entry."""
    if file.suffix in PAIR_SUFFIXES:
        rows: list[tuple[str, Any]] = [(f"{file}:{line}", row) for line, row in pair_rows(OPERATION, file)]
    else:
        content = json_of(OPERATION, text_of(OPERATION, file), file)
        if isinstance(content, dict):
            rows = [
                (f"{file}: {image}", {"image": image, "caption": text}) for image, text in content.items()
            ]
        elif isinstance(content, list):
            rows = [(f"{file}: entry {number}", row) for number, row in enumerate(content)]
        else:
            raise LapsValueError(
                _check.message(OPERATION, f"{file} lists nothing", "a list or an object", content)
            )
    return [
        (place, field_of(OPERATION, place, row, "image"), field_of(OPERATION, place, row, "caption"))
        for place, row in rows
    ]
