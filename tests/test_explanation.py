"""Explanations: shares that sum to the score, stages that are the oracle's, files, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import laps
import numpy as np
import PIL.Image
import pytest
import reference
import torch
from _models import CAPTIONS, ENVIRONMENT, SIZE, bert_tokenizer, tiny_laps
from hypothesis import given, settings
from hypothesis import strategies as st
from laps.attribution import Attribution
from laps.cli import main
from laps.data import CaptionTokenizer
from laps.explanation import Explanation
from laps.nn import LAPSHead

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = st.fixed_dictionaries(
    {
        "selection_ratio": st.sampled_from([0.3, 0.5, 0.75, 1.0]),
        "aggregation_ratio": st.sampled_from([0.5, 1.0]),
        "variant": st.sampled_from(["released", "paper"]),
        "selection": st.sampled_from(["text", "image", "none"]),
        "fusion": st.booleans(),
        "directions": st.sampled_from(["both", "word_to_patch", "patch_to_word"]),
        "direction_reduction": st.sampled_from(["sum", "mean"]),
        "negative_slope": st.sampled_from([None, 0.0, 0.1, 1.0]),
        "score": st.sampled_from(["cosine", "dot"]),
        "attention_weight": st.sampled_from([0.0, 0.8, 1.0]),
    }
)


def one_pair(
    options: dict[str, Any], sizes: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> tuple[LAPSHead, Any, Any]:
    n, p, length = sizes
    torch.manual_seed(seed)
    head = LAPSHead(12, n, num_prefix_tokens=p, **options).eval().to(dtype)
    images = head.encode_image(torch.randn(1, p + n, 12, dtype=dtype))
    texts = head.encode_text(torch.randn(1, length + 2, 12, dtype=dtype), torch.tensor([length]))
    return head, images.detach(), texts.detach()


@settings(deadline=None, max_examples=60)
@given(
    options=OPTIONS,
    sizes=st.tuples(st.integers(7, 16), st.integers(0, 3), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_shares_of_everything_sum_to_the_score(
    options: dict[str, Any], sizes: tuple[int, int, int], seed: int
) -> None:
    head, images, texts = one_pair(options, sizes, seed, torch.float32)
    with torch.no_grad():
        expected = float(head.similarity(images, texts))
    at = head.explain(images, texts)
    assert at.score == pytest.approx(expected, abs=1e-6)
    n, p, length = sizes
    assert at.patch_shares.shape == (length, n)
    assert at.prefix_shares.shape == (length, p)
    per_word = at.patch_shares.sum(1) + at.prefix_shares.sum(1)
    np.testing.assert_allclose(per_word, at.shares.sum(0), atol=1e-12)
    np.testing.assert_allclose(at.prefix_shares, at.shares[:p].T, atol=0)
    # A prefix token takes what its words leave; the others' shares are their patches'.
    np.testing.assert_allclose(at.patch_shares.sum(), at.shares[p:].sum(), atol=1e-12)
    # Nothing comes from a patch that is in no token.
    unused = at.token_weights.sum(0) == 0
    assert not at.patch_shares[:, unused].any()
    assert (at.maps >= 0).all()


@settings(deadline=None, max_examples=30)
@given(
    options=OPTIONS,
    sizes=st.tuples(st.integers(7, 12), st.integers(0, 2), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_stages_are_those_of_the_oracle(
    options: dict[str, Any], sizes: tuple[int, int, int], seed: int
) -> None:
    head, images, texts = one_pair(options, sizes, seed, torch.float64)
    at = head.explain(images, texts)
    v, logits, w = images.patches[0], images.logits[0], texts.words[0, : sizes[2]]
    p = None if images.keep_prob is None else images.keep_prob[0]
    kind = options["score"]
    text = options["selection"] == "text"
    s = reference.selection_scores(
        v, w, p, language_context=text, attention_weight=options["attention_weight"], score=kind
    )
    k = len(v) if options["selection"] == "none" else head.num_kept
    decision, margin = reference.select(s, k, stable=p is not None)
    if margin < 1e-9:
        return
    kept = decision.eq(1).numpy()
    tokens = reference.tokens(
        v, logits, decision, s, prefix=images.prefix[0] if sizes[1] else None, fusion=options["fusion"]
    )
    matrix = reference.alignment_matrix(tokens, w, head.negative_slope)
    expected = {
        "self_scores": reference.self_scores(v, kind),
        "selection_scores": s,
        "alignment": torch.stack([torch.stack(row) for row in matrix]),
    }
    if text:
        expected["text_scores"] = reference.text_scores(v, w, kind)
    else:
        assert at.text_scores is None
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(at, name), values, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(at.kept, kept)
    np.testing.assert_array_equal(at.groups >= 0, kept)
    weights = [reference.aggregation_weights(column, decision) for column in logits.T]
    assert at.has_fused_token == (options["fusion"] and not kept.all())
    if at.has_fused_token:
        weights.append(reference.fusion_weights(s, decision))
    np.testing.assert_allclose(at.token_weights, torch.stack(weights), atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(options=OPTIONS, seed=st.integers(0, 99), kept=st.integers(1, 2**9 - 1))
def test_another_selection_can_be_explained(options: dict[str, Any], seed: int, kept: int) -> None:
    head, images, texts = one_pair(options, (9, 1, 3), seed, torch.float64)
    mask = torch.tensor([bool(kept >> i & 1) for i in range(9)])
    at = head.explain(images, texts, mask=mask)
    np.testing.assert_array_equal(at.kept, mask)
    own = head.explain(images, texts)
    np.testing.assert_array_equal(at.selection_scores, own.selection_scores)
    assert head.explain(images, texts, mask=torch.from_numpy(own.kept)).score == own.score
    if head.score is None:
        arguments = head._feature_arguments(images, texts) | head._options()
        expected = laps.functional.similarity(**arguments, mask=mask[None, None])
        assert at.score == pytest.approx(float(expected), abs=1e-12)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    head, images, texts = one_pair({}, (9, 1, 3), 0, torch.float64)
    for mask in (torch.ones(8, dtype=torch.bool), torch.ones(9), torch.zeros(9, dtype=torch.bool)):
        with pytest.raises(laps.LapsValueError, match="explain: mask does not fit"):
            head.explain(images, texts, mask=mask)


def test_maps_are_weights_times_gradients() -> None:
    head, images, texts = one_pair({}, (9, 1, 3), 0, torch.float64)
    at = head.explain(images, texts)
    v, w = images.patches[0], torch.nn.functional.normalize(texts.words[0, :3], dim=-1)
    for word in range(3):
        token = int(at.alignment[1:, word].argmax())
        weights = torch.tensor(at.token_weights[token], requires_grad=True)
        length = (weights.detach() @ v).norm()
        ((weights @ v) @ w[word] / length).backward()
        expected = (weights * weights.grad).detach().clamp(min=0)
        np.testing.assert_allclose(at.maps[word], expected, atol=1e-12)


def test_features_that_are_not_finite_are_refused() -> None:
    head, images, texts = one_pair({}, (9, 1, 3), 0, torch.float32)
    images.patches[0, 2, 3] = float("nan")
    with pytest.raises(laps.LapsValueError, match="explain: patches has values that are not finite"):
        head.explain(images, texts)


@pytest.fixture(scope="module")
def model() -> laps.LAPS:
    from _models import bert_tokenizer

    return tiny_laps(tokenizer=bert_tokenizer()).train()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def explained(model: laps.LAPS, photo: Path) -> Explanation:
    why: Explanation = laps.explain(model, photo, CAPTIONS[0])
    return why


def test_a_file_and_a_sentence(model: laps.LAPS, photo: Path) -> None:
    why = explained(model, photo)
    assert model.training, "the mode is as it was"
    model.eval()
    expected = float(model.similarity(model.encode_files([photo]), model.encode_captions([CAPTIONS[0]])))
    model.train()
    assert why.score == pytest.approx(expected, abs=1e-6)
    assert [word.text for word in why.words] == ["[start]", *CAPTIONS[0].split(), "[end]"]
    assert [word.is_special for word in why.words] == [True, False, False, False, True]
    assert sum(word.share for word in why.words) == pytest.approx(why.score, abs=1e-12)
    assert why.token_shares.sum() == pytest.approx(why.score, abs=1e-12)
    assert why.token_names[0] == "prefix 1"
    assert why.token_names[-1] == "rest"
    assert len(why.token_names) == len(why.token_shares)
    assert why.grid == (4, 4)
    assert why.on_grid(why.words[1].map).shape == (4, 4)
    assert why.picture is not None
    assert why.picture.size == (60, 40)


def test_pieces_of_a_word_are_one_word(model: laps.LAPS, photo: Path) -> None:
    caption = "unheardofwords circle"
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode([caption])
    (first, last, _), *_ = tokens.spans[0]
    assert last - first > 1, "a word of several pieces"
    why = laps.explain(model, photo, caption)
    word = why.words[1]
    assert (word.text, word.first, word.last) == ("unheardofwords", first, last)
    assert word.share == pytest.approx(why.attribution.shares[:, first:last].sum())
    np.testing.assert_allclose(word.map, why.attribution.maps[first:last].sum(0))
    assert [w.last for w in why.words[:-1]] == [w.first for w in why.words[1:]], "every piece is in a word"


def test_every_kind_of_input_is_the_same_image(model: laps.LAPS, photo: Path) -> None:
    model.eval()
    expected = explained(model, photo)
    picture = PIL.Image.open(photo)
    pixels = model.transform.eval()(picture.convert("RGB"))
    with torch.no_grad():
        images, texts = model.encode_files([photo]), model.encode_captions([CAPTIONS[0]])
    for image in (str(photo), picture, pixels, pixels[None], images):
        for caption in (CAPTIONS[0], texts):
            why = laps.explain(model, image, caption)
            np.testing.assert_allclose(why.attribution.shares, expected.attribution.shares, atol=1e-6)
            assert [word.text for word in why.words] == [word.text for word in expected.words]
    assert laps.explain(model, images, CAPTIONS[0]).picture is None
    shown = laps.explain(model, images, CAPTIONS[0], picture=picture).picture
    assert shown is not None
    assert shown.tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), 7, "caption has the wrong type"),
        (7, "a", "image has the wrong type"),
        ("nowhere.png", "a", "nowhere.png"),
        (torch.zeros(3, SIZE + 1, SIZE), "a", "pixel_values"),
    ],
)
def test_wrong_input_is_named(model: laps.LAPS, image: Any, caption: Any, message: str) -> None:
    with pytest.raises(laps.LapsError, match=message):
        laps.explain(model, image, caption)


def test_one_at_a_time(model: laps.LAPS, photo: Path) -> None:
    both = model.encode_files([photo, photo])
    with pytest.raises(laps.LapsValueError, match="image is features of several"):
        laps.explain(model, both, "a")
    why = laps.explain(model, both[1], "a", grid=(2, 8))
    assert why.on_grid(why.attribution.kept).shape == (2, 8)
    with pytest.raises(laps.LapsValueError, match="grid does not fit"):
        laps.explain(model, photo, "a", grid=(3, 5))
    with pytest.raises(laps.LapsTypeError, match=r"laps\.LAPS"):
        laps.explain(model.head, photo, "a")  # type: ignore[arg-type]


def test_a_head_without_patches_says_so(photo: Path) -> None:
    from _models import bert_tokenizer

    model = tiny_laps(head="vse", tokenizer=bert_tokenizer())
    with pytest.raises(laps.LapsValueError, match='the head "vse" tells nothing'):
        laps.explain(model, photo, "a")


@pytest.mark.parametrize("family", ["vit", "swin", "clip"])
def test_every_family(family: str, photo: Path) -> None:
    from _models import clip_tokenizer

    text = "clip" if family == "clip" else "bert"
    tokenizer = clip_tokenizer(CAPTIONS) if text == "clip" else bert_tokenizer()
    model = tiny_laps(family, text, tokenizer=tokenizer)
    why = laps.explain(model, photo, CAPTIONS[1])
    expected = model.similarity(model.encode_files([photo]), model.encode_captions([CAPTIONS[1]]))
    assert why.score == pytest.approx(float(expected), abs=1e-6)
    assert why.attribution.num_prefix_tokens == (0 if family == "swin" else 1)


def test_files_hold_it(model: laps.LAPS, photo: Path, tmp_path: Path) -> None:
    why = explained(model, photo)
    why.save(tmp_path / "why.json")
    data = json.loads((tmp_path / "why.json").read_text())
    assert data["score"] == why.score
    assert sum(word["share"] for word in data["words"]) == pytest.approx(why.score, abs=1e-12)
    assert sum(token["share"] for token in data["tokens"]) == pytest.approx(why.score, abs=1e-12)
    assert sum(data["patches"]["kept"]) == why.attribution.kept.sum()
    why.save(tmp_path / "why.npz")
    with np.load(tmp_path / "why.npz") as arrays:
        for name, values in vars(why.attribution).items():
            if values is not None:
                np.testing.assert_array_equal(arrays[name], values, err_msg=name)
        assert list(arrays["words"]) == [word.text for word in why.words]
    with pytest.raises(laps.LapsValueError, match="another suffix"):
        why.save(tmp_path / "why.png")


def test_nothing_that_was_written_can_end_the_script(model: laps.LAPS, photo: Path) -> None:
    why = laps.explain(model, photo, 'circle </script><b onclick="x">&')
    html = why.to_html()
    assert html.count("</script>") == 2
    assert "<b onclick" not in html
    assert html.startswith("<!doctype html>")
    assert "http" not in html.replace("http-equiv", ""), "no other file"
    assert isinstance(why.attribution, Attribution)


# ---- what a stranger found


@pytest.mark.parametrize("kind", ["exif", "palette", "grey and alpha", "rgba", "16 bit"])
def test_a_pillow_image_is_seen_as_its_file_is(model: laps.LAPS, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    rng = np.random.default_rng(0)
    if kind == "exif":
        file = file.with_suffix(".jpg")
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        PIL.Image.fromarray(rng.integers(0, 255, (20, 40, 3), dtype=np.uint8)).save(file, exif=exif)
    elif kind == "16 bit":
        PIL.Image.fromarray(rng.integers(0, 65535, (20, 40), dtype=np.uint16)).save(file)
    else:
        rgba = PIL.Image.fromarray(rng.integers(0, 255, (20, 40, 4), dtype=np.uint8))
        if kind == "palette":
            rgba.convert("RGB").quantize(8).save(file, transparency=3)
        else:
            rgba.convert("LA" if kind == "grey and alpha" else "RGBA").save(file)
    of_file, of_pillow = (
        laps.explain(model, image, "a red circle") for image in (file, PIL.Image.open(file))
    )
    assert of_file.score == of_pillow.score
    assert of_file.picture is not None
    assert of_pillow.picture is not None
    assert of_file.picture.tobytes() == of_pillow.picture.tobytes()
    beside = laps.explain(model, model.encode_files([file]), "a red circle", picture=PIL.Image.open(file))
    assert beside.picture is not None
    assert beside.picture.tobytes() == of_file.picture.tobytes()


def test_what_is_frozen_stays_so(model: laps.LAPS) -> None:
    try:
        model.train()
        model.image_encoder.eval()
        modes = [part.training for part in model.modules()]
        laps.explain(model, torch.randn(3, SIZE, SIZE), "a red circle")
        assert [part.training for part in model.modules()] == modes
    finally:
        model.eval()


def test_an_apostrophe_joins_a_word_and_quotes_do_not(model: laps.LAPS) -> None:
    why = laps.explain(model, torch.randn(3, SIZE, SIZE), "it isn't a 'red' dog\u2019s circle, rock 'n' roll")
    texts = [word.text for word in why.words]
    assert texts[1:-1] == [
        *("it", "isn't", "a", "'", "red", "'", "dog\u2019s", "circle", ",", "rock", "'", "n", "'", "roll"),
    ]
    assert sum(word.share for word in why.words) == pytest.approx(why.score, abs=1e-9)
    assert [why.caption[start:end] for _, start, end in why.places() if why.caption] == texts[1:-1]


def test_the_end_of_a_long_caption_is_not_lost_without_a_word() -> None:
    caption = " ".join(["red"] * 80) + " circle."
    model = tiny_laps(tokenizer=CaptionTokenizer(bert_tokenizer().backend, max_length=20))
    why = laps.explain(model, torch.randn(3, SIZE, SIZE), caption)
    assert len(why.places()) == 18
    assert why.cut_off.endswith("red circle.")
    assert len(why.cut_off.split()) == 81 - len(why.places())
    assert f"did not see: \u201c{why.cut_off}\u201d" in why.to_html()
    short = laps.explain(model, torch.randn(3, SIZE, SIZE), "a red circle.")
    assert short.cut_off == ""
    assert "did not see" not in short.to_html()


def test_the_token_of_a_word_is_one_of_its_pieces(model: laps.LAPS) -> None:
    why = laps.explain(model, torch.randn(3, SIZE, SIZE), "squarered bluecircles triangledotted")
    pieces = [word for word in why.words if word.last - word.first > 1]
    assert pieces
    for word in pieces:
        assert word.token in why.attribution.best_tokens[word.first : word.last]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask": np.zeros((8, 2), dtype=bool)}, "mask does not fit"),
        ({"mask": np.ones((2, 8), dtype=bool), "grid": (8, 2)}, "mask does not fit"),
        ({"mask": np.ones(16)}, "mask does not fit"),
        ({"mask": "all"}, "mask has the wrong type"),
        ({"grid": (-4, -4)}, "grid"),
        ({"grid": (4.5, 4)}, "grid"),
        ({"grid": 16}, "grid is no pair"),
        ({"picture": "a.jpg"}, "picture has the wrong type"),
    ],
)
def test_options_that_do_not_fit_are_refused(model: laps.LAPS, options: dict[str, Any], error: str) -> None:
    with pytest.raises(laps.LapsError, match=error):
        laps.explain(model, torch.randn(3, SIZE, SIZE), "a red circle", **options)


def test_bytes_are_no_pixels(model: laps.LAPS) -> None:
    with pytest.raises(laps.LapsTypeError, match="image has wrong pixels"):
        laps.explain(model, torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), "a red circle")


@pytest.fixture
def saved(model: laps.LAPS, tmp_path: Path) -> list[str]:
    """A command line without the caption."""
    model.save_pretrained(tmp_path / "model")
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    return ["explain", str(tmp_path / "red.png"), "--model", str(tmp_path / "model")]


def test_the_command_refuses_what_it_cannot_use(
    saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([*saved, "caf\udce9"], "caption is no text"),
        ([*saved, "a", "-o", str(tmp_path)], "is a folder"),
        ([*saved, "a", "-o", str(tmp_path / "a.pdf")], "another suffix"),
        ([saved[0], str(tmp_path), *saved[2:], "a"], "is a folder (expected an image file)"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_a_terminal_that_knows_few_letters_loses_nothing(saved: list[str], tmp_path: Path) -> None:
    page = tmp_path / "why.HTML"
    done = subprocess.run(
        [sys.executable, "-m", "laps.cli", *saved, "a red \U0001f534 circle", "-o", str(page)],
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "circle" in done.stdout
    assert "\U0001f534" in page.read_text(encoding="utf-8")
