"""The benchmark tables of README.md and docs/, generated from benchmarks/results/*.json.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # fail where the documents and the results differ (CI)

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; no figure in them is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "*Not measured yet: `make bench` writes the result that this table is made from.*"
FORM_TITLES = {
    "loop": "per-caption loop",
    "torch": "batched PyTorch",
    "compile": "`torch.compile` of it",
    "laps": "**laps**",
}

Result = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|:--" + "|--:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three significant digits, or whole milliseconds."""
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def megabytes(count: int | None) -> str:
    """Whole megabytes; "n/a" where nothing was measured."""
    return "n/a" if count is None else f"{max(count / 1e6, 1):,.0f} MB"


def seconds_or_minutes(seconds: float) -> str:
    """Seconds with three significant digits, or minutes from two of them on."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def times(ratio: float) -> str:
    """A ratio with two significant digits at least."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def machine_line(result: Result) -> str:
    """Where and when."""
    machine = result["machine"]
    memory = f", {machine['memory_gib']:.0f} GiB" if machine["memory_gib"] else ""
    commit = f", commit {machine['commit'][:10]}" if machine["commit"] else ""
    commit += " with local changes" if commit and machine["commit_is_changed"] else ""
    simd = machine["laps_build"].get("simd")
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}; {machine['threads']} threads; "
        f"torch {machine['torch']} ({machine['torch_simd']}), "
        f"laps {machine['laps']}{f' ({simd})' if simd else ''}, {machine['rustc']}; "
        f"{machine['date'][:10]}{commit}."
    )


