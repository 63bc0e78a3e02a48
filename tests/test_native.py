"""The native encoders beside those of transformers: same files, same tokens, same training."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import laps
import pytest
import torch
import transformers
from _models import ENVIRONMENT, SIZE, SMALL, VARIANTS, build, make_batch, shaken, text_model, vision_model
from _rust_models import MODELS, batch, scores, train
from _rust_models import build as build_without_dropout
from laps.encoders import ImageEncoder, TextEncoder, implementations
from safetensors.torch import load_file, save_file
from torch import Tensor

installed = True
try:
    from laps.encoders import native
except ImportError:
    installed = False
needs_native = pytest.mark.skipif(not installed, reason="laps-rs-native is not installed for this torch")
pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {
    "vit": transformers.ViTConfig(image_size=SIZE, patch_size=8, **SMALL),
    "vit, one layer, no bias": transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, image_size=28,
        patch_size=14, qkv_bias=False, hidden_act="gelu_new",
    ),
    "swin": transformers.SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "swin, shifted and padded": transformers.SwinConfig(
        image_size=38, patch_size=2, embed_dim=8, depths=[2, 3, 2], num_heads=[2, 2, 4], window_size=4,
        use_absolute_embeddings=False, mlp_ratio=1.5,
    ),
    "swin, absolute positions": transformers.SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=12, depths=[2, 1], num_heads=[3, 2], window_size=4,
        use_absolute_embeddings=True, qkv_bias=False,
    ),
    "clip": transformers.CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=24, **SMALL),
    "clip, another size": transformers.CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=8, intermediate_size=40, image_size=42,
        patch_size=14, projection_dim=10, hidden_act="gelu",
    ),
}  # fmt: skip
TEXT = {
    "bert": transformers.BertConfig(vocab_size=99, **SMALL),
    "bert, another size": transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=70,
        hidden_act="relu", type_vocab_size=1, max_position_embeddings=12,
    ),
    "clip": transformers.CLIPTextConfig(
        vocab_size=99, projection_dim=24, pad_token_id=1, bos_token_id=0, eos_token_id=98, **SMALL
    ),
}  # fmt: skip


def make(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    projected = {
        "clip_vision_model": transformers.CLIPVisionModelWithProjection,
        "clip_text_model": transformers.CLIPTextModelWithProjection,
    }
    built = projected.get(config.model_type)
    return shaken(transformers.AutoModel.from_config(config) if built is None else built(config))


def loaded(model: transformers.PreTrainedModel, folder: Path, part: str) -> Any:
    model.save_pretrained(folder)
    return native.load(folder, part).eval()


def pairs_of_encoders(tmp_path: Path, config: Any, part: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model by transformers and native, as encoders without a projection of ours."""
    model = make(copy.deepcopy(config))
    ours = loaded(model, tmp_path / "model", part)
    encoder: Any = ImageEncoder if part == "vision" else TextEncoder
    return encoder(model).eval(), encoder(ours).eval()


