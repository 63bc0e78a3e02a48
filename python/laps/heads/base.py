"""What every similarity head offers, and how one is found by name."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import _check
from ..attribution import Attribution
from ..errors import LapsTypeError, LapsValueError
from ..features import ImageFeatures, Span, TextFeatures

__all__ = ["SimilarityHead", "TrainingScores", "build_head", "head_names", "register_head"]

_HEADS: dict[str, type[SimilarityHead]] = {}
HeadT = TypeVar("HeadT", bound="type[SimilarityHead]")


@dataclass(frozen=True)
class TrainingScores:
    """What a head gives to a loss.

    Attributes:
        scores: (B_v, B_t), differentiable: what retrieval ranks by.
        loss_scores: matrices (B_v, B_t) that the loss is summed over; empty where `scores` is the only one.
        penalty: a 0-d tensor that is added to the loss, or None.
        kept_fraction: (B_v, B_t), share of the patches kept per pair, for the ratio loss, or None.
        log: 0-d tensors that a log should show, detached.
    """

    scores: Tensor
    loss_scores: Sequence[Tensor] = ()
    penalty: Tensor | None = None
    kept_fraction: Tensor | None = None
    log: Mapping[str, Tensor] = field(default_factory=dict)


class SimilarityHead(nn.Module, ABC):
    """Scores of images against captions, in two steps: what is known of each side alone, then the pairs.

    A subclass takes ``(embed_dim, num_patches, *, num_prefix_tokens, ...)``, tells its other options by
    `options`, and implements `encode_image`, `encode_text`, `similarity` and `similarity_pairwise`. One whose
    scores need both sides at once has less to write in :class:`laps.heads.PairHead`.

    Attributes:
        name: what it is found by; :func:`register_head` sets it.
        uses_boxes: whether `encode_image` and `training_scores` take ``boxes``, (B_v, N, 4) as x0, y0, x1, y1
            in [0, 1], where the image encoder knows where its tokens are (regions).
        row_wise: whether `training_scores` of some of the images against all captions are those rows of the
            whole, so that ranks can share them out (without a penalty). Else each rank scores all pairs.
        uses_image_ids: whether `training_scores` takes ``image_ids``, (B,) integers: which image the data
            row i shows.
        default_loss: keyword arguments of :class:`laps.objective.Objective`, as its authors train it.
    """

    name: ClassVar[str] = ""
    uses_boxes: ClassVar[bool] = False
    uses_image_ids: ClassVar[bool] = False
    row_wise: ClassVar[bool] = False
    default_loss: ClassVar[Mapping[str, Any]] = {}
    embed_dim: int
    num_patches: int
    num_prefix_tokens: int

    def set_sizes(self, embed_dim: int, num_patches: int, num_prefix_tokens: int) -> None:
        """Keep C, N and P. Raises LapsValueError, LapsTypeError: one out of its range."""
        name = type(self).__name__
        self.embed_dim = _check.count(name, "embed_dim", embed_dim)
        self.num_patches = _check.count(name, "num_patches", num_patches)
        self.num_prefix_tokens = _check.count(name, "num_prefix_tokens", num_prefix_tokens, 0)

    @property
    def max_score(self) -> float:
        """The highest score of a pair, at which the loss "triplet" takes both for one; 1 for cosines."""
        return 1.0

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The keyword arguments, beside the sizes, that would build this head again; JSON can hold them."""

    @abstractmethod
    def encode_image(self, image_tokens: Tensor) -> ImageFeatures:
        """Everything about images that no caption changes, from tokens (B_v, P + N, C), prefix first."""

    @abstractmethod
    def encode_text(
        self, word_tokens: Tensor, word_lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        """Everything about captions that no image changes, from tokens (B_t, L, C) and lengths (B_t,)."""

    @abstractmethod
    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t) of every image with every caption."""

    @abstractmethod
    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B,) of image i with caption i."""

    def explain(
        self, images: ImageFeatures, texts: TextFeatures, *, mask: Tensor | None = None
    ) -> Attribution:
        """Where the score of one image and one caption comes from.

        Args:
            images: of one image.
            texts: of one caption.
            mask: (N,) bool, the patches to keep instead of the head's own selection; or None.

        Raises:
            LapsValueError: a head whose scores are not made of patches and words, features that are not
                finite, or a mask of another number of patches or of none.
        """
        raise LapsValueError(
            _check.message(
                "explain", f'the head "{self.name}" tells nothing of patches and words', 'such as "laps"'
            )
        )

    def same_step(self) -> contextlib.AbstractContextManager[None]:
        """Within it `training_scores` belongs to the step of the call before, of which a head that counts
        steps counts one."""
        return contextlib.nullcontext()

    def training_scores(
        self, image_tokens: Tensor, word_tokens: Tensor, word_lengths: Tensor
    ) -> TrainingScores:
        """Scores (B_v, B_t), differentiable, and what else the loss needs or a log should show."""
        images = self.encode_image(image_tokens)
        return TrainingScores(self.similarity(images, self.encode_text(word_tokens, word_lengths)))


def mean_of_words(word_tokens: Tensor, word_lengths: Tensor) -> Tensor:
    """The mean of the real words of each caption: (B_t, L, C), (B_t,) to (B_t, C)."""
    lengths = word_lengths.to(word_tokens.device)
    real = torch.arange(word_tokens.shape[1], device=word_tokens.device) < lengths[:, None]
    total = word_tokens.masked_fill(~real[..., None], 0).sum(1)
    return total / lengths[:, None].to(total.dtype)


def register_head(name: str) -> Callable[[HeadT], HeadT]:
    """A class decorator: makes a :class:`SimilarityHead` known under `name` to models, configs and commands.

    Raises:
        LapsValueError: the name is taken. LapsTypeError: the class is no SimilarityHead.
    """

    def register(head: HeadT) -> HeadT:
        if not (isinstance(head, type) and issubclass(head, SimilarityHead)):
            raise LapsTypeError(
                _check.message("register_head", "head is no SimilarityHead", "a subclass", head)
            )
        if name in _HEADS:
            raise LapsValueError(_check.message("register_head", f'name "{name}" is taken', "another name"))
        head.name = name
        _HEADS[name] = head
        return head

    return register


def head_names() -> list[str]:
    """The names of all heads that are known now, sorted."""
    return sorted(_HEADS)


def build_head(
    name: str, *, embed_dim: int, num_patches: int, num_prefix_tokens: int = 1, **options: Any
) -> SimilarityHead:
    """The head of this name with these sizes and options.

    Raises:
        LapsValueError: an unknown name, or options that the head refuses. LapsTypeError: an unknown option.

    Example:
        >>> import laps
        >>> laps.heads.build_head("laps", embed_dim=64, num_patches=49, selection_ratio=0.8).num_kept
        40
    """
    head = _HEADS[_check.choice("build_head", "name", name, head_names())]
    try:
        return head(embed_dim, num_patches, num_prefix_tokens=num_prefix_tokens, **options)
    except TypeError as error:
        if isinstance(error, LapsTypeError):
            raise
        raise LapsTypeError(
            _check.message("build_head", f'"{name}" refuses an option', "its keyword arguments", error)
        ) from None
