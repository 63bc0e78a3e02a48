"""Checkpoints of the published code become models with the same scores, and nothing in them runs."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import laps
import numpy as np
import pytest
import torch
import transformers
from _models import CAPTIONS, ENVIRONMENT, bert_tokenizer
from _published_model import (
    AGGREGATION,
    BASE,
    IMAGE,
    TEXT,
    TINY,
    Sizes,
    checkpoint,
    random_weights,
    scores,
    shapes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laps.cli import main
from laps.conversion.architecture import find_architecture
from laps.conversion.published import Published, read
from laps.data import CaptionTokenizer
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

# All tokenizers here have more than 40 tokens.
IDS = torch.tensor([[2, 7, 31, 39, 3], [2, 25, 3, 0, 0], [2, 8, 9, 3, 0]])
LENGTHS = torch.tensor([5, 3, 4])


def configs(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """The two configurations as files, by the arguments that take them."""
    paths = {}
    for side, values in (("image", sizes.image_config()), ("text", sizes.text_config())):
        paths[f"{side}_config"] = folder / f"{side}.json"
        paths[f"{side}_config"].write_text(json.dumps(values))
    return paths


def save(folder: Path, content: object, **options: Any) -> Path:
    path = folder / "model_best.pth"
    torch.save(content, path, **options)
    return path


def convert_tiny(folder: Path, content: object, sizes: Sizes, **more: Any) -> laps.conversion.Conversion:
    """In this process, without a tokenizer."""
    arguments = {"tokenizer": None, **configs(folder, sizes), **more}
    return laps.convert(save(folder, content), folder / "out", **arguments)


def difference(model: laps.LAPS, weights: dict[str, Tensor], sizes: Sizes) -> float:
    """The greatest between the scores of the model and those of the published one."""
    pixels = torch.randn(4, 3, sizes.image_size, sizes.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.similarity(model.encode_image(pixels), model.encode_text(IDS, LENGTHS))
    theirs = scores(weights, sizes, pixels, IDS, LENGTHS)
    # Equal scores of all pairs would show nothing.
    assert theirs.std() > 1e-2
    return float((ours - theirs).abs().max())


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "laps.cli", "convert", *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def refused(call: Callable[[], object], *parts: object, kind: type[Exception] = laps.LapsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, laps.LapsError)
    for piece in parts:
        assert str(piece) in message
    return message


# ---- the same scores


@pytest.mark.parametrize("family", TINY)
def test_the_command_makes_a_model_with_the_published_scores(family: str, tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    sizes = replace(TINY[family], vocabulary=tokenizer.vocab_size)
    weights = random_weights(sizes)
    (tmp_path / "words").mkdir()
    tokenizer.save(tmp_path / "words" / "tokenizer.json")
    files = configs(tmp_path, sizes)
    source = save(tmp_path, checkpoint(weights, sizes))
    done = command(
        source,
        tmp_path / "new" / "model",
        "--image-config",
        files["image_config"],
        "--text-config",
        files["text_config"],
        "--tokenizer",
        tmp_path / "words",
    )
    assert (done.returncode, done.stderr) == (0, "")
    for found in (
        f"{source}, epoch 21, best rSum 507.2",
        f"{'ViT' if family == 'vit' else 'Swin'}, {sizes.image_size} x {sizes.image_size} pixels",
        f"{sizes.num_patches} patches",
        f"selection ratio {sizes.selection_ratio}",
        f"aggregation ratio {sizes.aggregation_ratio} ({sizes.num_tokens} aggregated tokens)",
        str(tmp_path / "new" / "model"),
    ):
        assert found in done.stdout

    model = laps.LAPS.from_pretrained(tmp_path / "new" / "model")
    assert model.transform.to_dict() == laps.data.ImageTransform(sizes.image_size).to_dict()
    assert difference(model, weights, sizes) <= 1e-5
    texts = model.encode_captions(CAPTIONS)
    tokens = tokenizer.encode(CAPTIONS)
    pixels = torch.randn(2, 3, sizes.image_size, sizes.image_size)
    with torch.inference_mode():
        ours = model.similarity(model.encode_image(pixels), texts)
    theirs = scores(weights, sizes, pixels, tokens.input_ids, tokens.lengths)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "sizes",
    [
        replace(TINY["vit"], embed=32),
        replace(TINY["vit"], text_width=16),
        # The last stage is one window, as in the published sizes.
        replace(TINY["swin"], image_size=32),
    ],
    ids=["no projections", "one projection", "one window"],
)
def test_other_sizes_keep_their_scores(sizes: Sizes, tmp_path: Path) -> None:
    weights = random_weights(sizes)
    done = convert_tiny(tmp_path, checkpoint(weights, sizes), sizes)
    assert difference(laps.LAPS.from_pretrained(done.path), weights, sizes) <= 1e-5


def test_every_form_of_the_file_gives_the_same_model(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    weights = random_weights(sizes)
    full = checkpoint(weights, sizes)
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    floats = {n: t.contiguous() for n, t in weights.items()}
    save_file(floats, tmp_path / "model.safetensors")
    forms: dict[str, object] = {
        "zip": save(tmp_path, full),
        "folder": tmp_path,
        "safetensors": tmp_path / "model.safetensors",
    }
    for name, content, options in (
        ("legacy", full, {"_use_new_zipfile_serialization": False}),
        ("DataParallel", full | {"model": wrapped}, {}),
        ("options as a dictionary", full | {"opt": vars(full["opt"])}, {}),
        ("weights alone", weights, {}),
        ("parameters", full | {"model": {n: torch.nn.Parameter(t, False) for n, t in weights.items()}}, {}),
        ("numpy", full | {"best_rsum": np.float64(507.25), "epoch": np.int64(21)}, {}),
        ("double", full | {"model": {n: t.double() for n, t in floats.items()}}, {}),
    ):
        (tmp_path / name).mkdir()
        forms[name] = save(tmp_path / name, content, **options)
    expected = None
    for name, form in forms.items():
        out = tmp_path / "out" / name
        done = laps.convert(form, out, tokenizer=None, **configs(tmp_path, sizes))
        content = (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()
        assert content == (expected or content), name
        expected = content
        known = name not in ("safetensors", "weights alone")
        assert (done.epoch, done.best_rsum) == ((21, 507.25) if known else (None, None)), name


def test_numbers_under_the_names_of_numpy_1_are_read(tmp_path: Path) -> None:
    content = checkpoint(random_weights(TINY["vit"]), TINY["vit"], best_rsum=np.float32(500.5))
    path = save(tmp_path, content, _use_new_zipfile_serialization=False)
    pickled = path.read_bytes()
    assert b"numpy._core.multiarray" in pickled
    path.write_bytes(pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read("test", path).best_rsum == 500.5


# ---- which model it is


def bare(sizes: Sizes, **options: Any) -> Published:
    """A checkpoint of which only names and shapes are there."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes(sizes).items()}
    return Published(Path("model_best.pth"), "", weights, vars(sizes.options()) | options, 1, 1.0)


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("with_options", [True, False])
def test_the_published_sizes_are_found_without_configurations(name: str, with_options: bool) -> None:
    sizes = BASE[name]
    published = bare(sizes)
    if not with_options:
        published = replace(published, options={})
    found = find_architecture("test", published, None, None, None, None)

    preset = laps.config.PRESETS[name.replace("-", "-base-")]
    expected = transformers.CONFIG_MAPPING[sizes.family](
        **{key: value for key, value in preset.image_encoder.items() if key != "model_type"}
    )
    assert found.image_config.to_dict() == expected.to_dict()
    assert found.text_config.to_dict() == transformers.BertConfig().to_dict()
    assert (found.image_size, found.num_patches, found.embed_dim) == (
        sizes.image_size,
        sizes.num_patches,
        512,
    )
    assert found.selection_ratio == preset.head_options["selection_ratio"]
    assert found.aggregation_ratio == preset.head_options["aggregation_ratio"]
    assert (found.image_projection, found.text_projection) == (True, True)