def gradients(encoder: Any) -> dict[str, Tensor]:
    """By the hub's names."""
    if isinstance(encoder.backbone, native.NativeBackbone):
        return {name: p.grad for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    from laps.encoders import transformers_backbone

    model = copy.deepcopy(encoder.backbone)
    for own, parameter in zip(encoder.backbone.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    return transformers_backbone.weights(model)


def compare(theirs: Any, ours: Any, inputs: tuple[Tensor, ...], real: Tensor) -> None:
    """Tokens and, of a random weighting of them, gradients."""
    a, b = theirs(*inputs), ours(*inputs)
    torch.testing.assert_close(b[real], a[real], atol=1e-5, rtol=0)
    weights = torch.randn(a[real].shape, generator=torch.Generator().manual_seed(1))
    for tokens in (a, b):
        (tokens[real] * weights).sum().backward()
    expected, found = gradients(theirs), gradients(ours)
    assert found.keys() == {name for name, _ in ours.backbone.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m
        )


@needs_native
@pytest.mark.parametrize("family", VISION)
def test_image_tokens_and_gradients(family: str, tmp_path: Path) -> None:
    theirs, ours = pairs_of_encoders(tmp_path, VISION[family], "vision")
    assert ours.num_patches == theirs.num_patches
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens
    pixels = torch.randn(3, 3, ours.image_size, ours.image_size)
    everything = torch.ones(3, ours.num_prefix_tokens + ours.num_patches, dtype=torch.bool)
    compare(theirs, ours, (pixels,), everything)


@needs_native
@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("lengths", [[9, 4, 1], [9, 9, 9], [1, 1, 1]], ids=str)
def test_word_tokens_and_gradients(family: str, lengths: list[int], tmp_path: Path) -> None:
    theirs, ours = pairs_of_encoders(tmp_path, TEXT[family], "text")
    assert (ours.max_length, ours.vocab_size) == (theirs.max_length, theirs.vocab_size)
    ids = torch.randint(2, 50, (3, 9))
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    compare(theirs, ours, (ids, torch.tensor(lengths)), real)


@needs_native
@pytest.mark.parametrize("part", ["vision", "text"])
def test_dropout_draws_what_transformers_draws(part: str, tmp_path: Path) -> None:
    config = copy.deepcopy(VISION["swin, shifted and padded"] if part == "vision" else TEXT["bert"])
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.2, 0.1
    theirs, ours = pairs_of_encoders(tmp_path, config, part)
    inputs = (torch.randn(2, 3, 38, 38),)
    if part == "text":
        inputs = (torch.randint(2, 50, (2, 5)), torch.tensor([5, 5]))
    results = []
    for encoder in (theirs.train(), ours.train()):
        torch.manual_seed(0)
        results.append(encoder(*inputs))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
    assert not torch.equal(ours(*inputs), results[1])


@needs_native
@pytest.mark.parametrize("family", ["bert", "clip"])
def test_masks(family: str, tmp_path: Path) -> None:
    model = text_model(family)
    ours = loaded(model, tmp_path, "text")
    ids = torch.randint(2, 98, (3, 6))
    with torch.no_grad():
        alone = model(input_ids=ids).last_hidden_state
        alone = model.text_projection(alone) if family == "clip" else alone
        torch.testing.assert_close(ours(input_ids=ids), alone, atol=1e-5, rtol=0)
        # Padding in front, and holes.
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])
        if family == "clip":
            with pytest.raises(laps.LapsValueError, match="attention_mask"):
                ours(input_ids=ids, attention_mask=mask)
            return
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for given in (mask, mask.bool(), mask.float()):
            tokens = ours(input_ids=ids, attention_mask=given)
            torch.testing.assert_close(tokens[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@needs_native
@pytest.mark.parametrize("name", ["vit", "swin", "clip", "bert"])
def test_autocast_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    text = name == "bert"
    theirs, ours = pairs_of_encoders(tmp_path, (TEXT if text else VISION)[name], "text" if text else "vision")
    inputs = (
        (torch.randint(2, 50, (2, 5)), torch.tensor([5, 3])) if text else (torch.randn(2, 3, SIZE, SIZE),)
    )
    exact = ours(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = [encoder(*inputs) for encoder in (theirs, ours)]
    assert rounded[0].dtype == rounded[1].dtype
    real = torch.arange(exact.shape[1]) < (inputs[1][:, None] if text else exact.shape[1])
    real = real.expand(exact.shape[:2])
    # Two roundings of the same thing lie as far apart as either from it.
    errors = [(tokens.float() - exact)[real].abs().max() for tokens in rounded]
    assert 0 < errors[1] < 2 * errors[0] + 1e-3


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_halves_become_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    vision_model("vit").to(dtype).save_pretrained(tmp_path)
    ours, theirs = (ImageEncoder.from_pretrained(tmp_path, encoders=kind).eval() for kind in ("native", "hf"))
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    pixels = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-5, rtol=0)


@needs_native
@pytest.mark.parametrize("family", ["vit", "clip", "swin"])
def test_other_resolutions_interpolate_the_positions(family: str, tmp_path: Path) -> None:
    model = vision_model(family)
    model.save_pretrained(tmp_path)
    encoder = ImageEncoder.from_pretrained(tmp_path, image_size=48, encoders="native").eval()
    pixels = torch.randn(2, 3, 48, 48)
    expected = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    if family == "clip":
        expected = model.visual_projection(model.vision_model.post_layernorm(expected))
    assert encoder.num_patches == 36
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)
    if family != "swin":
        with pytest.raises(laps.LapsValueError, match="no images of 48 x 48"):
            ImageEncoder.from_pretrained(tmp_path, image_size=48)


@needs_native
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_scores_with_either(name: str, tmp_path: Path) -> None:
    build_without_dropout(*MODELS[name]).save_pretrained(tmp_path)
    theirs, ours = (laps.LAPS.from_pretrained(tmp_path, encoders=kind) for kind in ("hf", "native"))
    assert isinstance(ours.image_encoder.backbone, native.NativeBackbone)
    data = batch(theirs)
    torch.testing.assert_close(scores(ours, data), scores(theirs, data), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(ours.double(), data), scores(theirs.double(), data), atol=1e-9, rtol=0)


@needs_native
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_training_give_the_same_weights(name: str, tmp_path: Path) -> None:
    build_without_dropout(*MODELS[name]).save_pretrained(tmp_path)
    weights = []
    for kind in ("hf", "native"):
        model = laps.LAPS.from_pretrained(tmp_path, encoders=kind).double()
        train(model, batch(model))
        weights.append(model._portable_weights())
    for key, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][key], atol=1e-9, rtol=0, msg=lambda m, k=key: k + m)


