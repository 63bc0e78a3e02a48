"""The whole model: encoders, a similarity head, and the files that it is kept in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from . import _check
from ._files import atomic_path, write_atomically
from ._hub import find_folder
from ._json_files import read_object
from ._tensor_files import load_tensors, save_tensors
from .config import PRESETS, LAPSConfig
from .data import Batch, CaptionTokenizer, ImageTransform, RegionTransform
from .data.regions import label_names
from .distributed import Ranks
from .encoders import ImageEncoder, RegionBackbone, TextEncoder, implementations, label_embeddings
from .encoders.backbone import UNUSED, describe, freeze, is_transformers
from .encoders.keys import check_weights
from .errors import LapsError, LapsTypeError, LapsValueError
from .features import ImageFeatures, Span, TextFeatures
from .heads import SimilarityHead, build_head
from .objective import Objective

__all__ = ["LAPS", "BatchTokens"]

CONFIG, WEIGHTS, TOKENIZER, TRANSFORM = "config.json", "model.safetensors", "tokenizer.json", "transform.json"
CARD = "README.md"
SIDES = ("image_encoder", "text_encoder")
LAPST = TypeVar("LAPST", bound="LAPS")


class BatchTokens(NamedTuple):
    """What the encoders make of a batch.

    Attributes:
        images: (B, P + N, C), prefix first.
        words: (B, L, C), padded.
        dense: (B, L', C), those of the dense captions, or None.
    """

    images: Tensor
    words: Tensor
    dense: Tensor | None = None


class _Joint(NamedTuple):
    """What captions are scored against: tokens and boxes of images, and the ids of all ranks' images."""

    images: Tensor
    boxes: dict[str, Tensor]
    image_ids: Tensor
    ranks: Ranks


class LAPS(nn.Module, ModelHubMixin):
    """Image-text retrieval with patches and words: two encoders and a similarity head.

    ``LAPS.from_pretrained(folder_or_hub_id)`` loads a model and ``model.save_pretrained(folder)`` keeps one:
    ``config.json``, ``model.safetensors``, ``tokenizer.json``, ``transform.json``.
    ``LAPS.from_preset("vit-base-224")`` starts one of the paper's.

    Args:
        image_encoder: pixels to tokens.
        text_encoder: token ids to tokens.
        head: a :class:`laps.nn.LAPSHead`, or another head of :mod:`laps.heads`.
        tokenizer: captions to token ids; needed by `encode_captions`, training and evaluation. Where it
            allows longer captions than the text encoder has positions for, the model's copy cuts them there.
        transform: photographs to pixels, or files of regions to their rows. None: the published one at the
            encoder's size, or the one for its regions.
        objective: the loss of `forward`. None: the head's own (LAPS: the hinge loss with margin 0.2).

    Raises:
        LapsValueError: parts that do not fit each other. LapsTypeError: a part of the wrong type.

    Example:
        >>> import laps, torch
        >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
        >>> small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> vit = ViTModel(ViTConfig(image_size=32, patch_size=8, **small), add_pooling_layer=False)
        >>> bert = BertModel(BertConfig(**small), add_pooling_layer=False)
        >>> images = laps.encoders.ImageEncoder(vit, embed_dim=16)
        >>> texts = laps.encoders.TextEncoder(bert, embed_dim=16)
        >>> model = laps.LAPS(images, texts, laps.nn.LAPSHead(16, num_patches=16)).eval()
        >>> with torch.inference_mode():
        ...     photos = model.encode_image(torch.randn(2, 3, 32, 32))
        ...     captions = model.encode_text(torch.randint(100, (3, 7)), torch.tensor([7, 5, 3]))
        ...     model.similarity(photos, captions).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        head: SimilarityHead,
        *,
        tokenizer: CaptionTokenizer | None = None,
        transform: ImageTransform | RegionTransform | None = None,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        parts = (
            ("image_encoder", image_encoder, ImageEncoder),
            ("text_encoder", text_encoder, TextEncoder),
            ("head", head, SimilarityHead),
        )
        for name, part, kind in parts:
            if not isinstance(part, kind):
                raise LapsTypeError(
                    _check.message("LAPS", f"{name} has the wrong type", kind.__name__, _check.name_of(part))
                )
        _require_equal(image_encoder, "head", head, "embed_dim", "num_patches", "num_prefix_tokens")
        if text_encoder.embed_dim != head.embed_dim:
            raise LapsValueError(
                _check.message(
                    "LAPS",
                    f"text_encoder has embed_dim={text_encoder.embed_dim}, but head has {head.embed_dim}",
                    "equal",
                )
            )
        transform = _with_labels_of(image_encoder, transform or _transform_for(image_encoder))
        if transform.input_shape != image_encoder.input_shape:
            raise LapsValueError(
                _check.message(
                    "LAPS",
                    f"transform makes {transform.input_shape}, but image_encoder takes "
                    f"{image_encoder.input_shape}",
                    "equal (image_size)",
                )
            )
        if tokenizer is not None and tokenizer.vocab_size > (text_encoder.vocab_size or tokenizer.vocab_size):
            raise LapsValueError(
                _check.message(
                    "LAPS",
                    f"tokenizer has {tokenizer.vocab_size} tokens, but text_encoder has "
                    f"{text_encoder.vocab_size}",
                    "at most as many",
                )
            )
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.head = head
        self.tokenizer = _within(tokenizer, text_encoder.max_length)
        self.transform = transform
        self.objective = objective or Objective.for_head(head)
        self.frozen = False

    # ---- building

    @classmethod
    def from_config(cls: type[LAPST], config: LAPSConfig, *, encoders: str = "hf", **parts: Any) -> LAPST:
        """A model with random weights.

        Args:
            config: what to build.
            encoders: ``"hf"``, ``"native"`` or ``"auto"``; see :meth:`from_pretrained`.
            parts: ``tokenizer``, ``transform``, and ``image_encoder`` or ``text_encoder`` as modules where
                the config leaves them to you.

        Raises:
            LapsValueError: the config leaves an encoder to you and it was not given, or it does not fit.
        """
        backbones = {side: parts.pop(side, None) or _new_backbone(config, side, encoders) for side in SIDES}
        return cls._assemble(config, **backbones, **parts)

    @classmethod
    def from_preset(
        cls: type[LAPST],
        name: str,
        *,
        pretrained: bool = True,
        image_checkpoint: str | Path | None = None,
        text_checkpoint: str | Path | None = None,
        head: str = "laps",
        head_options: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        tokenizer: CaptionTokenizer | None = None,
        encoders: str = "hf",
        num_regions: int | None = None,
        feature_dim: int | None = None,
        labels: Sequence[str] | str | Path | None = None,
    ) -> LAPST:
        """A model of the paper's Tables 1 and 2, ready to be trained: pretrained encoders, a fresh head.

        Args:
            name: one of :data:`laps.config.PRESETS`, for example ``"vit-base-224"``.
            pretrained: False for random encoders (nothing is downloaded, and `tokenizer` must be given).
            image_checkpoint: a folder or hub id in place of the preset's.
            text_checkpoint: the same for the text encoder.
            head: name of the similarity head.
            head_options: keyword arguments of the head, over those of the preset.
            loss: keyword arguments of :class:`laps.objective.Objective`; None for the head's own.
            tokenizer: None: the text checkpoint's.
            encoders: ``"hf"``, ``"native"`` or ``"auto"``; see :meth:`from_pretrained`.
            num_regions: of a preset of regions, in place of its own; see
                :class:`laps.encoders.RegionBackbone`.
            feature_dim: the same.
            labels: names of the detector's labels in the order of their numbers, for the label prior, by
                :func:`laps.encoders.label_embeddings`; or the path of a text file with a name a line, as
                ``laps train --labels`` takes it; None for none.

        Raises:
            LapsValueError: an unknown name, no such checkpoint, or one that lacks weights; regions' arguments
                with a preset of pixels, or the reverse; a file of labels that cannot be read.
            LapsTypeError: a size that is no integer, labels that are neither names nor a file.
        """
        preset = PRESETS[_check.choice("LAPS.from_preset", "name", name, list(PRESETS))]
        # Before the weights are read, which takes long.
        Objective.from_options(loss or {})
        of_regions: dict[str, Any] = {
            "num_regions": num_regions,
            "feature_dim": feature_dim,
            "labels": labels,
        }
        misplaced = {"image_checkpoint": image_checkpoint} if preset.regions else of_regions
        for argument, value in misplaced.items():
            if value is not None:
                expected = f"a preset of {'pixels' if preset.regions else 'regions, such as region-36'}"
                raise LapsValueError(
                    _check.message("LAPS.from_preset", f"{argument} does not go with {name}", expected)
                )
        if preset.regions:
            RegionTransform(**preset.region_sizes(num_regions, feature_dim))
        if labels is not None:
            labels = label_names("LAPS.from_preset", labels)

        def backbone(part: str, checkpoint: str | Path | None, config: Mapping[str, Any]) -> nn.Module:
            if pretrained and checkpoint is not None:
                return implementations.load(checkpoint, part, encoders)
            return implementations.build(config, encoders)

        text_source = text_checkpoint or preset.text_checkpoint
        text_backbone = backbone("text", text_source, preset.text_encoder)
        if pretrained:
            tokenizer = tokenizer or CaptionTokenizer.from_pretrained(text_source)
        if labels is not None:
            if tokenizer is None:
                raise LapsValueError(
                    _check.message("LAPS.from_preset", "labels without a tokenizer", "tokenizer=...")
                )
            of_regions["labels"] = label_embeddings(labels, TextEncoder(text_backbone), tokenizer)
        given = {argument: value for argument, value in of_regions.items() if value is not None}
        image_source = image_checkpoint or preset.image_checkpoint
        image_backbone = backbone("vision", image_source, {**preset.image_encoder, **given})
        images = ImageEncoder(image_backbone, embed_dim=preset.embed_dim)
        texts = TextEncoder(text_backbone, embed_dim=preset.embed_dim)
        options = dict(preset.head_options) if head == "laps" else {}
        built = build_head(
            head,
            embed_dim=images.embed_dim,
            num_patches=images.num_patches,
            num_prefix_tokens=images.num_prefix_tokens,
            **(options | dict(head_options or {})),
        )
        transform = None
        if not preset.regions:
            transform = ImageTransform(image_size=images.image_size, mean=preset.mean, std=preset.std)
        objective = Objective.for_head(built, loss or {})
        return cls(images, texts, built, tokenizer=tokenizer, transform=transform, objective=objective)

    @classmethod
    def _assemble(
        cls: type[LAPST],
        config: LAPSConfig,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        **parts: Any,
    ) -> LAPST:
        """The model around two encoders, or around backbones for them."""
        image_encoder = _image_encoder(config, image_encoder)
        _require_equal(image_encoder, "config", config, "num_patches", "num_prefix_tokens", "image_size")
        head = build_head(
            config.head,
            embed_dim=image_encoder.embed_dim,
            num_patches=config.num_patches,
            num_prefix_tokens=config.num_prefix_tokens,
            **config.head_options,
        )
        texts = _text_encoder(config, text_encoder)
        return cls(image_encoder, texts, head, objective=Objective.from_options(config.loss), **parts)

    @property
    def config(self) -> LAPSConfig:
        """What the model is made of, as data."""
        images, texts = self.image_encoder, self.text_encoder
        return LAPSConfig(
            image_encoder=_backbone_config(images.backbone),
            text_encoder=_backbone_config(texts.backbone),
            embed_dim=images.embed_dim,
            num_prefix_tokens=images.num_prefix_tokens,
            num_patches=images.num_patches,
            image_size=images.image_size,
            image_projection=not isinstance(images.projection, nn.Identity),
            text_projection=not isinstance(texts.projection, nn.Identity),
            head=self.head.name,
            head_options=self.head.options(),
            loss=self.objective.options(),
        )

    # ---- using

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """Pixels (B_v, 3, S, S), normalised, to features: everything that does not depend on a caption."""
        return self.head.encode_image(self.image_encoder(pixel_values), **self._boxes(pixel_values))

    def encode_text(
        self, input_ids: Tensor, lengths: Tensor, spans: list[list[Span]] | None = None
    ) -> TextFeatures:
        """Token ids (B_t, L) and lengths (B_t,), both int64, to features; `spans` are kept beside them."""
        return self.head.encode_text(self.text_encoder(input_ids, lengths), lengths, spans)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], batch_size: int = 256) -> TextFeatures:
        """Sentences to features, without gradient, `batch_size` at a time.

        Raises:
            LapsValueError: the model has no tokenizer, no caption, or one without words (its index is named).
            LapsTypeError: one string.
        """
        operation = "LAPS.encode_captions"
        if isinstance(captions, str):
            raise LapsTypeError(_check.message(operation, "captions is one string", "a list of strings"))
        if not captions:
            raise LapsValueError(_check.message(operation, "captions is empty", "at least one", 0))
        step = _check.count(operation, "batch_size", batch_size)
        tokens = self._tokenizer("encode_captions").encode(captions)
        parts = []
        for first in range(0, len(captions), step):
            batch = slice(first, first + step)
            lengths = tokens.lengths[batch]
            ids = tokens.input_ids[batch, : int(lengths.max())]
            parts.append(self.encode_text(ids.to(self.device), lengths, tokens.spans[batch]))
        return TextFeatures.cat(parts)

    @torch.no_grad()
    def encode_files(self, paths: Sequence[str | Path], batch_size: int = 32) -> ImageFeatures:
        """Image files to features, without gradient, `batch_size` at a time.

        Raises:
            LapsValueError: a file that cannot be read (it is named), or no file. LapsTypeError: one path.
        """
        operation = "LAPS.encode_files"
        if isinstance(paths, (str, Path)):
            raise LapsTypeError(_check.message(operation, "paths is one path", "a list of paths", str(paths)))
        if not paths:
            raise LapsValueError(_check.message(operation, "paths is empty", "at least one", 0))
        step = _check.count(operation, "batch_size", batch_size)
        load: Callable[[Any], Tensor] = self.transform.eval()
        parts = []
        for first in range(0, len(paths), step):
            pixels = torch.stack([load(self.transform.open(path)) for path in paths[first : first + step]])
            parts.append(self.encode_image(pixels.to(self.device)))
        return ImageFeatures.cat(parts)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B_v, B_t), float32, of every image with every caption."""
        return self.head.similarity(images, texts)

    def similarity_pairwise(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Scores (B,), float32, of image i with caption i."""
        return self.head.similarity_pairwise(images, texts)

    @torch.inference_mode()
    def rank(
        self, query: ImageFeatures | TextFeatures, gallery: ImageFeatures | TextFeatures, top_k: int = 10
    ) -> tuple[Tensor, Tensor]:
        """The best items of a gallery for each query, best first; equal scores in the gallery's order.

        Args:
            query: features of Q images, or of Q captions.
            gallery: features of G items of the other kind.
            top_k: how many, >= 1; at most G come back.

        Returns:
            Scores (Q, min(top_k, G)) float32 and indices into the gallery, int64.

        Raises:
            LapsTypeError: both are of one kind. LapsValueError: `top_k` < 1.
        """
        top_k = _check.count("LAPS.rank", "top_k", top_k)
        if isinstance(query, TextFeatures) and isinstance(gallery, ImageFeatures):
            scores = self.similarity(gallery, query).T
        elif isinstance(query, ImageFeatures) and isinstance(gallery, TextFeatures):
            scores = self.similarity(query, gallery)
        else:
            raise LapsTypeError(
                _check.message(
                    "LAPS.rank",
                    "query and gallery do not fit",
                    "ImageFeatures and TextFeatures",
                    f"{_check.name_of(query)} and {_check.name_of(gallery)}",
                )
            )
        ordered = scores.sort(dim=1, descending=True, stable=True)
        return ordered.values[:, :top_k], ordered.indices[:, :top_k]

    # ---- training

    def forward(
        self,
        batch: Batch,
        *,
        warmup: float | None = None,
        dense_weight: float = 1.0,
        ranks: Ranks | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and values to log (0-d tensors, detached).

        Args:
            batch: image i with caption i; several may show the same image.
            warmup: in the first epoch the share of its steps that are done; None afterwards.
            dense_weight: what the loss of the images with the batch's dense captions counts, if it has any.
            ranks: whose batches make one, of which this is a part; see :mod:`laps.distributed`. None: this
                batch is the whole.
        """
        return self.loss_of_tokens(
            batch, self.encode_batch(batch), warmup=warmup, dense_weight=dense_weight, ranks=ranks
        )

    def encode_batch(self, batch: Batch) -> BatchTokens:
        """The encoders' part of `forward`: tokens of a batch, of which the rows are independent."""
        images = self.image_encoder(batch.pixel_values)
        words = self.text_encoder(batch.input_ids, batch.lengths)
        if batch.dense_ids is None or batch.dense_lengths is None:
            return BatchTokens(images, words)
        return BatchTokens(images, words, self.text_encoder(batch.dense_ids, batch.dense_lengths))

    def loss_of_tokens(
        self,
        batch: Batch,
        tokens: BatchTokens,
        *,
        warmup: float | None = None,
        dense_weight: float = 1.0,
        ranks: Ranks | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The other part of `forward`: what the head and the objective make of a batch's tokens."""
        joint = self._joint(batch, tokens.images, ranks or Ranks())
        loss, values = self._loss(joint, tokens.words, batch.lengths, warmup)
        if tokens.dense is None or batch.dense_lengths is None:
            return loss, values
        with self.head.same_step():
            dense, _ = self._loss(joint, tokens.dense, batch.dense_lengths, warmup)
        loss = loss + dense_weight * dense
        return loss, values | {"loss": loss.detach(), "dense_loss": dense.detach()}

    def _joint(self, batch: Batch, images: Tensor, ranks: Ranks) -> _Joint:
        """What this rank scores: its own images, or all where the head needs them together."""
        boxes, image_ids = self._boxes(batch.pixel_values), ranks.gather(batch.image_ids)
        if not self.head.row_wise:
            images = ranks.gather(images)
            boxes = {name: ranks.gather(tensor) for name, tensor in boxes.items()}
        return _Joint(images, boxes, image_ids, ranks)

    def _loss(
        self, joint: _Joint, words: Tensor, lengths: Tensor, warmup: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the images' tokens with some captions of theirs, and values to log."""
        ranks = joint.ranks
        words, lengths = ranks.gather_padded(words), ranks.gather_host(lengths, words.device)
        ids = {"image_ids": joint.image_ids} if self.head.uses_image_ids else {}
        scored = self.head.training_scores(joint.images, words, lengths, **joint.boxes, **ids)
        if self.head.row_wise:
            scored = ranks.gather_scores(scored)
        loss, values = self.objective(
            scored.scores,
            joint.image_ids,
            warmup=warmup,
            loss_scores=scored.loss_scores,
            penalty=scored.penalty,
            kept_fraction=scored.kept_fraction,
            selection_ratio=getattr(self.head, "selection_ratio", 1.0),
        )
        return loss, values | dict(scored.log)

    def freeze_backbones(self, frozen: bool = True) -> None:
        """Train the projections and the head alone; ``False`` lets the backbones learn again.

        Frozen backbones stay in eval mode (no dropout), whatever ``train()`` says.
        """
        self.frozen = _check.flag("LAPS.freeze_backbones", "frozen", frozen)
        for backbone in self._backbones():
            freeze(backbone, frozen)
        self.train(self.training)

    def train(self: LAPST, mode: bool = True) -> LAPST:
        super().train(mode)
        if mode and self.frozen:
            for backbone in self._backbones():
                backbone.eval()
        return self

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the backbones' activations in the backward pass: less memory, about a third more time.

        Raises:
            LapsTypeError: a backbone that is no model of transformers.
        """
        for backbone in self._backbones():
            # transformers 5.2 gave it another name.
            names = [
                f"{kind}_checkpointing_{'enable' if enabled else 'disable'}"
                for kind in ("activation", "gradient")
            ]
            change = next((getattr(backbone, name) for name in names if hasattr(backbone, name)), None)
            if change is None:
                raise LapsTypeError(
                    _check.message(
                        "LAPS.gradient_checkpointing",
                        f"backbone {type(backbone).__name__} cannot do it",
                        "a model of transformers",
                    )
                )
            change(*([{"use_reentrant": False}] if enabled else []))

    def parameter_groups(self, lr: float, backbone_lr_ratio: float = 0.1) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the backbones at ``lr * backbone_lr_ratio``, all else at `lr`."""
        backbone = [p for module in self._backbones() for p in module.parameters() if p.requires_grad]
        theirs = {id(parameter) for parameter in backbone}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        groups = [{"params": rest, "lr": lr, "name": "head"}]
        if backbone:
            groups.append({"params": backbone, "lr": lr * backbone_lr_ratio, "name": "backbones"})
        return groups

    def _backbones(self) -> Iterator[nn.Module]:
        yield self.image_encoder.backbone
        yield self.text_encoder.backbone

    def _boxes(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """What a head that looks at them is told of where regions are; of pixels nothing."""
        boxes = self.image_encoder.boxes(pixel_values) if self.head.uses_boxes else None
        return {} if boxes is None else {"boxes": boxes}

    def _tokenizer(self, method: str) -> CaptionTokenizer:
        if self.tokenizer is None:
            raise LapsValueError(
                _check.message(f"LAPS.{method}", "the model has no tokenizer", "LAPS(..., tokenizer=...)")
            )
        return self.tokenizer

    # ---- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Keep the model in a folder; a model that is there already is replaced once the new one is complete.

        Args:
            save_directory: the folder; made if missing. Other files in it stay.
            repo_id: of the hub; None: the folder's name.
            push_to_hub: whether to upload it too.
            model_card_kwargs: of the hub's model card, ``README.md``, which is written if there is none.
            push_to_hub_kwargs: see :meth:`huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The upload's URL, or None.

        Raises:
            OSError: the disk is full, or not writable; the model that was there is untouched.
        """
        # Not the mixin's way: it deletes config.json before the weights are written.
        folder = Path(save_directory)
        self._save_pretrained(folder)
        if not (folder / CARD).exists():
            write_atomically(folder / CARD, str(self.generate_model_card(**(model_card_kwargs or {}))))
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(
            repo_id or folder.resolve().name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        with ExitStack() as stack:
            # All are written before the first takes its place, which happens at the end of the block.
            config, transform, weights = (
                stack.enter_context(atomic_path(save_directory / name))
                for name in (CONFIG, TRANSFORM, WEIGHTS)
            )
            save_tensors(weights, self._portable_weights())
            self.config.save(config)
            write_atomically(transform, json.dumps(self.transform.to_dict(), indent=2) + "\n")
            if self.tokenizer is not None:
                self.tokenizer.save(stack.enter_context(atomic_path(save_directory / TOKENIZER)))
        if self.tokenizer is None:
            (save_directory / TOKENIZER).unlink(missing_ok=True)

    def _portable_weights(self) -> dict[str, Tensor]:
        """All weights; those of transformers under the key names of the hub, which its versions share."""
        state = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not any(name.startswith(f"{side}.backbone.") for side in SIDES)
        }
        for side, backbone in zip(SIDES, self._backbones(), strict=True):
            state |= {f"{side}.backbone.{name}": t for name, t in _weights(backbone).items()}
        return state

    @classmethod
    def from_pretrained(
        cls: type[LAPST],
        pretrained_model_name_or_path: str | Path,
        *,
        encoders: str = "hf",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **parts: Any,
    ) -> LAPST:
        """The model that `save_pretrained` kept, in eval mode, on the CPU.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the hub.
            encoders: ``"hf"``, those of transformers; ``"native"``, those of :mod:`laps.encoders.native`, in
                Rust; ``"auto"``, native where they are installed and know the model. The scores are the same
                to rounding, and so are the files that the model is saved in.
            force_download: this and the following are those of :func:`huggingface_hub.snapshot_download`.
            token: of the hub.
            cache_dir: of the hub's files.
            local_files_only: use what was downloaded before.
            revision: branch, tag or commit.
            parts: ``image_encoder`` and ``text_encoder`` where they are modules of your own, which no file
                describes; ``tokenizer`` and ``transform`` in place of those in the folder.

        Raises:
            LapsValueError: no such folder and no such model on the hub, a file that is missing or broken (it
                is named), weights that do not fit (missing and unexpected keys are named).
        """
        _check.choice("LAPS.from_pretrained", "encoders", encoders, implementations.IMPLEMENTATIONS)
        # Not the mixin's way: it takes the entries of config.json for arguments of the constructor.
        folder = find_folder(
            "LAPS.from_pretrained",
            pretrained_model_name_or_path,
            [CONFIG, WEIGHTS, TOKENIZER, TRANSFORM],
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls._from_folder(folder, encoders, **parts)

    @classmethod
    def _from_folder(cls: type[LAPST], folder: Path, encoders: str, **parts: Any) -> LAPST:
        config = LAPSConfig.load(folder / CONFIG)
        state = load_tensors("LAPS.from_pretrained", folder / WEIGHTS)
        if "tokenizer" not in parts and (folder / TOKENIZER).exists():
            parts["tokenizer"] = CaptionTokenizer.from_file(folder / TOKENIZER)
        if "transform" not in parts:
            parts["transform"] = _read_transform(folder / TRANSFORM)
        with _made_from(folder / CONFIG):
            backbones = {side: _stored_backbone(config, side, encoders, state, parts) for side in SIDES}
            modules = {side: module for side, (module, _) in backbones.items()}
            model = cls._assemble(config, **modules, **parts)
        model._load_rest(state, str(folder / WEIGHTS), complete=all(fits for _, fits in backbones.values()))
        return model.eval()

    def _load_rest(self, state: Mapping[str, Tensor], source: str, *, complete: bool) -> None:
        """Everything but the backbones of transformers, which came with their weights, all or not."""
        theirs = tuple(
            f"{side}.backbone."
            for side, b in zip(SIDES, self._backbones(), strict=True)
            if is_transformers(b)
        )
        backbones = tuple(f"{side}.backbone." for side in SIDES)
        rest = {name: t for name, t in state.items() if not name.startswith(theirs)}
        own = {name: t for name, t in self.state_dict().items() if not name.startswith(theirs)}
        if not complete or {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in rest.items()}:

            def needed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
                unused = (n for n in weights if n.startswith(backbones) and any(part in n for part in UNUSED))
                return {name: weights[name] for name in weights.keys() - set(unused)}

            # All at once, the backbones' too, and under the names of the file.
            check_weights(source, needed(self._portable_weights()), needed(state))
        if not complete:
            raise LapsValueError(
                _check.message(
                    "weights",
                    f"{source} has weights that this version of transformers does not find",
                    "the version that saved the model",
                )
            )
        self.load_state_dict(rest, strict=False)


def _require_equal(image_encoder: ImageEncoder, other: str, part: object, *names: str) -> None:
    """Refuse an image encoder whose sizes are not those of the other part."""
    for name in names:
        expected, got = getattr(part, name), getattr(image_encoder, name)
        if expected != got:
            raise LapsValueError(
                _check.message("LAPS", f"image_encoder has {name}={got}, but {other} has {expected}", "equal")
            )


def _within(tokenizer: CaptionTokenizer | None, longest: int | None) -> CaptionTokenizer | None:
    """The tokenizer, or one that cuts captions to what the text encoder has positions for."""
    if tokenizer is None or longest is None or tokenizer.max_length <= longest:
        return tokenizer
    shorter = copy.copy(tokenizer)
    shorter.max_length = longest
    return shorter


def _backbone_config(backbone: nn.Module) -> dict[str, Any]:
    """The configuration of a backbone that can be built from one; empty for a module of the user's own."""
    description = describe(backbone)
    return {} if description is None else description.config


def _weights(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights under the names that they are kept under."""
    if not is_transformers(backbone):
        return backbone.state_dict()
    from .encoders import transformers_backbone

    return transformers_backbone.weights(cast("Any", backbone))


def _read_transform(path: Path) -> ImageTransform | RegionTransform:
    settings = read_object("LAPS.from_pretrained", path, "a transform's JSON file")
    with _made_from(path):
        if settings.get("kind") == "regions":
            return RegionTransform.from_dict(settings)
        return ImageTransform.from_dict(settings)


def _transform_for(image_encoder: ImageEncoder) -> ImageTransform | RegionTransform:
    backbone = image_encoder.backbone
    if isinstance(backbone, RegionBackbone):
        return RegionTransform(backbone.num_regions, backbone.feature_dim)
    return ImageTransform(image_size=image_encoder.image_size)


def _with_labels_of(
    image_encoder: ImageEncoder, transform: ImageTransform | RegionTransform
) -> ImageTransform | RegionTransform:
    """The transform, which now refuses labels that the encoder does not know: it can name the file."""
    backbone = image_encoder.backbone
    named = len(backbone.labels) if isinstance(backbone, RegionBackbone) else 0
    if named and isinstance(transform, RegionTransform):
        return replace(transform, num_labels=named)
    return transform


@contextmanager
def _made_from(path: Path) -> Iterator[None]:
    """Put the name of the file into what is said of its values."""
    try:
        yield
    except LapsError as error:
        raise type(error)(f"{path}: {error}") from error


def _described_backbone(config: LAPSConfig, side: str) -> dict[str, Any]:
    """The configuration that a backbone can be built from."""
    values: dict[str, Any] = getattr(config, side)
    if not values:
        raise LapsValueError(
            _check.message("LAPS", f"{side} is a module of your own, which no file holds", f"{side}=module")
        )
    return values


def _new_backbone(config: LAPSConfig, side: str, encoders: str) -> nn.Module:
    """A backbone with random weights."""
    return implementations.build(_described_backbone(config, side), encoders)


def _stored_backbone(
    config: LAPSConfig, side: str, encoders: str, state: Mapping[str, Tensor], parts: dict[str, Any]
) -> tuple[nn.Module, bool]:
    """The caller's encoder or backbone, out of `parts`, else one for the stored weights.

    Also whether the stored weights fit it: what they lack is random.
    """
    given: nn.Module | None = parts.pop(side, None)
    if given is not None:
        return given, True
    prefix = f"{side}.backbone."
    stored = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return implementations.restore(_described_backbone(config, side), encoders, stored)


def _image_encoder(config: LAPSConfig, given: nn.Module) -> ImageEncoder:
    if isinstance(given, ImageEncoder):
        return given
    return ImageEncoder(
        given,
        embed_dim=config.embed_dim if config.image_projection else None,
        num_prefix_tokens=config.num_prefix_tokens,
        image_size=config.image_size,
    )


def _text_encoder(config: LAPSConfig, given: nn.Module) -> TextEncoder:
    if isinstance(given, TextEncoder):
        return given
    return TextEncoder(given, embed_dim=config.embed_dim if config.text_projection else None)
