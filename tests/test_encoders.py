"""Encoders give the tokens of transformers' own models, and name a checkpoint that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _models import SIZE, pixels, text_model, token_ids, vision_model
from laps import LapsTypeError, LapsValueError
from laps.encoders import ImageEncoder, TextEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5, "swin": 0, "clip": 1}


class Patches(nn.Module):
    """A backbone that is none of transformers': a convolution, and two learned tokens before the patches."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.prefix = nn.Parameter(torch.randn(1, 2, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(patches), -1, -1), patches], dim=1)


class Words(nn.Module):
    """A text backbone that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(99, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens: Tensor = self.words(input_ids) * attention_mask[..., None]
        return tokens


def edit_weights(folder: Path, change: Any) -> None:
    """Let `change` alter the dictionary of a checkpoint's tensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


# ---- images


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_patches_come_after_the_prefix_tokens_of_the_family(family: str) -> None:
    encoder = ImageEncoder(vision_model(family), embed_dim=20).eval()

    assert (encoder.num_prefix_tokens, encoder.num_patches) == (FAMILIES[family], 16)
    assert (encoder.embed_dim, encoder.image_size) == (20, SIZE)
    assert encoder(pixels(3)).shape == (3, FAMILIES[family] + 16, 20)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])
def test_without_projection_the_tokens_are_those_of_transformers(family: str) -> None:
    model = vision_model(family)
    encoder = ImageEncoder(model).eval()

    torch.testing.assert_close(encoder(pixels(2)), model(pixels(2)).last_hidden_state, rtol=0, atol=0)
    assert encoder.embed_dim == 32
    assert not list(encoder.projection.parameters())


CONVOLUTIONAL = {
    "resnet": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "convnext": transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE
    ),
}


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_a_feature_map_counts_as_patches_row_by_row(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONVOLUTIONAL[family]).eval()
    encoder = ImageEncoder(model, image_size=SIZE).eval()
    maps = model(pixels(2)).last_hidden_state

    rows, columns = maps.shape[2:]
    assert (encoder.num_prefix_tokens, encoder.num_patches) == (0, rows * columns)
    tokens = encoder(pixels(2))
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(tokens[:, row * columns + column], maps[:, :, row, column])

    model.save_pretrained(tmp_path)
    loaded = ImageEncoder.from_pretrained(tmp_path, image_size=SIZE).eval()
    assert torch.equal(loaded(pixels(2)), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_token_answers_to_its_own_patch_most(family: str) -> None:
    # The prefix was not mistaken for patches: token P + i is nearest to patch i, row by row.
    encoder = ImageEncoder(vision_model(family)).eval()
    lit = torch.zeros(17, 3, SIZE, SIZE)
    for patch in range(16):
        row, column = divmod(patch, 4)
        lit[patch, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 3.0
    with torch.no_grad():
        tokens = encoder(lit)[:, encoder.num_prefix_tokens :]

    assert (tokens[:16] - tokens[16]).norm(dim=-1).argmax(1).tolist() == list(range(16))


def test_clip_applies_its_last_norm_and_its_projection_to_every_token() -> None:
    model = vision_model("clip")
    tokens = ImageEncoder(model).eval()(pixels(3))

    torch.testing.assert_close(tokens[:, 0], model(pixels(3)).image_embeds, rtol=0, atol=1e-6)
    hidden = model.vision_model(pixels(3)).last_hidden_state
    each = [model.visual_projection(model.vision_model.post_layernorm(hidden[:, i])) for i in range(17)]
    torch.testing.assert_close(tokens, torch.stack(each, 1), rtol=0, atol=1e-6)


def test_a_clip_model_without_its_projection_is_refused() -> None:
    vision = transformers.CLIPVisionModel(vision_model("clip").config)
    with pytest.raises(LapsValueError, match=r"lacks CLIP's projection .expected CLIPVisionModelWithProj"):
        ImageEncoder(vision)
    with pytest.raises(LapsValueError, match="lacks CLIP's projection"):
        TextEncoder(transformers.CLIPTextModel(text_model("clip").config))


def test_any_module_that_returns_tokens_is_a_backbone_once_its_prefix_is_stated() -> None:
    backbone = Patches()
    encoder = ImageEncoder(backbone, embed_dim=8, num_prefix_tokens=2, image_size=SIZE)

    assert (encoder.num_patches, encoder.num_prefix_tokens) == (4, 2)
    torch.testing.assert_close(encoder(pixels(2)), encoder.projection(backbone(pixels(2))))
    with pytest.raises(LapsValueError, match=r"num_prefix_tokens of this backbone is not known .*stated"):
        ImageEncoder(backbone, image_size=SIZE)
    with pytest.raises(LapsValueError, match="image_size of this backbone is not known"):
        ImageEncoder(backbone, num_prefix_tokens=2)
    with pytest.raises(
        LapsValueError, match=r"too few tokens .expected more than the 6 prefix tokens, got 6"
    ):
        ImageEncoder(backbone, num_prefix_tokens=6, image_size=SIZE)


def test_a_backbone_that_returns_no_tokens_is_refused_with_what_it_returned() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 5, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(LapsValueError, match=r"returns no tokens .*got \(1, 5\)"):
        ImageEncoder(pooled, num_prefix_tokens=0, image_size=SIZE)
    with pytest.raises(LapsTypeError, match="backbone is no module"):
        ImageEncoder("vit")  # type: ignore[arg-type]


def test_making_an_encoder_changes_no_mode_and_draws_no_random_number_for_the_look_at_one_image() -> None:
    model = vision_model("vit").train()
    before = torch.get_rng_state()
    ImageEncoder(model)

    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(2, 3, SIZE, SIZE + 8), (2, 1, SIZE, SIZE), (3, SIZE, SIZE)])
