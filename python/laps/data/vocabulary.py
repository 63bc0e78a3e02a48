"""A WordPiece vocabulary learned from captions, the same on every run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from .. import _check
from ..errors import LapsValueError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_vocabulary(operation: str, captions: Sequence[str], vocab_size: int) -> dict[str, int]:
    """Token to id: BERT's special tokens, the letters, then the pieces that WordPiece training merges.

    Raises:
        LapsValueError: `vocab_size` below the number of special tokens and letters.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    letters: set[str] = set()
    for caption in captions:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            letters.add(word[0])
            letters.update(f"##{letter}" for letter in word[1:])
    # The library numbers letters in the order of a hash map, and breaks ties between merges by number: two
    # runs would differ. Letters that are given as special tokens are numbered in the given order.
    first = [*SPECIAL, *sorted(letters)]
    if vocab_size < len(first):
        raise LapsValueError(
            _check.message(operation, "vocab_size is too small", f"at least {len(first)}", vocab_size)
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    with _one_thread():
        tokenizer.train_from_iterator(captions, trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train without threads: after them the library warns in every DataLoader worker that forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
