"""Models and checkpoints come back bit for bit, in another process too, and a full disk loses nothing."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import laps
import numpy as np
import pytest
import torch
from _models import (
    CAPTIONS,
    ENVIRONMENT,
    SIZE,
    VARIANTS,
    build,
    make_batch,
    pixels,
    text_model,
    tiny_laps,
    vision_model,
)
from laps import LapsError, LapsValueError
from laps.checkpoint import load_checkpoint, save_checkpoint
from laps.encoders import ImageEncoder, TextEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

# Loads every model in a folder and keeps the matrix of the same images and sentences.
SCORE = """
import sys
from pathlib import Path
import laps, torch
from safetensors.torch import load_file, save_file
from _models import CAPTIONS

folder = Path(sys.argv[1])
pixels = load_file(folder / "pixels.safetensors")["pixels"]
results = {}
for path in sorted(path for path in folder.iterdir() if path.is_dir()):
    model = laps.LAPS.from_pretrained(path)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        results[path.name] = model.similarity(model.encode_image(pixels), model.encode_captions(CAPTIONS))
save_file(results, folder / "scores.safetensors")
"""

# Saves a changed model over the first where no file may grow beyond 100 kB, or on a disk that is full.
FULL = """
import os, resource, sys
from pathlib import Path
import laps, torch
from laps.checkpoint import load_checkpoint, save_checkpoint
from _models import make_batch, tiny_laps

kind, folder = sys.argv[1], Path(sys.argv[2])
model = tiny_laps()
optimizer = torch.optim.AdamW(model.parameters())
model.save_pretrained(folder / "model")
save_checkpoint(folder / "last", model, optimizer, {"step": 1})
before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
model(make_batch())[0].backward()
optimizer.step()
if kind == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
else:
    disk = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 50_000))
for name, save in {
    "model": lambda: model.save_pretrained(folder / "model"),
    "last": lambda: save_checkpoint(folder / "last", model, optimizer, {"step": 2}),
}.items():
    try:
        save()
    except OSError as error:
        print(name, error.errno, error.filename)
    else:
        sys.exit(f"{name}: the disk was not full")
(folder / "filler").unlink(missing_ok=True)
assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
again = laps.LAPS.from_pretrained(folder / "model")
assert all(torch.equal(again.state_dict()[name], kept[name]) for name in kept if "pooler" not in name)
assert load_checkpoint(folder / "last", model, optimizer) == {"step": 1}
assert all(torch.equal(model.state_dict()[name], kept[name]) for name in kept)
"""


class Grid(nn.Module):
    """A vision backbone of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patches(pixel_values).flatten(2).transpose(1, 2)


def own_model(seed: int) -> laps.LAPS:
    torch.manual_seed(seed)
    images = ImageEncoder(Grid(), num_prefix_tokens=0, image_size=SIZE)
    texts = TextEncoder(text_model(), embed_dim=16)
    return laps.LAPS(images, texts, laps.nn.LAPSHead(16, 16, num_prefix_tokens=0)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_laps().save_pretrained(folder)
    return folder


def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    # Copies: what is loaded is a view of the file, which is about to be overwritten.
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path)


# ---- models


def test_every_kind_of_model_gives_the_same_matrix_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    save_file({"pixels": pixels(5)}, tmp_path / "pixels.safetensors")
    expected = {}
    for variant in VARIANTS:
        model = build(variant)
        with torch.no_grad():
            images, texts = model.encode_image(pixels(5)), model.encode_captions(CAPTIONS)
            expected[str(variant)] = model.similarity(images, texts)
        model.save_pretrained(tmp_path / str(variant))
    subprocess.run([sys.executable, "-c", SCORE, str(tmp_path)], check=True, env=ENVIRONMENT)
    found = load_file(tmp_path / "scores.safetensors")

    assert found.keys() == expected.keys()
    assert len(found) == len(VARIANTS)
    for name, scores in expected.items():
        assert scores.shape == (5, 3)
        assert torch.equal(found[name], scores), name