@needs_native
def test_what_either_saves_the_other_loads(tmp_path: Path) -> None:
    model = build(VARIANTS[0])
    model.save_pretrained(tmp_path / "hf")
    laps.LAPS.from_pretrained(tmp_path / "hf", encoders="native").save_pretrained(tmp_path / "native")
    again = laps.LAPS.from_pretrained(tmp_path / "native")
    assert not isinstance(again.image_encoder.backbone, native.NativeBackbone)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@needs_native
def test_auto_is_native_where_it_is_known(tmp_path: Path) -> None:
    for variant, known in ((VARIANTS[0], True), (VARIANTS[3], False)):
        build(variant).save_pretrained(tmp_path / str(variant))
        model = laps.LAPS.from_pretrained(tmp_path / str(variant), encoders="auto")
        assert isinstance(model.image_encoder.backbone, native.NativeBackbone) == known
        assert isinstance(model.text_encoder.backbone, native.NativeBackbone)
    with pytest.raises(laps.LapsValueError, match="dinov2_with_registers"):
        laps.LAPS.from_pretrained(tmp_path / str(VARIANTS[3]), encoders="native")
    with pytest.raises(laps.LapsValueError, match="encoders"):
        laps.LAPS.from_pretrained(tmp_path / str(VARIANTS[0]), encoders="mine")


