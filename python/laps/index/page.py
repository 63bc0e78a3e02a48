"""Hits as HTML: one file with small pictures in it. No other file, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from ..data import open_image
from ..errors import LapsValueError
from .hits import Hit, Hits, shown

__all__ = ["fragment", "page", "sections", "thumbnail"]

# Pixels of a picture's longer side: sharp on screens of twice the density.
SIDE, QUERY_SIDE = 360, 160


def page(results: Sequence[Hits]) -> str:
    """A whole document with the hits of some queries."""
    style = (files("laps") / "view" / "page.css").read_text(encoding="utf-8")
    title = escape(", ".join(_title(hits) for hits in results))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><main>{sections(results)}</main></body></html>\n"
    )


def sections(results: Sequence[Hits]) -> str:
    """The hits of some queries, each below its query, for a notebook or within another page."""
    return "".join(
        f'<section class="laps-query">{_heading(hits)}{fragment(hits)}</section>' for hits in results
    )


def fragment(hits: Hits) -> str:
    """The hits of one query alone, for a notebook or within another page."""
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    items = "".join(map(_item, hits))
    return f'<div class="laps-hits"><style>{style}</style><ol>{items or "<li>no images</li>"}</ol></div>'


def thumbnail(path: Path, side: int) -> Image.Image | None:
    """A small copy of an image file; None for one that cannot be read, or has regions instead of pixels."""
    try:
        picture = open_image(path)
    except LapsValueError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _title(hits: Hits) -> str:
    return f"Like {shown(hits.query)}" if isinstance(hits.query, Path) else f"“{shown(hits.query)}”"


def _heading(hits: Hits) -> str:
    title = f"<h1>{escape(_title(hits))}</h1>"
    if not isinstance(hits.query, Path):
        return title
    return f"<header>{_picture(hits.query, 'the image that was searched with', QUERY_SIDE)}{title}</header>"


def _item(hit: Hit) -> str:
    name, place = escape(shown(hit.path.name)), escape(shown(hit.path))
    # Lines may end after a slash.
    place = place.replace("/", "/<wbr>")
    scores = f"<span>score {hit.score:.3f},</span> <span>global {hit.global_score:.3f}</span>"
    picture = _picture(hit.path, f"result {hit.rank}: {name}", SIDE)
    return f"<li>{picture}<p><b>{hit.rank}</b> {scores}</p><p>{place}</p></li>"


def _picture(path: Path, alternative: str, side: int) -> str:
    """An image element; `alternative` is HTML already."""
    picture = thumbnail(path, side)
    if picture is None:
        return f'<span class="none" role="img" aria-label="{alternative}">no picture</span>'
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    uri = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img src="{uri}" alt="{alternative}">'
