"""SCAN against its equations, with the attended vectors formed."""

from __future__ import annotations

import math
from typing import Any

import laps.heads.scan
import pytest
import torch
from _head_equations import CHANNELS, check_equations
from _models import tiny_laps
from laps import LapsTypeError, LapsValueError
from laps.features import ImageFeatures, TextFeatures
from laps.heads import SimilarityHead, build_head
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: list[dict[str, Any]] = [
    {},
    {"direction": "i2t"},
    {"direction": "both"},
    {"pooling": "lse"},
    {"direction": "i2t", "pooling": "lse", "lambda_lse_i2t": 20.0},
    {"direction": "both", "pooling": "lse", "lambda_softmax_t2i": 2.0, "lambda_lse_t2i": 3.0},
    {"direction": "both", "lambda_softmax_i2t": 11.0},
]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / (x.norm() * y.norm())


def relevances(queries: Tensor, contexts: Tensor, scale: float) -> Tensor:
    """R of every query: its cosine with the unit contexts that it attends to."""
    units = [x / x.norm() for x in contexts]
    a = []
    for x in units:
        row = torch.stack([cosine(x, query) for query in queries])
        row = torch.where(row > 0, row, 0.1 * row)
        a.append(row / row.square().sum().sqrt())
    found = []
    for j, query in enumerate(queries):
        weights = torch.stack([(scale * row[j]).exp() for row in a])
        attended = sum(weight * x for weight, x in zip(weights / weights.sum(), units, strict=True))
        assert isinstance(attended, Tensor)
        found.append(cosine(query, attended))
    return torch.stack(found)


def plain(v: Tensor, w: Tensor, options: dict[str, Any]) -> Tensor:
    scores = []
    for direction, queries, contexts in (("t2i", w, v), ("i2t", v, w)):
        if options["direction"] in (direction, "both"):
            found = relevances(queries, contexts, options[f"lambda_softmax_{direction}"])
            scale = options[f"lambda_lse_{direction}"]
            lse = (scale * found).exp().sum().log() / scale
            scores.append(found.mean() if options["pooling"] == "mean" else lse)
    return torch.stack(scores).mean()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (5, 1), (8, 2)])
def test_scores_and_gradients_are_those_of_the_equations(
    options: dict[str, Any], patches: int, prefix: int
) -> None:
    head = build_head("scan", embed_dim=CHANNELS, num_patches=patches, num_prefix_tokens=prefix, **options)
    check_equations(head, lambda v, w: plain(v[prefix:], w, head.options()))


