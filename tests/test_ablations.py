"""Table 4: the steps that `LAPSHead` can replace, beside a plain writing of one pair at a time."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import laps
import pytest
import reference
import torch
from laps import LapsTypeError, LapsValueError
from laps.ablations import TABLE_4
from laps.heads import build_head
from laps.nn import LAPSHead
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.usefixtures("one_thread")

C, LENGTHS, SEED = 8, [9, 1, 6, 3], 5
REPLACED: list[dict[str, Any]] = [
    {"calibration": calibration, "alignment": alignment, "words": words}
    for calibration, alignment, words in itertools.product(
        ["aggregation", "none", "clustering"],
        ["spa", "scan"],
        ["all", "selection", "aggregation", "both"],
    )
][1:]
SOME: list[dict[str, Any]] = [
    {"calibration": "none"},
    {"calibration": "clustering"},
    {"alignment": "scan"},
    {"alignment": "relevance", "relevance_k": 4},
    {"words": "both"},
    {"calibration": "none", "alignment": "scan", "words": "selection", "word_ratio": 0.8},
    {"calibration": "clustering", "fusion": False, "words": "aggregation", "max_words": 6},
]


def make(patches: int = 7, prefix: int = 1, **options: Any) -> LAPSHead:
    torch.manual_seed(0)
    head = LAPSHead(C, patches, 0.6, 0.5, num_prefix_tokens=prefix, **options)
    if head.relevance is not None:  # its last layer begins at zero
        for network in head.relevance.values():
            torch.nn.init.normal_(network.fc2.weight)
    return head


def batch(patches: int = 7, prefix: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Three images and four captions; padding is huge."""
    generator = torch.Generator().manual_seed(patches)
    images = torch.randn(3, prefix + patches, C, dtype=dtype, generator=generator)
    words = torch.randn(4, max(LENGTHS), C, dtype=dtype, generator=generator)
    for row, length in zip(words, LENGTHS, strict=True):
        row[length:] = 1e6
    return images, words, torch.tensor(LENGTHS)


# ---- one pair, plainly


