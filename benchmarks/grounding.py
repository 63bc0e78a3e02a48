"""Do the words of drawn scenes point at what they name? LAPS with and without patch selection, several seeds.

    python -m benchmarks.grounding                # seeds 0, 1 and 2: about twenty minutes on two cores
    python -m benchmarks.grounding --seeds 1      # one of them; what the file holds of the others stays

How it is measured. As `laps demo` does it: a seed decides the scenes, the first weights and the order of
training; a global embedding teaches the encoders, and from there on LAPS trains as in the demo, once as it is
and once with `selection="none"` (all patches are kept, nothing is fused, the rest is the same). Every word of
the test captions that names a colour, a shape, a size or a texture is asked where it points: right is the
centre of its brightest patch within the box of an object that has it. Intervals of one model are a bootstrap
over images; that of the difference draws the images anew, and with them both models' hits on them. Where
the words miss, and what selection could change of it, `benchmarks.misses` counts; it draws the first seed's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laps.data import load, make_scenes
from laps.data.phrases import read_scene_words
from laps.demo.recipe import PRETRAINING_HEAD, Sizes, settings, train
from laps.grounding import GroundingResult, bootstrap_interval, evaluate_grounding

from benchmarks import machine, misses
from benchmarks.seeds import SEEDS, Command, run_seeds

RESULT = machine.RESULTS / "grounding.json"
FORMS: dict[str, dict[str, Any]] = {"laps": {}, "all patches": {"selection": "none"}}


def difference(ours: GroundingResult, theirs: GroundingResult) -> dict[str, float]:
    """How many more of 100 words point right, with its 95 % interval; both saw the same words."""
    lead = ours.hits.astype(float) - theirs.hits
    low, high = bootstrap_interval(lead, ours.images)
    return {"mean": 100 * float(lead.mean()), "low": 100 * low, "high": 100 * high}


def measure_seed(seed: int, sizes: Sizes, picture: Path) -> dict[str, Any]:
    """Both forms trained and asked, and what lies between them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = make_scenes(
            folder / "scenes", num_train=sizes.train, num_dev=sizes.dev, num_test=sizes.test, seed=seed
        )
        data, dev = load(file, "train"), load(file, "dev")
        start = train(PRETRAINING_HEAD, data, dev, folder / "start", sizes=sizes, seed=seed, progress=True)
        words, found, models = read_scene_words(file), {}, {}
        for form, options in FORMS.items():
            trained = train(
                "laps",
                data,
                dev,
                folder / form,
                start=start.model,
                options=options,
                sizes=sizes,
                seed=seed,
                progress=True,
            )
            rsum = max(entry["rsum"] for entry in trained.history)
            results = {
                kind: evaluate_grounding(trained.model, words, kind=kind) for kind in ("shares", "gradient")
            }
            found[form], models[form] = (results, rsum), trained.model
            print(form, results["shares"].table(), sep="\n", flush=True)
        why = misses.measure(models, words, file)
        if seed == SEEDS[0]:
            misses.draw(models, words, file, picture)
    categories = sorted(set(found["laps"][0]["shares"].categories.tolist()))
    return {
        "forms": {
            form: {
                "dev_rsum": rsum,
                **{
                    kind: {name or "all": result.summary(name) for name in [None, *categories]}
                    for kind, result in results.items()
                },
            }
            for form, (results, rsum) in found.items()
        },
        "lead": difference(found["laps"][0]["shares"], found["all patches"][0]["shares"]),
        "misses": why,
    }


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """The mean lead over the seeds, with the 95 % interval of Student's t over them."""
    leads = [seed["lead"]["mean"] for seed in seeds.values()]
    # Of 1, 2, 3 .. degrees of freedom.
    student = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(leads))
    reach = None if student is None else student * statistics.stdev(leads) / len(leads) ** 0.5
    mean = statistics.mean(leads)
    return {
        "lead": mean,
        "low": None if reach is None else mean - reach,
        "high": None if reach is None else mean + reach,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    command = Command("grounding", __doc__, RESULT, {"forms": FORMS, **settings()})
    return run_seeds(command, measure_seed, summary, argv)


if __name__ == "__main__":
    sys.exit(main())
