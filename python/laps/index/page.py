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

__all__ = ["fragment", "page"]

# Pixels of a picture's longer side: sharp on screens of twice the density.
SIDE = 360


def page(results: Sequence[Hits]) -> str:
    """A whole document with the hits of some queries."""
    style = (files("laps") / "view" / "page.css").read_text(encoding="utf-8")
    body = "".join(f"<section><h1>{escape(_title(hits))}</h1>{fragment(hits)}</section>" for hits in results)
    title = escape(", ".join(_title(hits) for hits in results))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
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


def _item(hit: Hit) -> str:
    name = escape(shown(hit.path.name))
    return (
        f"<li>{_picture(hit.path, f'result {hit.rank}: {name}')}<p><b>{hit.rank}</b> "
        f"score {hit.score:.3f}, global {hit.global_score:.3f}</p><p>{escape(shown(hit.path))}</p></li>"
    )


def _picture(path: Path, alternative: str) -> str:
    """An image element; `alternative` is HTML already."""
    picture = thumbnail(path, SIDE)
    if picture is None:
        return f'<span class="none" role="img" aria-label="{alternative}">no picture</span>'
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    uri = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img src="{uri}" alt="{alternative}">'