def test_a_loaded_model_has_the_settings_of_the_saved_one(tmp_path: Path) -> None:
    model = tiny_laps(variant="paper", attention_weight=0.5)
    model.objective = laps.objective.Objective("info_nce", temperature=0.3)
    with torch.no_grad():
        model.objective.info_nce.log_scale.fill_(1.5)  # type: ignore[union-attr]
    model.transform = laps.data.ImageTransform(image_size=SIZE, mean=(0.1, 0.2, 0.3), flip=0.0)
    model.save_pretrained(tmp_path / "model")
    loaded = laps.LAPS.from_pretrained(str(tmp_path / "model"))

    assert loaded.config == model.config
    assert loaded.transform == model.transform
    assert loaded.objective.info_nce is not None
    assert loaded.objective.info_nce.log_scale.item() == 1.5
    assert loaded.tokenizer is not None
    assert model.tokenizer is not None
    assert loaded.tokenizer.encode(CAPTIONS).spans == model.tokenizer.encode(CAPTIONS).spans
    # No path of the machine that made it, and nothing that is pickled.
    assert "_name_or_path" not in (tmp_path / "model" / "config.json").read_text()
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors", ".md"}


def test_a_model_with_a_backbone_of_ones_own_comes_back_once_the_module_is_given(tmp_path: Path) -> None:
    model = own_model(seed=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(LapsValueError, match=r"image_encoder is a module of your own.*image_encoder=module"):
        laps.LAPS.from_pretrained(tmp_path)
    loaded = laps.LAPS.from_pretrained(tmp_path, image_encoder=own_model(seed=1).image_encoder.backbone)

    assert loaded.tokenizer is None
    torch.testing.assert_close(
        loaded.image_encoder(pixels(2)), model.image_encoder(pixels(2)), rtol=0, atol=0
    )


def test_saving_again_replaces_the_model_and_nothing_else_in_the_folder(tmp_path: Path) -> None:
    tiny_laps(seed=0).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = (tmp_path / "README.md").read_text() + "more"
    (tmp_path / "README.md").write_text(card)
    second = own_model(seed=1)
    second.save_pretrained(tmp_path)

    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == card
    assert not (tmp_path / "tokenizer.json").exists()
    assert laps.LAPS.from_pretrained(tmp_path, image_encoder=Grid()).config == second.config


# transformers knows the first by another name.
KEYS = {
    "image_encoder.backbone.encoder.layer.0.attention.attention.key.weight": ((2, 32), (32, 32)),
    "text_encoder.projection.weight": ((2, 32), (16, 32)),
    "head.aggregation.fc1.weight": ((2, 16), (3, 16)),
}


@pytest.mark.parametrize("key", KEYS)
def test_weights_that_do_not_fit_are_named_as_in_the_file_with_both_shapes(
    key: str, saved: Path, tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path)
    path = folder / "model.safetensors"
    given, own = KEYS[key]
    assert tuple(load_file(path)[key].shape) == own
    edit(path, lambda state: state.update({key + "_old": state.pop(key)}))
    with pytest.raises(LapsValueError) as caught:
        laps.LAPS.from_pretrained(folder)
    start = f"weights: {path} does not fit the model (expected its keys, got "
    assert str(caught.value) == f"{start}missing: {key}; unexpected: {key}_old)"

    edit(path, lambda state: state.update({key: state.pop(key + "_old")[:2].clone()}))
    with pytest.raises(LapsValueError) as caught:
        laps.LAPS.from_pretrained(folder)
    assert str(caught.value) == f"{start}of another shape: {key} {given}, not {own})"


def test_all_weights_that_do_not_fit_stand_in_one_message(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    edit(
        folder / "model.safetensors",
        lambda state: state.update({f"{key}_old": state.pop(key) for key in KEYS}),
    )
    with pytest.raises(LapsValueError) as caught:
        laps.LAPS.from_pretrained(folder)
    keys = sorted(KEYS)
    assert f"missing: {', '.join(keys)}; unexpected: {'_old, '.join(keys)}_old)" in str(caught.value)


def test_of_many_weights_that_do_not_fit_those_of_each_part_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    edit(folder / "model.safetensors", lambda state: [state.pop(key) for key in list(state)])  # type: ignore[arg-type, return-value]
    with pytest.raises(LapsValueError, match=r"missing: head\..* and \d+ more, image_encoder\..*") as caught:
        laps.LAPS.from_pretrained(folder)
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("config.json", "embed_dim", "16", "LAPSConfig: embed_dim is no integer (expected int, got str)"),
        ("config.json", "num_patches", 0, "LAPSConfig: num_patches is out of range"),
        ("config.json", "head_options", [1], "LAPSConfig: head_options has the wrong type"),
        ("config.json", "image_projection", 1, "LAPSConfig: image_projection is no flag"),
        ("config.json", "head", "slim", "build_head: name is unknown"),
        ("config.json", "head_options", {"rho": 0.5}, 'build_head: "laps" refuses an option'),
        ("config.json", "loss", {"bound": 2.0}, "Objective: the loss has an unknown option"),
        ("config.json", "image_encoder", {"model_type": ["vit"]}, "encoder config: model_type is unknown"),
        (
            "config.json",
            "text_encoder",
            {"model_type": "bert", "hidden_size": "32"},
            "encoder config: no bert model can be built",
        ),
        (
            "config.json",
            "text_encoder",
            {"model_type": "bert", "hidden_size": -8},
            "encoder config: no bert model can be built",
        ),
        ("transform.json", "mean", "grey", "ImageTransform: mean is no list"),
        ("transform.json", "image_size", 0, "ImageTransform: image_size is out of range"),
        ("transform.json", "rotate", 90, "ImageTransform.from_dict: unknown keys"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_file(
    name: str, key: str, value: object, said: str, saved: Path, tmp_path: Path
) -> None:
    path = copy(saved, tmp_path) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LapsError) as caught:
        laps.LAPS.from_pretrained(path.parent)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "transform.json"])
