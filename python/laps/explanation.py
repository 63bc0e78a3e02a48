"""Why an image and a caption have their score: what was kept, what was matched, and what each part adds."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from . import _check
from ._files import write_atomically
from ._modes import eval_mode
from .attribution import Attribution, Floats
from .data.images import as_rgb, open_image
from .data.regions import RegionTransform
from .data.transforms import ImageTransform
from .errors import LapsTypeError, LapsValueError
from .features import ImageFeatures, Span, TextFeatures

if TYPE_CHECKING:
    from .model import LAPS

__all__ = ["Explanation", "Word", "explain"]

OPERATION = "explain"
FORMAT = 1
START, END = "[start]", "[end]"
APOSTROPHES = ("'", "\u2019")
SUFFIXES = (".html", ".json", ".npz")


@dataclass(frozen=True)
class Word:
    """A word of the caption, all pieces of it together.

    Attributes:
        text: as written; "[start]" and "[end]" are the tokens around a caption.
        first, last: its first piece, and the one past its last.
        share: what it adds to the score.
        token: the token of the image that it is matched with; of a word in pieces the one that most of them
            are matched with.
        alignment: with that token, A, the mean of its pieces.
        patch_shares: (N,), the part of `share` that each patch adds; the rest is the prefix tokens'.
        map: (N,), its gradient-weighted map, >= 0, the sum of its pieces'.
    """

    text: str
    first: int
    last: int
    share: float
    token: int
    alignment: float
    patch_shares: Floats
    map: Floats

    @property
    def is_special(self) -> bool:
        """Whether it stands for the start or the end of a caption, which nobody wrote."""
        return self.text in (START, END)


@dataclass(frozen=True)
class Explanation:
    """Why an image and a caption have their score. N = rows x columns patches, M tokens of the image.

    ``sum(word.share for word in words)``, ``token_shares.sum()`` and ``attribution.shares.sum()`` are the
    score, which is that of ``model.similarity`` to rounding.

    In Jupyter it shows itself: hover or focus a word, and its patches light up, or a patch, and its words do.

    Attributes:
        attribution: the stages and the shares as arrays; see :class:`laps.attribution.Attribution`.
        words: those of the caption, "[start]" first and "[end]" last.
        grid: rows and columns of the patches.
        caption: as written, or None.
        picture: the image, or None where only features were given.
    """

    attribution: Attribution
    words: list[Word]
    grid: tuple[int, int]
    caption: str | None = None
    picture: Image.Image | None = None

    @property
    def score(self) -> float:
        """S."""
        return self.attribution.score

    def places(self) -> list[tuple[Word, int, int]]:
        """The written words, and where in the caption each stands: ``caption[start:end]``.

        Raises:
            LapsValueError: the caption is not known.
        """
        if self.caption is None:
            raise LapsValueError(
                _check.message("Explanation.places", "the caption is not known", "explain(..., caption)")
            )
        written = [word for word in self.words if not word.is_special]
        found = _found([word.text for word in written], self.caption)
        return [(word, *place) for word, place in zip(written, found, strict=True) if place is not None]

    @property
    def cut_off(self) -> str:
        """The end of a caption that is too long for the model, which did not see it; else empty."""
        if self.caption is None:
            return ""
        seen = max((end for _, _, end in self.places()), default=0)
        rest = self.caption[seen:].strip()
        return rest if any(letter.isalnum() for letter in rest) else ""

    @property
    def token_names(self) -> list[str]:
        """(M,): "prefix 1" and so on, "token 1" and so on, and "rest", of the dropped patches."""
        p, made = self.attribution.num_prefix_tokens, len(self.attribution.token_weights)
        names = [f"prefix {i + 1}" for i in range(p)] + [f"token {i + 1}" for i in range(made)]
        return [*names[:-1], "rest"] if self.attribution.has_fused_token else names

    @property
    def token_shares(self) -> Floats:
        """(M,), what each token of the image adds to the score."""
        shares: Floats = self.attribution.shares.sum(1)
        return shares

    def on_grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """(N,) values of patches as (rows, columns)."""
        return values.reshape(self.grid)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays by name, for ``numpy.savez``."""
        own = {name: value for name, value in vars(self.attribution).items() if value is not None}
        words = self.words
        return own | {
            "grid": np.array(self.grid),
            "words": np.array([word.text for word in words]),
            "word_pieces": np.array([(word.first, word.last) for word in words]).reshape(-1, 2),
            "word_shares": np.array([word.share for word in words]),
            "word_maps": np.array([word.map for word in words]).reshape(len(words), -1),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture, as JSON holds it."""
        at = self.attribution

        def plain(values: NDArray[Any] | None) -> Any:
            return None if values is None else values.tolist()

        names = ("self_scores", "text_scores", "keep_prob", "selection_scores", "kept", "groups")
        tokens = [
            {"name": name, "share": float(share), "weights": weights}
            for name, share, weights in zip(
                self.token_names,
                self.token_shares,
                [None] * at.num_prefix_tokens + at.token_weights.tolist(),
                strict=True,
            )
        ]
        words = [
            vars(word) | {"patch_shares": plain(word.patch_shares), "map": plain(word.map)}
            for word in self.words
        ]
        return {
            "laps_explanation": FORMAT,
            "score": self.score,
            "caption": self.caption,
            "grid": list(self.grid),
            "patches": {name: plain(getattr(at, name)) for name in names},
            "tokens": tokens,
            "words": words,
            "alignment": plain(at.alignment),
            "shares": plain(at.shares),
        }

    def save(self, path: str | Path) -> None:
        """Write it as a web page (.html), as data (.json) or as arrays (.npz), by the file's suffix.

        Raises:
            LapsValueError: another suffix, or a folder. OSError: no space, no permission.
        """
        path = Path(path)
        check_suffix(path)
        data: bytes | str
        suffix = path.suffix.lower()
        if suffix == ".html":
            data = self.to_html()
        elif suffix == ".json":
            data = json.dumps(self.to_dict()) + "\n"
        else:
            stream = io.BytesIO()
            arrays: dict[str, Any] = self.arrays()
            np.savez_compressed(stream, **arrays)
            data = stream.getvalue()
        write_atomically(path, data)

    def to_html(self) -> str:
        """A page of its own that needs no other file and no network."""
        from .explanation_view import page

        return page(self)

    def _repr_html_(self) -> str:
        from .explanation_view import fragment

        return fragment(self)


def check_suffix(path: Path) -> None:
    """Raise LapsValueError unless `Explanation.save` knows what to write there."""
    if path.suffix.lower() not in SUFFIXES:
        raise LapsValueError(
            _check.message("Explanation.save", f"{path} has another suffix", ", ".join(SUFFIXES))
        )


def explain(
    model: LAPS,
    image: str | Path | Image.Image | Tensor | ImageFeatures,
    caption: str | TextFeatures,
    *,
    picture: Image.Image | None = None,
    grid: tuple[int, int] | None = None,
    mask: Tensor | NDArray[np.bool_] | None = None,
) -> Explanation:
    """Why this image and this caption have their score.

    Args:
        model: with a head that can explain, such as "laps". It computes in eval mode.
        image: a file, a Pillow image, pixels (3, S, S) as the model's transform makes them, or the features
            of one image.
        caption: a sentence, or the features of one.
        picture: what to show under the patches, where `image` is pixels or features.
        grid: rows and columns of the patches, where they are not square.
        mask: bool, (N,) or (rows, columns): the patches to keep, to see what another selection would do; None
            for the model's own.

    Raises:
        LapsValueError: a file that cannot be read, features of several images or captions or not finite, a
            head that cannot explain, a grid or a mask of another number of patches, a mask that keeps none.
            LapsTypeError: an argument of the wrong type.

    Source: the paper's section 4 shows such pictures; the shares follow from sections SPC and SPA.

    Example:
        >>> import laps, torch
        >>> from laps.data import CaptionTokenizer
        >>> small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(image_size=32, patch_size=8, **small), add_pooling_layer=False)
        >>> bert = BertModel(BertConfig(**small), add_pooling_layer=False)
        >>> images, texts = laps.encoders.ImageEncoder(vit), laps.encoders.TextEncoder(bert)
        >>> tokenizer = CaptionTokenizer.train(["a red circle"], vocab_size=60)
        >>> model = laps.LAPS(images, texts, laps.nn.LAPSHead(32, num_patches=16), tokenizer=tokenizer)
        >>> why = laps.explain(model, torch.randn(3, 32, 32), "a red circle")
        >>> [word.text for word in why.words]
        ['[start]', 'a', 'red', 'circle', '[end]']
        >>> abs(sum(word.share for word in why.words) - why.score) < 1e-6
        True
    """
    from .model import LAPS

    if not isinstance(model, LAPS):
        raise LapsTypeError(
            _check.message(OPERATION, "model has the wrong type", "laps.LAPS", _check.name_of(model))
        )
    if picture is not None and not isinstance(picture, Image.Image):
        raise LapsTypeError(
            _check.message(OPERATION, "picture has the wrong type", "a Pillow image", _check.name_of(picture))
        )
    with eval_mode(model), torch.no_grad():
        images, seen = _image(model, image)
        texts, written = _caption(model, caption)
        # Regions lie anywhere: they are shown in a row.
        in_a_row = grid is None and isinstance(model.transform, RegionTransform)
        shape = _grid(model.head.num_patches, (1, model.head.num_patches) if in_a_row else grid)
        attribution = model.head.explain(images, texts, mask=None if mask is None else _mask(mask, shape))
    spans = texts.spans[0] if texts.spans else None
    if spans is not None and written is not None:
        spans = _joined(spans, written)
    return Explanation(
        attribution=attribution,
        words=_words(attribution, spans),
        grid=shape,
        caption=written,
        picture=seen if picture is None else as_rgb(picture),
    )


def _image(model: LAPS, image: object) -> tuple[ImageFeatures, Image.Image | None]:
    if isinstance(image, ImageFeatures):
        return _one("image", image), None
    picture = None
    transform = model.transform
    if isinstance(transform, RegionTransform):
        image = transform.open(image) if isinstance(image, (str, Path)) else image
    elif isinstance(image, (str, Path)):
        picture = open_image(image)
    elif isinstance(image, Image.Image):
        picture = as_rgb(image)
    if picture is not None and isinstance(transform, ImageTransform):
        pixels = transform.eval()(picture)
    elif isinstance(image, Tensor):
        if not image.is_floating_point():
            expected = "floating, as the model's transform makes them"
            raise LapsTypeError(_check.message(OPERATION, "image has wrong pixels", expected, image.dtype))
        shape = model.image_encoder.input_shape
        pixels = image[0] if image.dim() == len(shape) + 1 and len(image) == 1 else image
    else:
        expected = "a path, a Pillow image, a tensor (3, S, S) or ImageFeatures"
        raise LapsTypeError(
            _check.message(OPERATION, "image has the wrong type", expected, _check.name_of(image))
        )
    parameter = next(model.parameters())
    return model.encode_image(pixels[None].to(parameter.device, parameter.dtype)), picture


def _caption(model: LAPS, caption: object) -> tuple[TextFeatures, str | None]:
    if isinstance(caption, TextFeatures):
        return _one("caption", caption), None
    if isinstance(caption, str):
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise LapsValueError(
                _check.message(OPERATION, "caption is no text", "Unicode (UTF-8)", error)
            ) from None
        return model.encode_captions([caption]), caption
    raise LapsTypeError(
        _check.message(
            OPERATION, "caption has the wrong type", "a string or TextFeatures", _check.name_of(caption)
        )
    )


def _one(name: str, features: Any) -> Any:
    if len(features) != 1:
        raise LapsValueError(
            _check.message(OPERATION, f"{name} is features of several", "of one: features[i]", len(features))
        )
    return features


def _grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise LapsValueError(
                _check.message(OPERATION, f"{patches} patches are no square", "grid=(rows, columns)")
            )
        return side, side
    expected = f"two integers, rows * columns = {patches}"
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise LapsTypeError(_check.message(OPERATION, "grid is no pair", expected, grid))
    rows, columns = (_check.count(OPERATION, "grid", size) for size in grid)
    if rows * columns != patches:
        raise LapsValueError(_check.message(OPERATION, "grid does not fit", expected, f"{rows} x {columns}"))
    return rows, columns


def _mask(mask: Tensor | NDArray[np.bool_], grid: tuple[int, int]) -> Tensor:
    """(N,) of (N,) or (rows, columns)."""
    expected = f"bool, ({grid[0] * grid[1]},) or {grid}"
    if not isinstance(mask, (Tensor, np.ndarray)):
        raise LapsTypeError(
            _check.message(OPERATION, "mask has the wrong type", expected, _check.name_of(mask))
        )
    values = torch.as_tensor(mask)
    if values.dtype != torch.bool or tuple(values.shape) not in ((grid[0] * grid[1],), grid):
        raise LapsValueError(
            _check.message(OPERATION, "mask does not fit", expected, f"{values.dtype} {tuple(values.shape)}")
        )
    return values.flatten()


def _found(texts: Sequence[str], caption: str) -> list[tuple[int, int] | None]:
    """Where words that follow each other stand in the caption."""
    places: list[tuple[int, int] | None] = []
    done = 0
    for text in texts:
        start = caption.find(text, done)
        done = done if start < 0 else start + len(text)
        places.append(None if start < 0 else (start, done))
    return places


def _joined(spans: list[Span], caption: str) -> list[Span]:
    """The words, with those in one that an apostrophe joins: tokenizers make two or three of "isn't"."""
    joined: list[tuple[Span, tuple[int, int] | None]] = []
    places = _found([text for _, _, text in spans], caption)
    for (first, past, text), place in zip(spans, places, strict=True):
        before, where = joined[-1] if joined else ((0, 0, ""), None)
        if where is not None and place is not None and before[1] == first and where[1] == place[0]:
            at = where[1] - 1 if caption[where[1] - 1] in APOSTROPHES else place[0]
            around = caption[at - 1 : at], caption[at + 1 : at + 2]
            if caption[at] in APOSTROPHES and around[0].isalnum() and around[1].isalnum():
                joined[-1] = ((before[0], past, before[2] + text), (where[0], place[1]))
                continue
        joined.append(((first, past, text), place))
    return [span for span, _ in joined]


def _words(attribution: Attribution, spans: list[Span] | None) -> list[Word]:
    """The words of the spans, and between them the tokens that are in none."""
    length = attribution.shares.shape[1]
    if spans is None:
        spans = [(i, i + 1, f"[{i + 1}]") for i in range(length)]
    within = {piece for first, past, _ in spans for piece in range(first, past)}
    names = {0: START, length - 1: END}
    others = [(i, i + 1, names.get(i, f"[{i + 1}]")) for i in range(length) if i not in within]
    words = []
    for first, past, text in sorted([*spans, *others]):
        alignment = attribution.alignment[:, first:past].mean(1)
        # Of several pieces each has its own best token: that of the most, then of the best alignment.
        own = attribution.alignment[:, first:past].argmax(0)
        token = max(own.tolist(), key=lambda t: ((own == t).sum(), alignment[t]))
        words.append(
            Word(
                text=text,
                first=first,
                last=past,
                share=float(attribution.shares[:, first:past].sum()),
                token=token,
                alignment=float(alignment[token]),
                patch_shares=attribution.patch_shares[first:past].sum(0),
                map=attribution.maps[first:past].sum(0),
            )
        )
    return words
