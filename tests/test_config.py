"""Presets are the paper's rows, the defaults the published recipe, and a config file says what it lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import laps
import pytest
from laps import LAPSConfig, LapsTypeError, LapsValueError
from laps.config import PRESETS, Preset
from laps.encoders.transformers_backbone import config_from_dict
from laps.train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

# N, P, rho, lambda, C and the number of aggregated tokens N_c that laps.md states.
ROWS = {
    "vit-base-224": (196, 1, 0.5, 0.4, 512, 39),
    "vit-base-384": (576, 1, 0.5, 0.4, 512, 115),
    "swin-base-224": (49, 0, 0.8, 0.6, 512, 23),
    "swin-base-384": (144, 0, 0.8, 0.6, 512, 69),
    "clip-vit-base-224": (196, 1, 0.5, 0.4, 512, 39),
    "clip-vit-large-224": (256, 1, 0.5, 0.4, 768, 51),
}
VALUES: dict[str, Any] = {
    "image_encoder": {"model_type": "vit"},
    "text_encoder": {},
    "embed_dim": 512,
    "num_prefix_tokens": 1,
    "num_patches": 16,
    "image_size": 32,
}


def test_every_laps_row_of_the_tables_has_a_preset() -> None:
    assert PRESETS.keys() == ROWS.keys() | {"region-36"}
    assert [name for name, preset in PRESETS.items() if preset.regions] == ["region-36"]


def thin(name: str) -> Preset:
    """The preset with one block per stage, and few words: what is left fixes every size of the tokens."""
    preset = PRESETS[name]
    depth: dict[str, Any] = {"depths": [1, 1, 1, 1]} if "swin" in name else {"num_hidden_layers": 1}
    words = {"num_hidden_layers": 1, "vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return replace(
        preset, image_encoder={**preset.image_encoder, **depth}, text_encoder={**preset.text_encoder, **words}
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_has_the_sizes_and_ratios_of_its_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, name, thin(name))
    model = laps.LAPS.from_preset(name, pretrained=False)
    head = model.head

    assert isinstance(head, laps.nn.LAPSHead)
    assert (
        model.image_encoder.num_patches,
        model.image_encoder.num_prefix_tokens,
        head.selection_ratio,
        head.aggregation_ratio,
        model.text_encoder.embed_dim,
        head.num_tokens,
    ) == ROWS[name]
    assert model.transform.image_size == model.image_encoder.image_size == int(name[-3:])
    assert head.variant == "released"
    assert model.config.image_projection == model.config.text_projection == ("clip" not in name)


def test_the_encoders_of_the_presets_are_of_base_and_large_size() -> None:
    for name, preset in ((name, PRESETS[name]) for name in ROWS):
        images, texts = config_from_dict(preset.image_encoder), config_from_dict(preset.text_encoder)
        if "swin" in name:
            assert (images.hidden_size, images.depths) == (1024, [2, 2, 18, 2])
        else:
            width, layers = (1024, 24) if "large" in name else (768, 12)
            assert (images.hidden_size, images.num_hidden_layers) == (width, layers)
            assert (images.intermediate_size, images.num_attention_heads) == (4 * width, width // 64)
        words = {"clip-vit-base-224": 512}.get(name, 768)
        assert (texts.hidden_size, texts.num_hidden_layers) == (words, 12)
        assert texts.vocab_size == (49408 if "clip" in name else 30522)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_has_the_recipe_and_the_pixel_statistics_of_its_encoder(name: str) -> None:
    preset, clip = PRESETS[name], name.startswith("clip")

    assert (preset.learning_rate, preset.batch_size) == ((1e-4, 64) if clip else (2e-4, 128))
    assert preset.learning_rate * preset.backbone_lr_ratio == pytest.approx(1e-5 if clip else 2e-5)
    assert preset.mean == pytest.approx((0.481, 0.458, 0.408) if clip else (0.485, 0.456, 0.406), abs=1e-3)
    assert preset.std == pytest.approx((0.269, 0.261, 0.276) if clip else (0.229, 0.224, 0.225), abs=1e-3)
    assert (preset.text_checkpoint == preset.image_checkpoint) is clip


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(LapsValueError, match=r"from_preset.*clip-vit-base-224.*vit-huge"):
        laps.LAPS.from_preset("vit-huge")


# ---- LAPSConfig


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = LAPSConfig(**VALUES, head="vse", head_options={"pooling": "first"}, loss={"margin": 0.1})
    config.save(tmp_path / "config.json")

    assert LAPSConfig.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["laps_format"] == 1


def test_missing_and_unknown_keys_are_named_with_the_file(tmp_path: Path) -> None:
    values = {"laps_format": 1, **VALUES, "patches": 3}
    del values["num_patches"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(
        LapsValueError, match=r"config.json has other keys.*missing: num_patches; unknown: patches"
    ):
        LAPSConfig.load(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (json.dumps({"model_type": "vit"}), "is not the config.json of a laps model"),
        (json.dumps({"laps_format": 2, **VALUES}), "is not the config.json of a laps model"),
        ("{broken", "cannot be read .expected the config.json of a laps model"),
        ("[1, 2]", "holds no JSON object"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises((LapsValueError, LapsTypeError), match=match) as caught:
        LAPSConfig.load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(LapsValueError, match=r"absent.json does not exist"):
        LAPSConfig.load(tmp_path / "absent.json")


# ---- TrainConfig


def test_the_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()

    assert (config.epochs, config.batch_size, config.learning_rate) == (30, 128, 2e-4)
    assert (config.backbone_lr_ratio, config.weight_decay, config.clip_norm) == (0.1, 1e-4, 2.0)
    assert (config.milestones, config.gamma, config.warmup_epochs) == ((9, 15, 20, 25), 0.3, 1)
    expected = [0.3 ** sum(epoch >= m for m in (9, 15, 20, 25)) for epoch in range(30)]
    assert [config.lr_scale(epoch, epoch / 30) for epoch in range(30)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, LapsValueError, "epochs"),
        ({"batch_size": 2.5}, LapsTypeError, "batch_size"),
        ({"learning_rate": -1.0}, LapsValueError, "learning_rate"),
        ({"clip_norm": 0.0}, LapsValueError, "clip_norm"),
        ({"augment": 1.5}, LapsValueError, "augment"),
        ({"warmup_epochs": 2}, LapsValueError, "warmup_epochs is out of range .expected 0 or 1, got 2"),
        ({"on_error": "ignore"}, LapsValueError, "on_error"),
        ({"seed": 2**32}, LapsValueError, "seed is out of range"),
        ({"schedule": "cosine"}, LapsValueError, "schedule"),
        ({"loggers": ("tensorbored",)}, LapsValueError, "loggers.*tensorboard.*wandb.*trackio.*tensorbored"),
        ({"loggers": "tensorboard"}, LapsTypeError, "loggers is no list"),
        ({"milestones": (3, -1)}, LapsValueError, "milestones"),
    ],
)
def test_an_option_out_of_its_range_is_named(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        TrainConfig(**options)
