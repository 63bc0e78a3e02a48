"""The report: one HTML file with everything in it, to be read on any screen without a network."""

from __future__ import annotations

import math
import os
import platform
import random
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..data import RetrievalData
from ..explanation import explain
from ..explanation_view import fragment
from . import pictures
from .lookalikes import QUERIES, Lookalike
from .measure import Measured
from .recipe import HEADS, TITLES

__all__ = ["chance", "render"]

STYLE = Path(__file__).with_name("report.css")
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
SEARCHES, TOP, PAIRS, EXAMPLES = 4, 5, 3, 4
# The rank up to which a scene counts as found by its caption.
FOUND = 10
# Captions of more words make more pictures than a reader looks at.
MOST_WORDS = 9


@torch.inference_mode()
def render(measured: Measured) -> str:
    """The whole document."""
    # Examples are drawn, not picked by hand: by the seed, so that a run can be repeated.
    rng = random.Random(f"laps demo report {measured.seed}")
    sections = [
        _summary(measured),
        _results(measured),
        _training(measured),
        _lookalikes(measured, rng),
        _searches(measured),
        _matchings(measured, rng),
        _how(measured),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>LAPS demo</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def chance(data: RetrievalData) -> dict[str, float]:
    """What random scores reach on average: the recalls by :mod:`laps.metrics`' names, in percent."""
    images, captions = data.num_images, data.num_captions
    # An image without captions is no query.
    own = [count for count in np.bincount(data.caption_to_image).tolist() if count]
    expected = {}
    for k in (1, 5, 10):
        # An image is found unless all of the k first captions are others'.
        missed = (math.comb(captions - count, k) / math.comb(captions, min(k, captions)) for count in own)
        expected[f"i2t_r{k}"] = 100 * (1 - sum(missed) / len(own))
        expected[f"t2i_r{k}"] = 100 * min(k, images) / images
    expected["rsum"] = sum(expected.values())
    return expected


# ---- sections


def _summary(measured: Measured) -> str:
    laps, other = (measured.evaluations[head].metrics["rsum"] for head in HEADS)
    by_chance = chance(measured.test)["rsum"]
    lead = (
        f"LAPS is {laps - other:.1f} points ahead"
        if laps > other
        else (f"LAPS is {other - laps:.1f} points behind: on this seed it has no lead")
    )
    return (
        "<header><h1>LAPS demo</h1>"
        "<p>Two small models learnt to match pictures with sentences, on "
        f"{measured.sizes.train:,} drawn scenes with five captions each. One compares <em>patches of the "
        "picture with words</em> (LAPS), the other <em>one vector with one vector</em> (global embedding). "
        "Both began with the same encoders, which a global embedding had taught to see and to read. "
        f"They were then tested on {measured.test.num_images:,} scenes and {measured.test.num_captions:,} "
        "captions that neither had seen.</p>"
        '<div class="figures">'
        + _figure("LAPS", f"{laps:.1f}", f"rSum, {laps / by_chance:.0f} times chance")
        + _figure("global embedding", f"{other:.1f}", f"rSum, {other / by_chance:.0f} times chance")
        + _figure("chance", f"{by_chance:.1f}", "rSum")
        + f"</div><p>{lead}. This is one seed (number {measured.seed}); a single run says little about "
        "a lead of a few points.</p></header>"
    )


def _results(measured: Measured) -> str:
    rows = {TITLES[head]: measured.evaluations[head].metrics for head in HEADS}
    rows["chance"] = by_chance = chance(measured.test)
    body = [
        [
            name,
            *(f"{metrics[key]:.1f}" for key in (*RECALLS, "rsum")),
            f"{metrics['rsum'] / by_chance['rsum']:.1f}",
        ]
        for name, metrics in rows.items()
    ]
    header = ["", *2 * ("R@1", "R@5", "R@10"), "rSum", "times chance"]
    ways = "".join(f'<th colspan="3">{way}</th>' for way in ("image to text", "text to image"))
    groups = f'<tr><td></td>{ways}<td colspan="2"></td></tr>'
    return _section(
        "Result",
        _table(header, body, groups)
        + "<p>R@K: in how many of 100 searches a right answer is among the first K. rSum: the sum of the "
        "six. Chance is exact: the expectation for scores drawn at random.</p>",
    )


def _training(measured: Measured) -> str:
    start = measured.pretrained.history
    history = {TITLES[head]: start + measured.trained[head].history for head in HEADS}
    drawings = [
        pictures.curves(
            f"rSum on {measured.sizes.dev:,} other scenes, by epoch",
            {name: [entry["rsum"] for entry in entries] for name, entries in history.items()},
        ),
        pictures.curves(
            "training loss, by epoch",
            {name: [entry["loss"] for entry in entries] for name, entries in history.items()},
            decimals=2,
        ),
    ]
    legend = "".join(
        f'<span><i class="key-{number}"></i>{escape(name)}</span>' for number, name in enumerate(history)
    )
    return _section(
        "Training",
        f'<div class="curves">{"".join(f"<figure>{drawing}</figure>" for drawing in drawings)}</div>'
        f'<p class="legend">{legend}</p>'
        f"<p>Until epoch {len(start)} there is one model, whose encoders both then go on from. The same loss "
        "for both (InfoNCE), but of scores that differ in scale (those of LAPS span twice the range of "
        "cosines), so its heights cannot be compared; the rSum can.</p>",
    )


def _lookalikes(measured: Measured, rng: random.Random) -> str:
    pairs = measured.scenes.lookalikes()
    examples: dict[int, Lookalike] = {}
    for pair in rng.sample(pairs, len(pairs)):
        examples.setdefault(measured.scenes.groups[pair.image], pair)
        if len(examples) == EXAMPLES:
            break
    accuracy = " and ".join(
        f"<strong>{measured.lookalikes[head]:.1f} %</strong> by {TITLES[head]}" for head in HEADS
    )
    return _section(
        "Look-alikes",
        "<p>Test scenes come in groups of four that differ in one attribute, or in which object has it. "
        f"Of {len(pairs):,} pairs of such scenes, each with a caption that is true of one and false of the "
        f"other, the true one scores higher in {accuracy} (chance: 50 %). "
        f"{_number(len(examples))} pairs drawn at random:</p>"
        '<div class="cards">' + "".join(_lookalike(measured, pair) for pair in examples.values()) + "</div>",
    )


def _lookalike(measured: Measured, pair: Lookalike) -> str:
    rows = []
    for head in HEADS:
        scores = measured.evaluations[head].scores
        right, wrong = scores[pair.image, pair.caption], scores[pair.other, pair.caption]
        verdict = _mark(bool(right > wrong), "told apart", "mistaken")
        rows.append([TITLES[head], f"{right:.3f}", f"{wrong:.3f}", verdict])
    images = "".join(
        f"<figure>{_scene(measured, image, name)}<figcaption>{name}</figcaption></figure>"
        for name, image in (("right", pair.image), ("look-alike", pair.other))
    )
    return (
        f'<article class="card"><h3>{_quote(measured.test.captions[pair.caption])}</h3>'
        f'<div class="strip two">{images}</div>'
        f"{_table(['score', 'right', 'look-alike', ''], rows, escaped=True)}</article>"
    )


def _searches(measured: Measured) -> str:
    found = [(query, set(measured.scenes.true_images(query.facts))) for query in QUERIES]
    shown = [(query, true) for query, true in found if true][:SEARCHES]
    galleries = {
        head: trained.model.encode_files(measured.test.image_paths)
        for head, trained in measured.trained.items()
    }
    hits = dict.fromkeys(HEADS, 0)
    parts = []
    for query, true in shown:
        rows = []
        for head in HEADS:
            model = measured.trained[head].model
            _, order = model.rank(model.encode_captions([query.text]), galleries[head], TOP)
            best = order[0].tolist()
            hits[head] += len(true.intersection(best))
            strip = "".join(
                f"<figure>{_scene(measured, image, f'result {place} of {TITLES[head]}')}"
                f"<figcaption>{place} {_mark(image in true, 'true', 'not true')}</figcaption></figure>"
                for place, image in enumerate(best, 1)
            )
            rows.append(f'<h4>{escape(TITLES[head])}</h4><div class="strip">{strip}</div>')
        share = f"true of {len(true)} of the {measured.test.num_images:,} test scenes"
        parts.append(
            f'<article class="card"><h3>{_quote(query.text)}</h3><p>{share}</p>{"".join(rows)}</article>'
        )
    right = " and ".join(f"{count} of {TITLES[head]}" for head, count in hits.items())
    return _section(
        "Searching with a sentence",
        f"<p>The {TOP} best of {measured.test.num_images:,} test scenes for sentences that are the same in "
        "every run. Whether a sentence is true of a scene is read from how it was drawn; no model decides "
        f"it. Of the {TOP * len(shown)} scenes found by each, {right} are true.</p>" + "".join(parts),
    )


def _matchings(measured: Measured, rng: random.Random) -> str:
    data, scores = measured.test, measured.evaluations["laps"].scores
    short = [t for t, caption in enumerate(data.captions) if len(caption.split()) <= MOST_WORDS]
    own = scores[data.caption_to_image, np.arange(data.num_captions)]
    found = [t for t in short if (scores[:, t] > own[t]).sum() < FOUND]
    # A small or barely trained model may have found too few.
    pool = found if len(found) >= PAIRS else short
    chosen = rng.sample(pool, min(PAIRS, len(pool)))
    model = measured.trained["laps"].model
    cards = []
    for caption in chosen:
        path = data.image_paths[int(data.caption_to_image[caption])]
        why = explain(model, path, data.captions[caption])
        cards.append(
            f'<article class="card"><h3>{_quote(data.captions[caption])}</h3>{fragment(why)}</article>'
        )
    which = f"among those whose scene LAPS ranks among the first {FOUND}" if pool is found else "among all"
    return _section(
        "Which patches matched which word",
        f"<p>LAPS keeps {model.head.options()['selection_ratio']:.0%} of the patches, by a learnt score and "
        "by their likeness to the picture and the sentence (the others are dark; they are not lost, but form "
        "one token together), gathers them into tokens, and lets every word find its best token. Point at a "
        "word, and the patches that it was matched with light up; point at a patch, and its words do. The "
        f"numbers are what each word adds to the score. Pairs drawn at random {which}.</p>"
        + "".join(cards)
        + _pointing(measured),
    )


def _pointing(measured: Measured) -> str:
    """How often the brightest patch of a word lies on what the word names."""
    result = measured.grounding
    if result is None:
        return ""
    whole = result.summary()
    body = []
    for name in [*sorted(set(result.categories.tolist())), None]:
        at = result.summary(name)
        body.append(
            [
                name or "all words",
                f"{at['phrases']:,}",
                f"{at['pointing']:.0f} %",
                f"{at['pointing_low']:.0f} to {at['pointing_high']:.0f}",
                f"{at['chance']:.0f} %",
            ]
        )
    return (
        f"<h3>Do the words point at what they name?</h3><p>In {whole['pointing']:.0f} of 100 cases the "
        "brightest patch of a word lies on an object that has the colour, shape, size or texture that the "
        f"word names; a patch at random would in {whole['chance']:.0f}. Interval: 95 %, by drawing the "
        f"{len(set(result.images.tolist()))} test scenes anew. Nothing but pairs of scenes and captions "
        "taught this; after a training of minutes it is no careful pointing.</p>"
        + _table(["words for", "number", "right", "interval", "chance"], body)
    )


def _how(measured: Measured) -> str:
    trained, sizes = measured.trained["laps"], measured.sizes
    encoder = trained.model.image_encoder
    weights = ", ".join(
        f"{TITLES[head]} {sum(p.numel() for p in measured.trained[head].model.parameters()):,}"
        for head in HEADS
    )
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in measured.seconds.items())
    facts = {
        "models": f"a small residual network ({encoder.image_size} pixels, {encoder.num_patches} patches) "
        "and a small BERT; the encoders, where they start from, the data, its order, the steps and the "
        f"optimizer are the same for both, the heads differ. Weights: {weights}",
        "training": f"encoders from random weights in {measured.pretrained.steps:,} steps of "
        f"{sizes.batch_size} pairs ({sizes.pretraining_epochs} epochs of {sizes.train:,} scenes) with a "
        f"global embedding; from there each model in {trained.steps:,} steps ({sizes.epochs} epochs); AdamW, "
        "one cycle of the learning rate, InfoNCE; of the epochs the best by "
        f"{sizes.dev:,} development scenes",
        "time": f"{took}; {measured.cpu_seconds:.0f} s of processor time in all",
        "machine": f"{_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, "
        f"{platform.system()}",
        "versions": f"laps {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "seed": str(measured.seed),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return _section("How it was done", f"<dl>{rows}</dl>")


# ---- parts


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(name: str, value: str, note: str) -> str:
    return f"<p><span>{escape(name)}</span><strong>{escape(value)}</strong><span>{escape(note)}</span></p>"


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], groups: str = "", *, escaped: bool = False
) -> str:
    """A table that scrolls by itself where the screen is narrow; `escaped` cells are HTML already."""
    prepare = str if escaped else escape
    head = "".join(f"<th>{escape(cell)}</th>" if cell else "<td></td>" for cell in header)
    body = "".join(
        f"<tr><th>{prepare(row[0])}</th>{''.join(f'<td>{prepare(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead>{groups}<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _scene(measured: Measured, image: int, alternative: str) -> str:
    return _img(pictures.file_uri(measured.test.image_paths[image]), alternative)


def _picture(uri: str, alternative: str, caption: str) -> str:
    return f"<figure>{_img(uri, alternative)}<figcaption>{caption}</figcaption></figure>"


def _img(uri: str, alternative: str) -> str:
    return f'<img src="{uri}" alt="{escape(alternative)}">'


def _mark(good: bool, yes: str, no: str) -> str:
    # A word beside the colour, for those who do not see it.
    return f'<span class="{"yes" if good else "no"}">{"✓" if good else "✗"} {yes if good else no}</span>'


def _quote(caption: str) -> str:
    return f"“{escape(caption)}”"


def _number(count: int) -> str:
    return {1: "One", 2: "Two", 3: "Three", 4: "Four"}.get(count, str(count))


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
