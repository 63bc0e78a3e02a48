"""Heads are found by name, are built again from their options, and the global one is a cosine."""

from __future__ import annotations

from typing import Any

import laps
import laps.heads.pairs
import pytest
import torch
from laps import LapsTypeError, LapsValueError
from laps.features import ImageFeatures, TextFeatures
from laps.heads import GlobalHead, PairHead, Pairs, SimilarityHead, build_head, head_names, register_head
from laps.heads.layers import Linear
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

C, N, P = 16, 9, 1
# Heads that say where a score comes from.
EXPLAINING: list[tuple[str, dict[str, Any]]] = [
    ("laps", {}),
    ("chan", {}),
    ("cpfean", {}),
    ("cpfean", {"alignment": "region"}),
    ("cpfean", {"alignment": "max_mean", "fusion": False}),
    ("scan", {}),
    ("scan", {"direction": "i2t"}),
    ("scan", {"direction": "both"}),
    ("tgdt", {}),
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("laps", {}),
    ("laps", {"variant": "paper", "attention_weight": 0.5, "sampling": "topk", "score": "dot"}),
    ("laps", {"selection": "none", "directions": "patch_to_word", "negative_slope": 0.3}),
    ("laps", {"fusion": False, "direction_reduction": "mean", "selection_ratio": 0.8}),
    ("vse", {}),
    ("vse", {"pooling": "first"}),
    ("chan", {}),
    ("laps", {"calibration": "none", "fusion": False}),
    ("laps", {"calibration": "clustering", "words": "both", "word_ratio": 0.8}),
    ("laps", {"alignment": "scan", "words": "aggregation", "max_words": 32}),
    ("laps", {"variant": "paper", "calibration": "none", "words": "selection"}),
    ("chan", {"pooling": "lse", "temperature": 0.2}),
    ("clip", {}),
    ("cpfean", {}),
    ("cpfean", {"region_layers": 0, "word_graph": False, "gamma": 0.5}),
    ("cpfean", {"num_heads": 2, "region_layers": 1, "iou_mask": False, "alignment": "max_mean"}),
    ("cpfean", {"alignment": "region"}),
    ("cpfean", {"alignment": "attention"}),
    ("cpfean", {"fusion": False}),
    ("cpfean", {"fusion": False, "region_layers": 0, "word_graph": False, "alignment": "region"}),
    ("cpfean", {"fusion": False, "alignment": "attention"}),
    ("gpo", {}),
    ("gpo", {"use_prefix": False}),
    ("hrem", {}),
    ("hrem", {"num_heads": 4, "relation_weight": 1.5, "interaction_start": 0}),
    ("saf", {"sim_dim": 12}),
    ("scan", {}),
    ("scan", {"direction": "i2t"}),
    ("scan", {"direction": "both", "pooling": "lse", "lambda_softmax_t2i": 5.0}),
    ("scan", {"direction": "i2t", "pooling": "lse", "lambda_lse_i2t": 20.0}),
    ("sgr", {"sim_dim": 12}),
    ("sgraf", {"sim_dim": 12}),
    ("tgdt", {}),
]


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, P + N, C, generator=generator)
    words = torch.randn(4, 7, C, generator=generator)
    return images, words, torch.tensor([7, 3, 1, 5])


