"""The demo's story: draw, train twice, measure, report."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from .. import _check
from .._files import write_atomically
from .measure import measure, timed
from .recipe import HEADS, TITLES, Sizes
from .report import chance, render

__all__ = ["run"]


def run(
    out: str | Path,
    *,
    seed: int = 0,
    open_browser: bool = False,
    sizes: Sizes | None = None,
    progress: bool = True,
) -> Path:
    """Draw scenes, train LAPS and a global-embedding model on them, compare, search, and write a report.

    Args:
        out: the folder for ``report.html``, the models ``laps/`` and ``vse/``, their metrics ``laps.json``
            and ``vse.json``, and ``scenes/``. What an earlier run left there is replaced, but scenes of the
            same seed are used again; other files stay.
        seed: of the scenes, the weights and the order of training, >= 0.
        open_browser: show the report.
        sizes: None for the demo's own: about four minutes on two cores.
        progress: whether progress bars are shown, on a terminal.

    Returns:
        The path of the report.

    Raises:
        LapsValueError: `seed` is negative, or ``out/scenes`` holds something else.
        KeyboardInterrupt: Ctrl-C; no report is written then, and an older one stays.
    """
    out, seed = Path(out), _check.count("demo", "seed", seed, 0)
    measured = measure(out, seed=seed, sizes=sizes or Sizes(), progress=progress)
    with timed(measured.seconds, "report", "searching and writing the report"):
        for head in HEADS:
            measured.trained[head].model.save_pretrained(out / head)
            measured.evaluations[head].save_json(out / f"{head}.json")
        report = write_atomically(out / "report.html", render(measured))

    recalls = {head: measured.evaluations[head].table().splitlines()[2:5] for head in HEADS}
    print("", *recalls[HEADS[0]][:2], sep="\n")
    for head in HEADS:
        print(TITLES[head] + recalls[head][2][len(TITLES[head]) :])
    print(f"chance: rSum {chance(measured.test)['rsum']:.1f}\n")
    print(f"report: {report}\nagain:  laps eval {out / HEADS[0]} {measured.file}")
    if open_browser:
        webbrowser.open(report.resolve().as_uri())
    return report
