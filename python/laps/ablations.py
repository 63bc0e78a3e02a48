"""The rows of the paper's Table 4, and other steps in place of the method's own, in plain PyTorch.

`laps.functional` knows the method with its options. What replaces a whole step (calibration, alignment, or
what is done with the words) is here: selection, the weights of the tokens and the reduction are those of
:mod:`laps.torch_backend`, but all tokens of a pair exist as vectors. Gradients are autograd's. Memory has a
bound all the same: pairs are computed in blocks, and in the backward pass again.

Sizes as in :mod:`laps.torch_backend`: b images, t captions, N patches, M tokens, L words, C channels; what
belongs to captions has a leading s, 1 where all images share them, b where image i has its own caption only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _check, functional
from . import torch_backend as core
from .errors import LapsValueError
from .heads.layers import Linear
from .heads.pairs import CHUNK, unit
from .heads.scan import attention

__all__ = ["TABLE_4", "RelevanceNet", "Switches", "similarity"]

CALIBRATIONS = ("aggregation", "none", "clustering")
ALIGNMENTS = ("spa", "scan", "relevance")
WORDS = ("all", "selection", "aggregation", "both")

LEAST_WORDS = 4  # that a selection keeps, and that an aggregation makes
WORD_SLOTS = 0.75  # aggregated words per word
NEIGHBOURS = 5
SCAN_TEMPERATURE = 9.0
MOST_RELEVANT = 1024  # more than captions have words

# Keyword arguments of `LAPSHead` for each row, by the name that the paper prints. A row says only in what it
# differs from the complete method; beside `variant="paper"` in all rows they are those of the paper variant.
TABLE_4: dict[str, dict[str, Any]] = {
    "without patch selection process": {"selection": "none"},
    # Our reading: the patches are selected by the image alone. It could mean the score net alone as well:
    # {"variant": "paper", "attention_weight": 0.0}.
    "without language-context": {"selection": "image"},
    # The released variant has no score net to leave out, so this row is of the paper variant by itself.
    "only attentive scores": {"variant": "paper", "attention_weight": 1.0},
    # Our reading: aggregation and fusion are both parts of the calibration; the tokens are the prefix and the
    # kept patches.
    "without patch calibration process": {"calibration": "none", "fusion": False},
    "without redundant fusion": {"fusion": False},
    # Our reading: in place of the aggregation network alone, so the fused token stays.
    "use the clustering algorithm": {"calibration": "clustering"},
    # Our reading: every word attends to the tokens (t2i), and the similarities are averaged.
    "replace with SCAN alignment": {"alignment": "scan"},
    "only patch-to-word alignment": {"directions": "patch_to_word"},
    "only word-to-patch alignment": {"directions": "word_to_patch"},
    # The paper tells neither the score nor the ratios of the words; ours are in the docstring of `LAPSHead`.
    "introduce word selection": {"words": "selection"},
    "introduce word aggregation": {"words": "aggregation"},
    "introduce word selection & aggregation": {"words": "both"},
    "Complete LAPS": {},
}


@dataclass(frozen=True)
class Switches:
    """The steps that are replaced; arguments of :class:`laps.nn.LAPSHead`.

    Attributes:
        calibration: ``"aggregation"``, ``"none"`` or ``"clustering"``.
        alignment: ``"spa"``, ``"scan"`` or ``"relevance"``.
        words: ``"all"``, ``"selection"``, ``"aggregation"`` or ``"both"``.
        word_ratio: share of the words that are kept, in (0, 1].
        num_tokens: N_c, the number of clusters.
    """

    calibration: str = "aggregation"
    alignment: str = "spa"
    words: str = "all"
    word_ratio: float = 0.5
    num_tokens: int = 1

    @property
    def any(self) -> bool:
        """Whether a step differs from the method's own."""
        return (self.calibration, self.alignment, self.words) != ("aggregation", "spa", "all")

    @property
    def selects_words(self) -> bool:
        return self.words in ("selection", "both")

    @property
    def aggregates_words(self) -> bool:
        return self.words in ("aggregation", "both")


