"""What a sentence costs to answer from an index, and what reranking few candidates loses.

    python -m benchmarks.search                    # 20,000 drawn scenes, and the shapes of a ViT-base
    python -m benchmarks.search --model out/demo/laps   # with a trained model, not one that is trained first
    python -m benchmarks.search --quick            # small sizes, no file

How it is measured. Scenes are drawn, and a model is trained on some of them as `laps demo` trains its LAPS
model (or taken from --model). The others are indexed three times, in float32, float16 and int8. Queries are
captions of indexed scenes, one at a time. The truth is the exhaustive ranking of the float32 index: the head
scores every image. Recall@10 is the share of the truth's ten best that are among the ten that were found.
Time is wall time of `Index.search` from sentence to paths: tokenizer, text encoder, candidates, reading them
and checking them, scores. Files are in the page cache: each index is searched once before. Candidates come
from the exact product with all global vectors, and once more from the graph of the approximate search, which
is the default from 50,000 images on.

At the shapes of a ViT-base (196 patches, C=512) and a BERT-base, with random weights, random features are
written into an index; latency and bytes are those of real ones, and recall has no meaning.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laps import LAPS, Index
from laps.data import CaptionTokenizer, load, make_scenes
from laps.demo.recipe import PRETRAINING_HEAD, Sizes, train
from laps.index import STORAGES, graph, manifest
from laps.index.records import RecordLayout
from laps.index.search import default_candidates
from laps.index.shards import ImageEntry, ShardContent
from laps.index.writing import commit_pieces, write_piece

from benchmarks import machine
from benchmarks.shapes import SHAPES

CANDIDATES = (100, 200, 500, 1000, 2000, 3000)
TOP = 10
SHAPE = SHAPES["vit-224"]
# Images of random features that are made at once.
BATCH = 50


def timed(
    index: Index, queries: Sequence[str], candidates: int, *, approximate: bool = False
) -> tuple[dict[str, float], list[Any]]:
    """Latency over the queries, in seconds, with the processor's time beside it, and the hits of each."""
    index.search(queries[0], TOP, candidates=candidates, approximate=approximate)
    seconds, hits = [], []
    worked = time.process_time()
    for query in queries:
        started = time.perf_counter()
        hits.append(index.search(query, TOP, candidates=candidates, approximate=approximate))
        seconds.append(time.perf_counter() - started)
    return summary(seconds) | {"cpu_s": (time.process_time() - worked) / len(queries)}, hits


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"p50_s": statistics.median(seconds), "p95_s": float(np.quantile(seconds, 0.95))}


def stages(index: Index, queries: Sequence[str]) -> dict[str, dict[str, float]]:
    """The time of a query's first two steps alone: the sentence's features, and the default candidates."""
    text, nominate = [], []
    index.search(queries[0], TOP)
    with torch.inference_mode():
        for query in queries:
            started = time.perf_counter()
            vector = index.model.encode_captions([query]).embedding[0]
            encoded = time.perf_counter()
            graph.best(index._snapshot, None, vector, default_candidates(index._snapshot))
            text.append(encoded - started)
            nominate.append(time.perf_counter() - encoded)
    return {"text": summary(text), "candidates": summary(nominate)}


