"""The oracle: LAPS for one image and one text at a time, in plain loops.

Every backend is tested against this file, so it is written to be believed on reading, never to be fast. It
follows `reference/laps.md` stage by stage: scores of selection (`self_scores`, `text_scores`,
`selection_scores`), the decision which patches stay (`select`), the tokens (`tokens`), their alignment with
the words (`alignment`). Everything is made of differentiable torch operations on float32 or float64 tensors,
so that autograd gives the gradients; what must not carry gradient is detached on the spot. Tests normally
pass float64.

Symbols: patches v_i (N, C), words w_j (l, C) without padding, logits l_ij (N, N_c), keep probability p_i
(N,), decision D_i (N,), scores s_i (N,).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # the floor under the weights of the stable form, and the clamp of the probabilities
ZERO = 1e-12  # a vector that is this short has no direction


# ---- directions


def l2(vector: Tensor, scale: float = 1.0) -> Tensor:
    """x / |x|; a zero vector (|x| <= 1e-12 scale) gives zero, with zero gradient."""
    length = vector.square().sum().sqrt()
    if length.item() <= ZERO * scale:
        return torch.zeros_like(vector)
    return vector / length


def direction_of_sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """l2(sum_i w_i v_i) for weights w_i >= 0.

    Vectors that cancel leave rounding noise of about 1e-16 sum_i w_i |v_i|, which is no direction: such a sum
    is zero.
    """
    sum_of_lengths = weights.detach() @ vectors.detach().norm(dim=1)
    return l2(weights @ vectors, sum_of_lengths.item())


def direction_of_mean(vectors: Tensor) -> Tensor:
    """l2(mean_i v_i)."""
    return direction_of_sum(vectors.new_full((len(vectors),), 1 / len(vectors)), vectors)


# ---- selection


def self_scores(patches: Tensor, score: str = "cosine") -> Tensor:
    """a_i (N,): how well patch i agrees with the mean of the patches. No gradient."""
    patches = patches.detach()
    if score == "dot":
        mean = patches.mean(0)
        return torch.stack([v @ mean / len(v) for v in patches])
    direction = direction_of_mean(patches)
    return torch.stack([l2(v) @ direction for v in patches])


def text_scores(patches: Tensor, words: Tensor, score: str = "cosine") -> Tensor:
    """b_i (N,): how well patch i agrees with the mean of the words. No gradient."""
    patches, words = patches.detach(), words.detach()
    if score == "dot":
        mean = words.mean(0)
        return torch.stack([v @ mean / len(v) for v in patches])
    direction = direction_of_mean(words)
    return torch.stack([l2(v) @ direction for v in patches])


def rescale(values: Tensor) -> Tensor:
    """(x - min) / (max - min) over the patches of an image; 0 where all are equal."""
    low, high = values.min(), values.max()
    if low == high:
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def selection_scores(
    patches: Tensor,
    words: Tensor,
    keep_prob: Tensor | None = None,
    *,
    language_context: bool = True,
    attention_weight: float = 0.8,
    score: str = "cosine",
) -> Tensor:
    """s_i (N,): a + b as released; (1 - beta) p + beta (a' + b') / 2 as in the paper, with gradient to p."""
    a, b = self_scores(patches, score), text_scores(patches, words, score)
    if keep_prob is None:
        return a + b if language_context else a
    context = (rescale(a) + rescale(b)) / 2 if language_context else rescale(a)
    return (1 - attention_weight) * keep_prob + attention_weight * context


GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64


def mix(z: int) -> int:
    """The finaliser of splitmix64, on integers modulo 2^64."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 % WORD
    z ^= z >> 27
    z = z * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def uniform(seed: int, image: int, caption: int, patch: int) -> float:
    """A number in (0, 1) that depends on its four keys only."""
    h = mix((seed + GOLDEN) % WORD)
    for key in (image, caption, patch):
        h = mix((h + (key + 1) * GOLDEN) % WORD)
    return ((h >> 11) + 0.5) * 2.0**-53


def logistic_noise(seed: int, image: int, caption: int, num_patches: int) -> Tensor:
    """Logistic noise (N,) in float64, the difference of two Gumbel variables: log u - log(1 - u)."""
    u = torch.tensor([uniform(seed, image, caption, i) for i in range(num_patches)], dtype=torch.float64)
    return u.log() - torch.log1p(-u)


def top(values: Tensor, k: int) -> tuple[Tensor, float]:
    """Which k values are the highest (N,) bool, ties to the lower index; and the gap to the next one."""
    order = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:k]] = True
    gap = (values[order[k - 1]] - values[order[k]]).item() if k < len(values) else math.inf
    return chosen, gap


class Selection(NamedTuple):
    """The decision D (N,): bool in the hard form, floating in the stable form, where it carries gradient."""

    decision: Tensor
    margin: float  # how far the scores are from another decision


