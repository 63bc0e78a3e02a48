"""From a checkpoint of the published code to the folder of a laps model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import _check
from .._files import atomic_folder
from ..data import CaptionTokenizer, ImageTransform
from ..encoders import ImageEncoder, TextEncoder
from ..encoders.backbone import UNUSED
from ..encoders.keys import check_weights
from ..encoders.transformers_backbone import build, from_weights
from ..errors import LapsError, LapsValueError
from ..model import LAPS
from ..nn import LAPSHead
from .architecture import Architecture, find_architecture
from .published import AGGREGATION, IMAGE, IMAGE_PROJECTION, TEXT, TEXT_PROJECTION, Published, read

__all__ = ["DEFAULT_TOKENIZER", "Conversion", "convert"]

OPERATION = "convert"
DEFAULT_TOKENIZER = "bert-base-uncased"
# Where the weights of the published model are in ours. The encoders' own names are those of the hub in both.
PLACES = {
    "image_encoder.backbone.": IMAGE,
    "image_encoder.projection.": IMAGE_PROJECTION,
    "text_encoder.backbone.": TEXT,
    "text_encoder.projection.": TEXT_PROJECTION,
    "head.aggregation.scale": f"{AGGREGATION}scale",
    "head.aggregation.norm.": f"{AGGREGATION}weight.0.",
    "head.aggregation.fc1.": f"{AGGREGATION}weight.1.",
    "head.aggregation.fc2.": f"{AGGREGATION}weight.3.",
}
NAMES = {"vit": "ViT", "swin": "Swin", "bert": "BERT"}
# So many parameters more than a file has are no slip of a name.
MOST_MISSING = 100_000_000


@dataclass(frozen=True)
class Conversion:
    """What was converted, and to where.

    Attributes:
        path: the model's folder, for :meth:`laps.LAPS.from_pretrained`.
        source: the published code's file.
        image_encoder: ``"vit"`` or ``"swin"``.
        image_size: S in pixels.
        num_patches: N.
        embed_dim: C.
        selection_ratio, aggregation_ratio: rho, lambda.
        num_kept: k, the patches kept for each caption.
        num_tokens: N_c, the aggregated tokens.
        vocab_size: of the text encoder.
        epoch, best_rsum: what the file says of its training, if it does.
        has_tokenizer: whether the model takes captions, not token ids alone.
    """

    path: Path
    source: Path
    image_encoder: str
    image_size: int
    num_patches: int
    embed_dim: int
    selection_ratio: float
    aggregation_ratio: float
    num_kept: int
    num_tokens: int
    vocab_size: int
    epoch: int | None
    best_rsum: float | None
    has_tokenizer: bool

    def __str__(self) -> str:
        epoch = "unknown" if self.epoch is None else self.epoch
        rsum = "unknown" if self.best_rsum is None else f"{self.best_rsum:.1f}"
        lines = {
            "checkpoint": f"{self.source}, epoch {epoch}, best rSum {rsum}",
            "image encoder": f"{NAMES[self.image_encoder]}, {self.image_size} x {self.image_size} pixels, "
            f"{self.num_patches} patches",
            "text encoder": f"BERT, {self.vocab_size} tokens",
            "tokenizer": "in the folder" if self.has_tokenizer else "none: the model takes token ids",
            "head": f"C {self.embed_dim}, selection ratio {self.selection_ratio:g} ({self.num_kept} patches "
            f"kept), aggregation ratio {self.aggregation_ratio:g} ({self.num_tokens} aggregated tokens)",
            "model": str(self.path),
        }
        return "\n".join(f"{name:14} {text}" for name, text in lines.items())


def convert(
    source: str | Path,
    out: str | Path,
    *,
    image_config: str | Path | None = None,
    text_config: str | Path | None = None,
    tokenizer: CaptionTokenizer | str | Path | None = DEFAULT_TOKENIZER,
    selection_ratio: float | None = None,
    aggregation_ratio: float | None = None,
) -> Conversion:
    """Make a checkpoint of the published LAPS code a model for :meth:`laps.LAPS.from_pretrained`.

    The scores of the two are equal to rounding. Nothing in the file is run: it may hold tensors, numbers,
    strings and an ``argparse.Namespace``.

    Args:
        source: ``model_best.pth``, the folder that has one, or the same weights as ``.safetensors``.
        out: the folder to write; it must be new or empty, and has the whole model or nothing afterwards.
        image_config: the transformers ``config.json`` of the image encoder, or its folder, where it is no
            ViT-base. Sizes that the weights tell must be the same there.
        text_config: the same for the text encoder, where it is no BERT-base.
        tokenizer: a ``tokenizer.json``, BERT's ``vocab.txt``, a folder with one of them, or a hub id; None
            for a model that takes token ids alone.
        selection_ratio: rho, and `aggregation_ratio` lambda, for a file without options; None for the
            published ones: 0.5 and 0.4 for ViT, 0.8 and 0.6 for Swin.
        aggregation_ratio: see there.

    Raises:
        LapsValueError, LapsTypeError: naming the file: it is damaged or another kind of file, asks for more
            than data (what it asks for is named), weights are missing, unexpected or of another shape (under
            their names in the file), or options, shapes and configurations contradict each other; no such
            tokenizer, or one of another vocabulary; `out` is not empty.
        OSError: `out` cannot be written.

    Example:
        >>> import laps
        >>> laps.convert("runs/f30k_vit/model_best.pth", "laps-vit")  # doctest: +SKIP
        >>> model = laps.LAPS.from_pretrained("laps-vit")  # doctest: +SKIP
    """
    out = Path(out)
    _require_new(out)
    published = read(OPERATION, source)
    architecture = find_architecture(
        OPERATION, published, image_config, text_config, selection_ratio, aggregation_ratio
    )
    captions = _tokenizer(tokenizer, int(architecture.text_config.vocab_size))
    model = _model(published, architecture, captions)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        # Others may have written there meanwhile.
        _require_new(out)
    head = model.head
    assert isinstance(head, LAPSHead)
    return Conversion(
        out,
        published.path,
        architecture.image_config.model_type,
        architecture.image_size,
        architecture.num_patches,
        architecture.embed_dim,
        head.selection_ratio,
        head.aggregation_ratio,
        head.num_kept,
        head.num_tokens,
        int(architecture.text_config.vocab_size),
        published.epoch,
        published.best_rsum,
        captions is not None,
    )


def _require_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is no folder"
        raise LapsValueError(_check.message(OPERATION, f"{out} {what}", "a new or an empty folder"))


def _tokenizer(source: CaptionTokenizer | str | Path | None, vocab_size: int) -> CaptionTokenizer | None:
    """The tokenizer, refused if its vocabulary is not the text encoder's."""
    if source is None:
        return None
    if isinstance(source, CaptionTokenizer):
        tokenizer, name = source, "tokenizer"
    else:
        tokenizer, name = _read_tokenizer(source), f"tokenizer {source}"
    if tokenizer.vocab_size != vocab_size:
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{name} has {tokenizer.vocab_size} tokens, but the text encoder has {vocab_size}",
                "equal: the tokenizer that it was trained with",
            )
        )
    return tokenizer


