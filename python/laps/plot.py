"""Figures of explanations, searches and trainings: matplotlib axes in, axes out.

Every function draws into axes that you give, or into a new figure; nothing is shown or written, so that
``axes.figure.savefig("figure.pdf")`` is yours. Patches stay sharp squares at any size of print. Orange is
what adds to a score and blue what takes from it, in the palette of Okabe and Ito, which colour-blind readers
tell apart; panels that belong together share one scale. In axes of your own make room for the scale:
``pyplot.subplots(..., layout="constrained")``.

Needs matplotlib, as the extra ``plot`` brings it.

Example:
    >>> import laps  # doctest: +SKIP
    >>> why = laps.explain(model, "photo.jpg", "a dog on the beach")  # doctest: +SKIP
    >>> laps.plot.word_maps(why, ["dog", "beach"])[0].figure.savefig("words.pdf")  # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import _check
from .data.images import as_rgb, open_image
from .errors import LapsTypeError, LapsValueError
from .explanation import Explanation, Word

try:
    from matplotlib import colors, pyplot
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        _check.message("laps.plot", "matplotlib is not installed", "pip install matplotlib")
    ) from error

__all__ = [
    "aggregation",
    "alignment",
    "retrieval_grid",
    "selection",
    "selections",
    "training_curves",
    "word_map",
    "word_maps",
]

ORANGE, BLUE, GREEN, RED = "#E69F00", "#56B4E9", "#009E73", "#D55E00"
# Of groups; white comes last.
PALETTE = [ORANGE, BLUE, GREEN, "#F0E442", "#0072B2", RED, "#CC79A7", "#FFFFFF"]
# Of values that lie on no image.
LINEAR = colors.LinearSegmentedColormap.from_list("laps linear", [BLUE, "#FFFFFF", ORANGE])
# How much of an image the strongest colour hides.
COVER = 0.9
# Less than this share of the strongest is no reason to show the scale's negative half.
SEEN = 0.02
# The most that one side is shown longer than the other.
STRIP = 3.0
# How dark a dropped patch is.
SHADE = 0.78
# Inches of a panel's width.
PANEL = 2.6
# What a word map can show, and the title of its scale.
LABELS = {"shares": "added to the score", "gradient": "weight x gradient"}

History = Sequence[Mapping[str, Any]]


def selection(why: Explanation, ax: Axes | None = None, *, ratio: float | None = None) -> Axes:
    """The patches that the pair keeps; the others are dark.

    Args:
        why: of :func:`laps.explain`.
        ax: to draw into; None makes a figure.
        ratio: rho in (0, 1], to show what another budget would keep by the same scores; None is the model's
            own selection.

    Source: the paper's figures of selected patches.
    """
    ax = _axes(1, ax)[0]
    kept = _kept(why, ratio)
    _show(why, ax)
    shade = np.zeros((*why.grid, 4))
    shade[..., 3] = SHADE * ~why.on_grid(kept)
    _overlay(why, ax, shade)
    # On a dark picture the shade alone would not be seen.
    _borders(why, ax, why.on_grid(kept))
    share = "" if ratio is None else f"$\\rho$ = {ratio:g}: "
    ax.set_title(f"{share}{kept.sum()} of {kept.size} patches", fontsize="medium")
    return ax


def selections(
    why: Explanation | Sequence[Explanation],
    axes: Sequence[Axes] | None = None,
    *,
    ratios: Sequence[float] | None = None,
) -> list[Axes]:
    """Selections side by side: of one pair at several rho, or of several captions as they are.

    Args:
        why: one explanation with `ratios`, or several, as of the same image with different captions.
        axes: as many as there are panels; None makes a figure.
        ratios: of one explanation.
    """
    if isinstance(why, Explanation):
        steps: list[float | None] = [None] if ratios is None else list(ratios)
        panels = _axes(len(steps), axes)
        for ax, ratio in zip(panels, steps, strict=True):
            selection(why, ax, ratio=ratio)
        return panels
    if ratios is not None:
        raise LapsValueError(_check.message("selections", "ratios are of one explanation", "no list"))
    panels = _axes(len(why), axes)
    for ax, one in zip(panels, why, strict=True):
        selection(one, ax)
        ax.set_xlabel(_wrapped(one.caption or ""), fontsize="medium")
    return panels


def aggregation(why: Explanation, ax: Axes | None = None) -> Axes:
    """The patches merged into tokens: one colour per token, a line around each group, dropped patches dark.

    A kept patch counts to the aggregated token that it weighs most in. Colours come again after eight
    tokens, the lines tell neighbours apart. Side by side for several lambda: one model, explanation and axes
    each.

    Source: the paper's figures of aggregated patches.
    """
    ax = _axes(1, ax)[0]
    _show(why, ax, grey=True)
    groups = why.on_grid(why.attribution.groups)
    paint = np.zeros((*why.grid, 4))
    for group in np.unique(groups[groups >= 0]):
        paint[groups == group] = colors.to_rgba(PALETTE[group % len(PALETTE)], 0.5)
    paint[groups < 0] = (0, 0, 0, SHADE)
    _overlay(why, ax, paint)
    _borders(why, ax, groups)
    ax.set_title(f"{len(np.unique(groups[groups >= 0]))} groups of patches", fontsize="medium")
    return ax


def word_map(
    why: Explanation,
    word: str | int,
    ax: Axes | None = None,
    *,
    kind: str = "shares",
    most: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Where a word finds itself in the image.

    Args:
        why: of :func:`laps.explain`.
        word: as written (the first one, where it stands twice), or its position in ``why.words``.
        ax: to draw into; None makes a figure.
        kind: ``"shares"``, what each patch adds to the score with this word (they sum to the word's share,
            but for the prefix tokens'), or ``"gradient"``, the gradient-weighted weights of its best token.
        most: the value of the strongest colour; None is the largest there is.
        colorbar: whether to draw the scale.

    Source: the paper's figures of word-by-word alignment, drawn as gradient-weighted attention.
    """
    ax = _axes(1, ax)[0]
    _check.choice("word_map", "kind", kind, list(LABELS))
    found = _word(why, word)
    values = _values(found, kind)
    most = most or float(np.abs(values).max()) or 1.0
    scale = ScalarMappable(colors.Normalize(-most, most), _heat(opaque=False))
    _show(why, ax, grey=True)
    _overlay(why, ax, scale.to_rgba(why.on_grid(values)))
    ax.set_title(f"{found.text}  ({found.share:+.3f})", fontsize="medium")
    if colorbar:
        _colorbar(ax, scale, values, kind)
    return ax