def ranked(values: list[float]) -> list[int]:
    """Indices, the highest value first; ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def clusters(patches: Tensor, count: int) -> list[list[int]]:
    """DPC-kNN on normalised patches (K, C): the members of each cluster."""
    units = torch.stack([reference.l2(v) for v in patches.detach()])
    n = len(units)
    apart = [[float((units[i] - units[j]).norm()) for j in range(n)] for i in range(n)]
    density = []
    for i in range(n):
        nearest = sorted(apart[i][j] for j in range(n) if j != i)[:5]
        density.append(math.exp(-sum(d * d for d in nearest) / max(1, len(nearest))))
    peak = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peak.append(density[i] * (min(apart[i][j] for j in denser) if denser else max(apart[i])))
    centres = sorted(ranked(peak)[:count])
    members: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        own = centres.index(i) if i in centres else ranked([-apart[i][c] for c in centres])[0]
        members[own].append(i)
    return members


def chosen_words(words: Tensor, patches: Tensor, ratio: float) -> list[int]:
    words, patches = words.detach(), patches.detach()
    of_text, of_image = reference.direction_of_mean(words), reference.direction_of_mean(patches)
    scores = [float(reference.l2(w) @ of_text + reference.l2(w) @ of_image) for w in words]
    count = min(len(words), max(4, math.ceil(ratio * len(words))))
    return sorted([0, *[j for j in ranked(scores) if j != 0][: count - 1]])


def scan(tokens: Tensor, words: Tensor) -> Tensor:
    """t2i: Lee et al., equations 7 to 12."""
    units = torch.stack([reference.l2(w) for w in words])
    likeness = torch.nn.functional.leaky_relu(tokens @ units.T, 0.1)
    likeness = likeness / (likeness.square().sum(1, keepdim=True) + 1e-16).sqrt()
    attention = (9 * likeness).softmax(0)
    found = []
    for j in range(len(words)):
        attended = attention[:, j] @ tokens
        found.append(units[j] @ attended / (attended.square().sum() + 1e-16).sqrt())
    return torch.stack(found).mean()


def relevance(head: LAPSHead, tokens: Tensor, words: Tensor) -> Tensor:
    """SEPS, equation 5: a network of the k best matches of each direction, zeros where there are fewer."""
    rows = reference.alignment_matrix(tokens, words, head.negative_slope)
    added = []
    assert head.relevance is not None
    for direction, network in head.relevance.items():
        lines = rows if direction == "patch_to_word" else list(zip(*rows, strict=True))
        best = sorted((reference.largest(list(line)) for line in lines), key=lambda x: -x.item())
        top = best[: head.relevance_k] + [tokens.sum() * 0] * (head.relevance_k - len(best))
        added.append(network.fc2(torch.nn.functional.gelu(network.fc1(torch.stack(top))))[0])
    return sum(added) / (2 if head.direction_reduction == "mean" and len(added) == 2 else 1)


def plain(head: LAPSHead, tokens: Tensor, w: Tensor, image: int, caption: int, seed: int | None) -> Tensor:
    """The score of tokens (P + N, C) with the real words (l, C)."""
    p, n = head.num_prefix_tokens, head.num_patches
    v, ratio = tokens[p:], 1.0 if head.selection == "none" else head.selection_ratio
    scored = head.score is not None
    s = reference.selection_scores(
        v,
        w,
        head.score(v) if head.score is not None else None,
        language_context=head.selection == "text",
        attention_weight=head.attention_weight,
    )
    noise = None if seed is None or not scored else reference.logistic_noise(seed, image, caption, n)
    decision = reference.select(
        s, math.ceil(n * ratio), stable=scored, noise=noise, sampling=head.sampling
    ).decision
    present = decision.to(v.dtype)
    kept = [i for i in range(n) if decision[i].item() == 1]

    u = [reference.l2(token) for token in tokens[:p]]
    if head.calibration == "none":
        u += [present[i] * reference.l2(v[i]) for i in kept]
    elif head.calibration == "clustering":
        for members in clusters(v[kept], head.num_tokens) if kept else []:
            own = torch.tensor([kept[i] for i in members])
            u.append(reference.direction_of_sum(present[own] / len(own), v[own]))
    else:
        logits = head.aggregation.logits(v[None])[0]
        for j in range(head.num_tokens):
            u.append(reference.direction_of_sum(reference.aggregation_weights(logits[:, j], decision), v))
    if head.fusion and len(kept) < n:
        u.append(reference.direction_of_sum(reference.fusion_weights(s, decision), v))
    if not u:
        return v.sum() * 0

    if head.words in ("selection", "both"):
        chosen = chosen_words(w, v, head.word_ratio)
        assert len(chosen) <= len(w)
    else:
        chosen = list(range(len(w)))
    w = w[torch.tensor(chosen)]
    if head.word_aggregation is not None:
        logits = head.word_aggregation.logits(w[None])[0]
        slots = min(max(4, int(0.75 * len(w))), logits.shape[1])
        w = torch.stack([logits[:, j].softmax(0) @ w for j in range(slots)])
    if head.alignment == "scan":
        return scan(torch.stack(u), w)
    score = reference.alignment(
        torch.stack(u),
        w,
        directions=head.directions,
        direction_reduction=head.direction_reduction,
        negative_slope=head.negative_slope,
    )
    if head.relevance is not None:
        score = score + relevance(head, torch.stack(u), w)
    return score


def check(head: LAPSHead) -> None:
    """All scores and gradients are those of the plain writing."""
    head.double()
    images, words, lengths = batch(head.num_patches, head.num_prefix_tokens)
    inputs = [images.requires_grad_(), words.requires_grad_(), *head.parameters()]
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(SEED)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if head.training else None
    expected = torch.stack(
        [
            torch.stack([plain(head, v, words[t, :n], i, t, seed) for t, n in enumerate(LENGTHS)])
            for i, v in enumerate(images)
        ]
    )
    torch.manual_seed(SEED)
    scores = head(images, words, lengths)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
    found, wanted = (
        torch.autograd.grad((values * weights).sum(), inputs, allow_unused=True)
        for values in (scores, expected)
    )
    assert found[0].any()
    assert found[1].any()
    for one, other in zip(found, wanted, strict=True):
        if other is None:  # with no weight in the score
            assert one is None or not one.any()
        else:
            assert bool(one.isfinite().all())
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", REPLACED, ids=lambda options: "-".join(options.values()))
def test_every_combination_is_that_of_the_plain_writing(options: dict[str, Any]) -> None:
    check(make(7, 1, **options))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize(("patches", "prefix"), [(8, 0), (17, 2)])
def test_any_number_of_patches_and_prefix_tokens(options: dict[str, Any], patches: int, prefix: int) -> None:
    check(make(patches, prefix, **options))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("sampling", [None, "gumbel", "topk"])
def test_the_paper_variant_and_its_sampling(options: dict[str, Any], sampling: str | None) -> None:
    head = make(9, 1, variant="paper", attention_weight=0.4, sampling=sampling or "topk", **options)
    check(head.train(sampling is not None))


@pytest.mark.parametrize(
    "others",
    [
        {"selection": "none"},
        {"selection": "image", "fusion": False},
        {"directions": "patch_to_word", "negative_slope": 0.5},
        {"directions": "word_to_patch"},
        {"direction_reduction": "mean"},
        {"score": "dot"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{"calibration": "none"}, {"calibration": "clustering", "words": "both"}, {"alignment": "relevance"}],
)
def test_beside_the_other_options(options: dict[str, Any], others: dict[str, Any]) -> None:
    if others == {"score": "dot"}:  # which only orders differently, as the default head's selection does
        dot, cosine = make(**options, **others).eval(), make(**options).eval()
        assert not torch.equal(*(head(*batch(dtype=torch.float32)) for head in (dot, cosine)))
    else:
        check(make(8, 1, **options, **others))


def test_the_patches_kept_are_those_of_the_fused_path() -> None:
    images, words, lengths = batch(24, 0, torch.float32)
    seen = laps.nn.PatchSelection(0.6)(images, words, lengths)
    # With the tokens left as patches, the score of a caption with one of them tells whether it was kept.
    head = LAPSHead(
        C, 24, 0.6, num_prefix_tokens=0, calibration="none", fusion=False, directions="patch_to_word"
    )
    images.requires_grad_()
    for i, t in itertools.product(range(3), range(4)):
        (gradient,) = torch.autograd.grad(head(images, words, lengths)[i, t], images)
        assert gradient[i].any(-1).nonzero().flatten().tolist() == seen[i, t].tolist()


# ---- clusters


def test_equal_patches_go_to_the_lower_index() -> None:
    images, words, lengths = batch(12, 0)
    images = images[:, [0, 1, 0, 2, 1, 0, 3, 3, 2, 4, 5, 0]]
    head = LAPSHead(C, 12, 1.0, 0.4, num_prefix_tokens=0, calibration="clustering", selection="none").double()
    expected = torch.stack(
        [
            torch.stack([plain(head, v, words[t, :n], i, t, None) for t, n in enumerate(LENGTHS)])
            for i, v in enumerate(images)
        ]
    )
    torch.testing.assert_close(head(images, words, lengths), expected, rtol=0, atol=1e-9)
    same = images[:, :1].expand(-1, 12, -1)
    alone = LAPSHead(C, 1, 1.0, 1.0, num_prefix_tokens=0, calibration="clustering").double()
    torch.testing.assert_close(head(same, words, lengths), alone(same[:, :1], words, lengths))


def test_clusters_are_the_groups_that_one_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 16)
    near = centres.repeat_interleave(torch.tensor([3, 5, 2, 6]), dim=0)
    image = (near + 0.02 * torch.randn(near.shape, generator=generator))[None]
    options: dict[str, Any] = {"selection": "none", "num_prefix_tokens": 0, "directions": "patch_to_word"}
    head = LAPSHead(16, 16, 1.0, 0.25, calibration="clustering", **options)
    score = head(image, centres[None], [4])
    # Four tokens, and each has a word of its own.
    torch.testing.assert_close(score, torch.ones(1, 1), rtol=0, atol=1e-3)


# ---- the table


@pytest.mark.parametrize("row", TABLE_4)
@pytest.mark.parametrize("variant", [{}, {"variant": "paper"}], ids=["as it is", "paper"])
def test_every_row_scores_and_trains_all_its_parameters(row: str, variant: dict[str, Any]) -> None:
    head = make(12, **TABLE_4[row] | variant)
    images, words, lengths = batch(12, dtype=torch.float32)
    images.requires_grad_()
    result = head.training_scores(images, words[:3], lengths[:3])
    objective = laps.objective.Objective(max_score=head.max_score)
    loss, _ = objective(result.scores, torch.arange(3), kept_fraction=result.kept_fraction)
    loss.backward()

    assert result.scores.shape == (3, 3)
    assert result.scores.abs().max() <= head.max_score
    assert images.grad is not None
    assert images.grad.any()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())


def test_the_rows_are_those_of_the_paper_and_no_two_are_equal() -> None:
    assert len(TABLE_4) == 13
    inputs = batch(12, dtype=torch.float32)
    scores = [make(12, **options).eval()(*inputs) for options in TABLE_4.values()]
    for one, other in itertools.combinations(scores, 2):
        assert not torch.allclose(one, other)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("row", [row for row, options in TABLE_4.items() if make(**options).state_dict()])
@pytest.mark.usefixtures("one_process_group")
def test_distributed_training_finds_a_gradient_for_every_parameter(row: str) -> None:
    head = DistributedDataParallel(make(12, **TABLE_4[row]))
    for _ in range(2):  # the second step is where DDP complains about unused parameters
        head(*batch(12, dtype=torch.float32)).sum().backward()


# ---- relevance


def test_training_with_relevance_begins_at_the_score_of_laps() -> None:
    torch.manual_seed(0)
    usual = LAPSHead(C, 12, 0.6, 0.5)
    head = LAPSHead(C, 12, 0.6, 0.5, alignment="relevance")
    head.load_state_dict(usual.state_dict(), strict=False)
    inputs = batch(12, dtype=torch.float32)
    torch.testing.assert_close(head(*inputs), usual(*inputs), rtol=0, atol=1e-6)
    head(*inputs).sum().backward()
    assert head.relevance is not None
    # As in any network whose last layer is zero, the first step is that layer's.
    assert all(network.fc2.weight.grad.any() for network in head.relevance.values())


def test_relevance_of_more_matches_than_captions_have_words_is_refused() -> None:
    with pytest.raises(LapsValueError, match=r"k is out of range .expected k <= 1024, got 100000000"):
        LAPSHead(C, 12, alignment="relevance", relevance_k=100_000_000)


def test_weights_of_half_precision_do_not_halve_the_scores_precision() -> None:
    head = make(12, alignment="relevance")
    images, words, lengths = batch(12, dtype=torch.float32)
    exact = head(images, words, lengths)
    half = head.bfloat16()(images.bfloat16(), words.bfloat16(), lengths)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


# ---- the default head


def test_the_default_head_has_its_parameters_options_and_scores() -> None:
    head, named = make(), make(calibration="aggregation", alignment="spa", words="all", word_ratio=0.5)
    assert list(head.state_dict()) == [
        f"aggregation.{name}"
        for name in ("scale", "norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    # What reads a configuration without Python has no other options.
    assert set(head.options()) == {
        "selection_ratio", "aggregation_ratio", "variant", "directions", "direction_reduction",
        "negative_slope", "selection", "fusion", "attention_weight", "score", "sampling", "temperature",
    }  # fmt: skip
    assert named.options() == head.options()
    assert repr(named) == repr(head)
    images, words, lengths = batch(dtype=torch.float32)
    expected = laps.functional.similarity(
        images,
        words,
        lengths,
        head.aggregation.logits(images)[:, 1:],
        selection_ratio=0.6,
        prefix=1,
    )
    assert torch.equal(head(images, words, lengths), expected)
    assert torch.equal(named(images, words, lengths), expected)


def test_networks_exist_where_they_are_used_only() -> None:
    def networks(**options: Any) -> set[str]:
        return {name.split(".")[0] for name in make(**options).state_dict()}

    assert networks(calibration="none") == networks(calibration="clustering") == set()
    assert networks(calibration="none", variant="paper") == {"score"}
    assert networks(words="selection") == {"aggregation"}
    assert networks(words="both") == networks(words="aggregation") == {"aggregation", "word_aggregation"}
    head = make(words="aggregation")
    assert head.word_aggregation is not None
    assert head.word_aggregation.fc2.out_features == 48
    assert (make(calibration="none").num_tokens, make(calibration="clustering").num_tokens) == (0, 2)
    assert (make(alignment="scan").max_score, make(words="both").max_score) == (1.0, 2.0)


@pytest.mark.parametrize("options", [*SOME, *TABLE_4.values()], ids=str)
def test_a_head_is_built_again_from_its_options(options: dict[str, Any]) -> None:
    head = make(12, **options).eval()
    again = build_head("laps", embed_dim=C, num_patches=12, num_prefix_tokens=1, **head.options()).eval()
    again.load_state_dict(head.state_dict())
    assert options.items() <= head.options().items()
    assert again.options() == head.options()
    assert repr(again) == repr(head)
    inputs = batch(12, dtype=torch.float32)
    assert torch.equal(again(*inputs), head(*inputs))


# ---- pairs, features, blocks


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_pairs_are_the_diagonal_and_features_score_as_tokens_do(
    options: dict[str, Any], variant: str
) -> None:
    head = make(variant=variant, **options).double().eval()
    images, words, lengths = batch()
    scores, kept_fraction = head(images, words[:3], lengths[:3], return_kept_fraction=True)
    photos, texts = head.encode_image(images), head.encode_text(words[:3], lengths[:3])
    assert torch.equal(head.similarity(photos, texts), scores)
    torch.testing.assert_close(head.similarity_pairwise(photos, texts), scores.diagonal())
    paired = head.pairwise(images, words[:3], lengths[:3], return_kept_fraction=True)
    torch.testing.assert_close(paired, (scores.diagonal(), kept_fraction.diagonal()))
    torch.testing.assert_close(
        head.pairwise(images[:1], words[:1], lengths[:1]), scores[:1, 0], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(kept_fraction, torch.full_like(kept_fraction, 5 / 7))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("call", ["forward", "pairwise"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_blocks_of_any_size_give_the_same(options: dict[str, Any], call: str, variant: str) -> None:
    found = []
    for chunk in (None, 1, 60_000):
        head = make(variant=variant, chunk=chunk, **options).double().train()
        images, words, lengths = batch()
        count = 3 if call == "pairwise" else 4
        images.requires_grad_()
        words.requires_grad_()
        torch.manual_seed(SEED)
        scores, kept = getattr(head, call)(images, words[:count], lengths[:count], return_kept_fraction=True)
        weights = torch.arange(scores.numel(), dtype=torch.float64).view_as(scores)
        gradients = torch.autograd.grad(
            (scores * weights).sum(), [images, words, *head.parameters()], allow_unused=True
        )
        found.append([scores, kept, *(x for x in gradients if x is not None)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", SOME, ids=str)
def test_padding_has_no_influence(options: dict[str, Any]) -> None:
    head = make(**options)
    images, words, lengths = batch(dtype=torch.float32)
    found = []
    for padding in (0.0, 1e6, torch.nan):
        own = torch.nn.functional.pad(words, (0, 0, 0, 3))
        for row, length in zip(own, LENGTHS, strict=True):
            row[length:] = padding
        own.requires_grad_()
        scores = head(images, own, lengths)
        gradients = torch.autograd.grad(scores.square().sum(), [own, *head.parameters()])
        for row, length in zip(gradients[0], LENGTHS, strict=True):
            assert not row[length:].any()
        found.append([scores, *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    alone = head(images, words[2:3, : LENGTHS[2]], lengths[2:3])
    torch.testing.assert_close(alone, found[0][0][:, 2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", SOME, ids=str)
def test_what_is_not_finite_spoils_its_own_pairs_only(options: dict[str, Any]) -> None:
    head = make(**options)
    images, words, lengths = batch(dtype=torch.float32)
    expected = head(images, words, lengths)
    images[1, 3, 3], words[2, 0, 1] = torch.nan, torch.inf
    found = head(images, words, lengths)
    spoilt = torch.zeros(3, 4, dtype=torch.bool)
    spoilt[1], spoilt[:, 2] = True, True
    assert found[spoilt].isnan().all()
    torch.testing.assert_close(found[~spoilt], expected[~spoilt])


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_gradients_are_finite_for_zeros_and_equal_patches(options: dict[str, Any], variant: str) -> None:
    head = make(variant=variant, **options)
    images, words, lengths = batch(dtype=torch.float32)
    images[0, 1:] = images[0, :1].clone()
    images[1, 2:5], words[2] = 0, 0
    words[0, 1:4] = words[0, :1].clone()
    images.requires_grad_()
    words.requires_grad_()
    scores = head(images, words, lengths)
    assert bool(scores.isfinite().all())
    for gradient in torch.autograd.grad(scores.sum(), [images, words, *head.parameters()], allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("calibration", ["none", "clustering"])
@pytest.mark.parametrize("alignment", ["spa", "scan"])
def test_a_pair_of_which_nothing_is_kept_scores_zero(calibration: str, alignment: str) -> None:
    head = make(
        prefix=0,
        variant="paper",
        attention_weight=0.0,
        fusion=False,
        calibration=calibration,
        alignment=alignment,
    )
    assert head.score is not None
    torch.nn.init.zeros_(head.score.fc2.weight)
    head.score.fc2.bias.data = torch.tensor([-20.0, 20.0])
    scores, kept_fraction = head(*batch(prefix=0, dtype=torch.float32), return_kept_fraction=True)
    assert not kept_fraction.any()
    assert not scores.any()
    scores.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())


def test_dtypes_and_autocast() -> None:
    for options in SOME:
        head = make(**options)
        expected = head(*batch(dtype=torch.float32))
        images, words, lengths = batch(dtype=torch.bfloat16)
        words[words > 1e5] = 0
        assert head.bfloat16()(images, words, lengths).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = head.float()(*batch(dtype=torch.float32))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
        photos, texts = head.encode_image(images.float()), head.encode_text(words.float(), lengths)
        stored = head.similarity(photos.to(dtype=torch.float16), texts.to(dtype=torch.float16))
        assert stored.dtype == torch.float32
        assert bool(stored.isfinite().all())


def test_a_compiled_head_scores_the_same() -> None:
    torch.compiler.reset()
    head = make(calibration="clustering", alignment="scan", words="both")
    compiled = torch.compile(head, backend="eager")
    inputs = batch(dtype=torch.float32)
    torch.testing.assert_close(compiled(*inputs), head(*inputs), rtol=0, atol=1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "mean"}, 'calibration is unknown (expected one of "aggregation", "none"'),
        ({"alignment": "i2t"}, 'alignment is unknown (expected one of "spa", "scan"'),
        ({"words": "some"}, 'words is unknown (expected one of "all", "selection"'),
        ({"word_ratio": 0.0}, "word_ratio is out of range"),
        ({"max_words": 0}, "max_words is out of range"),
        ({"words": 1}, "words is unknown"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((LapsValueError, LapsTypeError)) as caught:
        make(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({"calibration": "none"}, 'calibration is "none"'),
        ({"alignment": "scan"}, 'alignment is "scan"'),
        ({"words": "both"}, 'words is "both"'),
    ],
)
def test_what_only_the_method_itself_can_is_refused(
    options: dict[str, Any], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LapsValueError, match=f'LAPSHead: {broken}.*or backend "auto" or "torch"'):
        make(backend="native", **options)
    head = make(**options, backend="torch")
    images, words, lengths = batch(dtype=torch.float32)
    expected = head(images, words, lengths)
    assert torch.equal(make(**options, backend="auto")(images, words, lengths), expected)
    with pytest.raises(LapsValueError, match=f"explain: {broken}"):
        head.explain(head.encode_image(images[:1]), head.encode_text(words[:1], lengths[:1]))
    monkeypatch.setenv("LAPS_BACKEND", "native")
    assert torch.equal(head(images, words, lengths), expected)
    with pytest.raises(LapsValueError, match=broken):
        make(**options)(images, words, lengths)


def test_sides_that_do_not_fit_are_refused() -> None:
    head = make(calibration="none")  # which has no parameter to compare them with
    images, words, lengths = batch(dtype=torch.float32)
    with pytest.raises(LapsTypeError, match="words has dtype float64, but patches has dtype float32"):
        head(images, words.double(), lengths)
    with pytest.raises(LapsValueError, match=r"word_tokens has C=7 \(expected embed_dim=8\)"):
        head(images, words[..., 1:], lengths)
    with pytest.raises(LapsValueError, match="words has B=4, but patches has B=3"):
        head.pairwise(images, words, lengths)
    with pytest.raises(LapsValueError, match="words is on meta"):
        head(images, words.to("meta"), lengths)


def test_long_captions_use_all_slots() -> None:
    head = make(words="aggregation", max_words=8)
    images, words, lengths = batch(dtype=torch.float32)
    assert head.word_aggregation is not None
    assert head.word_aggregation.fc2.out_features == 6
    assert head(images, words, lengths).shape == (3, 4)


@pytest.mark.parametrize("name", ["flickr30k-ablation", "scenes-ablation"])
def test_the_comparisons_have_these_rows(name: str, tmp_path: Path) -> None:
    from laps import compare

    comparison = compare.read(name, data=None if name.startswith("scenes") else tmp_path)
    assert {row.name: dict(row.options) for row in comparison.rows} == {
        row: dict(options) for row, options in TABLE_4.items()
    }
