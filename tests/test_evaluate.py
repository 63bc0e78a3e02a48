"""Evaluation equals scoring everything at once, in any blocks, and says what is wrong with which file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laps
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laps import LapsTypeError, LapsValueError
from laps.data import CaptionTokenizer, ImageTransform, RetrievalData, open_image
from laps.evaluation import Evaluation, evaluate
from laps.evaluation.encode import CaptionStore, encode_images
from laps.evaluation.rerank import nominate
from laps.features import ImageFeatures, TextFeatures
from laps.heads import GlobalHead, SimilarityHead
from laps.metrics import fold_metrics, retrieval_metrics
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

SIZE, PATCH, WIDTH = 32, 8, 16
WORDS = ["a", "the", "red", "green", "large", "small", "circle", "square", "star", "left", "of", "above"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class TinyModel(nn.Module):
    """A convolution over patches, a table of words with a little dropout, and a real head."""

    def __init__(self, tokenizer: CaptionTokenizer | None, head: SimilarityHead | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer = tokenizer
        self.transform = ImageTransform(image_size=SIZE)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.words = nn.Embedding(200, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.head = head or laps.nn.LAPSHead(WIDTH, (SIZE // PATCH) ** 2)
        self.seen: dict[str, list[tuple[int, ...]]] = {"images": [], "captions": [], "pairs": []}

    @property
    def device(self) -> torch.device:
        return self.patches.weight.device

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        self.seen["images"].append(tuple(pixel_values.shape))
        patches = self.dropout(self.patches(pixel_values).flatten(2).transpose(1, 2))
        return self.head.encode_image(torch.cat([patches.mean(1, keepdim=True), patches], dim=1))

    def encode_text(self, input_ids: Tensor, lengths: Tensor) -> TextFeatures:
        self.seen["captions"].append(tuple(input_ids.shape))
        return self.head.encode_text(self.dropout(self.words(input_ids)), lengths)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        self.seen["pairs"].append((len(images), len(texts), int(texts.lengths.max())))
        return self.head.similarity(images, texts)


def make_data(folder: Path, counts: list[int], *, seed: int = 0) -> RetrievalData:
    """Images with so many captions each, as files, the captions in any order."""
    generator = np.random.default_rng(seed)
    paths = []
    for i in range(len(counts)):
        paths.append(folder / f"{i}.png")
        # Blocks of colour: noise alone would make all images nearly equal.
        small = generator.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 36), Image.Resampling.NEAREST).save(paths[-1])
    image_of = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    captions = [" ".join(generator.choice(WORDS, size=generator.integers(1, 12))) for _ in image_of]
    return RetrievalData(paths, captions, image_of, "tiny/test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RetrievalData:
    return make_data(tmp_path_factory.mktemp("images"), [0, 1, 2, 3, 4, 5, 1, 1, 7, 2, 5, 5, 5, 0, 3, 1])


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train([" ".join(WORDS)], vocab_size=150)


@pytest.fixture
def model(tokenizer: CaptionTokenizer) -> TinyModel:
    return TinyModel(tokenizer)


def all_at_once(model: TinyModel, data: RetrievalData) -> tuple[ImageFeatures, TextFeatures]:
    """The features of everything, each side in one batch."""
    training = model.training
    model.eval()
    load = model.transform.eval()
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(data.captions)
    with torch.no_grad():
        images = model.encode_image(torch.stack([load(open_image(path)) for path in data.image_paths]))
        texts = model.encode_text(tokens.input_ids, tokens.lengths)
    model.train(training)
    return images, texts


def scores_at_once(model: TinyModel, data: RetrievalData) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = model.similarity(*all_at_once(model, data)).numpy()
    return scores


# ---- the matrix


@pytest.mark.parametrize("pair_chunk", [None, 1, 40, 333])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_equal_scoring_everything_at_once(
    model: TinyModel, data: RetrievalData, batch_size: int, pair_chunk: int | None
) -> None:
    result = evaluate(model, data, batch_size=batch_size, pair_chunk=pair_chunk, progress=False)
    assert result.scores.dtype == np.float32
    np.testing.assert_allclose(result.scores, scores_at_once(model, data), atol=1e-5)
    assert result.metrics == retrieval_metrics(result.scores, data.caption_to_image)


def test_worker_processes_change_nothing(model: TinyModel, data: RetrievalData) -> None:
    one, two = (evaluate(model, data, num_workers=n, batch_size=5, progress=False) for n in (0, 2))
    assert np.array_equal(one.scores, two.scores)


def test_each_image_and_caption_is_encoded_once_with_little_padding(
    model: TinyModel, data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    evaluate(model, data, batch_size=4, rerank=3, folds=2, progress=False)
    assert sum(shape[0] for shape in model.seen["images"]) == data.num_images
    assert sum(shape[0] for shape in model.seen["captions"]) == data.num_captions
    # Longest first: a batch is as wide as its longest caption, and the next one is no wider.
    lengths = sorted(tokenizer.encode(data.captions).lengths.tolist(), reverse=True)
    assert [shape[1] for shape in model.seen["captions"]] == lengths[::4]


@pytest.mark.parametrize("pair_chunk", [1, 40, 333, 5000])
def test_a_block_is_never_larger_than_asked(model: TinyModel, data: RetrievalData, pair_chunk: int) -> None:
    evaluate(model, data, pair_chunk=pair_chunk, rerank=3, progress=False)
    assert max(images * captions for images, captions, _ in model.seen["pairs"]) <= pair_chunk


def test_long_captions_come_in_smaller_blocks() -> None:
    lengths = torch.tensor([3, 500, 2, 500, 4])
    store = CaptionStore(torch.zeros(5, 1), lengths, torch.zeros(1009, 1), lengths.cumsum(0) - lengths)
    assert [block.tolist() for block in store.blocks(torch.arange(5), 2)] == [[1, 3], [4, 0], [2]]
    many = store.blocks(torch.tensor([1]).repeat(1000), 1000)
    assert max(len(block) for block in many) * 500 <= 32_768


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_stored_in_half_precision_give_float32_scores(
    model: TinyModel, data: RetrievalData, dtype: torch.dtype
) -> None:
    stored = encode_images(model, data, batch_size=5, num_workers=0, amp=False, dtype=dtype, progress=False)
    assert stored.patches is not None
    assert stored.patches.dtype == dtype
    model.eval()
    result = evaluate(model, data, feature_dtype=dtype, progress=False)
    assert result.scores.dtype == np.float32
    # One rounding of the features, in the eleventh (float16) or eighth (bfloat16) bit, and another
    # patch selected here and there.
    np.testing.assert_allclose(result.scores, scores_at_once(model, data), atol=0.1)
    assert np.abs(result.scores - scores_at_once(model, data)).mean() < 0.01


def test_autocast_gives_nearly_the_same(model: TinyModel, data: RetrievalData) -> None:
    result = evaluate(model, data, amp=True, rerank=4, progress=False)
    assert np.abs(result.scores - scores_at_once(model, data)).mean() < 0.01


def test_float64_models_are_scored_in_float64(model: TinyModel, data: RetrievalData) -> None:
    class Double(TinyModel):
        def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
            return super().encode_image(pixel_values.double())

    double = Double(model.tokenizer).double()
    result = evaluate(double, data, rerank=4, progress=False)
    np.testing.assert_allclose(result.scores, scores_at_once(model, data), atol=1e-5)


# ---- the model comes back as it was


def test_each_module_keeps_its_training_mode(model: TinyModel, data: RetrievalData) -> None:
    model.train()
    model.patches.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, data, progress=False)
    assert [module.training for module in model.modules()] == modes
    broken = RetrievalData([*data.image_paths[:-1], Path("absent.png")], data.captions, data.caption_to_image)
    with pytest.raises(LapsValueError, match=r"absent\.png is missing"):
        evaluate(model, broken, progress=False)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_random_number_is_drawn(model: TinyModel, data: RetrievalData, num_workers: int) -> None:
    model.train()
    state = torch.get_rng_state()
    evaluate(model, data, num_workers=num_workers, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_goes_on_afterwards(model: TinyModel, data: RetrievalData) -> None:
    evaluate(model.train(), data, progress=False)
    images = model.encode_image(torch.randn(2, 3, SIZE, SIZE))
    texts = model.encode_text(torch.randint(100, (3, 4)), torch.tensor([4, 3, 2]))
    model.similarity(images, texts).sum().backward()  # type: ignore[no-untyped-call]
    assert model.patches.weight.grad is not None


# ---- folds


def test_folds_are_means_over_blocks_of_the_same_matrix(model: TinyModel, data: RetrievalData) -> None:
    result = evaluate(model, data, folds=3, progress=False)
    assert result.folds == fold_metrics(result.scores, data.caption_to_image, 3)
    assert evaluate(model, data, progress=False).folds is None


# ---- two stages


def best(scores: NDArray[np.float32], k: int) -> list[int]:
    """The k highest; of equal ones the first."""
    return [index for _, index in sorted((-score, index) for index, score in enumerate(scores.tolist()))][:k]


def rerank_by_loops(
    scores: NDArray[np.float32], embeddings: NDArray[np.float32], image_of: list[int], k: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """Metrics, share of queries with a relevant item nominated, and pairs, one query after the other."""
    images, captions = scores.shape
    i2t, t2i = np.empty(scores.shape), np.empty(scores.shape)
    pairs, found = set(), {"i2t": 0, "t2i": 0}
    for i in range(images):
        nominated = best(embeddings[i], k)
        for t in range(captions):
            i2t[i, t] = scores[i, t] if t in nominated else -1000.0
        found["i2t"] += any(image_of[t] == i for t in nominated)
        pairs |= {(i, t) for t in nominated}
    for t in range(captions):
        nominated = best(embeddings[:, t], k)
        for i in range(images):
            t2i[i, t] = scores[i, t] if i in nominated else -1000.0
        found["t2i"] += image_of[t] in nominated
        pairs |= {(i, t) for i in nominated}
    two = (retrieval_metrics(i2t, image_of), retrieval_metrics(t2i, image_of))
    metrics = {name: two[name.startswith("t2i")][name] for name in two[0]}
    metrics["rsum"] = sum(metrics[f"{way}_r{n}"] for way in ("i2t", "t2i") for n in (1, 5, 10))
    share = {"i2t": 100 * found["i2t"] / len(set(image_of)), "t2i": 100 * found["t2i"] / captions}
    return metrics, share, len(pairs)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("pair_chunk", [None, 3])
def test_two_stages_equal_plain_loops(
    model: TinyModel, data: RetrievalData, k: int, pair_chunk: int | None
) -> None:
    images, texts = all_at_once(model, data)
    embeddings = (images.embedding @ texts.embedding.T).numpy()
    image_of = data.caption_to_image.tolist()
    metrics, share, pairs = rerank_by_loops(scores_at_once(model, data), embeddings, image_of, k)
    result = evaluate(model, data, rerank=k, pair_chunk=pair_chunk, progress=False)
    found = result.rerank
    assert found is not None
    assert found.metrics == pytest.approx(metrics)
    assert found.shortlist_recall == pytest.approx(share)
    assert found.pairs == pairs
    assert found.embedding_metrics == pytest.approx(retrieval_metrics(embeddings, image_of))
    expected = {name: result.metrics[name] - metrics[name] for name in found.recall_loss}
    assert found.recall_loss == pytest.approx(expected)
    assert list(expected) == ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"]


def test_a_shortlist_of_everything_loses_nothing(model: TinyModel, data: RetrievalData) -> None:
    result = evaluate(model, data, rerank=1000, progress=False)
    assert result.rerank is not None
    assert result.rerank.metrics == result.metrics
    assert set(result.rerank.recall_loss.values()) == {0.0}
    assert result.rerank.shortlist_recall == {"i2t": 100.0, "t2i": 100.0}
    assert result.rerank.pairs == data.num_images * data.num_captions


def test_a_relevant_item_off_the_shortlist_is_a_miss(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    """The head ranks all images right, the embeddings rank the right one last: nothing can be found."""

    class Misled(TinyModel):
        def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
            features = super().encode_image(pixel_values)
            first = sum(shape[0] for shape in self.seen["images"]) - len(features)
            features.embedding = -torch.eye(WIDTH)[first : first + len(features)]
            return features

        def encode_text(self, input_ids: Tensor, lengths: Tensor) -> TextFeatures:
            features = super().encode_text(input_ids, lengths)
            features.embedding = torch.eye(WIDTH)[self.number_of(input_ids, lengths)]
            return features

        def number_of(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
            # Caption n is the word of n letters "a".
            return lengths - 3

        def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
            return -images.embedding @ texts.embedding.T

    data = make_data(tmp_path, [1] * 8)
    data = RetrievalData(data.image_paths, [" ".join(["a"] * (n + 1)) for n in range(8)], np.arange(8))
    result = evaluate(Misled(tokenizer), data, rerank=7, progress=False)
    assert result.rerank is not None
    assert result.metrics["rsum"] == 600.0
    assert result.rerank.shortlist_recall == {"i2t": 0.0, "t2i": 0.0}
    assert (result.rerank.metrics["i2t_meanr"], result.rerank.metrics["t2i_meanr"]) == (8.0, 8.0)
    assert result.rerank.metrics["i2t_r5"] == result.rerank.metrics["t2i_r5"] == 0.0


def test_reranking_calls_the_head_once_per_image(model: TinyModel, data: RetrievalData) -> None:
    evaluate(model, data, progress=False)
    exhaustive = len(model.seen["pairs"])
    model.seen["pairs"].clear()
    evaluate(model, data, rerank=2, progress=False)
    calls = model.seen["pairs"][exhaustive:]
    assert len(calls) == data.num_images
    assert all(images == 1 for images, _, _ in calls)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_equal_embeddings_are_nominated_in_order(
    images: int, captions: int, k: int, levels: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).integers(levels, size=(images, captions)).astype(np.float32)
    pairs, by_image, by_caption = nominate(scores, k)
    chosen = list(zip(pairs.image.tolist(), pairs.caption.tolist(), strict=True))
    assert chosen == sorted(set(chosen))
    by_row = {pair for pair, own in zip(chosen, by_image, strict=True) if own}
    by_column = {pair for pair, own in zip(chosen, by_caption, strict=True) if own}
    assert by_row == {(i, t) for i in range(images) for t in best(scores[i], k)}
    assert by_column == {(i, t) for t in range(captions) for i in best(scores[:, t], k)}
    assert by_row | by_column == set(chosen)


def test_a_head_of_embeddings_alone_needs_no_words(tokenizer: CaptionTokenizer, data: RetrievalData) -> None:
    model = TinyModel(tokenizer, GlobalHead(WIDTH, 16))
    result = evaluate(model, data, rerank=1000, feature_dtype=torch.float16, progress=False)
    assert result.rerank is not None
    # The head decides as the embeddings do. Only rounding may differ, and it makes no tie here.
    assert result.rerank.metrics == result.rerank.embedding_metrics == result.metrics


def test_global_scoring_is_the_product_of_the_embeddings(model: TinyModel, data: RetrievalData) -> None:
    images, texts = all_at_once(model, data)
    expected = (images.embedding @ texts.embedding.T).numpy()
    result = evaluate(model, data, scoring="global", folds=2, progress=False)
    assert model.seen["pairs"] == []
    np.testing.assert_allclose(result.scores, expected, rtol=0, atol=1e-6)
    assert result.metrics == pytest.approx(retrieval_metrics(expected, data.caption_to_image))
    assert list(result.protocols()) == ["embeddings alone", "mean of 2 folds"]
    # As the first stage of the two has it.
    reranked = evaluate(model, data, rerank=1, progress=False).rerank
    assert reranked is not None
    assert result.metrics == pytest.approx(reranked.embedding_metrics)


def test_global_scoring_of_a_trained_model_is_that_of_the_global_head(
    tokenizer: CaptionTokenizer, data: RetrievalData
) -> None:
    laps_model = TinyModel(tokenizer)
    global_model = TinyModel(tokenizer, GlobalHead(WIDTH, 16))
    global_model.load_state_dict(laps_model.state_dict(), strict=False)
    result = evaluate(laps_model, data, scoring="global", progress=False)
    np.testing.assert_allclose(
        result.scores, evaluate(global_model, data, progress=False).scores, rtol=0, atol=1e-6
    )


# ---- what is refused


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named(
    model: TinyModel, data: RetrievalData, tmp_path: Path, num_workers: int
) -> None:
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(data.image_paths[3].read_bytes()[:100])
    paths = [*data.image_paths[:3], truncated, *data.image_paths[4:]]
    with pytest.raises(LapsValueError, match=re.escape(str(truncated))):
        evaluate(
            model,
            RetrievalData(paths, data.captions, data.caption_to_image),
            num_workers=num_workers,
            progress=False,
        )


def broken_image(model: TinyModel, data: RetrievalData) -> str:
    class Contrast(type(model)):  # type: ignore[misc]
        def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
            # An image of one colour has no contrast: 0 / 0.
            pixel_values = pixel_values - pixel_values.mean((1, 2, 3), keepdim=True)
            features: ImageFeatures = super().encode_image(
                pixel_values / pixel_values.std((1, 2, 3), keepdim=True)
            )
            return features

    model.__class__ = Contrast
    model.transform = ImageTransform(image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    path = re.escape(str(data.image_paths[2]))
    return rf"image 2 \({path}\): its embedding features are not finite in float32"


def broken_caption(model: TinyModel, data: RetrievalData) -> str:
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(["red"])
    with torch.no_grad():
        model.words.weight[tokens.input_ids[0, 1]] = torch.nan
    return r"caption \d+ \('[^']*\bred\b[^']*'\): its embedding features are not finite in float32"


def broken_pair(model: TinyModel, data: RetrievalData) -> str:
    class Tempered(type(model)):  # type: ignore[misc]
        def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
            scores: Tensor = super().similarity(images, texts)
            return scores / 0.0

    model.__class__ = Tempered
    return (
        rf"the score of image 0 \({re.escape(str(data.image_paths[0]))}\) with caption \d+ "
        rf"\('[\w ]+'\) is not finite \(expected finite scores, got -?inf\)"
    )


@pytest.mark.parametrize("break_model", [broken_image, broken_caption, broken_pair])
def test_what_is_not_finite_is_named(
    model: TinyModel,
    data: RetrievalData,
    tmp_path: Path,
    break_model: Callable[[TinyModel, RetrievalData], str],
) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (40, 36), (128, 128, 128)).save(plain)
    paths = [*data.image_paths[:2], plain, *data.image_paths[3:]]
    broken = RetrievalData(paths, data.captions, data.caption_to_image)
    message = break_model(model, broken)
    with pytest.raises(LapsValueError, match=message):
        evaluate(model, broken, progress=False)


def test_features_that_float16_cannot_hold_are_named(model: TinyModel, data: RetrievalData) -> None:
    with torch.no_grad():
        model.patches.weight.mul_(1e6)
    evaluate(model, data, progress=False)
    with pytest.raises(
        LapsValueError, match=r"image 0 \(.*\): its patches features are not finite in float16"
    ):
        evaluate(model, data, feature_dtype=torch.float16, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size is out of range \(expected batch_size >= 1, got 0\)"),
        ({"num_workers": -1}, "num_workers is out of range"),
        ({"pair_chunk": 0}, "pair_chunk is out of range"),
        ({"folds": 17}, r"folds is out of range \(expected 1 <= folds <= B_v=16, got 17\)"),
        ({"rerank": 0}, "rerank is out of range"),
        ({"scoring": "both"}, "scoring is unknown"),
        ({"scoring": "global", "rerank": 3}, 'rerank with scoring="global"'),
        ({"feature_dtype": torch.int8}, "feature_dtype is unknown"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_work(
    model: TinyModel, data: RetrievalData, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(LapsValueError, match=f"evaluate: {message}"):
        evaluate(model, data, progress=False, **arguments)
    assert model.seen["images"] == []


def test_a_fold_without_captions_is_refused_before_any_work(model: TinyModel, data: RetrievalData) -> None:
    with pytest.raises(LapsValueError, match=r"fold 0 \(images 0\.\.0\) has no captions"):
        evaluate(model, data, folds=16, progress=False)
    assert model.seen["images"] == []


def test_wrong_types_are_refused(model: TinyModel, data: RetrievalData) -> None:
    with pytest.raises(LapsTypeError, match=r"data has the wrong type \(expected RetrievalData, got str\)"):
        evaluate(model, "f30k")  # type: ignore[arg-type]
    with pytest.raises(LapsTypeError, match="amp is no flag"):
        evaluate(model, data, amp=1)  # type: ignore[arg-type]
    with pytest.raises(LapsValueError, match="the model has no tokenizer"):
        evaluate(TinyModel(None), data, progress=False)


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_shown_on_a_terminal_only_and_only_if_asked(
    model: TinyModel, data: RetrievalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    for stream, progress in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr("sys.stderr", stream)
        evaluate(model, data, rerank=2, progress=progress)
        shown.append(stream.getvalue())
    for name in ("encode images", "encode captions", "score pairs", "embeddings", "rerank 2"):
        assert f"{name}: 100%" in shown[0]
    assert shown[1:] == ["", ""]


# ---- results


@pytest.fixture(scope="module")
def result(data: RetrievalData, tokenizer: CaptionTokenizer) -> Evaluation:
    return evaluate(TinyModel(tokenizer), data, folds=2, rerank=4, progress=False)


def test_the_table_has_the_figures_of_every_protocol(result: Evaluation) -> None:
    assert result.rerank is not None
    lines = str(result).splitlines()
    assert lines[0] == "tiny/test: 16 images, 45 captions"
    for label, metrics in result.protocols().items():
        recalls = [f"{metrics[f'{way}_r{k}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
        assert any(
            line.startswith(label) and line.split()[-7:] == [*recalls, f"{metrics['rsum']:.1f}"]
            for line in lines
        )
    assert list(result.protocols()) == ["all", "mean of 2 folds", "embeddings alone", "rerank 4"]
    assert any(line.startswith("  its recall loss") for line in lines)
    assert f"{result.rerank.pairs:,} pairs scored" in str(result)
    assert max(map(len, lines)) <= 100


def test_json_has_everything_but_the_scores(result: Evaluation, tmp_path: Path) -> None:
    read = json.loads(result.save_json(tmp_path / "new" / "result.json").read_text())
    assert read == result.to_dict()
    assert result.rerank is not None
    assert (read["metrics"], read["folds"]) == (result.metrics, result.folds)
    assert read["rerank"]["recall_loss"] == result.rerank.recall_loss
    assert read["settings"]["data"] == "tiny/test"
    assert list(read["seconds"]) == ["images", "captions", "pairs", "metrics"]
    assert read["pairs_per_second"] > 0


def test_csv_has_one_line_per_protocol(result: Evaluation, tmp_path: Path) -> None:
    with result.save_csv(tmp_path / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["protocol"] for row in rows] == list(result.protocols())
    for row, metrics in zip(rows, result.protocols().values(), strict=True):
        assert (row["data"], row["images"], row["captions"]) == ("tiny/test", "16", "45")
        assert {name: float(row[name]) for name in metrics} == metrics


# ---- GPU


@cuda
def test_a_gpu_gives_the_same_and_the_model_returns_home(model: TinyModel, data: RetrievalData) -> None:
    result = evaluate(model, data, device="cuda", rerank=3, pair_chunk=100, progress=False)
    assert result.settings["device"] == "cuda:0"
    assert model.device.type == "cpu"
    np.testing.assert_allclose(result.scores, scores_at_once(model, data), atol=1e-4)