def word_maps(
    why: Explanation,
    words: Sequence[str | int] | None = None,
    axes: Sequence[Axes] | None = None,
    *,
    kind: str = "shares",
) -> list[Axes]:
    """The maps of several words on one scale.

    Args:
        why: of :func:`laps.explain`.
        words: as in :func:`word_map`; None for all that were written.
        axes: as many as there are words; None makes a figure.
        kind: as in :func:`word_map`.
    """
    written: list[str | int] = [i for i, word in enumerate(why.words) if not word.is_special]
    if isinstance(words, str):
        raise LapsTypeError(_check.message("word_maps", "words is one word", "a list of words", repr(words)))
    chosen = written if words is None else list(words)
    _check.choice("word_maps", "kind", kind, list(LABELS))
    panels = _axes(len(chosen), axes)
    values = [_values(_word(why, word), kind) for word in chosen]
    most = max(float(np.abs(v).max()) for v in values) or 1.0
    for ax, word in zip(panels, chosen, strict=True):
        word_map(why, word, ax, kind=kind, most=most, colorbar=False)
    scale = ScalarMappable(colors.Normalize(-most, most), _heat(opaque=False))
    _colorbar(panels, scale, np.concatenate(values), kind)
    return panels


def alignment(why: Explanation, ax: Axes | None = None) -> Axes:
    """The alignment A of all tokens with all words; a ring marks what counts in the score."""
    at = why.attribution
    rows, columns = at.alignment.shape
    if ax is None:
        _, ax = pyplot.subplots(figsize=(1.5 + 0.32 * columns, 1 + 0.2 * rows), layout="constrained")
    most = float(np.abs(at.alignment).max()) or 1.0
    picture = ax.imshow(at.alignment, cmap=LINEAR, vmin=-most, vmax=most, aspect="auto")
    token, word = np.nonzero(at.shares)
    ax.scatter(word, token, s=18, facecolors="none", edgecolors="black", linewidths=0.8)
    ax.set_yticks(range(rows), why.token_names, fontsize="small")
    pieces = [
        word.text if piece == word.first else ""
        for word in why.words
        for piece in range(word.first, word.last)
    ]
    ax.set_xticks(range(columns), pieces, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
    ax.figure.colorbar(picture, ax=ax, label="alignment", shrink=0.8)
    return ax


def retrieval_grid(
    query: str | Path | Image.Image,
    results: Sequence[str | Path | Image.Image],
    axes: Sequence[Axes] | None = None,
    *,
    scores: Sequence[float] | None = None,
    right: Sequence[bool] | None = None,
) -> list[Axes]:
    """A query and what was found for it, best first; the right ones are framed.

    Args:
        query: a sentence, or an image (a Path or a Pillow image).
        results: images (Paths, Pillow images) or, for an image, sentences.
        axes: one for the query and one for each result; None makes a figure.
        scores: of the results, to write beside them.
        right: which results are right, to frame them.
    """
    for name, values in (("scores", scores), ("right", right)):
        if values is not None and len(values) != len(results):
            raise LapsValueError(
                _check.message("retrieval_grid", f"{name} does not fit", f"{len(results)}", len(values))
            )
    panels = _axes(1 + len(results), axes)
    _item(panels[0], query)
    panels[0].set_title("query", fontsize="medium")
    for place, (ax, result) in enumerate(zip(panels[1:], results, strict=True)):
        _item(ax, result)
        score = "" if scores is None else f"  ({scores[place]:.3f})"
        good = right is not None and bool(right[place])
        # In words too: a frame's colour alone tells some readers nothing.
        ax.set_title(f"{place + 1}{score}{'  right' if good else ''}", fontsize="medium")
        if good:
            for spine in ax.spines.values():
                spine.set(visible=True, color=GREEN, linewidth=4)
    return panels


def training_curves(
    history: str | Path | History | Mapping[str, str | Path | History],
    axes: Sequence[Axes] | None = None,
    *,
    names: Sequence[str] = ("loss", "rsum"),
) -> list[Axes]:
    """Values per epoch of one training, or of several by name.

    Args:
        history: of :meth:`laps.train.Trainer.fit`, or its ``log.jsonl``; or several of these under names.
        axes: one for each value; None makes a figure.
        names: which values.

    Raises:
        LapsValueError: a file that cannot be read, or a value that no epoch has.
    """
    runs = dict(history) if isinstance(history, Mapping) else {"": history}
    read = {run: _history(entries) for run, entries in runs.items()}
    for run, entries in read.items():
        if not entries:
            raise LapsValueError(_check.message("training_curves", f"history {run} is empty", "an epoch"))
    panels = _axes(len(names), axes, width=4.2, height=2.8)
    styles = ["-", "--", ":", "-."]
    for ax, name in zip(panels, names, strict=True):
        for number, (run, entries) in enumerate(read.items()):
            points = [(entry["epoch"] + 1, entry[name]) for entry in entries if name in entry]
            if not points:
                known = sorted({key for entry in entries for key in entry})
                raise LapsValueError(
                    _check.message("training_curves", f"no epoch has {name!r}", ", ".join(known))
                )
            ax.plot(
                *zip(*points, strict=True),
                styles[number % len(styles)],
                color=["#0072B2", RED, GREEN, "#CC79A7"][number % 4],
                marker="o",
                markersize=3,
                label=run,
            )
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        if len(read) > 1:
            ax.legend(frameon=False)
    return panels


# ---- parts


def _axes(
    count: int, given: Axes | Sequence[Axes] | None, *, width: float = PANEL, height: float | None = None
) -> list[Axes]:
    """The axes that were given, or new ones in rows of at most six."""
    if given is not None:
        axes = [given] if isinstance(given, Axes) else list(np.ravel(np.asarray(given, dtype=object)))
        if len(axes) != count:
            raise LapsValueError(_check.message("plot", "axes do not fit", f"{count}", len(axes)))
        return axes
    if count < 1:
        raise LapsValueError(_check.message("plot", "nothing to draw", "at least one panel", count))
    columns = min(count, 6)
    rows = math.ceil(count / columns)
    size = (width * columns, (height or width * 1.12) * rows)
    _, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(grid.flat)
    for ax in flat[count:]:
        ax.remove()
    return flat[:count]


def _show(why: Explanation, ax: Axes, *, grey: bool = False) -> None:
    """The image under the patches, or plain grey."""
    rows, columns = why.grid
    if why.picture is None:
        pixels = np.full((rows, columns, 3), 200, dtype=np.uint8)
    else:
        pixels = np.asarray(why.picture.convert("L" if grey else "RGB").convert("RGB"))
        if grey:
            pixels = (pixels * 0.8).astype(np.uint8)
    ax.imshow(pixels, extent=_extent(why), interpolation="antialiased")
    _bare(ax)


def _overlay(why: Explanation, ax: Axes, rgba: NDArray[Any]) -> None:
    ax.imshow(rgba, extent=_extent(why), interpolation="nearest")


def _extent(why: Explanation) -> tuple[float, float, float, float]:
    """The image's own proportions, with a patch as the unit of its width; a strip is squeezed."""
    rows, columns = why.grid
    width, height = (columns, rows) if why.picture is None else why.picture.size
    return (0.0, float(columns), columns * min(max(height / width, 1 / STRIP), STRIP), 0.0)


def _borders(why: Explanation, ax: Axes, groups: NDArray[Any]) -> None:
    """A line wherever neighbouring patches are of different groups."""
    rows = len(groups)
    tall = _extent(why)[2] / rows
    lines = []
    for row, column in zip(*np.nonzero(groups[:, 1:] != groups[:, :-1]), strict=True):
        lines.append([(column + 1, row * tall), (column + 1, (row + 1) * tall)])
    for row, column in zip(*np.nonzero(groups[1:] != groups[:-1]), strict=True):
        lines.append([(column, (row + 1) * tall), (column + 1, (row + 1) * tall)])
    for (x0, y0), (x1, y1) in lines:
        ax.plot([x0, x1], [y0, y1], color="white", linewidth=1.0, solid_capstyle="butt")


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _item(ax: Axes, item: str | Path | Image.Image) -> None:
    """A picture, or a sentence as text."""
    if isinstance(item, str):
        ax.text(0.5, 0.5, _wrapped(item), ha="center", va="center", transform=ax.transAxes)
    elif isinstance(item, (Path, Image.Image)):
        ax.imshow(np.asarray(open_image(item) if isinstance(item, Path) else as_rgb(item)))
    else:
        raise LapsTypeError(
            _check.message(
                "retrieval_grid", "an item has the wrong type", "str, Path or Image", _check.name_of(item)
            )
        )
    _bare(ax)


def _wrapped(text: str, width: int = 26) -> str:
    import textwrap

    # A dollar sign would begin a formula.
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width))