def test_temperatures_loss_and_direction_are_the_authors() -> None:
    assert build_head("scan", embed_dim=CHANNELS, num_patches=4).options() == {
        "direction": "t2i",
        "pooling": "mean",
        "lambda_softmax_t2i": 9.0,
        "lambda_softmax_i2t": 4.0,
        "lambda_lse_t2i": 6.0,
        "lambda_lse_i2t": 5.0,
        "max_words": 64,
    }
    objective = tiny_laps(head="scan").objective.options()
    assert (objective["name"], objective["margin"]) == ("hinge", 0.2)


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("scale", [1.0, 6.0, 20.0])
def test_the_highest_log_sum_exp_is_that_of_equal_vectors(direction: str, scale: float) -> None:
    head = build_head(
        "scan",
        embed_dim=CHANNELS,
        num_patches=5,
        num_prefix_tokens=0,
        direction=direction,
        pooling="lse",
        lambda_lse_t2i=scale,
        lambda_lse_i2t=scale,
        max_words=11,
    )
    generator = torch.Generator().manual_seed(0)
    images, words = (torch.randn(4, n, CHANNELS, generator=generator) for n in (5, 11))
    images[0], words[0] = images[0, 0], images[0, 0]
    scores = head.training_scores(images, words, torch.tensor([11, 7, 1, 11])).scores

    expected = {"t2i": 1 + math.log(11) / scale, "i2t": 1 + math.log(5) / scale}
    expected["both"] = sum(expected.values()) / 2
    assert head.max_score == pytest.approx(expected[direction])
    assert float(scores[0, 0]) == pytest.approx(head.max_score, abs=1e-5)
    assert float(scores.max()) <= head.max_score + 1e-5


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_the_highest_mean_is_one(direction: str) -> None:
    assert build_head("scan", embed_dim=CHANNELS, num_patches=5, direction=direction).max_score == 1.0


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_vectors_that_cancel_or_vanish_have_finite_scores_and_gradients(direction: str) -> None:
    head = build_head(
        "scan", embed_dim=CHANNELS, num_patches=2, num_prefix_tokens=0, direction=direction
    ).train()
    x, y = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(0))
    # To float32 orthogonal to x, so that what x and -x say is rounding.
    y = y - (x @ y) / (x @ x) * x
    zero = torch.zeros(CHANNELS)
    images = torch.stack([torch.stack(pair) for pair in ((x, -x), (y, -y), (zero, zero), (x, zero))])
    words = torch.stack([torch.stack(pair) for pair in ((y, y), (x, -x), (zero, zero), (y, zero))])
    images.requires_grad_()
    words.requires_grad_()
    scores = head.training_scores(images, words, torch.tensor([2, 2, 2, 1])).scores
    scores.sum().backward()

    assert scores.isfinite().all()
    assert (scores.abs() <= 1 + 1e-6).all()
    assert scores[0, 0].abs() < 1e-3
    assert not scores[2].any()
    for inputs in (images, words):
        assert inputs.grad is not None
        assert inputs.grad.isfinite().all()


def test_sums_of_patches_that_nearly_cancel_are_no_better_than_rounding_allows() -> None:
    # c = e w, whose square is below the rounding of its terms: its cosine with w is 1, not 1e4.
    w, z = torch.eye(CHANNELS)[:2]
    for e in (1e-6, 1e-5, 1e-4, 2e-4):
        head = build_head("scan", embed_dim=CHANNELS, num_patches=2, num_prefix_tokens=0)
        scores = head.training_scores(
            torch.stack([z + e * w, e * w - z])[None], w[None, None], torch.tensor([1])
        ).scores
        assert 0 <= scores.item() < 1.5


def test_a_sharp_attention_ignores_padding() -> None:
    head = build_head(
        "scan",
        embed_dim=CHANNELS,
        num_patches=1,
        num_prefix_tokens=0,
        direction="i2t",
        lambda_softmax_i2t=60.0,
    )
    images = torch.randn(1, 1, CHANNELS, generator=torch.Generator().manual_seed(0))
    words = torch.cat([-images, images]).expand(2, 3, CHANNELS)
    scores = head.training_scores(images, words, torch.tensor([1, 3])).scores
    torch.testing.assert_close(scores, torch.tensor([[-1.0, 1.0]]))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is computed."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_attended_vector_of_a_pair_is_formed() -> None:
    head = build_head("scan", embed_dim=64, num_patches=5, num_prefix_tokens=0, direction="both")
    images = head.encode_image(torch.randn(6, 5, 64))
    texts = head.encode_text(torch.randn(7, 4, 64), torch.tensor([4] * 7))
    with Largest() as largest:
        head.similarity(images, texts)
    # That of cosines, patches, or words: all far below 6 x 7 x 4 x 64.
    assert largest.size <= max(6 * 7 * 4 * 5, 6 * 5 * 64, 7 * 4 * 64)


# ---- where a score comes from