def test_pixels_of_another_size_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    encoder = ImageEncoder(vision_model("vit"))
    with pytest.raises(LapsValueError, match=r"expected a tensor \(B, 3, 32, 32\), got \(") as caught:
        encoder(torch.zeros(shape))
    assert str(shape) in str(caught.value)


# ---- captions


@pytest.mark.parametrize("longest", [9, 14])
def test_bert_gives_the_same_words_however_far_a_caption_is_padded(longest: int) -> None:
    model = text_model()
    encoder = TextEncoder(model, embed_dim=20).eval()
    ids, lengths = token_ids([9, 4, 1], longest)
    tokens = encoder(ids, lengths)

    assert tokens.shape == (3, longest, 20)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.projection(model(ids[row : row + 1, :length]).last_hidden_state)
        torch.testing.assert_close(tokens[row, :length], alone[0], rtol=0, atol=1e-5)


def test_clip_text_gives_its_embedding_at_the_end_token() -> None:
    model = text_model("clip")
    ids, lengths = token_ids([7, 5, 3])
    ids[torch.arange(3), lengths - 1] = model.config.eos_token_id
    tokens = TextEncoder(model).eval()(ids, lengths)

    assert tokens.shape == (3, 7, 24)
    expected = model(input_ids=ids).text_embeds
    torch.testing.assert_close(tokens[torch.arange(3), lengths - 1], expected, rtol=0, atol=1e-6)


def test_any_module_that_takes_ids_and_a_mask_is_a_text_backbone() -> None:
    backbone = Words()
    encoder = TextEncoder(backbone)
    ids, lengths = token_ids([4, 2])

    assert encoder.embed_dim == 12
    assert torch.equal(encoder(ids, lengths)[0], backbone.words(ids[0]))
    assert not encoder(ids, lengths)[1, 2:].any()


def test_ids_and_lengths_that_do_not_fit_are_refused() -> None:
    encoder = TextEncoder(text_model())
    ids, lengths = token_ids([4, 2])
    with pytest.raises(
        LapsValueError, match=r"do not fit .expected \(B, L\) and \(B,\), got \(2, 4\) and \(1,\)"
    ):
        encoder(ids, lengths[:1])
    with pytest.raises(LapsTypeError, match="lengths is no tensor"):
        encoder(ids, [4, 2])  # type: ignore[arg-type]


def test_a_caption_longer_than_the_backbone_has_positions_is_refused_with_the_way_out() -> None:
    model = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=16
        )
    )
    ids, lengths = token_ids([17])
    with pytest.raises(
        LapsValueError, match=r"at most 16: CaptionTokenizer\(..., max_length=16\) cuts, got 17"
    ):
        TextEncoder(model)(ids, lengths)