def _heat(*, opaque: bool) -> colors.Colormap:
    """Blue below zero and orange above, the more the further, by the root so that little is seen; on white,
    or as a layer over an image.
    """
    values = np.linspace(-1, 1, 513)[:, None]
    paint = np.where(values < 0, colors.to_rgb(BLUE), colors.to_rgb(ORANGE))
    cover = COVER * np.sqrt(np.abs(values))
    if opaque:
        return colors.ListedColormap(cover * paint + (1 - cover), name="laps")
    return colors.ListedColormap(np.hstack([paint, cover]), name="laps over an image")


def _colorbar(axes: Axes | Sequence[Axes], scale: ScalarMappable, values: NDArray[Any], kind: str) -> None:
    """The scale on white, without the half that nothing has."""
    first = axes if isinstance(axes, Axes) else axes[0]
    opaque = ScalarMappable(scale.norm, _heat(opaque=True))
    bar = first.figure.colorbar(opaque, ax=axes, shrink=0.75, label=LABELS[kind])
    if values.min() > -SEEN * np.abs(values).max():
        bar.ax.set_ylim(bottom=0)


def _values(word: Word, kind: str) -> NDArray[Any]:
    return word.patch_shares if kind == "shares" else word.map


def _word(why: Explanation, word: str | int) -> Word:
    if isinstance(word, str):
        for one in why.words:
            if one.text.lower() == word.lower():
                return one
        known = ", ".join(one.text for one in why.words)
        raise LapsValueError(_check.message("word_map", f"the caption has no word {word!r}", known))
    if isinstance(word, bool) or not isinstance(word, int):
        raise LapsTypeError(
            _check.message("word_map", "word has the wrong type", "str or int", _check.name_of(word))
        )
    if not -len(why.words) <= word < len(why.words):
        raise LapsValueError(_check.message("word_map", "no such word", f"0 to {len(why.words) - 1}", word))
    return why.words[word]


def _kept(why: Explanation, ratio: float | None) -> NDArray[np.bool_]:
    if ratio is None:
        return why.attribution.kept
    ratio = _check.number("selection", "ratio", ratio, 0.0, 1.0, open_low=True)
    scores = why.attribution.selection_scores
    # Ties go to the lower index.
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), dtype=np.bool_)
    kept[order[: math.ceil(len(scores) * ratio)]] = True
    return kept


def _history(given: str | Path | History) -> History:
    if not isinstance(given, (str, Path)):
        return given
    try:
        return [json.loads(line) for line in Path(given).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise LapsValueError(
            _check.message("training_curves", f"{given} cannot be read", "the log.jsonl of a training", error)
        ) from error