def one_pair(options: dict[str, Any]) -> tuple[SimilarityHead, Tensor, Tensor, ImageFeatures, TextFeatures]:
    head = build_head("scan", embed_dim=CHANNELS, num_patches=6, num_prefix_tokens=1, **options)
    images = torch.randn(1, 7, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, 5, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    texts = head.encode_text(words, torch.tensor([4]))
    return head, images[0, 1:], words[0, :4], head.encode_image(images), texts


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_shares_of_some_patches_are_those_of_an_image_of_these_patches(direction: str) -> None:
    head, patches, words, images, texts = one_pair({"direction": direction})
    mask = torch.tensor([True, False, True, True, False, True])
    at = head.explain(images, texts, mask=mask)

    score = plain(patches[mask], words, head.options())
    assert at.score == pytest.approx(float(score), abs=1e-9)
    assert at.patch_shares.sum() == pytest.approx(float(score), abs=1e-9)
    assert at.kept.tolist() == mask.tolist()
    assert not at.patch_shares[:, ~at.kept].any()
    assert not at.token_weights[:, ~at.kept].any()
    assert at.token_weights.sum(1) == pytest.approx(1)
    assert not at.has_fused_token


def test_tokens_are_the_attended_vectors_of_the_words_then_the_patches() -> None:
    head, patches, words, images, texts = one_pair({"direction": "both"})
    at = head.explain(images, texts)
    of_words = relevances(words, patches, 9.0)
    of_patches = relevances(patches, words, 4.0)

    assert at.shares.shape == at.alignment.shape == (4 + 6, 4)
    torch.testing.assert_close(torch.tensor(at.shares[:4]), (of_words / 4 / 2).diag())
    torch.testing.assert_close(torch.tensor(at.shares[4:].sum(1)), of_patches / 6 / 2)
    torch.testing.assert_close(torch.tensor(at.alignment[:4]).diagonal(), of_words)
    for n, v in enumerate(patches):
        for j, w in enumerate(words):
            assert at.alignment[4 + n, j] == pytest.approx(float(cosine(v, w)))
    # What a patch adds to the cosine of its word's attended vector: its weight times its own cosine.
    units = torch.nn.functional.normalize(patches, dim=-1)
    weights = torch.tensor(at.token_weights[:4])
    added = weights * (units @ torch.nn.functional.normalize(words, dim=-1).T).T
    added = added / (weights @ units).norm(dim=1, keepdim=True) / 4
    alone = build_head("scan", embed_dim=CHANNELS, num_patches=6).explain(images, texts)
    torch.testing.assert_close(torch.tensor(alone.patch_shares), added)
    torch.testing.assert_close(torch.tensor(alone.maps), (4 * added).clamp(min=0))


def test_what_cannot_be_explained_is_refused() -> None:
    head, _, _, images, texts = one_pair({"pooling": "lse"})
    with pytest.raises(LapsValueError, match='pooling "lse" is no sum over words'):
        head.explain(images, texts)
    head, _, _, images, texts = one_pair({})
    for mask in (torch.zeros(6, dtype=torch.bool), torch.ones(5, dtype=torch.bool), torch.ones(6)):
        with pytest.raises(LapsValueError, match=r"mask does not fit.*bool \(6,\)"):
            head.explain(images, texts, mask=mask)


@pytest.mark.parametrize("option", ["softmax_t2i", "softmax_i2t", "lse_t2i", "lse_i2t"])
def test_options_out_of_range_are_named(option: str) -> None:
    with pytest.raises(LapsValueError, match=f"lambda_{option} is out of range"):
        build_head("scan", embed_dim=CHANNELS, num_patches=4, **{f"lambda_{option}": 0.0})
    with pytest.raises(LapsTypeError, match=f"lambda_{option} is no number"):
        build_head("scan", embed_dim=CHANNELS, num_patches=4, **{f"lambda_{option}": "9"})
    with pytest.raises(LapsValueError, match="max_words"):
        build_head("scan", embed_dim=CHANNELS, num_patches=4, max_words=0)
    with pytest.raises(LapsValueError, match="direction is unknown"):
        build_head("scan", embed_dim=CHANNELS, num_patches=4, direction="t2t")
    assert laps.heads.scan.SCANHead.name == "scan"
