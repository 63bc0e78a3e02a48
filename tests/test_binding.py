"""The raw binding `laps._laps`: hostile input ends in an exception of ours, never in a panic or a crash."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import reference
import torch
from laps import LapsError, LapsTypeError, LapsValueError, _laps
from torch._subclasses.fake_tensor import FakeTensorMode

OPTIONS = _laps.SimilarityOptions(selection_ratio=0.5)
SIZES = {"images": 2, "texts": 3, "patches": 8, "channels": 6, "words": 5, "aggregated": 2, "prefix": 1}


def arguments(dtype: Any = np.float32, **changes: Any) -> dict[str, Any]:
    """Valid arguments of `similarity_forward`, NumPy throughout, with `changes`."""
    rng = np.random.default_rng(0)
    b, t, n, c, l, m, p = SIZES.values()  # noqa: E741
    given = {
        "patches": rng.standard_normal((b, n, c)).astype(dtype),
        "words": rng.standard_normal((t, l, c)).astype(dtype),
        "word_lengths": np.array([5, 2, 1]),
        "logits": rng.standard_normal((b, n, m)).astype(dtype),
        "prefix": rng.standard_normal((b, p, c)).astype(dtype),
        "keep_prob": None,
        "mask": None,
        "seed": None,
        "options": OPTIONS,
        "pairwise": False,
        "num_threads": 2,
        "out_scores": np.empty((b, t), dtype),
        "out_kept_fraction": np.empty((b, t), dtype),
        "out_selection": None,
        "out_best_token": None,
        "out_best_word": None,
    }
    return given | changes


def forward(**changes: Any) -> np.ndarray:
    given = arguments(**changes)
    _laps.similarity_forward(*given.values())
    return given["out_scores"]


def with_strides(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 3, axis=-1)[..., ::3]


def reversed_twice(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def misaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.empty(x.nbytes + 1, np.uint8)
    view = np.ndarray(x.shape, x.dtype, buffer.data, 1)
    view[...] = x
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("layout", [with_strides, reversed_twice, misaligned, read_only, torch.from_numpy])
def test_any_layout_is_read_in_place_or_copied(layout: Any) -> None:
    given = arguments()
    changed = {name: layout(given[name]) for name in ("patches", "words", "word_lengths", "logits", "prefix")}
    assert np.array_equal(forward(**changed), forward())


def test_scores_equal_the_oracle() -> None:
    given = arguments(np.float64)
    tensors = [torch.from_numpy(given[name]) for name in ("patches", "words", "word_lengths", "logits")]
    expected = reference.similarity(*tensors, selection_ratio=0.5, prefix=torch.from_numpy(given["prefix"]))
    np.testing.assert_allclose(forward(dtype=np.float64), expected, atol=1e-12)


def test_output_that_shares_memory_is_refused() -> None:
    scores = np.empty((2, 3), np.float32)
    with pytest.raises(LapsValueError, match=r"out_kept_fraction .*shared with out_scores"):
        forward(out_scores=scores, out_kept_fraction=scores)
    patches = arguments()["patches"]
    with pytest.raises(LapsValueError, match=r"out_scores .*shared with patches"):
        forward(patches=patches, out_scores=patches.reshape(-1)[:6].reshape(2, 3))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"patches": [[1.0]]}, LapsTypeError, "patches .*expected a CPU tensor or array, got list"),
        ({"patches": None}, LapsTypeError, "patches .*got NoneType"),
        (
            {"patches": np.zeros((2, 8, 6), np.float16)},
            LapsTypeError,
            "patches .*float32 or float64, got float16",
        ),
        ({"patches": np.zeros((2, 8, 6), np.complex64)}, LapsTypeError, "patches .*got complex64"),
        (
            {"patches": np.zeros((2, 8), np.float32)},
            LapsValueError,
            r"patches has shape \(2, 8\), expected rank 3",
        ),
        ({"patches": np.zeros((0, 8, 6), np.float32)}, LapsValueError, "patches"),
        ({"words": np.zeros((3, 5, 6))}, LapsTypeError, "words .*expected float32, got float64"),
        ({"words": np.zeros((3, 5, 7), np.float32)}, LapsValueError, "words .*C=7, but patches has C=6"),
        ({"word_lengths": np.array([5, 2, 1], np.int32)}, LapsTypeError, "word_lengths .*int64, got int32"),
        (
            {"word_lengths": np.array([5, 2, 6])},
            LapsValueError,
            "word_lengths .*1 to L=5, got 6 at caption 2",
        ),
        ({"word_lengths": np.array([5, -(2**63), 1])}, LapsValueError, "word_lengths .*at caption 1"),
        ({"logits": np.zeros((2, 8, 0), np.float32)}, LapsValueError, "logits"),
        ({"mask": np.zeros((2, 3, 8), bool)}, LapsValueError, "mask .*none at image 0, caption 0"),
        ({"mask": np.full((2, 3, 8), 2, np.float32)}, LapsValueError, r"mask .*values in \[0, 1\]"),
        ({"mask": np.ones((2, 3, 8), np.int64)}, LapsTypeError, "mask .*float32, got int64"),
        ({"keep_prob": np.full((2, 8), -1, np.float32)}, LapsValueError, "keep_prob"),
        ({"out_scores": np.empty((3, 2), np.float32)}, LapsValueError, "out_scores"),
        ({"out_scores": np.empty((2, 3))}, LapsTypeError, "out_scores .*float32, got float64"),
        ({"out_scores": np.empty((2, 6), np.float32)[:, ::2]}, LapsTypeError, "out_scores .*contiguous"),
        ({"out_scores": read_only(np.empty((2, 3), np.float32))}, LapsTypeError, "out_scores .*writable"),
        ({"pairwise": True}, LapsValueError, "words .*one text per image"),
        ({"num_threads": -1}, OverflowError, "negative"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        forward(**changes)


def test_tensors_without_data_are_refused() -> None:
    with FakeTensorMode():
        fake = torch.empty(2, 8, 6)
    with pytest.raises(LapsTypeError, match=r"patches .*without"):
        forward(patches=fake)
    with pytest.raises(LapsTypeError, match=r"patches .*cannot be exported: Cannot pack tensors on meta"):
        forward(patches=torch.empty(2, 8, 6, device="meta"))


NUMBERS = ["selection_ratio", "attention_weight", "negative_slope", "temperature"]
OUT_OF_RANGE = [(name, value) for name in NUMBERS for value in (-1, float("nan"), float("inf"))]


@pytest.mark.parametrize(
    ("name", "value"), [*OUT_OF_RANGE, ("chunk", 0), ("chunk", -1), ("num_prefix_tokens", -1)]
)
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(LapsValueError, match=name):
        _laps.SimilarityOptions(**{"selection_ratio": 0.5, name: value})


@pytest.mark.parametrize(("count", "changes"), [(8, {"prefix": None}), (9, {"prefix": None}), (1, {})])
def test_leading_prefix_rows_that_do_not_fit_are_refused(count: int, changes: dict[str, Any]) -> None:
    options = _laps.SimilarityOptions(selection_ratio=0.5, num_prefix_tokens=count)
    with pytest.raises(LapsValueError, match="num_prefix_tokens"):
        forward(options=options, **changes)


@pytest.mark.parametrize(("rows", "prefix_rows"), [(1, 0), (9, 1)])
def test_gradients_that_do_not_fit_leading_prefix_rows_are_refused(rows: int, prefix_rows: int) -> None:
    options = _laps.SimilarityOptions(selection_ratio=0.5, num_prefix_tokens=1)
    b, t, n, c, words, m, _ = SIZES.values()
    first = list(arguments(options=options, prefix=None, patches=np.ones((b, n + 1, c), "f")).values())[:11]
    saved = [np.zeros((b, t, 1), "u1"), np.zeros((b, t, words), "i2"), np.zeros((b, t, m + 2), "i2")]
    grads = [np.ones((b, t), "f"), None]
    shapes = [(b, rows, c), (t, words, c), (b, n, m)]
    out = [np.empty(shape, "f") for shape in shapes]
    prefix = np.empty((b, prefix_rows, c), "f") if prefix_rows else None
    with pytest.raises(LapsValueError, match="out_grad_prefix" if prefix_rows else "out_grad_patches"):
        _laps.similarity_backward(*first, *saved, *grads, *out, prefix, None, None)


def test_random_arguments_never_get_past_an_exception() -> None:
    """A few thousand calls with shapes, dtypes, layouts and values at random; most are wrong in some way."""
    rng = random.Random(0)
    dtypes = [np.float32] * 12 + [np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex128]
    allowed = (LapsError, TypeError, OverflowError, BufferError, MemoryError)

    def anything(shape: tuple[int, ...]) -> Any:
        shape = tuple(rng.choice([d] * 30 + [0, 1, d + 1]) for d in shape)
        if rng.random() < 0.03:
            shape = shape[1:]
        values = rng.choice([0.0, 1.0, np.nan, np.inf, 1e30]) * np.random.default_rng(0).standard_normal(
            shape
        )
        with np.errstate(all="ignore"):
            array = np.atleast_1d(np.abs(values)).astype(rng.choice(dtypes))
        layouts = [array] * 8 + [np.asfortranarray(array), array[..., ::-1], None, 3]
        return rng.choice(layouts)

    b, t, n, c, l, m, p = SIZES.values()  # noqa: E741
    shapes: dict[str, tuple[int, ...]] = {
        "patches": (b, n, c),
        "words": (t, l, c),
        "word_lengths": (t,),
        "logits": (b, n, m),
        "prefix": (b, p, c),
        "keep_prob": (b, n),
        "mask": (b, t, n),
        "out_scores": (b, t),
        "out_kept_fraction": (b, t),
        "out_selection": (b, t, 1),
        "out_best_token": (b, t, l),
        "out_best_word": (b, t, p + m + 1),
    }
    done = 0
    for _ in range(3000):
        changes: dict[str, Any] = {}
        for name in rng.sample(sorted(shapes), rng.randint(1, 3)):
            changes[name] = anything(shapes[name])
        changes["pairwise"] = rng.random() < 0.2
        changes["seed"] = rng.choice([None, 0, -1, 2**64 - 1])
        try:
            forward(**changes)
            done += 1
        except allowed:
            pass
    assert done > 50, "the fuzzer should also get through"


def test_wrong_saved_tensors_are_refused_in_backward() -> None:
    given = arguments()
    outs = {
        "out_selection": np.zeros((2, 3, 1), np.uint8),
        "out_best_token": np.zeros((2, 3, 5), np.int16),
        "out_best_word": np.zeros((2, 3, 4), np.int16),
    }
    forward(**outs)
    first = [*given.values()][:11]
    saved = [outs["out_selection"], outs["out_best_token"], outs["out_best_word"]]
    grads = [np.ones((2, 3), np.float32), None]

    def backward(saved: list[Any]) -> list[np.ndarray]:
        out = [np.empty_like(given[name]) for name in ("patches", "words", "logits", "prefix")]
        _laps.similarity_backward(*first, *saved, *grads, *out, None, None)
        return out

    assert all(np.isfinite(grad).all() for grad in backward(saved))
    for which, value in ((1, -1), (1, 4), (2, 5), (2, 32767)):
        wrong = [array.copy() for array in saved]
        wrong[which][0, 0, 0] = value
        with pytest.raises(LapsValueError, match="best_token" if which == 1 else "best_word"):
            backward(wrong)
    # Any bits are a selection.
    random_bits = [np.full_like(saved[0], 0), *saved[1:]]
    backward(random_bits)


LONG_CALL = """
import signal
import torch, laps
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
torch.set_num_threads(2)
patches, words, logits = torch.randn(200, 196, 256), torch.randn(4000, 30, 256), torch.randn(200, 196, 39)
print("started", flush=True)
try:
    laps.functional.similarity(patches, words, torch.full((4000,), 30), logits, selection_ratio=0.5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    print("finished", flush=True)
"""


def test_ctrl_c_ends_a_long_call() -> None:
    process = subprocess.Popen([sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == "interrupted\n"
