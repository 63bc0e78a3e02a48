"""Evaluation of a retrieval model on images and captions.

Each image and each caption is encoded once; the matrix of all pairs is scored in bounded blocks; recalls and
ranks come from :mod:`laps.metrics`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import torch

from .. import _check
from .._laps import __version__
from .._modes import eval_mode
from ..data import RetrievalData
from ..distributed import Ranks
from ..errors import LapsTypeError, LapsValueError
from ..metrics import fold_metrics, fold_slices, retrieval_metrics
from ..ranking import CaptionMap
from .encode import CaptionStore, RetrievalModel, encode_captions, encode_images
from .pairs import PairScorer, dot_product
from .report import Evaluation
from .rerank import Reranked
from .rerank import rerank as run_rerank

__all__ = ["Evaluation", "Reranked", "RetrievalModel", "evaluate"]

# About a second of the LAPS head on two cores; a GPU needs more work per launch.
PAIRS_ON_CPU, PAIRS_ON_GPU = 2**15, 2**18
SCORINGS = ("head", "global")
FEATURE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)


def evaluate(
    model: RetrievalModel,
    data: RetrievalData,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    feature_dtype: torch.dtype | None = None,
    pair_chunk: int | None = None,
    folds: int | None = None,
    rerank: int | None = None,
    scoring: str = "head",
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score all images of `data` against all its captions, and measure retrieval both ways.

    Features lie in host memory (per image N (C + N_c) numbers, per caption its words times C), the matrix as
    float32 too; of both a block at a time goes to the device. The model comes back as it was given: on its
    device, each of its modules in its training mode. No random number of the caller is drawn.

    Args:
        model: :class:`laps.LAPS`, or another model with the members of :class:`RetrievalModel`.
        data: images and captions with any caption map. F30K 1K and COCO 5K are all images of their test
            splits; COCO 1K is ``folds=5`` on the latter. An image without captions is a distractor.
        batch_size: images, and captions, per call of the encoders.
        num_workers: processes that read images.
        device: where to encode and score; None: where the model is.
        amp: encode under bfloat16 autocast.
        feature_dtype: float16 or bfloat16 store the features in half the memory; None keeps what the model
            gives. Scores are float32 in any case.
        pair_chunk: pairs per call of ``model.similarity``, which bounds what the device holds at once; None:
            32,768 on the CPU, 262,144 elsewhere.
        folds: also average over this many contiguous disjoint folds of the images, each with its own
            captions.
        rerank: K, also measure the two-stage form (see :class:`Reranked`): global embeddings nominate the K
            best captions of each image and the K best images of each caption, the model ranks these.
        scoring: ``"head"``, or ``"global"``: the cosine of one vector per image and one per caption, the
            `embedding` of the head's features (of LAPS the means of patches and of words), whatever the model
            was trained for. Memory and time are those of a global-embedding model.
        progress: show progress bars, on a terminal or in a notebook.
        ranks: of :meth:`laps.distributed.Ranks.here`, all of which call this with the same arguments: each
            encodes its share of the images and of the captions, and scores its images. None: this process
            does all.

    Returns:
        The metrics, times and scores; ``print(result)`` is a table.

    Raises:
        LapsValueError: an image that cannot be read (its path is named), a caption without words, features or
            a score that are not finite (image and caption are named), an argument out of range, fewer images
            or captions than ranks, `rerank` with several ranks. LapsTypeError: an argument of the wrong type.

    Source: baselines.md, "Evaluation protocol" and "TGDT".

    Example::

        model = laps.LAPS.from_pretrained("runs/f30k/best")
        result = laps.evaluate(model, laps.data.load("f30k", "test"), rerank=100)
        print(result)
        result.save_json("f30k.json")
    """
    operation = "evaluate"
    batch_size = _check.count(operation, "batch_size", batch_size)
    num_workers = _check.count(operation, "num_workers", num_workers, 0)
    amp, progress = _check.flag(operation, "amp", amp), _check.flag(operation, "progress", progress)
    rerank = None if rerank is None else _check.count(operation, "rerank", rerank)
    alone = _check.choice(operation, "scoring", scoring, SCORINGS) == "global"
    if alone and rerank is not None:
        raise LapsValueError(
            _check.message(operation, 'rerank with scoring="global"', 'scoring="head", or no rerank', rerank)
        )
    if not isinstance(data, RetrievalData):
        raise LapsTypeError(
            _check.message(operation, "data has the wrong type", "RetrievalData", _check.name_of(data))
        )
    ranks = Ranks() if ranks is None else ranks
    if ranks.size > 1:
        _check_shares(operation, data, rerank, ranks)
    progress = progress and ranks.main
    caption_map = CaptionMap(data.caption_to_image, data.num_images)
    if folds is not None:
        # Else it would fail after an hour of scoring.
        fold_slices(operation, caption_map, folds)
    if feature_dtype not in FEATURE_DTYPES:
        raise LapsValueError(
            _check.message(
                operation, "feature_dtype is unknown", "None, float16, bfloat16 or float32", feature_dtype
            )
        )

    seconds: dict[str, float] = {}
    with _at_rest(model, device), torch.inference_mode():
        if pair_chunk is None:
            pair_chunk = PAIRS_ON_CPU if model.device.type == "cpu" else PAIRS_ON_GPU
        share = ranks.part(data.num_images)
        pair_chunk = _check.count(operation, "pair_chunk", pair_chunk)
        scorer = PairScorer(data, model.device, pair_chunk, progress, share.start)
        settings = {
            "data": data.name,
            "images": data.num_images,
            "captions": data.num_captions,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "device": str(model.device),
            "amp": amp,
            "feature_dtype": None if feature_dtype is None else _check.name_of(feature_dtype),
            "pair_chunk": pair_chunk,
            "folds": folds,
            "rerank": rerank,
            "scoring": scoring,
            "version": __version__,
        }
        with _timed(seconds, "images"):
            images = ranks.together(
                lambda: encode_images(
                    model,
                    data,
                    part=share,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    amp=amp,
                    dtype=feature_dtype,
                    embeddings_only=alone,
                    progress=progress,
                )
            )
        with _timed(seconds, "captions"):
            own_captions = ranks.together(
                lambda: encode_captions(
                    model,
                    data,
                    part=ranks.part(data.num_captions),
                    batch_size=batch_size,
                    amp=amp,
                    dtype=feature_dtype,
                    embeddings_only=alone,
                    progress=progress,
                )
            )
            parts = ranks.objects(own_captions)
            captions = parts[0] if len(parts) == 1 else CaptionStore.cat(parts)
        with _timed(seconds, "pairs"):
            score = dot_product if alone else model.similarity
            rows = ranks.together(lambda: scorer.all_pairs(score, images, captions, "score pairs"))
            scores = rows if ranks.size == 1 else np.concatenate(ranks.objects(rows))
        with _timed(seconds, "metrics"):
            metrics = retrieval_metrics(scores, data.caption_to_image)
            fold_means = None if folds is None else fold_metrics(scores, data.caption_to_image, folds)
        reranked = None
        if rerank is not None:
            reranked = run_rerank(
                model, images, captions, caption_map, rerank, scorer=scorer, exhaustive=metrics
            )
    return Evaluation(metrics, scores, settings, seconds, fold_means, reranked)


def _check_shares(operation: str, data: RetrievalData, rerank: int | None, ranks: Ranks) -> None:
    """Refuse what several ranks cannot do."""
    if rerank is not None:
        raise LapsValueError(
            _check.message(operation, "rerank with several ranks", "one process, or no rerank", ranks.size)
        )
    for name, number in (("images", data.num_images), ("captions", data.num_captions)):
        if number < ranks.size:
            raise LapsValueError(
                _check.message(operation, f"data has {number} {name}", f"one for each of {ranks.size} ranks")
            )


@contextlib.contextmanager
def _at_rest(model: RetrievalModel, device: torch.device | str | None) -> Iterator[None]:
    """The model in eval mode, on `device`; then as it was."""
    home = model.device
    with eval_mode(model):
        try:
            if device is not None:
                model.to(torch.device(device))
            yield
        finally:
            if device is not None:
                model.to(home)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
