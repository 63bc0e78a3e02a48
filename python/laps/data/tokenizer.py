"""Captions to token ids, with the words that the tokens came from, and the paper's caption augmentation."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from .. import _check
from .._files import write_atomically
from ..errors import LapsTypeError, LapsValueError
from .vocabulary import learn_vocabulary

__all__ = ["CaptionTokenizer", "Tokens"]

PAD_TOKENS = ("[PAD]", "<pad>")
MASK_TOKENS = ("[MASK]", "<mask>")
# The most tokens of a caption where the tokenizer's file does not say: what CLIP and BERT have positions for.
CLIP_END, CLIP_LENGTH, BERT_LENGTH = "<|endoftext|>", 77, 512
# Hub configurations write 1e30 where they mean "unlimited".
UNLIMITED = 1_000_000
# Of the words that augmentation changes: what share is masked, what share replaced; the rest is deleted.
MASKED, REPLACED = 0.5, 0.1
ON_LONG = ("truncate", "raise")

Span = tuple[int, int, str]


@dataclass
class Tokens:
    """Captions as an encoder takes them.

    Attributes:
        input_ids: (B_t, L) int64, each caption between its start and its end token, then padding.
        lengths: (B_t,) int64, the number of tokens without padding.
        spans: per caption and word: first token, past-the-last token, the word as it was written. Start, end
            and padding are in no span.
    """

    input_ids: Tensor
    lengths: Tensor
    spans: list[list[Span]]

    def __len__(self) -> int:
        return len(self.input_ids)


class CaptionTokenizer:
    """Token ids of captions, the same as those of the Hugging Face tokenizer with the same files.

    Made by :meth:`from_pretrained`, :meth:`from_file`, :meth:`from_vocab` or :meth:`train`.

    Args:
        tokenizer: of the `tokenizers` library; it has to put one token before a text and one after.
        max_length: the most tokens of a caption, the start and end tokens included; None takes what the
            tokenizer itself truncates to, else 77 for CLIP and 512 for others.

    Attributes:
        max_length, vocab_size, pad_id: integers.
        mask_id: the mask token's id, or None.

    Raises:
        LapsValueError: a tokenizer without these two tokens, `max_length` below 3.

    Example:
        >>> from laps.data import CaptionTokenizer
        >>> tokenizer = CaptionTokenizer.train(["a red circle", "a blue square"], vocab_size=60)
        >>> tokens = tokenizer.encode(["A red square", "blue"])
        >>> tokens.lengths.tolist(), tokens.spans[0][0], tokens.spans[1]
        ([5, 3], (1, 2, 'A'), [(1, 2, 'blue')])
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int | None = None) -> None:
        operation = "CaptionTokenizer"
        # A copy: the caller's tokenizer keeps its truncation and padding.
        self.backend = Tokenizer.from_str(tokenizer.to_str())
        truncation, padding = self.backend.truncation, self.backend.padding
        self.backend.no_truncation()
        self.backend.no_padding()
        frame = self.backend.encode("").ids
        if len(frame) != 2:
            raise LapsValueError(
                _check.message(
                    operation,
                    "the tokenizer has the wrong special tokens",
                    "one token before a text and one after",
                    [self.backend.id_to_token(i) for i in frame],
                )
            )
        self.start_id, self.end_id = frame
        self.pad_id = int(padding["pad_id"]) if padding else self._id_of(PAD_TOKENS, self.end_id)
        self.mask_id: int | None = self._id_of(MASK_TOKENS, None)
        if max_length is None and truncation:
            max_length = truncation["max_length"]
        if max_length is None:
            clip = self.backend.id_to_token(self.end_id) == CLIP_END
            max_length = CLIP_LENGTH if clip else BERT_LENGTH
        self.max_length = _check.count(operation, "max_length", max_length, 3)
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        special |= {self.start_id, self.end_id, self.pad_id}
        self._ordinary_ids = sorted(set(self.backend.get_vocab().values()) - special)

    def _id_of(self, names: Sequence[str], default: Any) -> Any:
        ids = [self.backend.token_to_id(name) for name in names]
        return next((i for i in ids if i is not None), default)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self.backend.get_vocab_size())

    def __len__(self) -> int:
        return self.vocab_size

    # ---- making one, keeping one

    @classmethod
    def from_file(cls, path: str | Path, *, max_length: int | None = None) -> CaptionTokenizer:
        """Of a ``tokenizer.json``. LapsValueError, with the path, if it is missing or none."""
        operation = "CaptionTokenizer.from_file"
        text = _read(operation, Path(path))
        try:
            tokenizer = Tokenizer.from_str(text)
        # The library raises plain Exception.
        except Exception as error:
            raise LapsValueError(
                _check.message(operation, f"{path} is no tokenizer", "a tokenizer.json", error)
            ) from error
        return cls(tokenizer, max_length=max_length)

    @classmethod
    def from_vocab(
        cls, path: str | Path, lowercase: bool = True, *, max_length: int | None = None
    ) -> CaptionTokenizer:
        """Of BERT's ``vocab.txt``, a token per line. LapsValueError if a token that BERT needs is absent."""
        operation = "CaptionTokenizer.from_vocab"
        lowercase = _check.flag(operation, "lowercase", lowercase)
        lines = _read(operation, Path(path)).removesuffix("\n").split("\n")
        vocabulary = {token.rstrip("\r"): i for i, token in enumerate(lines)}
        absent = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
        if absent:
            raise LapsValueError(
                _check.message(operation, f"{path} is no vocabulary of BERT", f"to find {', '.join(absent)}")
            )
        return cls(_bert(vocabulary, lowercase), max_length=max_length)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, max_length: int | None = None) -> CaptionTokenizer:
        """Of a local folder or a model on the Hugging Face hub: ``tokenizer.json``, else ``vocab.txt``.

        ``tokenizer_config.json``, where there is one, says `max_length` and if ``vocab.txt`` is lowercase.

        Raises:
            LapsValueError: neither file is there, `name` is a path and no folder (of which the hub is not
                asked), or the hub cannot be reached and has nothing cached.
        """
        operation = "CaptionTokenizer.from_pretrained"
        _refuse_paths(operation, name)
        config_file, config_error = _find(operation, name, "tokenizer_config.json")
        config = _settings(operation, config_file) if config_file else {}
        limit = config.get("model_max_length")
        if max_length is None and isinstance(limit, int) and limit < UNLIMITED:
            max_length = limit
        file, error = _find(operation, name, "tokenizer.json")
        if file:
            return cls.from_file(file, max_length=max_length)
        file, error = _find(operation, name, "vocab.txt")
        # Whether the vocabulary is lowercase stands in the configuration: never guess that it has none.
        error = config_error if file else error
        if error:
            raise LapsValueError(_unreachable(operation, name, error)) from error
        if file:
            return cls.from_vocab(file, config.get("do_lower_case", True), max_length=max_length)
        raise LapsValueError(
            _check.message(operation, f"{name} has no tokenizer", "tokenizer.json or vocab.txt", "neither")
        )

    @classmethod
    def train(
        cls, captions: Sequence[str], vocab_size: int = 8000, *, max_length: int | None = None
    ) -> CaptionTokenizer:
        """Learn a lowercase WordPiece vocabulary, with BERT's special tokens and rules, from captions.

        The same captions give the same vocabulary, on any machine and number of threads.

        Raises:
            LapsValueError: no caption, or `vocab_size` below the number of special tokens and letters.
        """
        operation = "CaptionTokenizer.train"
        captions = _captions(operation, captions)
        vocab_size = _check.count(operation, "vocab_size", vocab_size)
        return cls(_bert(learn_vocabulary(operation, captions, vocab_size), True), max_length=max_length)

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json``, with `max_length` and padding, that appears whole or not at all."""
        tokenizer = Tokenizer.from_str(self.backend.to_str())
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id))
        write_atomically(path, tokenizer.to_str(pretty=True))

    # ---- encoding

    def encode(self, captions: Sequence[str], *, on_long: str = "truncate") -> Tokens:
        """Token ids, lengths and words of captions.

        Args:
            captions: B_t texts.
            on_long: "truncate" cuts captions of more than `max_length` tokens, and keeps their end token;
                "raise" refuses them.

        Raises:
            LapsValueError, LapsTypeError: no caption; a caption without a token of its own, or, if asked, too
                long a caption, by index.
        """
        operation = "CaptionTokenizer.encode"
        captions = _captions(operation, captions)
        _check.choice(operation, "on_long", on_long, ON_LONG)
        rows, spans = [], []
        # One at a time: encode_batch starts threads, after which DataLoader workers cannot fork in peace.
        for index, caption in enumerate(captions):
            ids, words = self._words(caption)
            if not ids:
                raise LapsValueError(
                    _check.message(
                        operation, f"captions[{index}] has no token", "at least one word", repr(caption)
                    )
                )
            if on_long == "raise" and len(ids) + 2 > self.max_length:
                raise LapsValueError(
                    _check.message(
                        operation,
                        f"captions[{index}] is too long",
                        f"at most {self.max_length} tokens",
                        len(ids) + 2,
                    )
                )
            rows.append(self._framed(ids))
            last = len(rows[-1]) - 1
            spans.append([(a + 1, min(b + 1, last), text) for a, b, text in words if a + 1 < last])
        input_ids, lengths = self.pad(rows)
        return Tokens(input_ids, lengths, spans)

    def count(self, caption: str) -> int:
        """The number of tokens of a caption, start and end included, before any truncation.

        Raises:
            LapsValueError: half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        """
        return len(self._encoding(caption).ids) + 2

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids as one (B_t, L) int64 tensor, padded to the longest, and their lengths (B_t,) int64."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        input_ids = torch.full((len(rows), int(lengths.max())), self.pad_id, dtype=torch.int64)
        for target, row in zip(input_ids, rows, strict=True):
            target[: len(row)] = torch.tensor(row, dtype=torch.int64)
        return input_ids, lengths

    def augment(self, caption: str, generator: random.Random, probability: float = 0.2) -> list[int]:
        """The ids of a caption, start and end included, some of whose words are masked, replaced or deleted.

        Each word (with all its tokens) is changed with `probability`: of the changed ones half become mask
        tokens, one for each token; a tenth become one token, drawn from the vocabulary without its special
        tokens; the rest is deleted. Where that would delete every word, the caption stays as it is.

        Raises:
            LapsValueError: a caption without tokens, a probability outside [0, 1], or a positive one with a
                vocabulary that has no mask token.

        Source: caption augmentation of the recipe.
        """
        operation = "CaptionTokenizer.augment"
        probability = _check.number(operation, "probability", probability, 0.0, 1.0)
        if probability > 0 and self.mask_id is None:
            raise LapsValueError(
                _check.message(
                    operation,
                    "the vocabulary has no mask token",
                    f"{' or '.join(MASK_TOKENS)}, or probability=0",
                    f"probability={probability:g}",
                )
            )
        ids, words = self._words(caption)
        if not ids:
            raise LapsValueError(
                _check.message(operation, "caption has no token", "at least one word", repr(caption))
            )
        changed: list[int] = []
        for first, past, _ in words:
            # Always two draws per word, so that a word's fate does not move those after it.
            chosen, fate = generator.random() < probability, generator.random()
            if not chosen:
                changed += ids[first:past]
            elif fate < MASKED and self.mask_id is not None:
                changed += [self.mask_id] * (past - first)
            elif fate < MASKED + REPLACED:
                changed.append(generator.choice(self._ordinary_ids))
        return self._framed(changed or ids)

    def _encoding(self, caption: str) -> Encoding:
        """Without start and end."""
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise LapsValueError(
                _check.message(
                    "CaptionTokenizer",
                    "a caption is no text",
                    "valid Unicode",
                    f"{caption!r}: {error.reason}",
                )
            ) from None
        return self.backend.encode(caption, add_special_tokens=False)

    def _words(self, caption: str) -> tuple[list[int], list[Span]]:
        """The ids without start and end, and per word: first id, past-the-last id, text as written."""
        encoding = self._encoding(caption)
        numbers, offsets = encoding.word_ids, encoding.offsets
        words: list[Span] = []
        for piece, number in enumerate(numbers):
            continues = piece > 0 and number is not None and number == numbers[piece - 1]
            first = words.pop()[0] if continues else piece
            words.append((first, piece + 1, caption[offsets[first][0] : offsets[piece][1]]))
        return encoding.ids, words

    def _framed(self, ids: Sequence[int]) -> list[int]:
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]


def _bert(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer.add_special_tokens([token for token in special if token in vocabulary])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def _captions(operation: str, captions: object) -> list[str]:
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise LapsTypeError(
            _check.message(operation, "captions is no list", "a list of strings", _check.name_of(captions))
        )
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise LapsTypeError(
                _check.message(operation, f"captions[{index}] is no text", "str", _check.name_of(caption))
            )
    if not captions:
        raise LapsValueError(_check.message(operation, "captions is empty", "at least one", 0))
    return list(captions)


def _read(operation: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LapsValueError(
            _check.message(operation, f"{path} cannot be read", "a UTF-8 text file", error)
        ) from error


def _settings(operation: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_read(operation, file))
    except json.JSONDecodeError as error:
        raise LapsValueError(
            _check.message(operation, f"{file}:{error.lineno} is malformed", "JSON", error.msg)
        ) from error
    if not isinstance(settings, dict):
        raise LapsValueError(
            _check.message(operation, f"{file} has no settings", "{name: value}", _check.name_of(settings))
        )
    return settings


def _refuse_paths(operation: str, name: str | Path) -> None:
    """Refuse what is meant as a path and leads to no folder: the hub would be asked for it, repeatedly."""
    text, path = str(name), Path(name)
    if path.is_dir():
        return
    if path.exists():
        expected = "a folder or a hub model id; from_file and from_vocab read files"
        raise LapsValueError(_check.message(operation, f"{text} is no folder", expected))
    of_file = path.suffix in (".txt", ".json")
    if of_file or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise LapsValueError(
            _check.message(operation, f"{text} does not exist", "a local folder or a hub model id")
        )


def _find(operation: str, name: str | Path, file: str) -> tuple[Path | None, Exception | None]:
    """A file of a local folder or a hub repository, or why that is unknown (None: it has no such file)."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / file if (folder / file).is_file() else None), None
    try:
        return Path(hf_hub_download(str(name), file)), None
    except LocalEntryNotFoundError as error:
        return None, error
    except EntryNotFoundError:
        return None, None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LapsValueError(_unreachable(operation, name, error)) from error


def _unreachable(operation: str, name: str | Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return _check.message(operation, f"{name} cannot be had", "a local folder or a hub model id", reason)