def test_a_file_that_is_missing_or_broken_is_named(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    contents = (b"{not this", b"[1, 2]", b"\xff\xfe", (saved / name).read_bytes()[:-40])
    for spoil in (*(partial(Path.write_bytes, data=content) for content in contents), Path.unlink):
        spoil(folder / name)
        with pytest.raises(LapsValueError) as caught:
            laps.LAPS.from_pretrained(folder)
        assert str(folder / name) in str(caught.value)


def test_a_folder_of_transformers_is_no_laps_model(tmp_path: Path) -> None:
    vision_model("vit").save_pretrained(tmp_path)
    with pytest.raises(LapsValueError, match=r"config.json is not the config.json of a laps model"):
        laps.LAPS.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("/nowhere/best", "/nowhere/best does not exist"),
        ("./runs/best", "runs/best does not exist"),
        ("runs/one/best", "runs/one/best does not exist"),
        ("nobody/has-this-model", "nobody/has-this-model cannot be had .expected a folder or a hub id"),
        ("no good name", "no good name cannot be had .expected a folder or a hub id"),
    ],
)
def test_a_model_that_is_nowhere_is_named(source: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LapsValueError, match=match) as caught:
        laps.LAPS.from_pretrained(source)
    assert "\n" not in str(caught.value)


# ---- a full disk


def test_what_was_saved_survives_a_file_that_cannot_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, "limit", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"model 27 {tmp_path / 'model' / 'model.safetensors'}",
        f"last 27 {tmp_path / 'last'}",
    ]