def head_table(result: Result) -> str:
    """Times and memory of every form at every shape."""
    settings = result["settings"]
    pairs = settings["images"] * settings["captions"]
    rows = []
    for entry in result["shapes"].values():
        shape, forms = entry["shape"], entry["forms"]
        loop = forms.get("loop")
        title = f"**{shape['title']}** N={shape['num_patches']}, C={shape['channels']}"
        for name, form in forms.items():
            cells = [title, FORM_TITLES[name]]
            for part in ("forward", "step"):
                seconds = form[part]["median_s"]
                ratio = times(loop[part]["median_s"] / seconds) if loop else "n/a"
                cells += [milliseconds(seconds), f"{1e6 * seconds / pairs:.2f} µs", ratio]
            rows.append([*cells, megabytes(form.get("step_bytes"))])
            title = ""
    low, high = settings["words"]
    header = (
        "shape",
        "form",
        "forward",
        "a pair",
        "ratio",
        "forward + backward",
        "a pair",
        "ratio",
        "extra memory",
    )
    return (
        f"{settings['images']} images x {settings['captions']} captions of {low} to {high} words, float32. "
        "Medians; \"ratio\" is the loop's time over the row's, "
        '"extra memory" the peak of forward + backward above what was there before.\n\n'
        f"{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def rate_table(result: Result) -> str:
    """Operations per second beside torch.mm's."""
    rows = []
    for entry in result["shapes"].values():
        rates = entry["flops_per_s"]
        needed = sum(entry["flops"].values())
        row = [entry["shape"]["title"], f"{needed / 1e9:.2f}", f"{rates['mm'] / 1e9:.0f}"]
        for name in ("similarity", "head"):
            rate = rates.get(name)
            row += [f"{rate / 1e9:.0f}", f"{rate / rates['mm']:.0%}"] if rate else ["n/a", "n/a"]
        rows.append(row)
    header = ("shape", "GFLOP needed", "`torch.mm` GFLOP/s", "`similarity`", "share", "`LAPSHead`", "share")
    return markdown(header, rows)


def max_sim_table(result: Result) -> str:
    """Times beside maxsim-cpu's."""
    rows = []
    for entry in result["shapes"]:
        theirs, ours = entry["median_s"]["maxsim_cpu"], entry["median_s"]["laps"]
        rate = entry["flops_per_s"]["maxsim_cpu"] / 1e9
        rows.append(
            [
                f"{entry['documents']} x {entry['tokens']} x {entry['dim']}",
                f"{milliseconds(theirs)} ({rate:.0f} GFLOP/s)",
                milliseconds(ours),
                times(theirs / ours),
            ]
        )
    first = result["shapes"][0]
    difference = max(entry["difference"] for entry in result["shapes"])
    agreement = f"scores equal to {difference:.0e}" if difference else "scores equal bit for bit"
    header = (
        "documents x tokens x dim",
        f"maxsim-cpu {result['machine']['maxsim_cpu']}",
        "**laps**",
        "ratio",
    )
    return (
        f"One query of {first['query_tokens']} tokens, float32, the same arrays, {agreement}.\n\n"
        f"{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def evaluation_table(result: Result) -> str:
    """The time that scoring a whole test set takes, and on how many pairs that was measured."""
    settings, forms = result["settings"], result["forms"]
    loop = forms["loop"]
    rows = []
    for name, form in forms.items():
        whole = seconds_or_minutes(form["whole_s"])
        rows.append(
            [
                FORM_TITLES[name],
                f"{form['pairs_measured']:,} pairs in {form['pairs']['median_s']:.3g} s",
                f"{form['pairs_per_s']:,.0f}",
                f"{whole} (extrapolated)" if form["extrapolated"] else whole,
                times(loop["whole_s"] / form["whole_s"]),
                megabytes(form.get("extra_bytes")),
            ]
        )
    matrix = f"{settings['images']:,} images x {settings['captions']:,} captions"
    low, high = settings["words"]
    ours = forms["laps"]
    header = ("form", "measured", "pairs/s", matrix, "ratio", "extra memory")
    return (
        f"{matrix} of {low} to {high} words, {settings['shape']} (N={settings['num_patches']}, "
        f"C={settings['channels']}), float32. Features are {settings['features']}; encoding them is the same "
        f"for all. The time of laps contains {ours['prepare_s']:.3g} s for what is computed once per image "
        f"and caption. Recalls and ranks of the matrix take {ours['metrics']['median_s']:.2g} s more.\n\n"
        f"{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def training_table(result: Result) -> str:
    """The parts of a training step."""
    settings, forms = result["settings"], result["forms"]
    loop = forms["loop"]["median_s"]
    rows = []
    for name, form in forms.items():
        part = form["median_s"]
        rows.append(
            [
                FORM_TITLES[name],
                f"{part['encoders_forward'] + part['encoders_backward']:.3g} s",
                milliseconds(part["head"]),
                times(loop["head"] / part["head"]),
                f"{part['head'] / part['whole']:.1%}",
                f"{part['optimizer']:.2g} s",
                f"{part['whole']:.3g} s",
                f"{loop['whole'] / part['whole']:.2f}x",
                megabytes(form.get("head_bytes")),
                megabytes(form.get("step_bytes")),
            ]
        )
    low, high = settings["words"]
    header = (
        "head",
        "encoders",
        "head + loss",
        "ratio",
        "share",
        "AdamW",
        "whole step",
        "ratio",
        "memory, head",
        "memory, step",
    )
    return (
        f"{settings['encoders']} (random weights), batch {settings['batch']}, captions of {low} to {high} "
        "tokens, float32; each part forward + backward. Medians; memory as above, for the step beside the "
        f"weights and AdamW's moments.\n\n{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def scenes_table(result: Result) -> str:
    """LAPS beside the global-embedding model on drawn scenes, seed by seed, and the lead with its spread."""
    seeds, whole, sizes = result["seeds"], result["summary"], result["settings"]["sizes"]
    rows = []
    for seed, entry in seeds.items():
        ours, theirs = (entry["metrics"][head]["rsum"] for head in ("laps", "vse"))
        likes = [entry["lookalikes"][head] for head in ("laps", "vse")]
        rows.append(
            [
                seed,
                f"{ours:.1f}",
                times(ours / entry["chance"]["rsum"]),
                f"{theirs:.1f}",
                times(theirs / entry["chance"]["rsum"]),
                f"{ours - theirs:+.1f}",
                *(f"{share:.1f} %" for share in likes),
            ]
        )
    lead = ""
    if len(seeds) > 1:
        low, high = (whole["rsum"]["lead"][end] for end in ("min", "max"))
        lead = f"The lead lies between {low:+.1f} and {high:+.1f}; ± is the standard deviation. "
        rsum, likes_of = whole["rsum"], whole["lookalikes"]
        laps_rsum, vse_rsum = (
            f"{rsum[head]['mean']:.1f} ± {rsum[head]['stdev']:.1f}" for head in ("laps", "vse")
        )
        rows.append(
            [
                "mean",
                laps_rsum,
                "",
                vse_rsum,
                "",
                f"**{rsum['lead']['mean']:+.1f} ± {rsum['lead']['stdev']:.1f}**",
                *(f"{likes_of[head]['mean']:.1f} %" for head in ("laps", "vse")),
            ]
        )
    header = (
        "seed",
        "**LAPS** rSum",
        "of chance",
        "global embedding rSum",
        "of chance",
        "lead",
        "look-alikes, LAPS",
        "look-alikes, global",
    )
    chance = next(iter(seeds.values()))["chance"]["rsum"]
    return (
        f"`laps demo` with several seeds: {sizes['train']:,} training scenes; both models start from the "
        f"same encoders ({sizes['pretraining_epochs']} epochs with a global embedding) and train alike for "
        f"{sizes['epochs']} more; {sizes['test']:,} held-out scenes with {5 * sizes['test']:,} captions "
        f"(chance: rSum {chance:.1f}). {lead}Look-alikes: pairs of scenes that differ in one attribute, told "
        f"apart by a caption (chance: 50 %).\n\n{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def grounding_table(result: Result) -> str:
    """Where words point, with and without patch selection, seed by seed."""
    seeds, whole, sizes = result["seeds"], result["summary"], result["settings"]["sizes"]

    def pointing(at: Result) -> str:
        return f"{at['pointing']:.1f} % ({at['pointing_low']:.1f} to {at['pointing_high']:.1f})"

    rows = []
    for seed, entry in seeds.items():
        ours, theirs = (entry["forms"][form]["shares"] for form in ("laps", "all patches"))
        lead = entry["lead"]
        rows.append(
            [
                seed,
                pointing(ours["all"]),
                pointing(theirs["all"]),
                f"{lead['mean']:+.1f} ({lead['low']:+.1f} to {lead['high']:+.1f})",
                *(f"{ours[name]['pointing']:.0f} %" for name in ("color", "size", "texture", "shape")),
                f"{ours['all']['iou']:.1f} %",
                f"{ours['all']['chance']:.1f} %",
            ]
        )
    header = (
        "seed",
        "LAPS points right",
        "without selection",
        "lead",
        "colours",
        "sizes",
        "textures",
        "shapes",
        "IoU",
        "chance",
    )
    over = ""
    if whole["low"] is not None:
        over = (
            f" Over the seeds the lead is {whole['lead']:+.1f} (95 %: {whole['low']:+.1f} to "
            f"{whole['high']:+.1f})."
        )
    return (
        f"Words of the captions of {sizes['test']} held-out drawn scenes that name a colour, size, texture "
        "or shape: is the centre of the brightest patch on an object that has it? In brackets 95 % "
        f"intervals, images drawn anew.{over}\n\n{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def misses_table(result: Result) -> str:
    """Where words miss, and what selection could change of it."""
    seeds = {seed: entry["misses"] for seed, entry in result["seeds"].items()}
    titles = {"laps": "LAPS", "all patches": "without selection"}
    rows = [
        [
            seed,
            titles[form],
            *(f"{share:.0f} %" for share in at["places"].values()),
            f"{at['dropped']:.1f} %",
            f"{at['objects_only']:.0f} %",
        ]
        for seed, entry in seeds.items()
        for form, at in entry["forms"].items()
    ]
    places = list(next(iter(seeds.values()))["forms"]["laps"]["places"])
    header = (
        "seed",
        "model",
        *places,
        "at a patch that LAPS drops",
        "right, were the objects alone kept",
    )

    def span(values: Iterable[float]) -> str:
        low, high = (f"{value:.0f}" for value in _ends(values))
        return low if low == high else f"{low} to {high}"

    kept = {name: span(entry["kept"][name] for entry in seeds.values()) for name in ("objects", "background")}
    covered = span(entry["covered"] for entry in seeds.values())
    return (
        f"The brightest patches of the same words. Of the patches on objects, {covered} % of all, LAPS keeps "
        f"{kept['objects']} %, and of the others {kept['background']} %. Beside it: next to a patch on what "
        "the word names; the encoder's patches see their neighbours, and so the object's colour and edge.\n\n"
        f"{markdown(header, rows)}"
    )


def _ends(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[-1]


def encoders_table(result: Result) -> str:
    """Native encoders beside those of transformers."""
    rows = []
    for title, entry in result["encoders"].items():
        row = [title, str(entry["batch"])]
        for part in ("forward_s", "step_s"):
            hf, native = entry[part]["hf"], entry[part]["native"]
            rates = " / ".join(f"{entry['batch'] / seconds:.3g}" for seconds in (hf, native))
            row += [milliseconds(hf), milliseconds(native), f"{hf / native:.2f}x", rates]
        rows.append([*row, f"{entry['largest_difference']:.1g}"])
    low, high = result["settings"]["words"]
    header = (
        "encoder",
        "batch",
        "forward, transformers",
        "native",
        "ratio",
        "items/s",
        "step, transformers",
        "native",
        "ratio",
        "items/s",
        "largest difference",
    )
    return (
        f"Random weights, {result['settings']['dtype']}, captions of {low} to {high} tokens. A step is "
        "forward and backward in training mode, and SGD. Medians of forms that take turns; items/s are "
        "images or captions, transformers / native.\n\n"
        f"{markdown(header, rows)}\n\n"
        f"transformers {result['machine']['transformers']}; {machine_line(result)}"
    )


def microseconds(seconds: float) -> str:
    """Three significant digits, or whole microseconds."""
    value = 1e6 * seconds
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.3g} µs"


def heads_table(result: Result) -> str:
    """Every head, ours and its published form: time per pair, and memory."""
    settings = result["settings"]
    pairs = settings["images"] * settings["captions"]
    rows = []
    for name, entry in result["heads"].items():
        forms = entry["forms"]
        options = "".join(f", `{key}={value}`" for key, value in entry["options"].items())
        # The clock of this one starts at the tokens.
        sides = [milliseconds(part["median_s"]) for part in entry["sides"].values()]
        first = [f"`{entry['head']}`{options}", "in the pairs" if name == "laps" else " / ".join(sides)]
        for form in forms:
            title = {"ours": "**ours**", "published": "plain" if name == "cpfean" else "published"}[form]
            cells = [first[0], title, first[1]]
            for part in ("forward", "step"):
                if part not in forms[form]:
                    gigabytes = entry["published_step_needs_bytes"] / 1e9
                    cells += [f"n/a (about {gigabytes:.0f} GB)", "n/a"]
                    continue
                seconds = forms[form][part]["median_s"]
                other = forms.get("published", {}).get(part)
                cells += [
                    microseconds(seconds / pairs),
                    times(other["median_s"] / seconds) if other else "n/a" if len(forms) > 1 else "",
                ]
            rows.append([*cells, megabytes(forms[form].get("step_bytes"))])
            first = ["", ""]
    low, high = settings["words"]
    header = (
        "head",
        "form",
        "sides, forward / with backward",
        "forward, a pair",
        "ratio",
        "forward + backward, a pair",
        "ratio",
        "extra memory",
    )
    return (
        f"{settings['images']} images x {settings['captions']} captions of {low} to {high} words, "
        f"{settings['shape']} (N={settings['num_patches']}, C={settings['channels']}), float32, eval mode, "
        'random weights. Medians; "ratio" is the time of the published form over the row\'s, "extra memory" '
        'the peak of forward + backward above what was there before. "Sides" is what a head makes of all '
        "images alone and of all captions alone: it is the same in both forms, and in none of the other "
        "figures; but the published LAPS computes its aggregation network anew for each caption, so the "
        "times of LAPS start at the tokens. Published: a loop over the captions, each beside all images, "
        "written from the equations; of `cpfean`, of which nothing is published, the plain form of our "
        "reading. `vse`, `clip`, `gpo` and `hrem` are one matrix product (`hrem` without its interaction in "
        "training): their published form is ours.\n\n"
        f"{markdown(header, rows)}\n\n{machine_line(result)}"
    )


def search_table(result: Result) -> str:
    """What a sentence costs, and what is lost, for several numbers of candidates."""
    scenes, shape, settings = result["scenes"], result["shape"], result["settings"]
    rows = [
        [
            f"{int(count):,}",
            *_found(scenes["candidates"][count]),
            *_found(scenes["graph_candidates"][count]),
        ]
        for count in scenes["candidates"]
    ]
    every = scenes["exhaustive"]["float16"]
    rows.append(["all", "1", *(milliseconds(every[name]) for name in ("p50_s", "p95_s")), "", "", ""])
    one = ("recall@10", "p50", "p95")
    first = markdown(("candidates", *one, *(f"by the graph: {name}" for name in one)), rows)
    kept = [
        [
            f"`{storage}`",
            f"{entry['bytes_per_image']:,.0f}",
            f"{entry['largest_difference']:.1g}" if "largest_difference" in entry else "reference",
            f"{entry['recall']:.3f}" if "recall" in entry else "reference",
        ]
        for storage, entry in scenes["storage"].items()
    ]
    second = markdown(
        ("storage", "bytes an image", "largest difference of a score", "recall@10, all images scored"), kept
    )
    counts = list(shape["storage"]["float16"]["candidates"])
    third = markdown(
        ("candidates", *(f"`{storage}`, p50" for storage in shape["storage"])),
        [
            [
                f"{int(count):,}",
                *(milliseconds(entry["candidates"][count]["p50_s"]) for entry in shape["storage"].values()),
            ]
            for count in counts
        ],
    )
    return (
        f"{scenes['images']:,} drawn scenes, the LAPS model of `laps demo`, {scenes['queries']} captions as "
        "queries; from the sentence to the hits. Recall is against all images scored in float32. The graph "
        f"is the approximate search, built in {seconds_or_minutes(scenes['graph']['build_s'])}, "
        f"{scenes['graph']['bytes_per_image']:,.0f} bytes an image.\n\n"
        f"{first}\n\n{second}\n\n"
        f"At {shape['shape']} (N={settings['num_patches']}, C={settings['channels']}) and BERT-base, "
        f"{shape['images']:,} images of random features, for which recall means nothing:\n\n"
        f"{third}\n\n{machine_line(result)}"
    )


def compare_table(result: Result) -> str:
    """Every row of a comparison, and how far the last one, LAPS, is ahead of it, seed by seed."""
    lines, runs = result["lines"]["all"], result["results"]
    rsum = {(run["row"], run["seed"]): run["metrics"]["rsum"] for run in runs}
    reference = result["comparison"]["rows"][-1]["name"]
    columns = list(lines[0]["cells"])
    best = {column: max(line["cells"][column]["mean"] for line in lines) for column in columns}
    rows = []
    for line in lines:
        row, cells = [line["name"]], []
        for column in columns:
            cell = line["cells"][column]
            text = f"{cell['mean']:.1f}"
            if column == "rsum" and cell["spread"] is not None:
                text += f" ± {cell['spread']:.1f}"
            cells.append(f"**{text}**" if cell["mean"] == best[column] else text)
        seeds = [seed for name, seed in rsum if name == line["name"] and (reference, seed) in rsum]
        leads = [rsum[reference, seed] - rsum[line["name"], seed] for seed in seeds]
        ahead = "" if line["name"] == reference or not leads else _spread_of(leads)
        rows.append([*row, *cells, ahead])
    ways = {"i2t": "image to text", "t2i": "text to image"}
    header = ["", *(f"{ways[c[:3]]} R@{c.split('_r')[1]}" if c != "rsum" else "rSum" for c in columns)]
    scenes, start = result["comparison"]["scenes"], result["comparison"]["start"]
    seeds_of = sorted({run["seed"] for run in runs})
    return (
        f"{scenes['train']:,} training scenes, {scenes['test']:,} test scenes with {5 * scenes['test']:,} "
        f"captions; {start['epochs']} epochs of a global embedding, from which every row goes on for "
        f"{runs[0]['steps']:,} steps; {len(seeds_of)} seeds. ± is the standard deviation over the seeds; "
        f"the last column is by how much the rSum of {reference} is ahead, mean (lowest to highest of the "
        f"seeds).\n\n{markdown([*header, f'{reference} ahead by'], rows)}\n\n{machine_line(result)}"
    )


def _spread_of(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):+.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.1f} to {max(values):+.1f})"


def _found(entry: dict[str, float]) -> list[str]:
    return [f"{entry['recall']:.3f}", milliseconds(entry["p50_s"]), milliseconds(entry["p95_s"])]


class Table(NamedTuple):
    """The result that a table comes from, what makes it, and where it stands."""

    result: str
    make: Callable[[Result], str]
    document: str = "README.md"


# By marker.
TABLES = {
    "head": Table("head.json", head_table),
    "rate": Table("head.json", rate_table),
    "max_sim": Table("max_sim.json", max_sim_table),
    "evaluation": Table("evaluation.json", evaluation_table),
    "training": Table("training.json", training_table),
    "scenes": Table("scenes.json", scenes_table),
    "grounding": Table("grounding.json", grounding_table),
    "misses": Table("grounding.json", misses_table),
    "encoders": Table("encoders.json", encoders_table),
    "heads": Table("heads.json", heads_table, "docs/heads.md"),
    "compare": Table("compare-scenes.json", compare_table, "docs/heads.md"),
    "ablation": Table("compare-scenes-ablation.json", compare_table, "docs/heads.md"),
    "search": Table("search.json", search_table, "docs/search.md"),
}


def render(text: str, results: Path = RESULTS, document: str = "README.md") -> str:
    """A document's text with every table made anew; raises where a marker is missing."""
    for name, table in TABLES.items():
        if table.document != document:
            continue
        path = results / table.result
        made = table.make(json.loads(path.read_text())) if path.exists() else MISSING
        opening, closing = f"<!-- bench:{name} -->\n", f"<!-- /bench:{name} -->"
        before, opened, rest = text.partition(opening)
        _, closed, after = rest.partition(closing)
        if not (opened and closed):
            raise SystemExit(f"tables: {document} has no place marked {opening.strip()} ... {closing}")
        text = f"{before}{opening}\n{made}\n\n{closing}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the documents; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 where a document is out of date"
    )
    options = parser.parse_args(argv)
    status = 0
    for document in dict.fromkeys(table.document for table in TABLES.values()):
        path = ROOT / document
        current = path.read_text(encoding="utf-8")
        wanted = render(current, document=document)
        if wanted == current:
            continue
        if options.check:
            print(f"tables: {document} differs from benchmarks/results (run: make tables)", file=sys.stderr)
            status = 1
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"Wrote {document}")
    return status


if __name__ == "__main__":
    sys.exit(main())