def scores(head: SimilarityHead, longest: int = 7) -> Tensor:
    images, words, lengths = tokens()
    more = torch.full((4, longest - 7, C), 9.0)
    texts = head.encode_text(torch.cat([words, more], 1), lengths)
    return head.similarity(head.encode_image(images), texts)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_head_built_from_its_own_options_is_the_same_head(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    again = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **head.options()).eval()
    again.load_state_dict(head.state_dict())

    assert again.options() == head.options()
    assert options.items() <= head.options().items()
    assert head.name == name
    assert torch.equal(scores(again), scores(head))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_pairs_are_the_diagonal_and_padding_changes_nothing(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    images, words, lengths = tokens()
    pairwise = head.similarity_pairwise(head.encode_image(images), head.encode_text(words[:3], lengths[:3]))

    torch.testing.assert_close(pairwise, scores(head)[:, :3].diagonal(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores(head, longest=12), scores(head), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_training_scores_are_those_of_the_features_and_reach_both_sides(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    images, words, lengths = tokens()
    images.requires_grad_()
    words.requires_grad_()
    result = head.training_scores(images, words, lengths)
    result.scores.sum().backward()

    torch.testing.assert_close(result.scores.detach(), scores(head), rtol=0, atol=1e-6)
    assert images.grad is not None
    assert images.grad.any()
    assert words.grad is not None
    assert words.grad.any()
    assert (result.kept_fraction is not None) is (options.get("variant") == "paper")


def test_the_global_head_is_the_cosine_of_mean_patches_and_mean_words() -> None:
    images, words, lengths = tokens()
    expected = torch.empty(3, 4)
    for i in range(3):
        for t in range(4):
            expected[i, t] = torch.cosine_similarity(
                images[i, P:].mean(0), words[t, : lengths[t]].mean(0), dim=0
            )
    torch.testing.assert_close(scores(GlobalHead(C, N, num_prefix_tokens=P)), expected, rtol=0, atol=1e-6)


def test_the_global_head_pools_the_first_tokens_if_asked() -> None:
    images, words, _ = tokens()
    expected = torch.cosine_similarity(images[:, None, 0], words[None, :, 0], dim=-1)
    torch.testing.assert_close(scores(GlobalHead(C, N, pooling="first")), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("own_heads")
def test_a_head_of_ones_own_is_known_by_its_name_once_and_for_all() -> None:
    class Ones(GlobalHead):
        def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
            return torch.ones(len(images), len(texts))

    register_head("test-ones")(Ones)

    assert "test-ones" in head_names()
    assert {"laps", "vse"} <= set(head_names())
    head = build_head("test-ones", embed_dim=C, num_patches=N)
    assert isinstance(head, Ones)
    assert head.name == "test-ones"
    with pytest.raises(LapsValueError, match='"test-ones" is taken'):
        register_head("test-ones")(Ones)
    with pytest.raises(LapsTypeError, match="head is no SimilarityHead"):
        register_head("test-module")(torch.nn.Linear)  # type: ignore[type-var]


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(LapsValueError, match=r"laps.*vse.*got.*scam"):
        build_head("scam", embed_dim=C, num_patches=N)
    with pytest.raises(LapsTypeError, match=r'"vse" refuses an option.*selection_ratio'):
        build_head("vse", embed_dim=C, num_patches=N, selection_ratio=0.5)
    with pytest.raises(LapsValueError, match="pooling"):
        build_head("vse", embed_dim=C, num_patches=N, pooling="max")
    with pytest.raises(LapsValueError, match="selection_ratio"):
        build_head("laps", embed_dim=C, num_patches=N, selection_ratio=1.5)


def test_the_laps_head_keeps_what_does_not_depend_on_the_caption() -> None:
    torch.manual_seed(0)
    head = laps.nn.LAPSHead(C, N, variant="paper", num_prefix_tokens=P)
    images, words, lengths = tokens()
    features = head.encode_image(images)
    patches = images[:, P:]
    normal = torch.nn.functional.normalize

    assert features.patches is not None
    assert features.prefix is not None
    assert features.logits is not None
    assert features.keep_prob is not None
    assert features.self_scores is not None
    assert torch.equal(features.patches, patches)
    assert torch.equal(features.prefix, images[:, :P])
    assert features.logits.shape == (3, N, head.num_tokens)
    assert torch.equal(features.keep_prob, head.keep_probability(images))
    mean = normal(patches.mean(1, keepdim=True), dim=-1)
    torch.testing.assert_close(features.self_scores, (normal(patches, dim=-1) * mean).sum(-1))
    torch.testing.assert_close(features.embedding, mean[:, 0])
    texts = head.encode_text(words, lengths)
    torch.testing.assert_close(texts.embedding[1], normal(words[1, :3].mean(0), dim=0))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_blocks_of_any_size_give_the_same_scores_and_gradients(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    images, words, lengths = tokens()
    images.requires_grad_()
    words.requires_grad_()
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for chunk in (2**40, 1):
        if isinstance(head, laps.heads.PairHead):
            head.chunk = chunk
        images.grad = words.grad = None
        head.zero_grad()
        scores = head.training_scores(images, words, lengths).scores
        (scores * weights).sum().backward()
        assert images.grad is not None
        assert words.grad is not None
        own = [p.grad.clone() for p in head.parameters() if p.grad is not None]
        found.append([scores.detach(), images.grad.clone(), words.grad.clone(), *own])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def without_dropout(head: SimilarityHead) -> SimilarityHead:
    for module in head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return head


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_weights_and_tokens_score_as_in_float32(
    name: str, options: dict[str, Any], dtype: torch.dtype, training: bool, autocast: bool
) -> None:
    torch.manual_seed(0)
    half, full = (
        without_dropout(build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options))
        for _ in range(2)
    )
    half.to(dtype).train(training)
    full.load_state_dict(half.state_dict())
    full.train(training)
    images, words, lengths = tokens()
    images, words, lengths = images.to(dtype).requires_grad_(), words[:3].to(dtype), lengths[:3]
    # Of a sampled selection.
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = half.training_scores(images, words, lengths)
    torch.manual_seed(1)
    expected = full.training_scores(images.detach().float(), words.float(), lengths)

    pairs = zip([found.scores, *found.loss_scores], [expected.scores, *expected.loss_scores], strict=True)
    for one, other in pairs:
        assert one.dtype == torch.float32
        # Each side alone may be encoded in half precision; bfloat16 has three digits.
        torch.testing.assert_close(one, other, rtol=0, atol=0.01)
    total = found.scores.sum()
    (total if found.penalty is None else total + found.penalty).backward()
    for parameter in half.parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is None or parameter.grad.isfinite().all()
    for one, other in zip(half.buffers(), full.buffers(), strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_no_pair_scores_above_the_highest_score(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    images, words, lengths = tokens()
    # What all patches and words are alike in scores highest.
    for spread in (1.0, 0.1, 0.0):
        texts = head.encode_text(images[0, 0] + spread * words, lengths)
        found = head.similarity(head.encode_image(images[0, 0] + spread * images), texts)
        assert float(found.detach().max()) <= head.max_score + 1e-5


@pytest.mark.parametrize(("name", "options"), EXPLAINING)
@pytest.mark.parametrize("masked", [False, True])
def test_shares_sum_to_the_score(name: str, options: dict[str, Any], masked: bool) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).double().eval()
    images, words, lengths = tokens()
    photo, text = head.encode_image(images[:1].double()), head.encode_text(words[:1].double(), lengths[:1])
    mask = torch.arange(N) % 2 == 0 if masked else None
    with torch.no_grad():
        at = head.explain(photo, text, mask=mask)
        score = float(head.similarity(photo, text))
    if not masked:
        assert at.score == pytest.approx(score, abs=1e-9)
    assert at.kept.sum() == (5 if masked else getattr(head, "num_kept", N))
    per_word = at.patch_shares.sum(1) + at.prefix_shares.sum(1)
    torch.testing.assert_close(torch.tensor(per_word), torch.tensor(at.shares.sum(0)))
    assert at.alignment.shape == at.shares.shape == (len(at.token_weights) + at.num_prefix_tokens, 7)
    if masked and name != "laps":
        assert not at.patch_shares[:, ~at.kept].any()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_what_is_not_finite_spoils_its_own_pairs_only(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = build_head(name, embed_dim=C, num_patches=N, num_prefix_tokens=P, **options).eval()
    images, words, lengths = tokens()
    expected = head.similarity(head.encode_image(images), head.encode_text(words, lengths))
    images[1, P + 2, 3] = torch.nan
    words[2, 0, 1] = torch.inf
    found = head.similarity(head.encode_image(images), head.encode_text(words, lengths))
    if name == "clip" or options.get("pooling") == "first":
        images[1, 0, 3] = torch.nan
        found = head.similarity(head.encode_image(images), head.encode_text(words, lengths))
    spoilt = torch.zeros(3, 4, dtype=torch.bool)
    spoilt[1], spoilt[:, 2] = True, True
    assert found[spoilt].isnan().all()
    torch.testing.assert_close(found[~spoilt], expected[~spoilt])


class Dropped(PairHead):
    """A head that draws random numbers for every pair."""

    def __init__(self, embed_dim: int, num_patches: int, *, num_prefix_tokens: int = 1) -> None:
        super().__init__(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens)
        self.weigh = Linear(embed_dim, embed_dim)

    def options(self) -> dict[str, Any]:
        return {}

    def pair_scores(self, pairs: Pairs) -> Tensor:
        cosines = pairs.products(self.weigh(pairs.patches), pairs.words)
        return torch.nn.functional.dropout(cosines, 0.5).square().sum((-2, -1))


def test_what_a_head_draws_for_pairs_is_drawn_again_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = Dropped(C, N, num_prefix_tokens=P).to(device)
    head.chunk = 1
    images, words, lengths = tokens()
    images, words = images.to(device).requires_grad_(), words.to(device)
    found = []
    for recompute in (True, False):
        if not recompute:
            monkeypatch.setattr(laps.heads.pairs, "checkpoint", lambda block, *x, **_: block(*x))
        torch.manual_seed(1)
        scores = head.training_scores(images, words, lengths).scores
        torch.rand(5, device=device)  # The generator has moved on when the backward pass begins.
        found.append([scores, *torch.autograd.grad(scores.sum(), [images, *head.parameters()])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_torch_is_told_the_device_whose_random_state_a_block_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU: torch keeps the states of the devices of those tensors that are arguments themselves.
    told: list[Any] = []

    def checkpoint(block: Any, *given: Any, **options: Any) -> Tensor:
        assert options.get("preserve_rng_state", True)
        told.append([x.device for x in given if isinstance(x, Tensor)])
        result: Tensor = block(*given)
        return result

    monkeypatch.setattr(laps.heads.pairs, "checkpoint", checkpoint)
    head = Dropped(C, N, num_prefix_tokens=P)
    head.chunk = 1
    images, words, lengths = tokens()
    head.training_scores(images, words, lengths)
    assert told == [[images.device]] * 12