def _read_tokenizer(source: str | Path) -> CaptionTokenizer:
    path = Path(source)
    try:
        if path.is_file():
            return (
                CaptionTokenizer.from_file(path)
                if path.suffix == ".json"
                else CaptionTokenizer.from_vocab(path)
            )
        return CaptionTokenizer.from_pretrained(source)
    except LapsError as error:
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"no tokenizer {source}",
                "--tokenizer with a tokenizer.json, BERT's vocab.txt, a folder with one of them or a hub id, "
                "or --no-tokenizer (tokenizer=None) for a model that takes token ids alone",
                error,
            )
        ) from error


def _model(published: Published, architecture: Architecture, tokenizer: CaptionTokenizer | None) -> LAPS:
    """The model with the file's weights, in eval mode."""
    given = published.weights
    images, image_fits = _backbone(published, IMAGE, architecture.image_config)
    texts, text_fits = _backbone(published, TEXT, architecture.text_config)
    embed_dim = architecture.embed_dim
    image_encoder = ImageEncoder(images, embed_dim=embed_dim if architecture.image_projection else None)
    model = LAPS(
        image_encoder,
        TextEncoder(texts, embed_dim=embed_dim if architecture.text_projection else None),
        LAPSHead(
            embed_dim,
            architecture.num_patches,
            architecture.selection_ratio,
            architecture.aggregation_ratio,
            num_prefix_tokens=image_encoder.num_prefix_tokens,
        ),
        tokenizer=tokenizer,
        transform=ImageTransform(image_size=architecture.image_size),
    )
    encoders = (IMAGE, TEXT)
    own = {_published_name(n): t for n, t in model.state_dict().items() if ".backbone." not in n}
    rest = {n: t for n, t in given.items() if not n.startswith(encoders)}
    if not (image_fits and text_fits) or _shapes(own) != _shapes(rest):
        # All at once, and under the names of the file.
        own = {_published_name(n): t for n, t in model._portable_weights().items()}
        check_weights(
            str(published.path),
            *({published.prefix + n: t for n, t in _needed(weights).items()} for weights in (own, given)),
        )
    if not (image_fits and text_fits):
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{published.path} has weights that this version of transformers does not find",
                "another version",
            )
        )
    places = {_published_name(n): n for n in model.state_dict() if ".backbone." not in n}
    model.load_state_dict({places[name]: tensor for name, tensor in rest.items()}, strict=False)
    return model.eval()


def _backbone(published: Published, side: str, config: PretrainedConfig) -> tuple[nn.Module, bool]:
    """An encoder with the file's weights, and whether they all fitted."""
    weights = published.part(side)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    stored = sum(tensor.numel() for tensor in weights.values())
    # Before memory is taken for them.
    if size > stored + MOST_MISSING:
        raise LapsValueError(
            _check.message(
                OPERATION,
                f"{published.path}: {side}* has {stored} parameters, but its {config.model_type} has {size}",
                "equal",
            )
        )
    backbone, misfit = from_weights(config, weights)
    return backbone, not any(misfit)


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _needed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what no token depends on."""
    return {n: t for n, t in weights.items() if not any(part in n for part in UNUSED)}


def _published_name(name: str) -> str:
    """The name in the published code of a weight of ours."""
    for own, theirs in PLACES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name