class RelevanceNet(nn.Module):
    """What the k best matches of one direction add to a score: Linear(GELU(Linear)) with 2k hidden units.

    The last layer begins at zero, so that training begins at the score of LAPS.

    Args:
        k: 1 to 1024.

    Raises:
        LapsValueError, LapsTypeError: k out of its range.

    Source: Mao et al., SEPS (arXiv 2511.01390), equation 5. The sizes and the zeros are ours: the paper
    prints MLP(TOPK(.)), and its code has no such network.

    Example:
        >>> import laps, torch
        >>> net = laps.ablations.RelevanceNet(5)
        >>> net(torch.rand(2, 3, 9), torch.arange(9) < 7).tolist() == [[0, 0, 0], [0, 0, 0]]
        True
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _check.count("RelevanceNet", "k", k)
        if k > MOST_RELEVANT:
            raise LapsValueError(
                _check.message("RelevanceNet", "k is out of range", f"k <= {MOST_RELEVANT}", k)
            )
        # Scores are float32 at least, whatever the weights are.
        self.fc1, self.fc2 = Linear(k, 2 * k), Linear(2 * k, 1)
        for parameter in self.fc2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, best: Tensor, real: Tensor) -> Tensor:
        """The best match of each word (or token), (..., L), of which some are real, to (...,).

        Where fewer than k are real, the rest are zeros.
        """
        best = best.masked_fill(~real, -torch.inf)
        top = best.topk(min(self.k, best.shape[-1]), dim=-1).values
        top = F.pad(top.masked_fill(top == -torch.inf, 0.0), (0, self.k - top.shape[-1]))
        added: Tensor = self.fc2(F.gelu(self.fc1(top)))[..., 0]
        return added


def word_slots(length: int) -> int:
    """How many words so many words are aggregated to."""
    return max(LEAST_WORDS, int(WORD_SLOTS * length))


def refuse(operation: str, switches: Switches, expected: str) -> None:
    """Raise LapsValueError if a step is replaced, naming the argument."""
    usual = Switches()
    for name in ("calibration", "alignment", "words"):
        value = getattr(switches, name)
        if value != getattr(usual, name):
            wanted = f'{name}="{getattr(usual, name)}"{expected}'
            raise LapsValueError(_check.message(operation, f'{name} is "{value}"', wanted))


def check_backend(operation: str, switches: Switches, backend: str | None) -> None:
    """Refuse the native backend, which has the method's own steps only."""
    if backend == "native":
        refuse(operation, switches, ', or backend "auto" or "torch"')


