"""TGDT against its equations: the local score, the global one, and what holds the two modalities together."""

from __future__ import annotations

import laps.heads.tgdt
import pytest
import torch
from _head_equations import CHANNELS, check_equations
from _models import tiny_laps
from laps import LapsValueError
from laps.heads import SimilarityHead, build_head
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [8, 3, 4, 6, 1]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / (x.norm() * y.norm())


def local(patches: Tensor, words: Tensor) -> Tensor:
    """Of tokens [CLS], inner words, last piece, [SEP]."""
    inner = list(words)[1:-2]
    best = [torch.stack([cosine(v, w) for v in patches]).max() for w in inner]
    return 10 * sum(best, torch.zeros((), dtype=words.dtype))


def whole(tokens: Tensor, prefix: int) -> Tensor:
    return tokens[0] if prefix else tokens.mean(0)


def plain(tokens: Tensor, words: Tensor, prefix: int) -> Tensor:
    return local(tokens[prefix:], words) + cosine(whole(tokens, prefix), words[0])


def head_of(patches: int, prefix: int) -> SimilarityHead:
    return build_head("tgdt", embed_dim=CHANNELS, num_patches=patches, num_prefix_tokens=prefix)


def example(patches: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(patches)
    images = torch.randn(5, prefix + patches, CHANNELS, dtype=torch.float64, generator=generator)
    words = torch.randn(5, max(LENGTHS), CHANNELS, dtype=torch.float64, generator=generator)
    for row, length in zip(words, LENGTHS, strict=True):
        row[length:] = 1e6
    return images, words, torch.tensor(LENGTHS)


@pytest.mark.parametrize(("patches", "prefix"), [(1, 0), (1, 1), (6, 0), (6, 1), (7, 2)])
def test_scores_and_gradients_are_those_of_the_equations(patches: int, prefix: int) -> None:
    check_equations(head_of(patches, prefix), lambda v, w: plain(v, w, prefix))


@pytest.mark.parametrize(("patches", "prefix"), [(6, 0), (6, 1), (7, 2)])
def test_the_loss_has_both_scores_and_a_penalty(patches: int, prefix: int) -> None:
    images, words, lengths = example(patches, prefix)
    images.requires_grad_()
    words.requires_grad_()
    scored = head_of(patches, prefix).training_scores(images, words, lengths)
    texts = [row[:length] for row, length in zip(words, LENGTHS, strict=True)]
    expected_local = torch.stack([torch.stack([local(v[prefix:], w) for w in texts]) for v in images])
    expected_global = torch.stack(
        [torch.stack([cosine(whole(v, prefix), w[0]) for w in texts]) for v in images]
    )
    penalty = torch.zeros((), dtype=torch.float64)
    for j in range(5):
        gaps = [
            (
                cosine(texts[i][0], texts[j][0]) - cosine(whole(images[i], prefix), whole(images[j], prefix))
            ).abs()
            for i in range(5)
        ]
        penalty = penalty + (torch.stack(gaps).max() - 0.3).clamp(min=0)

    for found, expected in zip(scored.loss_scores, (expected_local, expected_global), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(scored.scores, expected_local + expected_global, rtol=0, atol=1e-9)
    assert scored.penalty is not None
    assert penalty > 0
    torch.testing.assert_close(scored.penalty, penalty, rtol=0, atol=1e-9)
    found_grads = torch.autograd.grad(scored.penalty, (images, words))
    for one, other in zip(found_grads, torch.autograd.grad(penalty, (images, words)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_there_is_no_penalty_for_what_is_alike_or_not_beside_each_other() -> None:
    images, words, lengths = example(6, 1)
    head = head_of(6, 1)
    images[:, 0] = words[:, 0]
    images.requires_grad_()
    alike = head.training_scores(images, words, lengths).penalty
    assert alike is not None
    assert alike == 0
    alike.backward()
    assert images.grad is not None
    assert not images.grad.any()
    assert head.training_scores(images[:4], words, lengths).penalty is None


def test_the_loss_of_a_model_is_that_of_both_scores_and_the_penalty() -> None:
    objective = tiny_laps(head="tgdt").objective
    assert (objective.options()["name"], objective.options()["margin"]) == ("hinge", 0.2)
    images, words, lengths = example(6, 1)
    scored = head_of(6, 1).training_scores(images, words, lengths)
    assert scored.penalty is not None
    loss, values = objective(
        scored.scores, torch.arange(5), loss_scores=scored.loss_scores, penalty=scored.penalty
    )
    hinges = [laps.losses.hinge_loss(s, range(5), range(5), 0.2) for s in scored.loss_scores]
    torch.testing.assert_close(loss, hinges[0] + hinges[1] + scored.penalty)
    assert values["penalty"] == scored.penalty


def test_the_triplet_loss_takes_the_scores() -> None:
    head = head_of(6, 1)
    assert head.max_score == 100
    objective = laps.objective.Objective("triplet", max_score=head.max_score)
    images, words, lengths = example(6, 1)
    images.requires_grad_()
    scored = head.training_scores(images, words, lengths)
    loss, _ = objective(scored.scores, torch.arange(5), loss_scores=scored.loss_scores)
    loss.backward()
    assert loss.isfinite()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_embeddings_are_the_global_vectors(prefix: int) -> None:
    images, words, lengths = example(6, prefix)
    head = head_of(6, prefix)
    photo, text = head.encode_image(images), head.encode_text(words, lengths)
    for i in range(5):
        v = whole(images[i], prefix)
        torch.testing.assert_close(photo.embedding[i], v / v.norm())
        torch.testing.assert_close(text.embedding[i], words[i, 0] / words[i, 0].norm())
    assert photo.patches is not None
    assert torch.equal(photo.patches, images[:, prefix:])


@pytest.mark.parametrize("longest", [1, 2, 3, 4])
def test_short_captions_have_no_local_score(longest: int) -> None:
    images, words, _ = example(6, 1)
    head = head_of(6, 1)
    lengths = torch.tensor([longest, 1, min(longest, 3), min(longest, 2), 1])
    scored = head.training_scores(images, words[:, :longest], lengths)
    own, _ = scored.loss_scores
    assert own[:, 1:].count_nonzero() == 0
    assert bool(own[:, 0].any()) is (longest == 4)
    pairwise = head.similarity_pairwise(
        head.encode_image(images), head.encode_text(words[:, :longest], lengths)
    )
    torch.testing.assert_close(pairwise, scored.scores.diagonal())


@pytest.mark.parametrize("patches", [1, 6])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("caption", range(5))
def test_shares_are_those_of_the_score(patches: int, prefix: int, caption: int) -> None:
    images, words, lengths = example(patches, prefix)
    length = LENGTHS[caption]
    head = head_of(patches, prefix)
    photo, text = head.encode_image(images[:1]), head.encode_text(words, lengths)[caption]
    mask = torch.arange(patches) % 2 == 0
    for chosen in (None, mask):
        kept = mask if chosen is not None else torch.ones(patches, dtype=torch.bool)
        tokens = torch.cat([images[0, :prefix], images[0, prefix:][kept]])
        at = head.explain(photo, text, mask=chosen)
        count = int(kept.sum())
        assert at.score == pytest.approx(float(plain(tokens, words[caption, :length], prefix)), abs=1e-9)
        assert at.shares.shape == at.alignment.shape == (prefix + count, length)
        assert at.patch_shares.sum() + at.prefix_shares.sum() == pytest.approx(at.score, abs=1e-9)
        assert not at.patch_shares[:, ~at.kept].any()
        assert at.num_prefix_tokens == prefix
        # The last piece and [SEP] say nothing, and [CLS] only S_g.
        assert not at.shares[:, max(length - 2, 1) :].any()
        of_first = float(cosine(whole(tokens, prefix), words[caption, 0]))
        assert at.shares[:, 0].sum() == pytest.approx(of_first)
        if prefix:
            assert at.prefix_shares[0, 0] == pytest.approx(of_first)
            assert not at.prefix_shares.ravel()[1:].any()
        assert (at.maps >= 0).all()
        for j in range(1, length - 2):
            best = int(at.alignment[prefix:, j].argmax())
            assert at.shares[prefix + best, j] == pytest.approx(10 * at.alignment[prefix + best, j])


def test_an_embedding_that_is_not_finite_is_not_explained() -> None:
    images, words, lengths = example(6, 1)
    head = head_of(6, 1)
    text = head.encode_text(words[:1], lengths[:1])
    images[0, 0, 2] = torch.nan
    with pytest.raises(LapsValueError, match="embedding has values that are not finite"):
        head.explain(head.encode_image(images[:1]), text)
    photo = head.encode_image(images[1:2])
    with pytest.raises(LapsValueError, match="mask does not fit"):
        head.explain(photo, text, mask=torch.zeros(6, dtype=torch.bool))
