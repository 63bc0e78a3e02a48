"""Samples of tar files: an image and its captions, which share a key.

The key is a member's path up to the first dot of its name: KEY.jpg with KEY.txt, of a caption a line, or with
KEY.json, of which ``"caption"`` counts. So webdataset, img2dataset and CLIP_benchmark write them.
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from .parsers import json_of
from .tar_files import Member

__all__ = ["Sample", "SampleNames"]


class Sample:
    """What a tar file has under one key.

    Attributes:
        file: the tar file.
        key: as in :mod:`laps.data.tar_samples`.
        image: the name of the image's member, or None.
        content: its bytes, where `add` was given them.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key
        self.image: str | None = None
        self.content: bytes | None = None
        self._second: str | None = None
        self._texts: dict[str, tuple[str, bytes]] = {}

    def add(self, member: Member, *, with_content: bool) -> None:
        """Take a member; of images the bytes are read only `with_content`."""
        if member.kind == "text":
            self._texts[member.suffix] = (f"{self.file}/{member.name}", member.read())
        elif self.image is not None:
            self._second = member.name
        else:
            self.image = member.name
            self.content = member.read() if with_content else None

    def captions(self, operation: str, names: SampleNames) -> tuple[str, list[str]]:
        """Where the captions stand, and them; of KEY.txt and KEY.json the former, as img2dataset repeats it.

        None where there is no image, and the texts are about something else, such as the shard.

        Raises:
            LapsValueError: a text that is not UTF-8, malformed JSON, a caption of another type, two images or
                captions that have lost theirs; with the member's path.
        """
        if self.image is None:
            self._refuse_lost(operation, names)
            return f"{self.file}/{self.key}", []
        if self._second is not None:
            raise LapsValueError(
                _check.message(
                    operation,
                    f"{self.file} has two images for {self.key}",
                    "one",
                    f"{self.image} and {self._second}",
                )
            )
        place, captions = f"{self.file}/{self.image}", list[str]()
        if "txt" in self._texts:
            place, content = self._texts["txt"]
            # Lines end at a line feed only: captions may hold Unicode's other separators. A text of blanks is
            # an empty caption, not none.
            lines = _decoded(operation, place, content).split("\n")
            captions = [line for line in lines if line.strip()] or [""]
        elif "json" in self._texts:
            place, content = self._texts["json"]
            captions = _of_json(operation, place, _decoded(operation, place, content))
        return place, captions

    def _refuse_lost(self, operation: str, names: SampleNames) -> None:
        """Raise for captions without their image, if they are called as the samples of the file are."""
        if self.key not in names:
            return
        if "txt" in self._texts:
            place = self._texts["txt"][0]
        elif "json" in self._texts and _has_captions(self._texts["json"][1]):
            place = self._texts["json"][0]
        else:
            return
        raise LapsValueError(
            _check.message(operation, f"{place} has no image beside it", f"{self.key}.jpg, .png or .webp")
        )


class SampleNames:
    """How a tar file calls its samples: tells captions that have lost their image from a README.

    Writers of shards number their samples. A key without a digit is a sample's where one with an image has
    none either.
    """

    def __init__(self) -> None:
        self._numbered = True

    def add(self, key: str) -> None:
        """Learn from the key of a sample that has an image."""
        self._numbered = self._numbered and _has_digit(key)

    def __contains__(self, key: str) -> bool:
        return not self._numbered or _has_digit(key)


def _has_digit(key: str) -> bool:
    return any(map(str.isdigit, key.rpartition("/")[2]))


def _has_captions(content: bytes) -> bool:
    """Whether JSON that stands alone has captions; malformed, it is about something else too."""
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and bool(entry.get("caption"))


def _decoded(operation: str, place: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LapsValueError(
            _check.message(operation, f"{place} is not UTF-8", "UTF-8", f"byte {error.start}: {error.reason}")
        ) from error


def _of_json(operation: str, place: str, text: str) -> list[str]:
    entry = json_of(operation, text, Path(place))
    if not isinstance(entry, dict):
        raise LapsValueError(
            _check.message(operation, f"{place} is no object", "{...}", _check.name_of(entry))
        )
    # img2dataset writes null for an image without text.
    captions = entry.get("caption")
    captions = [] if captions is None else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise LapsValueError(
            _check.message(
                operation,
                f"{place} has no usable 'caption'",
                "'caption': str or a list of str",
                repr(captions),
            )
        )
    return captions