# ---- checkpoints


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers", "swin", "clip"])
def test_a_vision_checkpoint_on_disk_gives_the_tokens_of_the_model_that_was_saved(
    family: str, tmp_path: Path
) -> None:
    model = vision_model(family)
    model.save_pretrained(tmp_path)
    loaded = ImageEncoder.from_pretrained(tmp_path)

    assert loaded.training
    torch.testing.assert_close(
        loaded.eval()(pixels(2)), ImageEncoder(model).eval()(pixels(2)), rtol=0, atol=0
    )


def test_a_checkpoint_with_a_classifier_or_with_both_halves_of_clip_gives_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(vision_model("vit").config).eval()
    classifier.save_pretrained(tmp_path / "vit")
    hidden = classifier.vit(pixels(2)).last_hidden_state
    images = ImageEncoder.from_pretrained(tmp_path / "vit").eval()
    torch.testing.assert_close(images(pixels(2)), hidden, rtol=0, atol=0)

    both = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text_model("clip").config.to_dict(),
            vision_config=vision_model("clip").config.to_dict(),
            projection_dim=24,
        )
    ).eval()
    both.save_pretrained(tmp_path / "clip")
    ids, lengths = token_ids([7, 5])
    ids[torch.arange(2), lengths - 1] = 98
    images = ImageEncoder.from_pretrained(tmp_path / "clip").eval()
    texts = TextEncoder.from_pretrained(str(tmp_path / "clip")).eval()
    output = both(pixel_values=pixels(2), input_ids=ids)
    normalize = nn.functional.normalize
    torch.testing.assert_close(normalize(images(pixels(2))[:, 0], dim=-1), output.image_embeds)
    ends = texts(ids, lengths)[torch.arange(2), lengths - 1]
    torch.testing.assert_close(normalize(ends, dim=-1), output.text_embeds)


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path: Path) -> None:
    text_model().half().save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path, embed_dim=16)

    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_weights_that_the_checkpoint_lacks_or_has_in_another_shape_are_named(tmp_path: Path) -> None:
    # transformers calls the first "layers.0.attention.q_proj.weight".
    names = "encoder.layer.0.attention.attention.query.weight", "layernorm.weight", "embeddings.cls_token"
    classifier = transformers.ViTForImageClassification(vision_model("vit").config)
    for model, prefix, more in ((vision_model("vit"), "", ""), (classifier, "vit.", "classifier.")):
        folder = tmp_path / (more or "plain")
        model.save_pretrained(folder)
        query, norm, token = (prefix + name for name in names)

        def spoil(state: dict[str, Tensor], query: str = query, norm: str = norm, token: str = token) -> None:
            state[query + "_old"] = state.pop(query)
            del state[norm]
            state[token] = torch.zeros(1, 1, 33)

        edit_weights(folder, spoil)
        with pytest.raises(LapsValueError) as caught:
            ImageEncoder.from_pretrained(folder)
        surplus = [f"{more}bias", f"{more}weight"] if more else []
        assert str(caught.value) == (
            f"weights: {folder / 'model.safetensors'} does not fit the model (expected its keys, got "
            f"missing: {query}, {norm}; unexpected: {', '.join([*surplus, query + '_old'])}; "
            f"of another shape: {token} (1, 1, 33), not (1, 1, 32))"
        )


def test_a_checkpoint_of_the_other_kind_is_refused_by_name(tmp_path: Path) -> None:
    vision_model("vit").save_pretrained(tmp_path / "vit")
    text_model().save_pretrained(tmp_path / "bert")

    with pytest.raises(
        LapsValueError, match=r"vit is no text model .expected one that takes input_ids, got vit"
    ):
        TextEncoder.from_pretrained(tmp_path / "vit")
    with pytest.raises(
        LapsValueError, match=r"bert is no vision model .expected one that takes pixel_values"
    ):
        ImageEncoder.from_pretrained(tmp_path / "bert")
    with pytest.raises(LapsValueError, match=r"backbone ViTModel takes other inputs .expected input_ids"):
        TextEncoder(vision_model("vit"))
    with pytest.raises(LapsValueError, match=r"backbone BertModel takes other inputs .expected pixel_values"):
        ImageEncoder(text_model())


def test_a_folder_without_a_model_a_broken_file_and_an_unknown_id_are_errors_that_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    text_model().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for source in (tmp_path / "empty", tmp_path / "broken", tmp_path / "absent", "nobody/has-this-model"):
        with pytest.raises(LapsValueError, match=r"cannot be loaded .expected a folder or hub id") as caught:
            TextEncoder.from_pretrained(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)
