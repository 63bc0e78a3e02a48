"""What a search returns: images in order, which print as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Hit", "HitLists", "Hits", "shown"]


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        rank: from 1.
        score: of the model's head; for an image as the query, the global score.
        global_score: product of the global vectors, by which it was nominated.
        path: of the file, absolute.
    """

    rank: int
    score: float
    global_score: float
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "rank": self.rank,
            "score": self.score,
            "global_score": self.global_score,
            "path": str(self.path),
        }


class Hits(list[Hit]):
    """The hits of one query, best first; ``print(hits)`` is a table, a notebook shows the images.

    Attributes:
        query: the sentence, or the path of the image.
    """

    def __init__(self, query: str | Path, hits: Iterable[Hit] = ()) -> None:
        super().__init__(hits)
        self.query = query

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = "image" if isinstance(self.query, Path) else "text"
        return {kind: str(self.query), "hits": [hit.to_dict() for hit in self]}

    def __str__(self) -> str:
        lines = ["rank   score  global  image"]
        lines += [
            f"{hit.rank:4d}  {hit.score:6.3f}  {hit.global_score:6.3f}  {shown(hit.path)}" for hit in self
        ]
        return "\n".join(lines) if self else "no images"

    def __repr__(self) -> str:
        return f'"{shown(self.query)}"\n{self}'

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)


class HitLists(list[Hits]):
    """The hits of several queries, in their order; a notebook shows the images."""

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self)) if self else "no queries"

    def _repr_html_(self) -> str:
        from .page import sections

        return sections(self)


def shown(text: str | Path) -> str:
    """A path or a query for people: what is no text, or would control a terminal, as its code."""
    # File names of other encodings have lone surrogates.
    return "".join(
        c if c.isprintable() and not "\ud800" <= c <= "\udfff" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
