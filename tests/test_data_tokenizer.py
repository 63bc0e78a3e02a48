"""The ids are those of the Hugging Face tokenizers, spans cover them, and augmentation follows its rule."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from laps import LapsTypeError, LapsValueError
from laps.data import CaptionTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, CLIPTokenizerFast

CAPTIONS = [
    "A man in a RED shirt, riding a horse.",
    "two dogs' tails; the dog's tail isn't wagging!",
    "Café Zoë: 3 naïve élèves",
    "日本 の 街 at night \u200b",
    "  tabs\tand\nnew lines  ",
    "[SEP] is written here, and [MASK]",
    "x" * 130,
    "emoji 🐈‍⬛ and ﬁ ligature İstanbul",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!'é日本"
WORDS = ["a", "man", "dog", "dogs", "in", "the", "red", "shirt", "hor", "##se", "rid", "##ing", "cafe", "zoe"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
captions = st.text(st.sampled_from(LETTERS + "ABC \t-İß🐈\u0301"), min_size=1, max_size=60)


def bert_vocabulary() -> dict[str, int]:
    pieces = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def write_vocab(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in bert_vocabulary()), encoding="utf-8")
    return folder / "vocab.txt"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> CaptionTokenizer:
    return CaptionTokenizer.from_vocab(write_vocab(tmp_path_factory.mktemp("bert")))


def clip_of_transformers() -> CLIPTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("r", "e"),
        ("re", "d</w>"),
        ("d", "o"),
        ("do", "g"),
        ("do", "g</w>"),
        ("dog", "s</w>"),
        ("i", "n</w>"),
    ]
    pieces = [*alphabet, *(f"{a}</w>" for a in alphabet), *(a + b for a, b in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> CaptionTokenizer:
    folder = tmp_path_factory.mktemp("clip")
    clip_of_transformers().save_pretrained(folder)
    return CaptionTokenizer.from_pretrained(folder)


def ids_of(tokenizer: CaptionTokenizer, texts: list[str]) -> list[list[int]]:
    tokens = tokenizer.encode(texts)
    return [row[:length].tolist() for row, length in zip(tokens.input_ids, tokens.lengths, strict=True)]


# ---- the same ids as elsewhere


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_equal_those_of_transformers_bert(tmp_path: Path, lowercase: bool) -> None:
    reference = BertTokenizerFast(vocab=bert_vocabulary(), do_lower_case=lowercase)
    tokenizer = CaptionTokenizer.from_vocab(write_vocab(tmp_path), lowercase)
    assert ids_of(tokenizer, CAPTIONS) == reference(CAPTIONS)["input_ids"]
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.max_length) == (PAD, MASK, 512)
    assert tokenizer.vocab_size == len(tokenizer) == len(bert_vocabulary())


def test_ids_equal_those_of_transformers_clip(clip: CaptionTokenizer) -> None:
    reference = clip_of_transformers()
    assert ids_of(clip, CAPTIONS) == reference(CAPTIONS, truncation=True, max_length=77)["input_ids"]
    assert (clip.pad_id, clip.mask_id, clip.max_length) == (reference.pad_token_id, None, 77)


@given(st.lists(captions, min_size=1, max_size=4))
def test_any_text_has_the_ids_of_transformers(bert: CaptionTokenizer, texts: list[str]) -> None:
    expected = BERT_REFERENCE(texts, truncation=True, max_length=512)["input_ids"]
    if any(len(row) == 2 for row in expected):
        with pytest.raises(LapsValueError, match="has no token"):
            bert.encode(texts)
    else:
        assert ids_of(bert, texts) == expected


BERT_REFERENCE = BertTokenizerFast(vocab=bert_vocabulary())


@pytest.mark.parametrize("max_length", [3, 4, 7])
def test_truncation_keeps_the_end_token_as_transformers_does(bert: CaptionTokenizer, max_length: int) -> None:
    short = CaptionTokenizer(
        Tokenizer.from_str(BERT_REFERENCE.backend_tokenizer.to_str()), max_length=max_length
    )
    expected = BERT_REFERENCE(CAPTIONS, truncation=True, max_length=max_length)["input_ids"]
    assert ids_of(short, CAPTIONS) == expected
    assert all(row[-1] == SEP and len(row) <= max_length for row in expected)


# ---- padding, spans


@given(
    st.lists(captions.filter(lambda text: text.strip(" \t\u0301") != ""), min_size=1, max_size=5),
    st.integers(3, 20),
)
@example(["dogs riding", "a"], 4)
def test_spans_cover_the_pieces_and_padding_follows(
    bert: CaptionTokenizer, clip: CaptionTokenizer, texts: list[str], max_length: int
) -> None:
    for whole in (bert, clip):
        tokenizer = CaptionTokenizer(whole.backend, max_length=max_length)
        tokens = tokenizer.encode(texts)
        assert tokens.input_ids.shape == (len(texts), int(tokens.lengths.max()))
        assert tokens.input_ids.dtype == tokens.lengths.dtype == torch.int64
        assert len(tokens) == len(tokens.spans) == len(texts)
        for row, length, spans, text in zip(
            tokens.input_ids, tokens.lengths.tolist(), tokens.spans, texts, strict=True
        ):
            assert 3 <= length <= max_length
            assert (row[0], row[length - 1]) == (tokenizer.start_id, tokenizer.end_id)
            assert (row[length:] == tokenizer.pad_id).all()
            assert [piece for first, past, _ in spans for piece in range(first, past)] == [
                *range(1, length - 1)
            ]
            assert all(first < past for first, past, _ in spans)
            position = 0
            for _, _, word in spans:
                assert word.strip() == word
                position = text.index(word, position)
                # One accented letter can be split into words that overlap in the text.
                position += len(word) - 1


def test_words_are_given_as_written(bert: CaptionTokenizer, clip: CaptionTokenizer) -> None:
    text = "Red DOGS, Café isn't"
    assert [word for _, _, word in bert.encode([text]).spans[0]] == [
        "Red", "DOGS", ",", "Café", "isn", "'", "t"
    ]  # fmt: skip
    assert [word for _, _, word in clip.encode([text]).spans[0]] == ["Red", "DOGS", ",", "Café", "isn", "'t"]


def test_a_word_that_is_cut_keeps_its_text(bert: CaptionTokenizer) -> None:
    tokens = CaptionTokenizer(bert.backend, max_length=4).encode(["a riding dog"])
    assert tokens.spans == [[(1, 2, "a"), (2, 3, "riding")]]


# ---- files


def test_a_saved_tokenizer_comes_back_the_same(
    tmp_path: Path, bert: CaptionTokenizer, clip: CaptionTokenizer
) -> None:
    for whole in (bert, clip):
        tokenizer = CaptionTokenizer(whole.backend, max_length=9)
        tokenizer.save(tmp_path / "tokenizer.json")
        for again in (
            CaptionTokenizer.from_file(tmp_path / "tokenizer.json"),
            CaptionTokenizer.from_pretrained(tmp_path),
        ):
            assert (again.max_length, again.pad_id, again.mask_id) == (9, whole.pad_id, whole.mask_id)
            assert ids_of(again, CAPTIONS) == ids_of(tokenizer, CAPTIONS)
        assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
        assert CaptionTokenizer.from_file(tmp_path / "tokenizer.json", max_length=30).max_length == 30


def test_a_folder_of_bert_says_its_length_and_case(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path)
    assert (ids_of(tokenizer, ["DOGS"]), tokenizer.max_length) == (ids_of(tokenizer, ["dogs"]), 512)
    config: dict[str, Any] = {"do_lower_case": False, "model_max_length": 40}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    cased = CaptionTokenizer.from_pretrained(tmp_path)
    assert (ids_of(cased, ["DOGS"]), cased.max_length) == ([[CLS, UNK, SEP]], 40)
    assert CaptionTokenizer.from_pretrained(str(tmp_path), max_length=12).max_length == 12
    config["model_max_length"] = int(1e30)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert CaptionTokenizer.from_pretrained(tmp_path).max_length == 512


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, bert: CaptionTokenizer) -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    bert.save(snapshot / "tokenizer.json")
    code = (
        "from laps.data import CaptionTokenizer; from laps import LapsValueError\n"
        "print(CaptionTokenizer.from_pretrained('someone/model').encode(['a dog']).input_ids.tolist())\n"
        "for name in ('someone/else', 'nobody'):\n"
        "    try: CaptionTokenizer.from_pretrained(name)\n"
        "    except LapsValueError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    lines = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0] == str(bert.encode(["a dog"]).input_ids.tolist())
    assert all("cannot be had (expected a local folder or a hub model id" in line for line in lines[1:])
    assert all(name in line for name, line in zip(("someone/else", "nobody"), lines[1:], strict=True))


def test_a_vocabulary_is_learned_the_same_in_every_process(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefg", k=generator.randint(1, 6))) for _ in range(150)]
    lines = [" ".join(generator.choices(words, k=8)) for _ in range(300)]
    here = CaptionTokenizer.train(lines, vocab_size=120)
    assert here.vocab_size == 120
    assert all(UNK not in row for row in ids_of(here, lines))
    here.save(tmp_path / "here.json")
    (tmp_path / "lines.txt").write_text("\n".join(reversed(lines)))
    code = (
        "import sys; from laps.data import CaptionTokenizer\n"
        "CaptionTokenizer.train(open(sys.argv[1]).read().split('\\n'), vocab_size=120).save(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "lines.txt", tmp_path / "there.json"],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        check=True,
    )
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_a_learned_vocabulary_has_berts_conventions() -> None:
    tokenizer = CaptionTokenizer.train(["A red dog", "red dogs"], vocab_size=40)
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL] == [PAD, UNK, CLS, SEP, MASK]
    assert ids_of(tokenizer, ["RED dog"]) == ids_of(tokenizer, ["red DOG"])
    assert len(ids_of(tokenizer, ["red"])[0]) == 3
    assert ids_of(tokenizer, ["zzz"]) == [[CLS, UNK, SEP]]


# ---- augmentation


def test_nothing_changes_at_probability_0(bert: CaptionTokenizer, clip: CaptionTokenizer) -> None:
    for tokenizer in (bert, clip):
        for text in CAPTIONS:
            assert tokenizer.augment(text, random.Random(0), 0.0) == ids_of(tokenizer, [text])[0]


def test_the_same_generator_gives_the_same_caption(bert: CaptionTokenizer) -> None:
    drawn = [bert.augment(CAPTIONS[0], random.Random(seed)) for seed in (5, 5, 6, 7, 8, 9)]
    assert drawn[0] == drawn[1]
    assert len({tuple(row) for row in drawn}) > 2


def test_words_are_masked_replaced_and_deleted_as_often_as_the_rule_says(bert: CaptionTokenizer) -> None:
    # One word of two pieces and five of one, all different, so that each one's fate shows in the result.
    text, trials = "riding the dog in red shirt", 6000
    generator = random.Random(1)
    riding = ids_of(bert, ["riding"])[0][1:-1]
    others = [ids_of(bert, [word])[0][1] for word in ("the", "dog", "in", "red", "shirt")]
    assert len(riding) == 2
    counts: Counter[str] = Counter()
    fates: Counter[str] = Counter()
    for _ in range(trials):
        row = bert.augment(text, generator)
        assert (row[0], row[-1]) == (CLS, SEP)
        body = row[1:-1]
        # The two pieces of a word share their fate.
        head = "kept" if body[:2] == riding else "masked" if body[:2] == [MASK] * 2 else "one or none"
        fates[head] += 1
        counts["kept"] += sum(piece in others for piece in body)
        counts["masks"] += body.count(MASK)
        counts["foreign"] += sum(piece not in (*riding, *others, MASK) for piece in body)
        counts["length"] += len(body)
    foreign_share = 1 - (len(others) + 2) / (bert.vocab_size - len(SPECIAL))

    def near(count: float, expected: float, variance: float) -> None:
        # Five standard deviations: one chance failure in a million, and the seed is fixed.
        assert abs(count - expected) < 5 * math.sqrt(variance)

    masked = 0.2 * 0.5
    near(fates["kept"], 0.8 * trials, 0.8 * 0.2 * trials)
    # Also where the first word is gone and the next two are masked: rare enough to drown in the tolerance.
    near(fates["masked"], masked * trials, masked * (1 - masked) * trials)
    near(counts["masks"], 7 * masked * trials, (5 + 4) * masked * (1 - masked) * trials)
    near(counts["foreign"], 6 * 0.02 * foreign_share * trials, 6 * 0.02 * trials)
    near(counts["length"], (5 * 0.92 + 1.82) * trials, (5 * 0.08 * 0.92 + 0.4) * trials)


def test_at_probability_1_half_are_masked_a_tenth_replaced_and_the_rest_deleted(
    bert: CaptionTokenizer,
) -> None:
    # A hundred words, so that a caption that would lose all of them never comes up.
    text, generator, counts = " ".join(["dog"] * 100), random.Random(2), Counter[str]()
    for _ in range(100):
        body = bert.augment(text, generator, 1.0)[1:-1]
        counts["masked"] += body.count(MASK)
        counts["replaced"] += sum(piece != MASK for piece in body)
        counts["deleted"] += 100 - len(body)
        assert not set(body) & {PAD, UNK, CLS, SEP}
    statistic = sum(
        (counts[k] - e) ** 2 / e for k, e in (("masked", 5000), ("replaced", 1000), ("deleted", 4000))
    )
    # The chi-square distribution's 0.9999 quantile at 2 degrees of freedom.
    assert statistic < 18.4


def test_replacements_come_from_the_whole_vocabulary(bert: CaptionTokenizer) -> None:
    generator, seen = random.Random(3), set[int]()
    for _ in range(200):
        seen.update(bert.augment(" ".join(["dog"] * 100), generator, 1.0)[1:-1])
    assert seen == {MASK, *range(len(SPECIAL), bert.vocab_size)}


def test_a_caption_never_loses_all_its_words(bert: CaptionTokenizer) -> None:
    rows = [bert.augment("dog", random.Random(seed), 1.0) for seed in range(200)]
    assert all(len(row) == 3 for row in rows)
    assert ids_of(bert, ["dog"])[0] in rows


def test_augmented_captions_are_truncated_too(bert: CaptionTokenizer) -> None:
    short = CaptionTokenizer(bert.backend, max_length=6)
    for seed in range(20):
        row = short.augment(CAPTIONS[0], random.Random(seed))
        assert len(row) == 6
        assert row[-1] == SEP


# ---- what is refused


def test_captions_that_cannot_be_encoded_are_refused(bert: CaptionTokenizer) -> None:
    with pytest.raises(LapsValueError, match=r"captions\[1\] has no token .* got ' \\u200b'"):
        bert.encode(["a dog", " \u200b"])
    with pytest.raises(LapsValueError, match="caption has no token"):
        bert.augment("", random.Random(0))
    with pytest.raises(LapsValueError, match="captions is empty"):
        bert.encode([])
    with pytest.raises(LapsTypeError, match="captions is no list"):
        bert.encode("a dog")
    with pytest.raises(LapsTypeError, match=r"captions\[1\] is no text"):
        bert.encode(["a dog", 3])  # type: ignore[list-item]


def test_long_captions_are_refused_if_asked(bert: CaptionTokenizer) -> None:
    short = CaptionTokenizer(bert.backend, max_length=4)
    assert short.encode(["a", "a dog"], on_long="raise").lengths.tolist() == [3, 4]
    with pytest.raises(
        LapsValueError, match=r"captions\[1\] is too long \(expected at most 4 tokens, got 5\)"
    ):
        short.encode(["a", "a dog in"], on_long="raise")
    with pytest.raises(LapsValueError, match="on_long is unknown"):
        short.encode(["a"], on_long="cut")
    assert (short.count("a dog in"), short.count(" ")) == (5, 2)


def test_augmentation_needs_a_mask_token_and_a_probability(
    bert: CaptionTokenizer, clip: CaptionTokenizer
) -> None:
    with pytest.raises(LapsValueError, match="no mask token"):
        clip.augment("a dog", random.Random(0))
    with pytest.raises(LapsValueError, match="probability"):
        bert.augment("a dog", random.Random(0), 1.5)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(LapsValueError, match=r"a\.json is no tokenizer"):
        CaptionTokenizer.from_file(tmp_path / "a.json")
    with pytest.raises(LapsValueError, match=r"b\.json cannot be read"):
        CaptionTokenizer.from_file(tmp_path / "b.json")
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(LapsValueError, match=r"words\.txt is no vocabulary of BERT .*\[CLS\], \[SEP\]"):
        CaptionTokenizer.from_vocab(tmp_path / "words.txt")
    with pytest.raises(LapsValueError, match="has no tokenizer"):
        CaptionTokenizer.from_pretrained(tmp_path)
    for content, part in (('{"a":\n', r"tokenizer_config\.json:2 is malformed"), ("[]", "has no settings")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(LapsValueError, match=part):
            CaptionTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_without_start_and_end_is_refused() -> None:
    with pytest.raises(LapsValueError, match="wrong special tokens"):
        CaptionTokenizer(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def test_too_small_a_vocabulary_is_refused_with_the_least_size() -> None:
    with pytest.raises(LapsValueError, match=r"vocab_size is too small \(expected at least 9, got 8\)"):
        CaptionTokenizer.train(["ab ba"], vocab_size=8)
    assert CaptionTokenizer.train(["ab ba"], vocab_size=9).vocab_size == 9
    with pytest.raises(LapsValueError, match="max_length"):
        CaptionTokenizer.train(["ab ba"], vocab_size=9, max_length=2)


def test_half_a_surrogate_pair_is_refused_with_the_caption() -> None:
    tokenizer = CaptionTokenizer.train(["a red cat"], vocab_size=60)
    caption = json.loads('"a \\ud83d cat"')
    message = r"a caption is no text .expected valid Unicode, got 'a \\ud83d cat'"
    with pytest.raises(LapsValueError, match=message):
        tokenizer.encode([caption])
    with pytest.raises(LapsValueError, match=message):
        tokenizer.count(caption)
    assert tokenizer.count("a cat") == 4


@pytest.mark.parametrize("name", ["nope.txt", "bert/vocab.json", "no/such/folder", "./nope", "/nope"])
def test_a_path_that_leads_nowhere_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("laps.data.tokenizer.hf_hub_download", asked)
    with pytest.raises(LapsValueError, match="does not exist"):
        CaptionTokenizer.from_pretrained(name)