def recall(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """The share of the truth's images that were found, over all queries."""
    shares = [
        len({hit.path for hit in mine} & {hit.path for hit in theirs}) / len(theirs)
        for mine, theirs in zip(found, truth, strict=True)
    ]
    return statistics.mean(shares)


def measure_scenes(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Recall and latency on drawn scenes."""
    sizes = Sizes(train=options.train)
    scenes = folder / "scenes"
    make_scenes(scenes, num_train=sizes.train, num_dev=sizes.dev, num_test=options.images, seed=options.seed)
    model = LAPS.from_pretrained(options.model) if options.model else trained(scenes, folder, sizes, options)
    test = load(scenes, "test")
    rng = np.random.default_rng(options.seed)
    chosen = rng.choice(test.num_captions, min(options.queries, test.num_captions), replace=False)
    queries = [test.captions[t] for t in chosen]
    indexes: dict[str, Index] = {}
    result: dict[str, Any] = {"images": test.num_images, "queries": len(queries), "storage": {}}
    for storage in STORAGES:
        index = Index.create(folder / storage, model, storage=storage)
        started = time.perf_counter()
        index.add(test.image_paths, batch_size=64, num_workers=options.num_workers)
        indexes[storage] = index
        result["storage"][storage] = {
            "bytes_per_image": index.nbytes / len(index),
            "encode_s": time.perf_counter() - started,
        }
    few = queries[: options.exhaustive]
    truth_time, truth = timed(indexes["float32"], queries, len(test.image_paths))
    result["exhaustive"] = {"float32": truth_time}
    for storage in ("float16", "int8"):
        latency, hits = timed(indexes[storage], few, len(test.image_paths))
        exact = [{hit.path: hit.score for hit in each} for each in truth]
        differences = [
            abs(hit.score - scores[hit.path])
            for each, scores in zip(hits, exact, strict=False)
            for hit in each
            if hit.path in scores
        ]
        result["exhaustive"][storage] = latency
        result["storage"][storage] |= {
            "recall": recall(hits, truth[: len(few)]),
            "largest_difference": max(differences),
            "mean_difference": statistics.mean(differences),
        }
    result["stages"] = stages(indexes["float16"], queries)
    started = time.perf_counter()
    indexes["float16"].build_graph(progress=False)
    size = sum(path.stat().st_size for path in indexes["float16"].folder.glob("graph*"))
    result["graph"] = {"build_s": time.perf_counter() - started, "bytes_per_image": size / test.num_images}
    for form, approximate in (("candidates", False), ("graph_candidates", True)):
        result[form] = {}
        for count in CANDIDATES:
            if count > test.num_images:
                continue
            latency, hits = timed(indexes["float16"], queries, count, approximate=approximate)
            result[form][str(count)] = latency | {"recall": recall(hits, truth)}
            print(
                f"{form} {count:5d}: recall@{TOP} {recall(hits, truth):.4f}, "
                f"p50 {1e3 * latency['p50_s']:.1f} ms, p95 {1e3 * latency['p95_s']:.1f} ms",
                flush=True,
            )
    print(f"exhaustive: p50 {1e3 * truth_time['p50_s']:.0f} ms", flush=True)
    return result


def trained(scenes: Path, folder: Path, sizes: Sizes, options: argparse.Namespace) -> LAPS:
    """The LAPS model of `laps demo`, trained on the scenes' training split."""
    data, dev = load(scenes, "train"), load(scenes, "dev")
    arguments: dict[str, Any] = {"sizes": sizes, "seed": options.seed, "progress": True}
    start = train(PRETRAINING_HEAD, data, dev, folder / "start", **arguments)
    return train("laps", data, dev, folder / "laps", start=start.model, **arguments).model


def measure_shape(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Latency and bytes at the shapes of a ViT-base, with random features."""
    captions = [f"two dogs on a beach beside {word} umbrella" for word in ("a red", "the blue", "no")]
    tokenizer = CaptionTokenizer.train(captions, vocab_size=200)
    model = LAPS.from_preset("vit-base-224", pretrained=False, tokenizer=tokenizer).eval()
    result: dict[str, Any] = {"images": options.shape_images, "shape": SHAPE.title, "storage": {}}
    for storage in ("float16", "int8"):
        index = Index.create(folder / f"shape-{storage}", model, storage=storage)
        fill(index, options.shape_images)
        index.refresh()
        entry: dict[str, Any] = {"bytes_per_image": index.nbytes / len(index), "candidates": {}}
        entry["stages"] = stages(index, captions * 5)
        for count in CANDIDATES:
            if count <= len(index):
                latency, _ = timed(index, captions * options.repetitions, count)
                entry["candidates"][str(count)] = latency
                print(f"{SHAPE.title} {storage} {count:5d}: p50 {1e3 * latency['p50_s']:.1f} ms", flush=True)
        result["storage"][storage] = entry
    return result


def fill(index: Index, images: int) -> None:
    """Write random features into an empty index."""
    generator = torch.Generator().manual_seed(0)
    head, storage, state = index.model.head, index.storage, manifest.read(index.folder)
    tokens = (head.num_prefix_tokens + head.num_patches, head.embed_dim)
    for first in range(0, images, 10 * BATCH):
        embeddings, records = [], []
        layout = None
        for start in range(first, min(first + 10 * BATCH, images), BATCH):
            count = min(BATCH, images - start)
            with torch.inference_mode():
                features = head.encode_image(torch.randn(count, *tokens, generator=generator))
            layout = RecordLayout.of(features, storage)
            embeddings.append(features.embedding.numpy())
            records.append(layout.pack(features)[0].numpy())
        assert layout is not None
        vectors = np.concatenate(embeddings)
        content = ShardContent(
            images=[ImageEntry(0, f"{first + i}.jpg", 0, 0) for i in range(len(vectors))],
            embedding=vectors,
            records=np.concatenate(records),
        )
        piece = write_piece(index.folder, state, layout, content)
        state = commit_pieces(index.folder, state, [piece], roots=("/",))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="indexed scenes (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="sentences (default: %(default)s)")
    parser.add_argument(
        "--exhaustive", type=int, default=50, help="sentences that float16 and int8 are measured with"
    )
    parser.add_argument("--train", type=int, default=Sizes.train, help="scenes to train on")
    parser.add_argument("--model", help="a trained model in place of training: a folder or hub id")
    parser.add_argument("--shape-images", type=int, default=4000, help="random images of the shape's index")
    parser.add_argument("--repetitions", type=int, default=10, help="of three sentences, at the shape")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shape", dest="shape", action="store_false", help="drawn scenes only")
    parser.add_argument("--no-scenes", dest="scenes", action="store_false", help="the shape only")
    parser.add_argument("--quick", action="store_true", help="small sizes, no file")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    machine.add_options(parser, "search.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.images, options.queries, options.exhaustive = 120, 6, 3
        options.shape_images, options.repetitions, options.train = 60, 1, 64
    full = options.images >= 20_000 and options.scenes and options.shape
    output = options.output or (machine.RESULTS / "search.json" if full else None)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "settings": {
            "seed": options.seed,
            "top": TOP,
            "train": None if options.model else options.train,
            "num_patches": SHAPE.num_patches,
            "channels": SHAPE.channels,
        },
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.scenes:
            result["scenes"] = measure_scenes(folder, options)
        if options.shape:
            result["shape"] = measure_shape(folder, options)
    if output:
        machine.write(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
