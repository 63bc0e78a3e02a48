"""Do the words of drawn scenes point at what they name? LAPS with and without patch selection, several seeds.

    python -m benchmarks.grounding                # seeds 0, 1 and 2: about fifteen minutes on two cores
    python -m benchmarks.grounding --seeds 1      # one of them; what the file holds of the others stays

How it is measured. As `laps demo` does it: a seed decides the scenes, the first weights and the order of
training; a global embedding teaches the encoders, and from there on LAPS trains as in the demo, once as it is
and once with `selection="none"` (all patches are kept, nothing is fused, the rest is the same). Every word of
the test captions that names a colour, a shape, a size or a texture is asked where it points: right is the
centre of its brightest patch within the box of an object that has it. Intervals of one model are a bootstrap
over images; that of the difference draws the images anew, and with them both models' hits on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from laps.data import load, make_scenes
from laps.data.phrases import read_scene_words
from laps.demo.recipe import PRETRAINING_HEAD, Sizes, settings, train
from laps.grounding import GroundingResult, evaluate_grounding

from benchmarks import machine
from benchmarks.demo import earlier

RESULT = machine.RESULTS / "grounding.json"
SEEDS = (0, 1, 2)
FORMS: dict[str, dict[str, Any]] = {"laps": {}, "all patches": {"selection": "none"}}
RESAMPLES = 2000


def difference(ours: GroundingResult, theirs: GroundingResult) -> dict[str, float]:
    """How many more of 100 words point right, with its 95 % interval; both saw the same words."""
    _, group = np.unique(ours.images, return_inverse=True)
    lead = np.bincount(group, ours.hits.astype(float) - theirs.hits)
    counts = np.bincount(group)
    drawn = np.random.default_rng(0).integers(0, len(lead), (RESAMPLES, len(lead)))
    low, high = np.quantile(lead[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return {
        "mean": 100 * float(lead.sum() / counts.sum()),
        "low": 100 * float(low),
        "high": 100 * float(high),
    }


def measure_seed(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Both forms trained and asked, and what lies between them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = make_scenes(
            folder / "scenes", num_train=sizes.train, num_dev=sizes.dev, num_test=sizes.test, seed=seed
        )
        data, dev = load(file, "train"), load(file, "dev")
        start = train(PRETRAINING_HEAD, data, dev, folder / "start", sizes=sizes, seed=seed, progress=True)
        words, found = read_scene_words(file), {}
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
            found[form] = (results, rsum)
            print(form, results["shares"].table(), sep="\n", flush=True)
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grounding", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=RESULT, help="(default: results/grounding.json)")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="(default: %(default)s)"
        )
    options = parser.parse_args(argv)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})

    wanted = json.loads(json.dumps({"sizes": asdict(sizes), "forms": FORMS, **settings()}))
    seeds = earlier(options.output, wanted)
    for seed in options.seeds:
        print(f"\nseed {seed}", flush=True)
        seeds[str(seed)] = measure_seed(seed, sizes)
        seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
        machine.write(
            options.output,
            {"machine": machine.describe(), "settings": wanted, "seeds": seeds, "summary": summary(seeds)},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