@core._full_precision
def similarity(
    patches: Tensor,
    words: Tensor,
    word_lengths: functional.Lengths,
    *,
    switches: Switches,
    logits: Tensor | None = None,
    prefix: Tensor | None = None,
    keep_prob: Tensor | None = None,
    word_logits: Tensor | None = None,
    relevance: Mapping[str, nn.Module] | None = None,
    pairwise: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (B_v, B_t), or (B,) if `pairwise`; float64 for float64, else float32.

    Arguments as in :func:`laps.functional.similarity`; besides, `switches` says which steps are replaced,
    `logits` are None unless tokens are aggregated, `word_logits` (B_t, L, slots) are there if words are, at
    padding with any values, `relevance` has a network for each direction if that is the alignment, `pairwise`
    scores image i with caption i only, and `chunk` None is 256 MiB.

    Raises:
        LapsValueError: unequal sizes or devices, a length out of range, the native backend. LapsTypeError:
        wrong dtypes.
    """
    operation = "similarity_pairwise" if pairwise else "similarity"
    check_backend(operation, switches, backend or functional.default_backend(operation))
    given = {"patches": patches, "words": words, "logits": logits, "prefix": prefix, "keep_prob": keep_prob}
    given["word_logits"] = word_logits
    device = _check.same_device(operation, given)
    dtype = _check.common_dtype(operation, given)
    functional._backend(operation, "torch", device)
    _check.fake_tensors(operation, given, needs_values=True)
    sizes, captions = _check.Sizes(operation), "B" if pairwise else "B_t"
    sizes.match("patches", patches, "B N C" if pairwise else "B_v N C")
    sizes.match("words", words, f"{captions} L C")
    lengths = _check.word_lengths(operation, word_lengths, sizes[captions], sizes["L"], device)

    patches = core._saturated(patches.to(dtype), torch.finfo(dtype).max)
    images = patches, *(None if x is None else x.to(dtype) for x in (logits, prefix, keep_prob))
    texts = words.to(dtype), lengths, None if word_logits is None else word_logits.to(dtype)
    if chunk is None:
        chunk = sys.maxsize if core._traced(patches) else CHUNK
    settings = switches, core.Options(**options), relevance
    image_step, text_step = _steps(images, texts, *settings[:2], chunk, pairwise)
    if pairwise:
        own = [None if x is None else x[:, None] for x in texts]
        blocks = [(i, part[:4], i, part[4:]) for i, part in core._split(image_step, *images, *own)]
    else:
        blocks = [
            (i, part, t, tuple(None if x is None else x[None] for x in own))
            for t, own in core._split(text_step, *texts)
            for i, part in core._split(image_step, *images)
        ]
    if torch.is_grad_enabled() and len(blocks) > 1:
        scored = [
            checkpoint(_block, *block, *settings, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
    else:
        scored = [_block(*block, *settings) for block in blocks]
    results = []
    for parts in zip(*scored, strict=True):
        rows = len(parts) if pairwise else -(-len(patches) // image_step)
        columns = [torch.cat(parts[k : k + rows]) for k in range(0, len(parts), rows)]
        results.append(columns[0].squeeze(1) if pairwise else torch.cat(columns, dim=1))
    scores, kept_fraction = results
    return scores, kept_fraction


def _steps(
    images: Any, texts: Any, switches: Switches, options: core.Options, budget: int, pairwise: bool
) -> tuple[int, int]:
    """How many images and captions make a block."""
    (patches, logits, prefix, _), (words, _, word_logits) = images, texts
    (count, n, c), (captions, length, _), size = patches.shape, words.shape, patches.element_size()
    made = switches.num_tokens if logits is None else logits.shape[-1]
    made = 1 if switches.calibration == "none" else made + 1  # the vectors of a pair that are no patches
    tokens = made + (n if switches.calibration == "none" else 0) + (0 if prefix is None else prefix.shape[1])
    image = n * c * (16 + 5 * size)
    caption = length * c * (8 + 5 * size)
    floats = 4 * made * n + 6 * made * c + 8 * tokens * length
    pair = 80 * n
    if switches.calibration == "clustering":
        image, pair = image + 24 * n * n, pair + 48 * math.ceil(n * options.selection_ratio) ** 2
    if switches.alignment == "scan":
        floats += length * (4 * tokens + 10 * c)
    if switches.selects_words and word_logits is not None:
        floats += 4 * word_slots(length) * (length + c)
    pair += size * floats
    if pairwise:
        step = max(1, budget // (image + caption + pair))
        return step, step
    return core._fit(count, captions, image, caption, pair, budget)


def _block(
    first: int,
    image_parts: tuple[Any, ...],
    first_text: int,
    text_parts: tuple[Any, ...],
    switches: Switches,
    options: core.Options,
    relevance: Mapping[str, nn.Module] | None,
) -> tuple[Tensor, Tensor]:
    """Scores and kept fractions (b, t) of images and captions numbered from these."""
    images = _images(first, options.score, *image_parts)
    words, lengths, word_logits = text_parts
    captions = core._captions(words, lengths, first_text, options.score)
    words = core._real_words(words, lengths)[0]
    finite = images.finite & captions.finite

    scores = core._selection_scores(images.rows, captions, images.keep_prob, options)
    decision = core._decide(scores, images, captions, options)
    parts, presence = _tokens(images, decision, scores, switches, options)
    if switches.aggregates_words:
        logits = torch.where(captions.real[..., None], word_logits[..., : words.shape[2], :], 0.0)
        sound = logits.isfinite().flatten(2).all(2)
        finite, word_logits = finite & sound, core._zero_unless(sound[..., None, None], logits)
    if switches.selects_words:
        chosen = _chosen_words(images, captions, words, switches.word_ratio)
        captions = captions._replace(real=chosen, lengths=chosen.sum(-1).clamp(min=1))
    if switches.aggregates_words:
        captions = _aggregated_words(captions, words, word_logits)

    # A product counts as often as its token is there, which is how the decision gets a gradient.
    cosines = torch.cat(_products(parts, captions.units), dim=2) * presence[..., None]
    exists = presence.detach() > 0
    exists = torch.cat([exists[..., :1] | ~exists.any(-1, keepdim=True), exists[..., 1:]], dim=-1)
    if switches.alignment == "scan":
        result = _scan(parts, cosines, presence, exists, captions)
    else:
        result = _spa(cosines, exists, captions, options)
        if relevance is not None:
            result = result + _relevance(cosines, exists, captions, options, relevance)
    kept_fraction = decision.to(result.dtype).mean(-1)
    return torch.where(finite, result, torch.nan), torch.where(finite, kept_fraction, torch.nan)


def _images(
    first: int,
    score: str,
    patches: Tensor,
    logits: Tensor | None,
    prefix: Tensor | None,
    keep_prob: Tensor | None,
) -> core.Images:
    """Images numbered from `first`, without what only the fused form of the tokens reads."""
    rows, prefix = core._rows(patches, score), patches[:, :0] if prefix is None else prefix
    logits = patches.new_empty(len(patches), patches.shape[1], 0) if logits is None else logits
    given = [logits, prefix] if keep_prob is None else [logits, prefix, keep_prob]
    finite = torch.cat([rows.finite, *(x.isfinite().flatten(1).all(1, keepdim=True) for x in given)], dim=1)
    finite = finite.all(1, keepdim=True)
    nothing = patches.new_empty(0)
    return core.Images(
        position=torch.arange(first, first + len(patches), device=patches.device)[:, None],
        finite=finite,
        rows=rows,
        patches=rows.scaled,
        norms=rows.norms,
        gram=nothing,
        exponentials=nothing,
        logits=core._zero_unless(finite[..., None], logits).mT,
        prefix=core._polar(core._zero_unless(finite[..., None], prefix))[0],
        keep_prob=None if keep_prob is None else core._zero_unless(finite, keep_prob),
    )


# ---- calibration


def _tokens(
    images: core.Images, decision: Tensor, scores: Tensor, switches: Switches, options: core.Options
) -> tuple[list[Tensor], Tensor]:
    """The tokens, normalised: prefix, patches or what is made of them, fused.

    Returns:
        Parts (b, t, m, C) of the M tokens, t = 1 where all captions share them; and which tokens exist
        (b, t, M), 1 or 0: a token that is one patch carries the gradient of the decision here.
    """
    (b, t, _), patches = decision.shape, images.patches
    present = decision.to(patches.dtype)
    parts, weights = [images.prefix[:, None]], []
    presence = [patches.new_ones(b, t, images.prefix.shape[1])]
    if switches.calibration == "none":
        parts.append(core._polar(patches)[0][:, None])
        presence.append(present)
    elif switches.calibration == "aggregation":
        weights.append(core._aggregation_weights(images.logits[:, None], decision[:, :, None]))
        presence.append(patches.new_ones(b, t, images.logits.shape[1]))
    else:
        members = _clusters(images.rows, decision == 1, switches.num_tokens)
        weights.append(members * present[:, :, None])
        presence.append(members.any(-1).to(patches.dtype))
    if options.fusion:
        weights.append(core._fusion_weights(scores, decision)[:, :, None].to(patches.dtype))
        presence.append((decision != 1).any(-1, keepdim=True).to(patches.dtype))
    if weights:
        joined = torch.cat(weights, dim=2).flatten(1, 2)
        parts.append(core._tokens(joined, patches).view(b, t, -1, patches.shape[2]))
    return parts, torch.cat(presence, dim=-1)


@torch.no_grad()
def _clusters(rows: core.Rows, kept: Tensor, count: int) -> Tensor:
    """Which patches (b, t, K, N) make each cluster of the kept ones (b, t, N); none where fewer are kept.

    DPC-kNN on normalised patches: centres are dense (exp of minus the mean squared distance to the nearest
    neighbours) and far from what is denser; all others join the nearest centre. Ties go to the lower index.
    """
    b, t, n = kept.shape
    number = kept.sum(-1)
    most = n if core._traced(kept) else max(1, int(number.max()))
    index = kept.int().sort(dim=-1, descending=True, stable=True).indices[..., :most]
    exists = torch.arange(most, device=kept.device) < number[..., None]
    flat = index[..., :, None] * n + index[..., None, :]
    distances = _distances(rows).flatten(1).gather(1, flat.flatten(1)).view(flat.shape)

    same = torch.eye(most, dtype=torch.bool, device=kept.device)
    others = distances.masked_fill(same | ~exists[..., None, :], torch.inf)
    nearest = others.topk(min(NEIGHBOURS, most - 1), dim=-1, largest=False).values.sort(dim=-1).values
    near = nearest.isfinite()
    density = (-torch.where(near, nearest.square(), 0.0).sum(-1) / near.sum(-1).clamp(min=1)).exp()
    mine, theirs = density[..., :, None], density[..., None, :]
    lower = same.new_ones(most, most).tril(-1)  # [i, j]: j < i
    denser = ((theirs > mine) | ((theirs == mine) & lower)) & exists[..., None, :]
    farthest = torch.where(exists[..., None, :], distances, 0.0).amax(-1)
    reach = torch.where(denser.any(-1), torch.where(denser, distances, torch.inf).amin(-1), farthest)

    peaks = (density * reach).masked_fill(~exists, -torch.inf)
    size = min(count, most)
    centres = peaks.sort(dim=-1, descending=True, stable=True).indices[..., :size].sort(dim=-1).values
    real = exists.gather(-1, centres)
    own = torch.arange(most, device=kept.device)[:, None] == centres[..., None, :]
    to_centres = distances.gather(-1, centres[..., None, :].expand(b, t, most, size))
    to_centres = to_centres.masked_fill(own, -1.0).masked_fill(~real[..., None, :], torch.inf)
    joined = F.one_hot(to_centres.argmin(-1), size).bool() & exists[..., None]
    return kept.new_zeros(b, t, size, n).scatter(
        -1, index[..., None, :].expand(b, t, size, most), joined.mT.contiguous()
    )


def _distances(rows: core.Rows) -> Tensor:
    """|v^_i - v^_j| (b, N, N), float64, exactly equal for equal patches."""
    units = core._polar(rows.scaled.double())[0]
    squares = units.square().sum(-1)  # 0 for a zero patch
    distances = squares[:, :, None] + squares[:, None] - 2 * units @ units.mT
    distances = ((distances + distances.mT) / 2).clamp(min=0).sqrt()
    first, second = rows.twins[:, :, None].expand_as(distances), rows.twins[:, None].expand_as(distances)
    distances = distances.gather(1, first).gather(2, second)
    return distances.masked_fill(first == second, 0.0)


# ---- words


@torch.no_grad()
def _chosen_words(images: core.Images, captions: core.Captions, words: Tensor, ratio: float) -> Tensor:
    """Which words (b, t, L) are nearest the means of their caption and of the image; the first always is."""
    rows = core._rows(words.flatten(0, 1), "cosine")
    shared = len(words) == 1
    patches = images.patches[None] if shared else images.patches[:, None]
    lengths = torch.full(patches.shape[:2], patches.shape[2])
    scores = core._selection_scores(
        rows, core._captions(patches, lengths, 0, "cosine"), None, core.Options()
    )  # of words before images, as they are of patches before captions
    scores = scores.transpose(0, 1) if shared else scores
    count = (captions.lengths.double() * ratio).ceil().clamp(min=LEAST_WORDS)
    scores = scores.masked_fill(~captions.real, -torch.inf)
    scores = torch.cat([torch.full_like(scores[..., :1], torch.inf), scores[..., 1:]], dim=-1)
    rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    return (rank < count[..., None]) & captions.real


def _aggregated_words(captions: core.Captions, words: Tensor, logits: Tensor) -> core.Captions:
    """The captions with words made of words (s, t, L, C) by logits (s, t, L, slots)."""
    count = (captions.lengths * WORD_SLOTS).long().clamp(min=LEAST_WORDS, max=logits.shape[-1])
    logits = logits[..., : word_slots(words.shape[2])].mT
    weights = core._aggregation_weights(logits, captions.real[..., None, :])
    real = torch.arange(logits.shape[2], device=words.device) < count[..., None]
    return captions._replace(units=core._tokens(weights, words), real=real, lengths=count)


# ---- alignment


def _products(parts: list[Tensor], words: Tensor) -> list[Tensor]:
    """u_m . w_j (b, t, m, L) of each part."""
    products = [core._token_products(part, words) for part in parts]
    b, t = max(len(parts[0]), len(words)), words.shape[1]
    return [x.expand(b, t, -1, -1) for x in products]


def _spa(cosines: Tensor, exists: Tensor, captions: core.Captions, options: core.Options) -> Tensor:
    """Scores (b, t) from u_m . w_j (b, t, M, L)."""
    order = exists.int().sort(dim=-1, descending=True, stable=True).indices
    cosines = cosines.take_along_dim(order[..., None], dim=2)
    return core._reduce(cosines, exists.sum(-1), captions, options)


def _relevance(
    cosines: Tensor,
    exists: Tensor,
    captions: core.Captions,
    options: core.Options,
    networks: Mapping[str, nn.Module],
) -> Tensor:
    """What the networks of the directions make (b, t) of the best matches, from u_m . w_j (b, t, M, L)."""
    added = torch.zeros_like(cosines[..., 0, 0])
    for direction, network in networks.items():
        of_words = direction == "word_to_patch"
        hidden = ~exists[..., None] if of_words else ~captions.real[:, :, None]
        best = cosines.masked_fill(hidden, -torch.inf).max(2 if of_words else 3).values
        best = F.leaky_relu(best, options.negative_slope)
        added = added + network(best, captions.real if of_words else exists)
    halve = options.directions == "both" and options.direction_reduction == "mean"
    return added / 2 if halve else added


def _scan(
    parts: list[Tensor], cosines: Tensor, presence: Tensor, exists: Tensor, captions: core.Captions
) -> Tensor:
    """Scores (b, t): every word beside the mean of the tokens that it attends to.

    Source: Lee et al., SCAN (ECCV 2018), text-to-image attention and average pooling.
    """
    likeness = cosines.masked_fill(~captions.real[:, :, None], 0.0)
    weights = attention(likeness, SCAN_TEMPERATURE, exists[..., None]) * presence[..., None]
    shares = torch.split(weights, [part.shape[2] for part in parts], dim=2)
    attended = torch.stack(
        [torch.einsum("btml,btmc->btlc", own, part) for own, part in zip(shares, parts, strict=True)]
    ).sum(0)
    agreement = torch.where(captions.real[..., None], unit(attended) * captions.units, 0.0).sum(-1)
    return agreement.sum(-1) / captions.lengths