def select(
    scores: Tensor,
    k: int,
    *,
    stable: bool = False,
    noise: Tensor | None = None,
    sampling: str = "gumbel",
    temperature: float = 1.0,
    override: Tensor | None = None,
) -> Selection:
    """Keep the k highest scores (hard form), or decide with straight-through gradient (`stable`, the paper).

    `override` (N,) bool replaces the hard decision; the soft values, hence the gradient, stay as they are.
    """
    if not stable:
        hard, margin = top(scores, k)
        return Selection(hard if override is None else override, margin)

    clamped = scores.clamp(EPS, 1 - EPS)
    z = clamped.log() - (1 - clamped).log()
    if noise is not None:
        z = z + noise.to(z.dtype)
    soft = torch.sigmoid(z / temperature)

    if noise is None:
        hard, margin = top(scores, k)
    elif sampling == "topk":
        hard, margin = top(z, k)
    else:
        hard, margin = z > 0, z.abs().min().item()
    if override is not None:
        hard = override
    return Selection(hard.to(soft.dtype) + (soft - soft.detach()), margin)


# ---- tokens


def aggregation_weights(logits: Tensor, decision: Tensor) -> Tensor:
    """Weights (N,) of one aggregated token from its logits (N,).

    The maximum in the stable form is part of the formula (it sets what eps is compared with), so it carries
    gradient.
    """
    if decision.dtype == torch.bool:
        weights = torch.zeros_like(logits)
        weights[decision] = torch.softmax(logits[decision], 0)
        return weights
    kept = torch.exp(logits - logits.max(0).values) * decision
    return (kept + EPS / len(logits)) / (kept.sum() + EPS)


def fusion_weights(scores: Tensor, decision: Tensor) -> Tensor:
    """Weights (N,) of the token that fuses the dropped patches."""
    if decision.dtype == torch.bool:
        weights = torch.zeros_like(scores)
        weights[~decision] = torch.softmax(scores[~decision], 0)
        return weights
    highest = scores[decision < 1].max().detach()  # any constant will do: it cancels in the quotient
    dropped = torch.exp(scores - highest) * (1 - decision)
    return dropped / dropped.sum()


def tokens(
    patches: Tensor,
    logits: Tensor,
    decision: Tensor,
    scores: Tensor,
    *,
    prefix: Tensor | None = None,
    fusion: bool = True,
) -> Tensor:
    """u (M, C), normalised: the prefix tokens, c_1 .. c_Nc, and r if there is anything to fuse."""
    result = [] if prefix is None else [l2(token) for token in prefix]
    for j in range(logits.shape[1]):
        result.append(direction_of_sum(aggregation_weights(logits[:, j], decision), patches))
    if fusion and not decision.detach().eq(1).all():
        result.append(direction_of_sum(fusion_weights(scores, decision), patches))
    return torch.stack(result)


# ---- alignment


def largest(values: list[Tensor]) -> Tensor:
    """The maximum; among equals the first, which alone receives the gradient."""
    best = values[0]
    for value in values[1:]:
        if value > best:
            best = value
    return best


def alignment_matrix(tokens: Tensor, words: Tensor, negative_slope: float = 0.1) -> list[list[Tensor]]:
    """A_mj = leaky_relu(u_m . l2(w_j)), M rows of l scalars."""
    directions = [l2(word) for word in words]
    return [[torch.nn.functional.leaky_relu(u @ w, negative_slope) for w in directions] for u in tokens]


def alignment(
    tokens: Tensor,
    words: Tensor,
    *,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
) -> Tensor:
    """The score of the pair, from its tokens (M, C), normalised, and its real words (l, C)."""
    rows = alignment_matrix(tokens, words, negative_slope)
    columns = [list(column) for column in zip(*rows, strict=True)]
    word_to_patch = torch.stack([largest(column) for column in columns]).mean()
    patch_to_word = torch.stack([largest(row) for row in rows]).mean()
    if directions == "word_to_patch":
        return word_to_patch
    if directions == "patch_to_word":
        return patch_to_word
    both = word_to_patch + patch_to_word
    return both / 2 if direction_reduction == "mean" else both


# ---- pairs


class Pair(NamedTuple):
    """What is computed for one image and one text."""

    score: Tensor
    kept_fraction: Tensor
    decision: Tensor  # (N,)
    margin: float