def test_the_names_of_the_oracle_are_those_of_the_hub() -> None:
    for sizes in (BASE["vit-224"], BASE["swin-224"]):
        found = find_architecture("test", bare(sizes), None, None, None, None)
        for prefix, config in ((IMAGE, found.image_config), (TEXT, found.text_config)):
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config)
            count = sum(p.numel() for n, p in model.named_parameters() if "pooler" not in n)
            given = {n: s for n, s in shapes(sizes).items() if n.startswith(prefix) and "pooler" not in n}
            assert count == sum(int(np.prod(shape)) for shape in given.values())


@pytest.mark.parametrize(
    ("family", "options", "parts"),
    [
        ("vit", {"vit_type": "swin"}, ["opt.vit_type='swin'", "weights are of a vit"]),
        ("swin", {"vit_type": "vit"}, ["opt.vit_type='vit'", "weights are of a swin"]),
        ("vit", {"img_res": 384}, ["opt.img_res=384", "weights have 32"]),
        ("swin", {"img_res": 96}, ["opt.num_patches=64", "weights have 144"]),
        ("swin", {"img_res": 100}, ["images of 100 pixels", "a multiple of 8"]),
        ("swin", {"img_res": 10**9}, ["images of 1000000000 pixels", "up to 2048"]),
        ("swin", {"img_res": 16, "num_patches": 4}, ["2 x 2 patches", "a window of 4 x 4"]),
        ("swin", {"img_res": "big"}, ["opt.img_res is no integer", "'big'"]),
        ("vit", {"embed_size": 512}, ["opt.embed_size=512", "weights have 16"]),
        ("vit", {"num_patches": 196}, ["opt.num_patches=196", "weights have 16"]),
        ("vit", {"sparse_ratio": 0.8}, ["16 patches", "0.8", "0.4", "make 5 tokens", "weight.3.weight 3"]),
        ("vit", {"aggr_ratio": 1.5}, ["opt.aggr_ratio is out of range", "1.5"]),
        ("vit", {"aggr_ratio": "many"}, ["opt.aggr_ratio", "str"]),
        ("vit", {"aggr_ratio": 10**400}, ["opt.aggr_ratio is out of range"]),
    ],
)
def test_options_and_shapes_that_contradict_each_other_are_both_said(
    family: str, options: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    sizes = TINY[family]
    opt = argparse.Namespace(**vars(sizes.options()) | options)
    content = checkpoint(random_weights(sizes), sizes, opt=opt)
    refused(lambda: convert_tiny(tmp_path, content, sizes), "convert: ", "model_best.pth: ", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change", "parts"),
    [
        ("image", {"hidden_size": 64}, ["hidden_size of the image encoder is 32, but 64 in "]),
        ("image", {"num_hidden_layers": 3}, ["num_hidden_layers", "is 2, but 3"]),
        ("image", {"patch_size": 4}, ["patch_size", "is 8, but 4"]),
        ("image", {"image_size": 64}, ["image_size", "is 32, but 64"]),
        ("image", {"num_attention_heads": 5}, ["of another shape", "query.weight (32, 32), not (30, 32)"]),
        ("image", {"hidden_size": "wide"}, ["image.json"]),
        ("image", {"model_type": "swin"}, ["is a vit, but model_type of", "is 'swin'"]),
        ("image", {"qkv_bias": False}, ["unexpected: img_enc.visual_encoder.encoder.layer.0.attention"]),
        ("text", {"vocab_size": 100}, ["vocab_size of the text encoder is 99, but 100"]),
        ("text", {"model_type": "gpt2"}, ["is a bert, but model_type of", "is 'gpt2'"]),
    ],
)
def test_configurations_that_contradict_the_weights_are_refused(
    file: str, change: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    sizes = TINY["vit"]
    paths = configs(tmp_path, sizes)
    path = paths[f"{file}_config"]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    source = save(tmp_path, checkpoint(random_weights(sizes), sizes))
    refused(lambda: laps.convert(source, tmp_path / "out", tokenizer=None, **paths), *parts)


def test_configurations_are_read_as_their_folders_and_with_two_sides(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    for side, values in (
        ("image", sizes.image_config() | {"image_size": [32, 32]}),
        ("text", sizes.text_config()),
    ):
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.json").write_text(json.dumps(values))
    weights = random_weights(sizes)
    folders = {f"{side}_config": tmp_path / side for side in ("image", "text")}
    done = convert_tiny(tmp_path, checkpoint(weights, sizes), sizes, **folders)
    assert difference(laps.LAPS.from_pretrained(done.path), weights, sizes) <= 1e-5


def test_a_width_whose_heads_are_not_known_asks_for_a_configuration(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    source = save(tmp_path, checkpoint(random_weights(sizes), sizes))
    given = configs(tmp_path, sizes)
    for side, other in (("image", "text"), ("text", "image")):
        refused(
            lambda side=side, other=other: laps.convert(  # type: ignore[misc]
                source, tmp_path / "out", tokenizer=None, **{f"{other}_config": given[f"{other}_config"]}
            ),
            f"the {side} encoder has hidden_size=32, whose number of heads is not known",
            f"--{side}-config",
        )


def test_the_shapes_of_a_swin_tell_its_heads_and_windows(tmp_path: Path) -> None:
    sizes = TINY["swin"]
    weights = random_weights(sizes)
    text = configs(tmp_path, sizes)["text_config"]
    source = save(tmp_path, checkpoint(weights, sizes))
    done = laps.convert(source, tmp_path / "out", tokenizer=None, text_config=text)
    assert difference(laps.LAPS.from_pretrained(done.path), weights, sizes) <= 1e-5


def test_ratios_of_weights_alone_are_the_published_ones_or_the_given_ones(tmp_path: Path) -> None:
    sizes = replace(TINY["vit"], selection_ratio=0.75, aggregation_ratio=0.5)
    weights = random_weights(sizes)
    refused(
        lambda: convert_tiny(tmp_path, weights, sizes),
        "selection ratio 0.5",
        "make 3 tokens",
        "weight.3.weight 6",
        "--selection-ratio and --aggregation-ratio",
    )
    ratios = {"selection_ratio": 0.75, "aggregation_ratio": 0.5}
    done = convert_tiny(tmp_path, weights, sizes, **ratios)
    assert difference(laps.LAPS.from_pretrained(done.path), weights, sizes) <= 1e-5
    refused(
        lambda: laps.convert(
            save(tmp_path, checkpoint(weights, sizes)),
            tmp_path / "other",
            tokenizer=None,
            selection_ratio=0.5,
            **configs(tmp_path, sizes),
        ),
        "opt.sparse_ratio=0.75, but selection_ratio=0.5 is given",
    )


# ---- weights that do not fit


def test_weights_that_do_not_fit_are_named_as_in_the_file(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    weights = {f"module.{name}": tensor for name, tensor in random_weights(sizes).items()}
    for name in (
        f"{IMAGE}layernorm.weight",
        f"{TEXT}encoder.layer.1.output.dense.bias",
        f"{AGGREGATION}scale",
    ):
        del weights[f"module.{name}"]
    weights["module.criterion.weight"] = torch.zeros(3)
    weights[f"module.{TEXT}embeddings.LayerNorm.bias"] = torch.zeros(31)
    weights["module.txt_enc.fc.weight"] = torch.zeros(16, 31)
    message = refused(lambda: convert_tiny(tmp_path, checkpoint(weights, sizes), sizes), "model_best.pth")
    missing, unexpected, other = message.split("; ")
    assert f"module.{IMAGE}layernorm.weight" in missing
    assert f"module.{TEXT}encoder.layer.1.output.dense.bias" in missing
    assert f"module.{AGGREGATION}scale" in missing
    assert unexpected == "unexpected: module.criterion.weight"
    assert f"module.{TEXT}embeddings.LayerNorm.bias (31,), not (32,)" in other
    assert "module.txt_enc.fc.weight (16, 31), not (16, 32)" in other
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        f"{IMAGE}embeddings.position_embeddings",
        f"{TEXT}embeddings.word_embeddings.weight",
        f"{AGGREGATION}weight.0.weight",
        f"{AGGREGATION}weight.3.weight",
    ],
)
def test_a_missing_weight_that_tells_a_size_is_named(name: str, tmp_path: Path) -> None:
    sizes = TINY["vit"]
    weights = random_weights(sizes)
    del weights[name]
    refused(lambda: convert_tiny(tmp_path, checkpoint(weights, sizes), sizes), f"{name} is missing")
    weights[name] = torch.zeros(1, 2, 3, 4, 5)
    refused(lambda: convert_tiny(tmp_path, checkpoint(weights, sizes), sizes), f"{name} has another shape")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (torch.full((32,), float("nan")), ["is not finite"]),
        (torch.zeros(32, dtype=torch.complex64), ["is no weight", "complex64"]),
        (torch.zeros(32, dtype=torch.int8), ["is no weight", "int8"]),
        (torch.zeros(0), ["is no weight", "(0,)"]),
        (torch.zeros(32).to_sparse(), ["is no weight", "sparse"]),
        (torch.empty(32, device="meta"), ["is no weight", "meta"]),
        (torch.zeros(1).expand(10**12), ["is smaller than its weights"]),
        ("32 numbers", ["is no tensor", "str"]),
    ],
    ids=["nan", "complex", "integers", "empty", "sparse", "meta", "expanded", "text"],
)
def test_what_is_no_weight_is_named(value: object, parts: list[str], tmp_path: Path) -> None:
    sizes = TINY["vit"]
    content = checkpoint(random_weights(sizes) | {f"{IMAGE}layernorm.bias": value}, sizes)  # type: ignore[dict-item]
    refused(lambda: convert_tiny(tmp_path, content, sizes), "model_best.pth", *parts)


def test_more_layers_than_fit_into_memory_are_refused_before_it_is_taken(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    paths = configs(tmp_path, sizes)
    # 32 channels for each of very many.
    paths["image_config"].write_text(json.dumps(sizes.image_config() | {"num_channels": 10**12}))
    source = save(tmp_path, checkpoint(random_weights(sizes), sizes))
    refused(
        lambda: laps.convert(source, tmp_path / "out", tokenizer=None, **paths), f"{IMAGE}* has", "parameters"
    )


# ---- files of others


class Call:
    """Pickled, it asks for a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Options(argparse.Namespace):
    """Pickled, it asks for itself, and would do more than a Namespace."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def hostile(marker: Path) -> dict[str, tuple[object, str]]:
    """What would touch the file, or read others, and the name that it asks for."""
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": (Call(os.system, f"touch {marker}"), "posix.system"),
        "eval": (Call(builtins.eval, code), "builtins.eval"),
        "exec": (Call(builtins.exec, code), "builtins.exec"),
        "open": (Call(open, str(marker), "w"), f"{open.__module__}.open"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
        # The name of subprocess in protocol 2, which is that of Python 2.
        "Popen": (Call(subprocess.Popen, ["touch", str(marker)]), "commands.Popen"),
        "subclass": (Options(marker=str(marker)), f"{__name__}.Options"),
        "nested load": (Call(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
        "torch.load": (Call(torch.load, "x.pth"), "torch.serialization.load"),
        "jit": (Call(torch.jit.load, "x.pth"), "torch.jit._serialization.load"),
        "hub": (Call(torch.hub.load, "x", "y"), "torch.hub.load"),
        "array": (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        "path": (Path("x"), "pathlib"),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["opt", "best_rsum", "model", "inside opt"])
@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_a_file_that_asks_for_more_than_data_runs_nothing(
    kind: str, place: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even where torch is told to trust what it is not told to distrust.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    value, name = hostile(marker)[kind]
    content = checkpoint({}, TINY["vit"])
    if place == "model":
        content["model"] = {f"{IMAGE}layernorm.bias": value}
    elif place == "inside opt":
        content["opt"].seed = value
    else:
        content[place] = value
    source = save(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refused(
        lambda: laps.convert(source, tmp_path / "out", tokenizer=None), f"convert: {source} asks for {name}"
    )
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_the_command_says_in_one_line_what_a_hostile_file_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    source = save(tmp_path, checkpoint({}, TINY["vit"], opt=Call(os.system, f"touch {marker}")))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"laps: convert: {source} asks for posix.system (expected tensors and plain values"
    )
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_others_allowed_to_load_is_neither_allowed_nor_forgotten(tmp_path: Path) -> None:
    source = save(tmp_path, checkpoint({}, TINY["vit"], opt=Options(marker=str(tmp_path / "marker"))))
    with torch.serialization.safe_globals([Options, argparse.Namespace]):
        allowed = set(torch.serialization.get_safe_globals())
        refused(lambda: laps.convert(source, tmp_path / "out"), "asks for", "Options")
        assert set(torch.serialization.get_safe_globals()) == allowed
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is empty (expected a file of torch.save"]),
        (b"hello, these are words\n", ["is a text file (expected a file of torch.save"]),
        ("ein Häuschen\n\tam See".encode(), ["is a text file"]),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", ["is a web page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", ["git lfs pull"]),
        (b"\xff\xd8\xff\xe0" + bytes(100), ["is an image (JPEG)"]),
        (b"\x1f\x8b\x08" + bytes(100), ["is compressed by gzip"]),
        (bytes(257) + b"ustar" + bytes(250), ["is an old tar file"]),
        (b"PK\x03\x04" + bytes(100), ["cannot be read (expected a file of torch.save"]),
        ([1, 2], ["is no checkpoint (expected a dictionary"]),
        ({"epoch": 1}, ['expected "model" with weights img_enc', "got keys 'epoch'"]),
        ({"model": 5}, ['expected "model" with weights img_enc', "got weights 'int'"]),
        ({"model": {}}, ["got weights none"]),
        ({"model": {3: torch.zeros(2)}}, ["got weights 3"]),
        ({"model": {f"{IMAGE}\x1b[2J\n": torch.zeros(2)}}, ["visual_encoder.\\x1b[2J\\n'"]),
        ({"vit.layernorm.weight": torch.zeros(2)}, ["got keys 'vit.layernorm.weight'"]),
        (
            {"model": {"img_enc.visual_encoder.conv1.weight": torch.ones(2)}},
            ["is no encoder of the published"],
        ),
        ({"model": {f"{IMAGE}x": torch.ones(2)}, "opt": [1]}, ["opt holds no options", "list"]),
    ],
)
def test_other_kinds_of_files_are_refused_by_what_they_are(
    content: object, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = refused(
        lambda: laps.convert(path, tmp_path / "out", tokenizer=None), f"convert: {path}", *parts
    )
    assert "\n" not in message


def test_paths_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    for source, part in (
        (tmp_path / "absent.pth", "absent.pth does not exist"),
        (tmp_path, f"{tmp_path / 'model_best.pth'} does not exist"),
        (Path("/dev/null"), "/dev/null is no regular file"),
    ):
        refused(lambda source=source: laps.convert(source, tmp_path / "out"), part)  # type: ignore[misc]
    save_file({"vit.layernorm.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    refused(
        lambda: laps.convert(tmp_path / "vit.safetensors", tmp_path / "out"), "no checkpoint of the published"
    )
    os.rename(tmp_path / "vit.safetensors", tmp_path / "vit.pth")
    refused(lambda: laps.convert(tmp_path / "vit.pth", tmp_path / "out"), "vit.pth is a safetensors file")
    save(tmp_path, [1], pickle_protocol=4)
    refused(lambda: laps.convert(tmp_path, tmp_path / "out"), "model_best.pth cannot be read")


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def file_bytes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    sizes = replace(TINY["vit"], depths=(1,), text_depth=1, width=8, text_width=8, embed=8)
    folder = tmp_path_factory.mktemp("whole")
    content = checkpoint(random_weights(sizes), sizes)
    return save(folder, content, _use_new_zipfile_serialization=request.param).read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(file_bytes: bytes, tmp_path_factory: Any, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.pth"
    path.write_bytes(file_bytes[: int(share * len(file_bytes))])
    refused(lambda: read("convert", path), f"convert: {path}")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_none(file_bytes: bytes, tmp_path_factory: Any, data: Any) -> None:
    damaged = bytearray(file_bytes)
    # Where the pickle is, in both forms, most of the time.
    places = st.integers(0, 8000) | st.integers(0, len(damaged) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[min(place, len(damaged) - 1)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(laps.LapsError):
        find_architecture("convert", read("convert", path), None, None, None, None)


# ---- where it is written, and the tokenizer


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    sizes = TINY["vit"]
    content = checkpoint(random_weights(sizes), sizes)
    out = tmp_path / "out"
    out.mkdir()
    convert_tiny(tmp_path, content, sizes)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert {path.name for path in before} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "transform.json",
    }
    refused(lambda: convert_tiny(tmp_path, content, sizes), f"{out} is not empty")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    refused(lambda: laps.convert(tmp_path, tmp_path / "file"), "is no folder")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(OSError, match="File exists"):
        laps.convert(tmp_path, tmp_path / "file" / "out", tokenizer=None, **configs(tmp_path, sizes))


def test_a_tokenizer_is_taken_in_each_of_its_forms_and_must_have_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    sizes = replace(TINY["vit"], vocabulary=tokenizer.vocab_size)
    content = checkpoint(random_weights(sizes), sizes)
    words = tmp_path / "words"
    words.mkdir()
    tokenizer.save(words / "tokenizer.json")
    vocabulary = tokenizer.backend.get_vocab()
    (tmp_path / "vocab.txt").write_text(
        "\n".join(sorted(vocabulary, key=lambda token: vocabulary[token])) + "\n"
    )
    forms: list[CaptionTokenizer | Path | str] = [
        tokenizer,
        words,
        str(words / "tokenizer.json"),
        tmp_path / "vocab.txt",
    ]
    for number, form in enumerate(forms):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = convert_tiny(folder, content, sizes, tokenizer=form)
        assert done.has_tokenizer
        stored = laps.LAPS.from_pretrained(done.path).tokenizer
        assert stored is not None
        assert stored.encode(CAPTIONS).input_ids.equal(tokenizer.encode(CAPTIONS).input_ids)

    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("more\n")
    refused(
        lambda: convert_tiny(tmp_path, content, sizes, tokenizer=tmp_path / "vocab.txt"),
        f"has {tokenizer.vocab_size + 1} tokens, but the text encoder has {tokenizer.vocab_size}",
    )
    assert not (tmp_path / "out").exists()


def test_without_the_default_tokenizer_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = TINY["vit"]
    files = configs(tmp_path, sizes)
    source = save(tmp_path, checkpoint(random_weights(sizes), sizes))
    arguments = [source, tmp_path / "out", "--image-config", files["image_config"]]
    arguments += ["--text-config", files["text_config"]]
    # As HF_HUB_OFFLINE and HF_HOME say before the start of a process.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["convert", *map(str, arguments)]) == 2
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    for part in ("no tokenizer bert-base-uncased", "--tokenizer with", "vocab.txt", "--no-tokenizer"):
        assert part in error
    assert not (tmp_path / "out").exists()
    assert main(["convert", *map(str, arguments), "--no-tokenizer"]) == 0
    assert "tokenizer      none" in capsys.readouterr().out
    assert laps.LAPS.from_pretrained(tmp_path / "out").tokenizer is None


def test_convert_is_a_function_each_time_it_is_asked_for() -> None:
    assert callable(laps.convert)
    assert callable(laps.convert)
    assert "convert" in dir(laps)


def test_a_torchscript_archive_is_named_and_torchs_advice_is_not_passed_on(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pth")
    message = refused(lambda: laps.convert(tmp_path / "a.pth", tmp_path / "out"), "is a TorchScript archive")
    assert "weights_only" not in message


def test_compressed_or_overlapping_entries_and_a_huge_pickle_are_refused_unread(tmp_path: Path) -> None:
    def archive(content: bytes, compression: int) -> Path:
        with zipfile.ZipFile(tmp_path / "a.pth", "w", compression) as file:
            file.writestr("a/data.pkl", content)
        return tmp_path / "a.pth"

    bomb = archive(b"\x80\x02" + b"]" * 2**22 + b".", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**16
    refused(lambda: laps.convert(bomb, tmp_path / "out"), "compressed entries", "a/data.pkl")
    large = archive(b"\x80\x02" + b"]" * 2**24 + b".", zipfile.ZIP_STORED)
    refused(lambda: laps.convert(large, tmp_path / "out"), "a/data.pkl is too large", 2**24)


@pytest.mark.parametrize("name", ["get", "keys", "values", "__iter__", "__len__"])
def test_attributes_that_hide_the_methods_of_a_dictionary_change_nothing(tmp_path: Path, name: str) -> None:
    def spoiled(values: dict[str, Any]) -> OrderedDict[str, Any]:
        ordered = OrderedDict(values)
        ordered.__dict__[name] = 5
        return ordered

    content = checkpoint(random_weights(TINY["vit"]), TINY["vit"])
    content = spoiled({**content, "model": spoiled(content["model"])})
    assert convert_tiny(tmp_path, content, TINY["vit"]).epoch == 21


@pytest.mark.parametrize("epoch", [10**300, True, -1, "21"])
def test_an_epoch_that_is_none_is_unknown(tmp_path: Path, epoch: object) -> None:
    content = checkpoint(random_weights(TINY["vit"]), TINY["vit"]) | {"epoch": epoch}
    assert "epoch unknown" in str(convert_tiny(tmp_path, content, TINY["vit"]))


def test_names_of_options_reach_no_terminal_raw(tmp_path: Path) -> None:
    content = checkpoint(random_weights(TINY["vit"]), TINY["vit"])
    setattr(content["opt"], "a\x1b[31mX", 2**70)
    message = refused(lambda: convert_tiny(tmp_path, content, TINY["vit"]), r"opt.a\x1b[31mX is out of range")
    assert "\x1b" not in message