@needs_native
@pytest.mark.parametrize("change", [{"hidden_act": "silu"}, {"image_size": [SIZE, SIZE]}], ids=str)
def test_auto_leaves_to_transformers_what_only_it_has(change: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.ViTConfig(**VISION["vit"].to_dict() | change)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(laps.LapsValueError):
        ImageEncoder.from_pretrained(tmp_path, image_size=SIZE, encoders="native")
    encoder = ImageEncoder.from_pretrained(tmp_path, image_size=SIZE, encoders="auto")
    assert isinstance(encoder.backbone, transformers.ViTModel)
    built = implementations.build(config.to_dict(), "auto")
    assert isinstance(built, transformers.ViTModel)


@needs_native
def test_new_models_start_as_those_of_transformers_do() -> None:
    for kind, part in (("vit", VISION["vit"]), ("clip", VISION["clip"]), ("bert", TEXT["bert"])):
        ours = native.NativeBackbone(part.to_dict())
        torch.manual_seed(0)
        fresh = transformers.AutoModel.from_config(part)
        fresh = fresh if kind != "clip" else transformers.CLIPVisionModelWithProjection(part)
        from laps.encoders import transformers_backbone

        expected = transformers_backbone.weights(fresh)
        for name, parameter in ours.named_parameters():
            # A thousand normal numbers have the standard deviation to a tenth.
            if parameter.numel() > 1000 and "position" not in name and "word" not in name:
                ratio = float(parameter.detach().std() / expected[name].std())
                assert ratio == pytest.approx(1.0, rel=0.1), name
            elif "orm" in name:
                assert torch.equal(parameter, expected[name]), name
    words = ours.state_dict()["embeddings.word_embeddings.weight"]
    assert words.any(1).tolist() == [False] + [True] * 98, "the row of the padding token"


@needs_native
def test_parameters_are_ordinary_ones(tmp_path: Path) -> None:
    build(VARIANTS[0]).save_pretrained(tmp_path)
    model = laps.LAPS.from_pretrained(tmp_path, encoders="native")
    backbone = model.image_encoder.backbone
    assert "encoder.layer.0.attention.attention.query.weight" in backbone.state_dict()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    tokens = backbone(pixels)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin(pixels), tokens)
        with torch.no_grad():
            next(iter(twin.parameters())).add_(1.0)
        assert not torch.equal(twin(pixels), tokens)
        assert torch.equal(backbone(pixels), tokens)
    assert backbone.double()(pixels).dtype == torch.float64
    backbone.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = backbone(pixels)
    torch.testing.assert_close(rounded.float(), tokens, atol=0.1, rtol=0.1)
    with torch.inference_mode():
        assert torch.equal(backbone(pixels), tokens)
    swapped = {name: torch.zeros_like(value) for name, value in backbone.named_parameters()}
    assert not torch.func.functional_call(backbone, swapped, (pixels,)).any()
    # Parameters that were replaced, and not changed in place.
    backbone.layernorm.weight = torch.nn.Parameter(torch.zeros_like(backbone.layernorm.weight))
    assert not torch.equal(backbone(pixels), tokens)
    plain = backbone.layernorm
    plain.weight = torch.nn.Parameter(torch.full_like(plain.weight, 2.0))
    torch.nn.utils.parametrizations.weight_norm(plain)
    normed = backbone(pixels)
    assert not torch.equal(normed, tokens)
    backbone.layernorm = torch.nn.LayerNorm(32, eps=1e-12)
    with pytest.raises(laps.LapsValueError, match=r"the submodule layernorm was replaced .* got LayerNorm"):
        backbone(pixels)
    backbone.layernorm = plain
    assert torch.equal(backbone(pixels), normed)
    model.freeze_backbones()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@needs_native