def pair(
    image: int,
    caption: int,
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    selection_ratio: float,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | None = None,
    directions: str = "both",
    direction_reduction: str = "sum",
    negative_slope: float = 0.1,
    fusion: bool = True,
    language_context: bool = True,
    attention_weight: float = 0.8,
    score: str = "cosine",
    sampling: str = "gumbel",
    temperature: float = 1.0,
    selection: Tensor | None = None,
) -> Pair:
    """The method for one image and one caption, given by their indices, which are also the keys of the noise.

    Everything else is of the whole batch, as in `similarity`; only mask and selection (N,) are of the pair.
    """
    v, w = patches[image], words[caption, : int(word_lengths[caption])]
    own_logits = logits[image]
    own_prefix = None if prefix is None else prefix[image]
    p = None if keep_prob is None else keep_prob[image]
    k = math.ceil(len(v) * selection_ratio)
    stable = p is not None or (mask is not None and mask.dtype != torch.bool)

    if not all(x.isfinite().all() for x in (v, w, own_logits, own_prefix, p, mask) if x is not None):
        nan = v.new_tensor(math.nan)
        return Pair(nan, nan, torch.zeros(len(v), dtype=torch.bool), 0.0)

    s = selection_scores(
        v, w, p, language_context=language_context, attention_weight=attention_weight, score=score
    )
    if mask is not None:
        decision, margin = mask, math.inf
    else:
        noise = logistic_noise(seed, image, caption, len(v)) if stable and seed is not None else None
        decision, margin = select(
            s, k, stable=stable, noise=noise, sampling=sampling, temperature=temperature, override=selection
        )

    result = alignment(
        tokens(v, own_logits, decision, s, prefix=own_prefix, fusion=fusion),
        w,
        directions=directions,
        direction_reduction=direction_reduction,
        negative_slope=negative_slope,
    )
    return Pair(result, decision.to(v.dtype).mean(), decision, margin)


def all_pairs(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    selection: Tensor | None = None,
    **options: Any,
) -> list[list[Pair]]:
    """Every image with every text; mask and selection (B_v, B_t, N)."""
    batch = (patches, words, word_lengths, logits)
    rows = []
    for i in range(len(patches)):
        row = []
        for t in range(len(words)):
            own_mask = None if mask is None else mask[i, t]
            own_selection = None if selection is None else selection[i, t]
            row.append(pair(i, t, *batch, mask=own_mask, selection=own_selection, **options))
        rows.append(row)
    return rows


def similarity(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    return_kept_fraction: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scores (B_v, B_t) of patches (B_v, N, C) with words (B_t, L, C); with the kept fractions if asked for.

    Keywords as in `laps.functional.similarity`, and `selection` (B_v, B_t, N) bool, which overrides the hard
    decision.
    """
    rows = all_pairs(patches, words, word_lengths, logits, **options)
    scores = torch.stack([torch.stack([p.score for p in row]) for row in rows])
    kept_fraction = torch.stack([torch.stack([p.kept_fraction for p in row]) for row in rows])
    return (scores, kept_fraction) if return_kept_fraction else scores


def similarity_pairwise(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    selection: Tensor | None = None,
    return_kept_fraction: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scores (B,) of image i with text i; mask and selection (B, N)."""
    batch = (patches, words, word_lengths, logits)
    pairs = []
    for i in range(len(patches)):
        own_mask = None if mask is None else mask[i]
        own_selection = None if selection is None else selection[i]
        pairs.append(pair(i, i, *batch, mask=own_mask, selection=own_selection, **options))
    scores = torch.stack([p.score for p in pairs])
    kept_fraction = torch.stack([p.kept_fraction for p in pairs])
    return (scores, kept_fraction) if return_kept_fraction else scores


def selection_mask(
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    *,
    selection_ratio: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The hard decision D (B_v, B_t, N) bool, and its margin (B_v, B_t).

    The margin is the gap between the last score kept and the first one dropped, or with Gumbel sampling the
    distance of the nearest z_i to 0; inf where nothing could change, 0 for pairs that are not finite. Below
    the rounding error of a backend its selection may differ from this one, rightly.
    """
    logits = patches.new_zeros(patches.shape[0], patches.shape[1], 1)
    with torch.no_grad():
        rows = all_pairs(patches, words, word_lengths, logits, selection_ratio=selection_ratio, **options)
    decision = torch.stack([torch.stack([p.decision == 1 for p in row]) for row in rows])
    margin = torch.tensor([[p.margin for p in row] for row in rows], dtype=torch.float64)
    return decision, margin


def max_sim(patches: Tensor, words: Tensor, word_lengths: Tensor) -> Tensor:
    """S (B_v, B_t) = sum_j max_i v_i . w_j over the real words, vectors as they are; NaN if not finite."""
    rows = []
    for v in patches:
        row = []
        for caption, length in zip(words, word_lengths.tolist(), strict=True):
            w = caption[:length]
            total = v.new_tensor(0.0 if v.isfinite().all() and w.isfinite().all() else math.nan)
            for word in w if total.isfinite() else []:
                total = total + largest([patch @ word for patch in v])
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)
