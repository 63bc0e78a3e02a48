"""An explanation as HTML: a picture and a sentence that light each other up. No other file, no network."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .explanation import Explanation, Word

__all__ = ["fragment", "page"]

# Pixels of the longer side: sharp on screens of twice the density at the width that the view has.
SIDE = 840
# The most that one side is shown longer than the other.
STRIP = 3.0


def page(explanation: Explanation) -> str:
    """A whole document."""
    title = escape(explanation.caption or "Explanation")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_asset('page.css')}</style></head>"
        f"<body><main><h1>{title}</h1>{fragment(explanation)}</main></body></html>\n"
    )


def fragment(explanation: Explanation) -> str:
    """The view alone, for a notebook or within another page. Several may stand on one page."""
    # "</" would end the script, whatever it stands in, and "<!--" with "<script" would keep it from ending.
    data = json.dumps(_data(explanation), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="laps-why"><style>{_asset("explanation.css")}</style>'
        f"{_static(explanation)}"
        f'<script type="application/json">{data}</script><script>{_asset("explanation.js")}</script></div>'
    )


def _asset(name: str) -> str:
    return (files(__package__) / "view" / name).read_text(encoding="utf-8")


def _static(explanation: Explanation) -> str:
    """What there is to see where no script runs: what was kept, and what each word adds."""
    rows, columns = explanation.grid
    at = explanation.attribution
    cells = "".join(
        '<div role="row">'
        + "".join(
            f'<div role="gridcell" class="cell{"" if at.kept[row * columns + column] else " dropped"}"></div>'
            for column in range(columns)
        )
        + "</div>"
        for row in range(rows)
    )
    width, height = (columns, rows) if explanation.picture is None else explanation.picture.size
    shown = min(max(width / height, 1 / STRIP), STRIP)
    picture = ""
    if explanation.picture is not None:
        picture = f'<img src="{_uri(explanation.picture)}" alt="the image">'
    words = "".join(_chip(word) for word in explanation.words)
    prefix = float(explanation.attribution.prefix_shares.sum())
    whole = ""
    if at.num_prefix_tokens:
        whole = f", of which the image as a whole (its prefix tokens) {prefix:.3f}"
    return (
        f'<p class="sum">score <b>{explanation.score:.3f}</b>{whole}; '
        f"{int(at.kept.sum())} of {at.kept.size} patches kept"
        f"{'; the picture is shown squeezed' if shown != width / height else ''}</p>{_cut_off(explanation)}"
        f'<div class="stage"><div class="frame" style="aspect-ratio:{shown:.4f}">{picture}'
        f'<div class="cells" role="grid" aria-label="patches of the image" '
        f'style="--rows:{rows};--columns:{columns}">{cells}</div></div>'
        '<div class="side"><div class="words" role="group" '
        f'aria-label="words of the caption, and what each adds to the score">{words}</div>'
        '<div class="modes" role="group" aria-label="what the picture shows"></div>'
        '<p class="note" role="status" aria-live="polite"></p></div></div>'
    )


def _cut_off(explanation: Explanation) -> str:
    rest = explanation.cut_off
    if not rest:
        return ""
    return f'<p class="cut">The caption is too long. The model did not see: “{escape(rest)}”</p>'


def _chip(word: Word) -> str:
    kind = ' class="special"' if word.is_special else ""
    # Never "-0.000".
    share = f"{word.share:.3f}".replace("-0.000", "0.000")
    return f'<button type="button"{kind}>{escape(word.text)}<small>{share}</small></button>'


def _uri(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.convert("RGB").save(stream, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _data(explanation: Explanation) -> dict[str, Any]:
    """What the script needs, with as many digits as can be seen."""
    at = explanation.attribution

    def short(values: Any) -> list[float]:
        return [float(f"{value:.4g}") for value in np.asarray(values).ravel()]

    names = explanation.token_names
    scores = {"by likeness to the image": short(at.self_scores)}
    if at.text_scores is not None:
        scores["by likeness to the caption"] = short(at.text_scores)
    if at.keep_prob is not None:
        scores["by the score net"] = short(at.keep_prob)
    return {
        "columns": explanation.grid[1],
        "fused": at.has_fused_token,
        "kept": at.kept.astype(int).tolist(),
        "groups": at.groups.tolist(),
        "tokens": names[at.num_prefix_tokens :],
        "scores": scores,
        "words": [
            {
                "text": word.text,
                "share": word.share,
                "token": names[word.token],
                "alignment": word.alignment,
                "patches": short(word.patch_shares),
            }
            for word in explanation.words
        ],
    }
