"""The whole model is its encoders and its head, whatever the batch, the precision or the compiler."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import laps
import numpy as np
import pytest
import torch
import transformers
from _models import (
    CAPTIONS,
    LENGTHS,
    SIZE,
    SMALL,
    VARIANTS,
    Variant,
    bert_tokenizer,
    build,
    pixels,
    text_model,
    tiny_laps,
    token_ids,
    vision_model,
)
from laps import LapsTypeError, LapsValueError
from laps.data import ImageTransform, RegionTransform, open_image
from laps.encoders import ImageEncoder, TextEncoder
from laps.features import ImageFeatures, TextFeatures
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> laps.LAPS:
    return tiny_laps()


def encode(model: laps.LAPS) -> tuple[ImageFeatures, TextFeatures]:
    ids, lengths = token_ids(LENGTHS)
    return model.encode_image(pixels(3)), model.encode_text(ids.remainder(40), lengths)


# ---- scores


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_scores_are_those_of_the_head_on_the_encoders_tokens(
    variant: Variant,
) -> None:
    model = build(variant)
    ids, lengths = token_ids(LENGTHS)
    ids = ids.remainder(40)
    tokens, words = model.image_encoder(pixels(3)), model.text_encoder(ids, lengths)
    expected = model.head.training_scores(tokens, words, lengths).scores
    images, texts = encode(model)

    scores = model.similarity(images, texts)
    assert scores.shape == (3, 4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    pairwise = model.similarity_pairwise(images, texts[:3])
    torch.testing.assert_close(pairwise, scores[:, :3].diagonal(), rtol=0, atol=1e-6)


def test_a_caption_scores_the_same_alone_and_beside_longer_ones(model: laps.LAPS) -> None:
    images, texts = encode(model)
    together = model.similarity(images, texts)
    ids, lengths = token_ids(LENGTHS)
    for t, length in enumerate(LENGTHS):
        alone = model.encode_text(ids[t : t + 1, :length].remainder(40), lengths[t : t + 1])
        torch.testing.assert_close(model.similarity(images, alone)[:, 0], together[:, t], rtol=0, atol=1e-5)


def test_sentences_and_files_are_encoded_as_the_tokenizer_and_the_transform_say(
    model: laps.LAPS, tmp_path: Path
) -> None:
    paths = []
    for i, size in enumerate([(40, 30), (64, 64)]):
        paths.append(tmp_path / f"{i}.png")
        Image.effect_noise(size, 90).convert("RGB").save(paths[-1])
    images, texts = model.encode_files(paths), model.encode_captions(CAPTIONS)
    tokens = bert_tokenizer().encode(CAPTIONS)
    load = model.transform.eval()
    by_hand = model.encode_image(torch.stack([load(open_image(path)) for path in paths]))

    assert texts.spans == tokens.spans
    assert [word for _, _, word in tokens.spans[0]] == ["a", "red", "circle"]
    assert torch.equal(texts.lengths, tokens.lengths)
    assert torch.equal(
        model.similarity(images, texts),
        model.similarity(by_hand, model.encode_text(tokens.input_ids, tokens.lengths)),
    )


def test_files_and_sentences_in_batches_are_those_in_one(model: laps.LAPS, tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.effect_noise((32, 32), 60 + 30 * i).convert("RGB").save(paths[-1])
    captions = [*CAPTIONS, "a red circle above a blue square and more words than the others"]
    images, texts = model.encode_files(paths, batch_size=2), model.encode_captions(captions, batch_size=2)
    expected = model.similarity(model.encode_files(paths), model.encode_captions(captions))
    torch.testing.assert_close(model.similarity(images, texts), expected, rtol=0, atol=1e-5)
    assert texts.spans == model.encode_captions(captions).spans
    assert not images.patches.requires_grad
    with pytest.raises(LapsValueError, match="batch_size is out of range"):
        model.encode_files(paths, batch_size=0)
    with pytest.raises(LapsValueError, match="captions is empty"):
        model.encode_captions([])


def test_what_cannot_be_encoded_is_named(model: laps.LAPS, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    with pytest.raises(LapsValueError, match=r"broken.png"):
        model.encode_files([broken])
    with pytest.raises(LapsValueError, match="paths is empty"):
        model.encode_files([])
    with pytest.raises(LapsTypeError, match="paths is one path"):
        model.encode_files(str(broken))
    with pytest.raises(LapsTypeError, match="captions is one string"):
        model.encode_captions("a red circle")
    with pytest.raises(LapsValueError, match=r"captions\[1\] has no token"):
        model.encode_captions(["a", " "])
    without = laps.LAPS(model.image_encoder, model.text_encoder, model.head)
    with pytest.raises(LapsValueError, match="the model has no tokenizer"):
        without.encode_captions(["a"])


# ---- rank


def test_rank_orders_a_gallery_of_either_kind(model: laps.LAPS) -> None:
    images, texts = encode(model)
    scores = model.similarity(images, texts)
    by_text, found = model.rank(texts, images, top_k=2)
    by_image, captions = model.rank(images, texts, top_k=9)

    assert found.shape == (4, 2)
    assert torch.equal(found, scores.T.argsort(1, descending=True)[:, :2])
    assert torch.equal(by_text, scores.T.sort(1, descending=True).values[:, :2])
    assert captions.shape == by_image.shape == (3, 4)
    assert torch.equal(captions, scores.argsort(1, descending=True))


def test_equal_scores_rank_in_the_order_of_the_gallery(model: laps.LAPS) -> None:
    images, texts = encode(model)
    twice = ImageFeatures.cat([images, images, images])
    best = int(model.similarity(images, texts[:1]).argmax())
    _, found = model.rank(texts[:1], twice, top_k=3)

    assert found.tolist() == [[best, best + 3, best + 6]]


def test_rank_refuses_two_of_a_kind_and_no_place(model: laps.LAPS) -> None:
    images, texts = encode(model)
    with pytest.raises(LapsTypeError, match="got ImageFeatures and ImageFeatures"):
        model.rank(images, images)
    with pytest.raises(LapsTypeError, match="query and gallery do not fit"):
        model.rank(texts, texts)
    with pytest.raises(LapsValueError, match="top_k"):
        model.rank(texts, images, top_k=0)


# ---- features


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_features_sliced_indexed_and_joined_score_as_before(
    variant: Variant,
) -> None:
    model = build(variant)
    images, texts = encode(model)
    scores = model.similarity(images, texts)
    some = torch.tensor([3, 1])
    parts = [texts[some], texts[torch.tensor([False, False, True, False])], texts[:1]]

    assert [len(part) for part in parts] == [2, 1, 1]
    torch.testing.assert_close(model.similarity(images[1:], parts[0]), scores[1:][:, some], rtol=0, atol=1e-6)
    joined = TextFeatures.cat(parts)
    again = model.similarity(ImageFeatures.cat([images[2:], images[:2]]), joined)
    torch.testing.assert_close(again, scores[[2, 0, 1]][:, [3, 1, 2, 0]], rtol=0, atol=1e-6)


def test_a_part_of_the_captions_keeps_its_words_and_no_more_padding_than_it_needs(model: laps.LAPS) -> None:
    texts = model.encode_captions(CAPTIONS)
    part = texts[torch.tensor([0])]

    assert texts.spans is not None
    assert part.spans == [texts.spans[0]]
    assert part.words is not None
    assert part.words.shape[1] == int(part.lengths[0]) == 5
    joined = TextFeatures.cat([part, texts[1:]])
    assert joined.spans == texts.spans
    assert torch.equal(joined.lengths, texts.lengths)


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[-1:], ids=str)
def test_an_integer_chooses_features_of_one_item_that_score_as_before(variant: Variant) -> None:
    model = build(variant)
    images, texts = encode(model)
    scores = model.similarity(images, texts)
    for number in (1, -2, np.int64(1), torch.tensor(1)):
        one = model.similarity(images[number], texts[number])
        assert one.shape == (1, 1)
        torch.testing.assert_close(one[0, 0], scores[number, number], rtol=0, atol=1e-6)
    assert [len(text) for text in texts] == [1] * 4
    again = model.similarity(ImageFeatures.cat(list(images)), TextFeatures.cat(list(texts)))
    torch.testing.assert_close(again, scores, rtol=0, atol=1e-6)
    for some in ([2, 0], np.array([2, 0])):
        chosen = model.similarity(images[some], texts[some])
        torch.testing.assert_close(chosen, scores[[2, 0]][:, [2, 0]], rtol=0, atol=1e-6)
    assert (len(images[[]]), len(texts[[]])) == (0, 0)


def test_what_is_no_index_of_features_is_refused(model: laps.LAPS) -> None:
    images, texts = encode(model)
    for features, name in ((images, "ImageFeatures"), (texts, "TextFeatures")):
        for index in ((0, 1), 1.5, None, "first", True, [0.5], [[0, 1]], torch.tensor(True), ...):
            with pytest.raises(LapsTypeError, match=f"{name}: the index chooses no items"):
                features[index]  # type: ignore[index]
        for number in (len(features), -len(features) - 1):
            with pytest.raises(IndexError, match=f"{name}: index out of range .*got {number}"):
                features[number]


def test_features_in_half_precision_score_within_its_error(model: laps.LAPS) -> None:
    images, texts = encode(model)
    half = images.to(dtype=torch.float16), texts.to(dtype=torch.float16)
    scores = model.similarity(*half)

    assert half[0].patches is not None
    assert half[0].patches.dtype == torch.float16
    assert half[1].lengths.dtype == torch.int64
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.similarity(images, texts), rtol=0, atol=3e-3)


def test_features_move_to_another_device_except_the_lengths(model: laps.LAPS) -> None:
    images, texts = encode(model)
    moved = texts.to("meta")

    assert moved.words is not None
    assert (moved.words.device.type, moved.embedding.device.type) == ("meta", "meta")
    assert moved.lengths.device.type == "cpu"
    assert all(t is None or t.device.type == "meta" for t in vars(images.to("meta")).values())


def test_features_that_do_not_fit_each_other_are_refused(model: laps.LAPS) -> None:
    images, texts = encode(model)
    with pytest.raises(LapsValueError, match="the tensors differ in number"):
        ImageFeatures(embedding=images.embedding, patches=images.embedding[:2, None])
    with pytest.raises(LapsValueError, match=r"spans does not fit .expected 4 lists, got 1"):
        TextFeatures(embedding=texts.embedding, lengths=texts.lengths, spans=[[]])
    with pytest.raises(LapsValueError, match="some parts have words and some have none"):
        TextFeatures.cat([texts, TextFeatures(embedding=texts.embedding, lengths=texts.lengths)])
    with pytest.raises(LapsValueError, match="parts is empty"):
        ImageFeatures.cat([])


# ---- putting parts together


def test_parts_that_do_not_fit_are_refused_with_both_sizes() -> None:
    images = ImageEncoder(vision_model("vit"), embed_dim=16)
    texts = TextEncoder(text_model(), embed_dim=16)
    wide = TextEncoder(text_model(), embed_dim=24)
    head = laps.nn.LAPSHead(16, 16)
    for parts, match in (
        ((images, wide, head), "text_encoder has embed_dim=24, but head has 16"),
        ((images, texts, laps.nn.LAPSHead(24, 16)), "image_encoder has embed_dim=16, but head has 24"),
        ((images, texts, laps.nn.LAPSHead(16, 25)), "image_encoder has num_patches=16, but head has 25"),
        (
            (images, texts, laps.nn.LAPSHead(16, 16, num_prefix_tokens=0)),
            "image_encoder has num_prefix_tokens=1, but head has 0",
        ),
    ):
        with pytest.raises(LapsValueError, match=match):
            laps.LAPS(*parts)
    with pytest.raises(
        LapsTypeError, match=r"text_encoder has the wrong type .expected TextEncoder, got BertModel"
    ):
        laps.LAPS(images, text_model(), head)  # type: ignore[arg-type]
    for transform, made in (
        (ImageTransform(image_size=224), "(3, 224, 224)"),
        (RegionTransform(36, 2048), "(36, 2053)"),
    ):
        message = f"transform makes {made}, but image_encoder takes (3, 32, 32)"
        with pytest.raises(LapsValueError, match=re.escape(message)):
            laps.LAPS(images, texts, head, transform=transform)
    few = TextEncoder(text_model(vocab_size=12), embed_dim=16)
    with pytest.raises(LapsValueError, match=r"tokenizer has \d+ tokens, but text_encoder has 12"):
        laps.LAPS(images, few, head, tokenizer=bert_tokenizer())


def test_a_preset_starts_from_other_checkpoints_with_the_head_and_loss_that_are_asked_for(
    tmp_path: Path,
) -> None:
    tokenizer = bert_tokenizer()
    vision_model("vit").save_pretrained(tmp_path / "vit")
    text_model(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "bert")
    tokenizer.save(tmp_path / "bert" / "tokenizer.json")
    options: dict[str, Any] = {
        "image_checkpoint": tmp_path / "vit",
        "text_checkpoint": tmp_path / "bert",
    }
    model = laps.LAPS.from_preset("vit-base-224", **options, head_options={"aggregation_ratio": 0.3})
    tokens = vision_model("vit")(pixels(2)).last_hidden_state
    embed = model.image_encoder.projection

    assert isinstance(model.head, laps.nn.LAPSHead)
    assert (model.head.selection_ratio, model.head.aggregation_ratio, model.head.num_patches) == (
        0.5,
        0.3,
        16,
    )
    assert (model.image_encoder.embed_dim, model.transform.image_size) == (512, SIZE)
    torch.testing.assert_close(model.eval().image_encoder(pixels(2)), embed(tokens), rtol=0, atol=1e-5)
    assert model.tokenizer is not None
    assert model.tokenizer.encode(CAPTIONS).spans == tokenizer.encode(CAPTIONS).spans
    assert model.objective.options()["max_score"] == 2.0

    vse = laps.LAPS.from_preset("vit-base-224", **options, head="vse", loss={"name": "triplet"})
    assert (vse.head.name, vse.objective.name, vse.objective.max_score) == ("vse", "triplet", 1.0)


def test_captions_are_cut_to_what_the_text_encoder_has_positions_for(model: laps.LAPS) -> None:
    config = transformers.BertConfig(**SMALL, vocab_size=150, max_position_embeddings=9)
    texts = TextEncoder(transformers.BertModel(config, add_pooling_layer=False), embed_dim=16)
    tokenizer = bert_tokenizer()
    short = laps.LAPS(model.image_encoder, texts, model.head, tokenizer=tokenizer).eval()
    features = short.encode_captions(["a red circle " * 9, "a red circle"])
    assert features.lengths.tolist() == [9, 5]
    assert tokenizer.max_length > 9  # the caller's own is as it was