def test_what_was_saved_survives_a_full_disk(tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    tmpfs = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    try:
        subprocess.run([*mount, tmpfs], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system lets no user mount a small disk: {error}")
    done = subprocess.run(
        [*mount, f'{tmpfs} && exec "$@"', "sh", sys.executable, "-c", FULL, "disk", str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["model", "28"], ["last", "28"]]


# ---- checkpoints


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(make_batch())[0].backward()
    optimizer.step()


def trainee(seed: int) -> tuple[laps.LAPS, torch.optim.Optimizer]:
    model = tiny_laps(seed=seed).train()
    return model, torch.optim.AdamW(model.parameter_groups(1e-3))


def test_a_checkpoint_brings_back_weights_optimizer_counters_and_random_states(tmp_path: Path) -> None:
    model, optimizer = trainee(seed=0)
    torch.manual_seed(5)
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1 / 3
    save_checkpoint(tmp_path / "last", model, optimizer, {"step": 1, "loss": 0.1 + 0.2})
    step(model, optimizer)
    drawn = torch.rand(3), np.random.rand(3), random.random()

    other, other_optimizer = trainee(seed=1)
    torch.manual_seed(6)
    random.seed(6)
    progress = load_checkpoint(tmp_path / "last", other, other_optimizer)
    assert progress == {"step": 1, "loss": 0.1 + 0.2}
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.1 / 3, 1e-4]
    step(other, other_optimizer)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]
    assert {path.suffix for path in (tmp_path / "last").iterdir()} == {".json", ".safetensors"}


def test_a_checkpoint_of_another_model_or_a_broken_one_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = trainee(seed=0)
    save_checkpoint(tmp_path / "last", model, optimizer, {})
    other = tiny_laps("swin")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(LapsValueError, match=r"missing: image_encoder\.backbone.*unexpected: image_encoder"):
        load_checkpoint(tmp_path / "last", other, torch.optim.AdamW(other.parameters()))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())

    with pytest.raises(LapsValueError, match="nothing holds no checkpoint"):
        load_checkpoint(tmp_path / "nothing", model, optimizer)
    (tmp_path / "last" / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(LapsValueError, match=r"optimizer\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "last", model, optimizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint after one step."""
    model, optimizer = trainee(seed=0)
    step(model, optimizer)
    save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "last", model, optimizer, {"step": 1})
    return tmp_path_factory.getbasetemp() / "checkpoint0" / "last"


def without(key: str) -> Callable[[Any], Any]:
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: json.dumps(state)[:-9], "cannot be read (expected the state of a run, got "),
        (lambda state: [state], "holds no JSON object (expected the state of a run, got list)"),
        (without("progress"), "progress is broken (expected the state of a run: a dict, got nothing)"),
        (lambda state: state | {"progress": [1]}, "progress is broken"),
        (without("optimizer"), "optimizer is broken"),
        (lambda state: state | {"python_random": "xyz"}, "python_random is broken"),
        (lambda state: state | {"python_random": [1, 2]}, "is broken (expected what save_checkpoint writes"),
        (lambda state: state | {"numpy_random": {}}, "is broken (expected what save_checkpoint writes"),
    ],
)
def test_a_broken_state_is_one_line_with_its_file_and_changes_nothing(
    change: Callable[[Any], Any], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = copy(checkpoint, tmp_path) / "state.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused(path, said)


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups[:1],
        lambda groups: [{"params": group["params"]} for group in groups],
        lambda groups: [group | {"params": group["params"][:3]} for group in groups],
        lambda groups: [1, 2],
    ],
)
def test_the_groups_of_another_optimizer_are_refused(
    change: Callable[[Any], Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = copy(checkpoint, tmp_path) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"optimizer": change(state["optimizer"])}))
    refused(path, "is broken (expected what save_checkpoint writes")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("random.safetensors", lambda state: state.pop("torch")),
        ("random.safetensors", lambda state: state.update(torch=torch.zeros(3))),
        ("optimizer.safetensors", lambda state: state.update({"first.exp_avg": torch.zeros(3)})),
        ("optimizer.safetensors", lambda state: state.update({"0.exp_avg": torch.zeros(3)})),
    ],
)
def test_tensors_of_another_run_are_refused_with_their_file(
    name: str, change: Callable[[dict[str, Tensor]], None], checkpoint: Path, tmp_path: Path
) -> None:
    path = copy(checkpoint, tmp_path) / name
    edit(path, change)
    refused(path, "is broken (expected what save_checkpoint writes")


def refused(path: Path, said: str) -> None:
    """Loading the file's folder fails in one line that names the file, and leaves the model as it was."""
    model, optimizer = trainee(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    with pytest.raises(LapsValueError) as caught:
        load_checkpoint(path.parent, model, optimizer)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), drawn)