def test_ddp_sees_every_gradient(tmp_path: Path) -> None:
    build(VARIANTS[0]).save_pretrained(tmp_path)
    code = """
import sys, torch, laps
from _models import make_batch
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)
model = laps.LAPS.from_pretrained(sys.argv[1], encoders="native").train()
loss, _ = torch.nn.parallel.DistributedDataParallel(model)(make_batch())
loss.backward()
assert all(p.grad is not None for p in model.parameters())
torch.distributed.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_native
def test_a_trainer_and_compile_take_it(tmp_path: Path) -> None:
    build(VARIANTS[0]).save_pretrained(tmp_path)
    model = laps.LAPS.from_pretrained(tmp_path, encoders="native")
    pixels = torch.randn(2, 3, SIZE, SIZE)
    # The graph breaks there and goes on behind it.
    compiled = torch.compile(model.image_encoder, backend="eager")
    assert torch.equal(compiled(pixels), model.image_encoder(pixels))
    with pytest.raises(laps.LapsTypeError, match="cannot do it"):
        model.gradient_checkpointing()
    loss, _ = model.train()(make_batch())
    loss.backward()


@needs_native
def test_old_names_and_task_models_are_read(tmp_path: Path) -> None:
    model = text_model("bert")
    expected = loaded(model, tmp_path / "new", "text").state_dict()
    old = {}
    for name, value in load_file(tmp_path / "new" / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = value
    old |= {"cls.predictions.bias": torch.zeros(99), "bert.embeddings.position_ids": torch.arange(512)}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    found = native.load(tmp_path / "old", "text").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@needs_native
def test_halves_of_a_clip_checkpoint(tmp_path: Path) -> None:
    vision, text = VISION["clip"].to_dict(), TEXT["clip"].to_dict()
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    model = shaken(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    pixels, ids = torch.randn(2, 3, SIZE, SIZE), torch.randint(2, 98, (2, 5))
    images = ImageEncoder.from_pretrained(tmp_path, encoders="native").eval()
    texts = TextEncoder.from_pretrained(tmp_path, encoders="native").eval()
    expected = ImageEncoder.from_pretrained(tmp_path).eval(), TextEncoder.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(images(pixels), expected[0](pixels), atol=1e-5, rtol=0)
    lengths = torch.tensor([5, 5])
    torch.testing.assert_close(texts(ids, lengths), expected[1](ids, lengths), atol=1e-5, rtol=0)


@needs_native
def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    vision_model("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["layernorm.bias"]
    weights["embeddings.mystery"] = torch.zeros(1)
    weights["layernorm.weight"] = torch.zeros(3)
    save_file(weights, file)
    with pytest.raises(laps.LapsValueError) as error:
        native.load(tmp_path, "vision")
    for part in (
        "missing: layernorm.bias",
        "unexpected: embeddings.mystery",
        "of another shape: layernorm.weight (3,), not (32,)",
        str(file),
    ):
        assert part in str(error.value)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"patch_size": 0}, "patch_size"),
        ({"hidden_size": "wide"}, "wide"),
        ({"hidden_act": "mish"}, "mish"),
        ({"model_type": "resnet"}, "resnet"),
        ({"model_type": None}, "model_type"),
        ({"image_size": 2**33}, "image_size"),
        ({"num_hidden_layers": 2**63}, "num_hidden_layers"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"model_type": "swin", "window_size": 3000}, "window_size"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
        ({"model_type": "bert", "pad_token_id": 10**9}, "pad_token_id"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "bert", "add_cross_attention": True}, "add_cross_attention"),
        ({"is_causal": True}, "is_causal"),
        ({"head_dim": 5}, "head_dim"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
    ],
    ids=str,
)
def test_senseless_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = VISION["vit"].to_dict() | change
    with pytest.raises(laps.LapsValueError, match=message):
        native.NativeBackbone(config)


@needs_native
def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    vit = native.NativeBackbone(VISION["vit"].to_dict())
    with pytest.raises(laps.LapsValueError, match="pixel_values is missing"):
        vit(input_ids=torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(laps.LapsError, match="torch: "):
        vit(torch.zeros(1, 4, SIZE, SIZE))
    with pytest.raises(laps.LapsError):
        vit(torch.zeros(2, 3))
    with pytest.raises(laps.LapsValueError, match="expected"):
        vit(torch.zeros(1, 3, SIZE // 2, SIZE * 2))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        vit("pixels")
    bert = native.NativeBackbone(TEXT["bert"].to_dict())
    with pytest.raises(laps.LapsError, match="index out of range"):
        bert(input_ids=torch.full((1, 3), 1000))
    for shape in ((3,), (1, 4), (1, 1, 3)):
        with pytest.raises(laps.LapsValueError, match="attention_mask does not fit"):
            bert(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(shape))
    with pytest.raises(laps.LapsTypeError, match="config has the wrong type"):
        native.NativeBackbone(VISION["vit"])
    with pytest.raises(laps.LapsValueError, match="takes other inputs"):
        ImageEncoder(bert, image_size=SIZE)
    with pytest.raises(laps.LapsValueError, match="does not exist"):
        native.load(tmp_path / "nowhere", "vision")
    text_model("bert").save_pretrained(tmp_path)
    with pytest.raises(laps.LapsValueError, match=r"is no vision model .* got bert"):
        native.load(tmp_path, "vision")
    for size, error in ((1.5, laps.LapsTypeError), ("64", laps.LapsTypeError), (0, laps.LapsValueError)):
        with pytest.raises(error, match="image_size"):
            native.load(tmp_path, "vision", image_size=size)


@needs_native
def test_an_exception_of_a_hook_comes_through() -> None:
    def pack(_: Tensor) -> Tensor:
        raise KeyError("mine")

    vit, pixels = native.NativeBackbone(VISION["vit"].to_dict()), torch.randn(1, 3, SIZE, SIZE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), pytest.raises(KeyError, match="mine"):
        vit(pixels)
    # torch.utils.checkpoint ends its second pass with an exception of its own.
    vit(pixels).sum().backward()
    expected = [parameter.grad.clone() for parameter in vit.parameters()]
    vit.zero_grad()
    torch.utils.checkpoint.checkpoint(vit, pixels, use_reentrant=False).sum().backward()
    for parameter, gradient in zip(vit.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@needs_native
def test_loaded_weights_are_float32_whatever_the_default(tmp_path: Path) -> None:
    vision_model("vit").save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        ours = native.load(tmp_path, "vision")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


@needs_native
def test_older_checkpoints_of_clip_keep_what_counts_elsewhere(tmp_path: Path) -> None:
    text = TEXT["clip"].to_dict()
    config = transformers.CLIPConfig(
        vision_config=VISION["clip"].to_dict(), text_config=text, projection_dim=24
    )
    shaken(transformers.CLIPModel(config)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config_dict"] = {**values["text_config"], "hidden_act": "relu", "layer_norm_eps": 0.5}
    file.write_text(json.dumps(values))
    ids, lengths = torch.randint(2, 98, (2, 5)), torch.tensor([5, 5])
    ours, theirs = (TextEncoder.from_pretrained(tmp_path, encoders=kind).eval() for kind in ("auto", "hf"))
    assert isinstance(ours.backbone, native.NativeBackbone)
    torch.testing.assert_close(ours(ids, lengths), theirs(ids, lengths), atol=1e-5, rtol=0)


@needs_native
def test_auto_reads_what_only_transformers_reads(tmp_path: Path) -> None:
    model = vision_model("vit")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(laps.LapsValueError, match=r"model\.safetensors does not exist"):
        ImageEncoder.from_pretrained(tmp_path, encoders="native")
    encoder = ImageEncoder.from_pretrained(tmp_path, encoders="auto")
    assert isinstance(encoder.backbone, transformers.ViTModel)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(laps.LapsValueError, match="cannot be loaded"):
        ImageEncoder.from_pretrained(tmp_path, encoders="auto")


@pytest.mark.parametrize("built_for", [None, "2.3"])
def test_another_torch_is_an_import_error_before_anything_is_loaded(
    built_for: str | None, tmp_path: Path
) -> None:
    if built_for:
        package = tmp_path / "laps_native"
        package.mkdir()
        (package / "__init__.py").write_text(f"BUILT_FOR_TORCH = {built_for!r}\n")
        (package / "_native.py").write_text("raise SystemExit('loaded')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
if {built_for!r} is None:
    sys.modules["laps_native"] = None
import laps
try:
    import laps.encoders.native
except ImportError as error:
    print(error)
assert "laps_native._native" not in sys.modules
from _models import VARIANTS, build
build(VARIANTS[0]).save_pretrained({str(tmp_path / "model")!r})
laps.LAPS.from_pretrained({str(tmp_path / "model")!r}, encoders="auto")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = f"built for torch {built_for}" if built_for else "laps-rs-native is not installed"
    assert f"laps.encoders.native: {'laps-rs-native was ' if built_for else ''}{expected}" in done.stdout
