"""Training follows the recipe, keeps the best model by dev, and stops without harm where it has to."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import laps
import pytest
import torch
from _models import ENVIRONMENT, SIZE, clip_tokenizer, scenes, text_model, tiny_laps
from laps import LapsValueError
from laps.data import CaptionDataset, CaptionTokenizer, RetrievalData
from laps.data.sampler import EpochSampler
from laps.encoders import ImageEncoder, TextEncoder
from laps.evaluation import evaluate
from laps.objective import Objective
from laps.train import TrainConfig, Trainer, TrainingStoppedError
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "num_workers": 0, "device": "cpu", "progress": False}
Data = tuple[RetrievalData, RetrievalData]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def tokenizer(data: Data) -> CaptionTokenizer:
    return CaptionTokenizer.train(data[0].captions, vocab_size=150)


@pytest.fixture
def model(tokenizer: CaptionTokenizer) -> laps.LAPS:
    return tiny_laps(tokenizer=tokenizer)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the recipe


@pytest.mark.parametrize(("accumulation", "clip_norm"), [(1, 0.5), (4, None)])
def test_an_epoch_is_the_published_recipe_written_out(
    accumulation: int, clip_norm: float | None, data: Data, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    config = TrainConfig(**OPTIONS | {"epochs": 1}, seed=3, accumulation=accumulation, clip_norm=clip_norm)
    trained = tiny_laps(tokenizer=tokenizer)
    Trainer(trained, data[0], None, tmp_path, config).fit()

    model = tiny_laps(tokenizer=tokenizer).train()
    dataset = CaptionDataset(data[0], tokenizer, model.transform, seed=3)
    sampler = EpochSampler(len(dataset), seed=3)
    order, steps = list(sampler), len(dataset) // 8
    backbones = [p for name, p in model.named_parameters() if ".backbone." in name and p.requires_grad]
    head = [p for name, p in model.named_parameters() if ".backbone." not in name]
    optimizer = torch.optim.AdamW(
        [{"params": head, "lr": 2e-4}, {"params": backbones, "lr": 2e-5}], weight_decay=1e-4
    )
    torch.manual_seed(3)
    # Six batches: with four to a step, the second step has two, and takes their mean.
    assert steps == 6
    for first in range(0, steps, accumulation):
        group = range(first, min(first + accumulation, steps))
        for i in group:
            batch = dataset.collate([dataset[t] for t in order[i * 8 : i * 8 + 8]])
            loss, _ = model(batch, warmup=(i + 1) / steps)
            torch.autograd.backward(loss / len(group))
        if clip_norm is not None:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm) > clip_norm
        optimizer.step()
        optimizer.zero_grad()

    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-7, msg=name)


def test_the_learning_rate_falls_at_the_milestones_and_every_step_is_logged_for_tensorboard(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(
        **OPTIONS | {"epochs": 3},
        milestones=(1, 2),
        loggers=("tensorboard",),
        log_every=1,
        learning_rate=1e-3,
    )
    history = Trainer(model, data[0], data[1], tmp_path, config).fit()
    log = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    rates = [(event.step, event.value) for event in log.Scalars("train/lr")]
    assert [step for step, _ in rates] == list(range(1, 19))
    expected = [1e-3] * 6 + [3e-4] * 6 + [9e-5] * 6
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert all(event.value > 0 for event in log.Scalars("train/gradient_norm"))
    assert [e.value for e in log.Scalars("dev/rsum")] == pytest.approx([entry["rsum"] for entry in history])
    assert [e.value for e in log.Scalars("epoch/loss")] == pytest.approx([entry["loss"] for entry in history])


def test_the_loss_falls_on_scenes(tokenizer: CaptionTokenizer, data: Data, tmp_path: Path) -> None:
    model = tiny_laps(tokenizer=tokenizer, head="vse")
    model.objective = Objective("info_nce")
    config = TrainConfig(
        **OPTIONS | {"epochs": 8}, learning_rate=3e-3, backbone_lr_ratio=0.3, warmup_epochs=0, milestones=()
    )
    history = Trainer(model, data[0], None, tmp_path, config).fit()
    losses = [entry["loss"] for entry in history]

    assert losses[-1] < 0.8 * losses[0]


def test_the_sampler_permutes_every_epoch_anew_and_can_start_in_its_midst() -> None:
    sampler, orders = EpochSampler(50, seed=1), []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        other = EpochSampler(50, seed)
        other.start(epoch, 0)
        orders.append(list(other))
        assert sorted(orders[-1]) == list(range(50))
    sampler.start(1, 20)

    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(sampler) == orders[1][20:]
    assert len(sampler) == 30


def test_half_precision_checkpointing_and_frozen_backbones_train_the_rest(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    before = weights(model)
    config = TrainConfig(
        **OPTIONS | {"epochs": 1}, amp=True, freeze_backbones=True, gradient_checkpointing=True
    )
    Trainer(model, data[0], None, tmp_path, config).fit()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}

    assert changed
    assert not any(".backbone." in name for name in changed)
    assert {name.split(".")[0] for name in changed} == {"image_encoder", "text_encoder", "head"}


def test_layers_that_the_user_froze_stay_frozen(model: laps.LAPS, data: Data, tmp_path: Path) -> None:
    model.text_encoder.backbone.embeddings.requires_grad_(False)  # type: ignore[operator]
    before = weights(model)
    Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS | {"epochs": 1})).fit()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}

    assert not any("text_encoder.backbone.embeddings" in name for name in changed)
    assert any("text_encoder.backbone.encoder" in name for name in changed)


def test_training_works_in_a_thread_where_signals_cannot_be_caught(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    trainer = Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS | {"epochs": 1}))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()

    assert (tmp_path / "last" / "state.json").is_file()


# ---- caption augmentation


def test_a_tokenizer_without_mask_token_trains_with_the_defaults_and_unchanged_captions(
    data: Data, tmp_path: Path
) -> None:
    clip = clip_tokenizer(data[0].captions)
    model = tiny_laps("clip", "clip", tokenizer=clip)
    trainer = Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS | {"epochs": 1}))

    assert clip.mask_id is None
    example = trainer.source.dataset[5]
    assert example is not None
    assert example.token_ids == clip.encode([data[0].captions[5]]).input_ids[0].tolist()
    assert len(trainer.fit()) == 1
    with pytest.raises(
        LapsValueError, match=r"the tokenizer has no mask token .expected augment=0, got augment=0.2"
    ):
        Trainer(model, data[0], None, tmp_path / "other", TrainConfig(**OPTIONS, augment=0.2))


def test_a_tokenizer_with_mask_token_augments_a_fifth_of_the_words_by_default(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    published = Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS))
    plain = Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS, augment=0.0))

    assert published.source.dataset.augment == 0.2
    assert plain.source.dataset.augment == 0.0


# ---- the best model


def test_the_best_model_is_the_one_with_the_highest_dev_rsum_and_loads(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    # A learning rate that is far too high: later epochs are worse.
    config = TrainConfig(**OPTIONS | {"epochs": 4}, learning_rate=0.02, backbone_lr_ratio=1.0)
    trainer = Trainer(model, data[0], data[1], tmp_path, config)
    history = trainer.fit()
    best = max(history, key=lambda entry: entry["rsum"])
    loaded = laps.LAPS.from_pretrained(tmp_path / "best")

    assert evaluate(loaded, data[1], progress=False).metrics["rsum"] == best["rsum"]
    assert (trainer.progress.best_epoch, trainer.progress.best_rsum) == (best["epoch"], best["rsum"])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3]


def test_without_a_dev_split_the_last_epoch_is_the_best(model: laps.LAPS, data: Data, tmp_path: Path) -> None:
    history = Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS)).fit()
    loaded = weights(laps.LAPS.from_pretrained(tmp_path / "best"))

    assert all("rsum" not in entry for entry in history)
    assert same(loaded, {name: tensor for name, tensor in weights(model).items() if name in loaded})


# ---- what cannot go on


def test_a_folder_that_holds_a_run_is_refused_and_a_finished_one_resumed_as_it_is(
    model: laps.LAPS, data: Data, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    config = TrainConfig(**OPTIONS | {"epochs": 1})
    history = Trainer(model, data[0], None, tmp_path, config).fit()
    fresh = tiny_laps(tokenizer=tokenizer, seed=1)
    before = weights(fresh)
    with pytest.raises(LapsValueError, match=r"holds a run already .expected another folder, or resume=True"):
        Trainer(fresh, data[0], None, tmp_path, config).fit()
    assert same(weights(fresh), before)

    assert Trainer(fresh, data[0], None, tmp_path, config).fit(resume=True) == history
    assert same(weights(fresh), weights(model))


def test_a_run_is_not_resumed_with_other_options_another_model_or_other_data(
    model: laps.LAPS, data: Data, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    config = TrainConfig(**OPTIONS | {"epochs": 1})
    Trainer(model, data[0], None, tmp_path, config).fit()
    other = tiny_laps(tokenizer=tokenizer, aggregation_ratio=0.3)
    renamed = replace(data[0], captions=["a cat", *data[0].captions[1:]])

    def refused(model: laps.LAPS, train: RetrievalData, config: TrainConfig) -> str:
        with pytest.raises(
            LapsValueError, match=r"was trained with other options .expected the same"
        ) as caught:
            Trainer(model, train, None, tmp_path, config).fit(resume=True)
        return str(caught.value).split("got ")[1].rstrip(")")

    assert refused(model, data[0], replace(config, learning_rate=0.5, gamma=0.5)) == (
        "train.gamma: 0.3 before, 0.5 now; train.learning_rate: 0.0002 before, 0.5 now"
    )
    assert refused(other, data[0], config) == "model.head_options.aggregation_ratio: 0.4 before, 0.3 now"
    assert refused(model, renamed, config).startswith("train_data.content: ")
    broken = shutil.copytree(tmp_path, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(LapsValueError, match=r"config\.json cannot be read .expected the options of the run"):
        Trainer(model, data[0], None, broken, config).fit(resume=True)
    # What changes nothing that is learned may change.
    Trainer(model, data[0], None, tmp_path, replace(config, save_every=7, eval_batch_size=3)).fit(resume=True)


@pytest.mark.parametrize("poison", ["weight", "learning_rate"])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_touches_a_weight(
    poison: str, model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    rate, bad_batch = (2e-4, 0) if poison == "weight" else (1e30, 1)
    if poison == "weight":
        with torch.no_grad():
            model.image_encoder.projection.weight[0, 0] = torch.nan
    config = TrainConfig(**OPTIONS, learning_rate=rate)
    trainer = Trainer(model, data[0], None, tmp_path, config)
    before = weights(model)
    with pytest.raises(TrainingStoppedError, match="no weight was changed by it") as caught:
        trainer.fit()

    assert f"the loss is nan in epoch 0, batch {bad_batch} (expected a finite number)" in str(caught.value)
    assert caught.value.signal_number is None
    if poison == "weight":
        assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in weights(model).items())
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    captions = list(EpochSampler(48, seed=0))[bad_batch * 8 : bad_batch * 8 + 8]
    assert report["captions"] == captions
    images = [str(data[0].image_paths[data[0].caption_to_image[t]]) for t in captions]
    assert report["images"] == images
    assert images[0] in str(caught.value)
    assert (report["epoch"], report["batch"]) == (0, bad_batch)


class Steep(nn.Module):
    """A backbone whose tokens are finite and whose derivative is not: the root of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return tokens + (tokens * 0).sqrt()


def test_a_finite_loss_with_an_infinite_gradient_stops_the_run_too(
    data: Data, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    images = ImageEncoder(Steep(), num_prefix_tokens=0, image_size=SIZE, embed_dim=16)
    texts = TextEncoder(text_model(vocab_size=tokenizer.vocab_size), embed_dim=16)
    head = laps.nn.LAPSHead(16, 16, num_prefix_tokens=0)
    model = laps.LAPS(images, texts, head, tokenizer=tokenizer)
    before = weights(model)
    for clip_norm in (2.0, None):
        config = TrainConfig(**OPTIONS, clip_norm=clip_norm)
        trainer = Trainer(model, data[0], None, tmp_path / str(clip_norm), config)
        with pytest.raises(TrainingStoppedError, match="the gradient's norm is nan in epoch 0, batch 0"):
            trainer.fit()
        assert same(weights(model), before)


def test_an_image_that_cannot_be_read_ends_the_run_or_is_left_out_as_asked(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    shutil.copy(data[0].image_paths[3], broken)
    broken.write_bytes(broken.read_bytes()[:200])
    spoiled = replace(data[0], image_paths=[*data[0].image_paths[:3], broken, *data[0].image_paths[4:]])
    config = TrainConfig(**OPTIONS | {"epochs": 1})
    with pytest.raises(LapsValueError, match=r"broken\.jpg"):
        Trainer(model, spoiled, None, tmp_path / "raise", config).fit()
    trainer = Trainer(model, spoiled, None, tmp_path / "skip", replace(config, on_error="skip"))
    with pytest.warns(UserWarning, match=r"skipped: .*broken\.jpg"):
        assert len(trainer.fit()) == 1


def test_a_run_that_cannot_begin_says_what_it_lacks(model: laps.LAPS, data: Data, tmp_path: Path) -> None:
    with pytest.raises(LapsValueError, match=r"train_data has 48 captions .expected at least batch_size=64"):
        Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS | {"batch_size": 64}))
    for device in ("gpu", "cuda:99"):
        with pytest.raises(LapsValueError, match=f"Trainer: device {device} cannot be used"):
            Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS | {"device": device}))
    model.tokenizer = None
    with pytest.raises(LapsValueError, match="model has no tokenizer"):
        Trainer(model, data[0], None, tmp_path, TrainConfig(**OPTIONS))


def test_a_logger_that_is_not_installed_is_named(model: laps.LAPS, data: Data, tmp_path: Path) -> None:
    for name in ("wandb", "trackio"):
        try:
            __import__(name)
        except ImportError:
            config = TrainConfig(**OPTIONS, loggers=(name,))
            with pytest.raises(
                LapsValueError, match=f'"{name}" is not installed .expected pip install {name}'
            ):
                Trainer(model, data[0], None, tmp_path / name, config).fit()
            return
    pytest.skip("wandb and trackio are installed")


# Trains until it is killed, with a loader's worker; says when the first checkpoint is there.
ENDLESS = """
import sys
from pathlib import Path
from _models import tiny_laps
from laps.data import CaptionTokenizer, load
from laps.train import TrainConfig, Trainer

folder, scenes = Path(sys.argv[1]), Path(sys.argv[2])
model = tiny_laps(tokenizer=CaptionTokenizer.from_file(scenes / "tokenizer.json"))
options = dict(epochs=10**6, batch_size=8, save_every=1, num_workers=1, device="cpu", progress=False)
Trainer(model, load(scenes, "train"), None, folder, TrainConfig(**options)).fit()
"""


def test_two_runs_at_once_in_a_folder_are_refused_and_a_killed_one_is_resumed_at_once(
    model: laps.LAPS, data: Data, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    folder, drawn = tmp_path / "run", data[0].image_paths[0].parent.parent
    tokenizer.save(drawn / "tokenizer.json")
    options = OPTIONS | {"epochs": 10**6, "num_workers": 1, "save_every": 1}
    trainer = Trainer(model, data[0], None, folder, TrainConfig(**options))
    command = [sys.executable, "-c", ENDLESS, str(folder), str(drawn)]
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True) as process:
        while not (folder / "last" / "state.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        owner = f"process {process.pid} on {socket.gethostname()}"
        expected = f"Trainer: {folder} is in use (expected one run at a time in a folder, got {owner})"
        for resume in (False, True):
            with pytest.raises(LapsValueError) as caught:
                trainer.fit(resume=resume)
            assert str(caught.value) == expected
        # Its worker lives on for seconds, and holds nothing.
        process.kill()
        process.wait()

    class OnceError(Exception):
        """Raised by the first step."""

    def forward(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise OnceError

    with model.head.register_forward_pre_hook(forward), pytest.raises(OnceError):
        trainer.fit(resume=True)
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", "1"),
        ("step", 1.5),
        ("batch", True),
        ("loss_sum", None),
        ("history", [{"loss": 1.0}]),
        ("history", {}),
        ("speed", 3),
    ],
)
def test_progress_that_makes_no_sense_is_named_with_its_file(
    key: str, value: object, model: laps.LAPS, data: Data, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = folder / "last" / "state.json"
    state = json.loads(path.read_text())
    trainer = Trainer(model, data[0], None, folder, TrainConfig(**OPTIONS | {"epochs": 1}))
    for progress, got in ((state["progress"] | {key: value}, repr(value)), ({}, "nothing")):
        path.write_text(json.dumps(state | {"progress": progress}))
        with pytest.raises(LapsValueError) as caught:
            trainer.fit(resume=True)
        assert str(caught.value).startswith(f"Trainer: {path}: progress.")
        assert str(caught.value).endswith(f"is broken (expected what a run writes, got {got})")
        assert key in str(caught.value) or not progress


@pytest.mark.parametrize("content", ["{", "[1]", "3", "null"])
def test_broken_options_of_a_run_are_named(
    content: str, model: laps.LAPS, data: Data, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "config.json").write_text(content)
    trainer = Trainer(model, data[0], None, folder, TrainConfig(**OPTIONS | {"epochs": 1}))
    with pytest.raises(LapsValueError) as caught:
        trainer.fit(resume=True)
    assert str(folder / "config.json") in str(caught.value)
    assert "expected the options of the run, got" in str(caught.value)


@pytest.fixture(scope="module")
def finished(data: Data, tokenizer: CaptionTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    config = TrainConfig(**OPTIONS | {"epochs": 1})
    Trainer(tiny_laps(tokenizer=tokenizer), data[0], None, folder, config).fit()
    return folder


# ---- what a run leaves alone, and what it leaves behind


def test_a_folder_with_a_model_is_not_trained_into(model: laps.LAPS, data: Data, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    trainer = Trainer(model, *data, tmp_path / "model", TrainConfig(**OPTIONS))
    for resume in (False, True):
        with pytest.raises(LapsValueError, match="holds something else, a model perhaps"):
            trainer.fit(resume=resume)
    laps.LAPS.from_pretrained(tmp_path / "model")


def test_a_run_is_not_resumed_with_another_tokenizer_or_transform(
    model: laps.LAPS, tokenizer: CaptionTokenizer, data: Data, tmp_path: Path
) -> None:
    config = TrainConfig(**OPTIONS | {"epochs": 1})
    Trainer(model, *data, tmp_path, config).fit()
    other = CaptionTokenizer.train(data[0].captions[::2], vocab_size=150)
    with pytest.raises(LapsValueError, match=r"tokenizer\.content: "):
        Trainer(tiny_laps(tokenizer=other), *data, tmp_path, config).fit(resume=True)
    flipped = tiny_laps(tokenizer=tokenizer)
    flipped.transform = replace(flipped.transform, flip=0.25)
    with pytest.raises(LapsValueError, match=r"transform\.flip: 0\.5 before, 0\.25 now"):
        Trainer(flipped, *data, tmp_path, config).fit(resume=True)


def test_the_checkpoint_at_the_end_of_an_epoch_comes_before_its_evaluation(
    model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    # The evaluation fails: an image of the dev split vanishes after the data was loaded.
    images = tmp_path / "images"
    images.mkdir()
    copies = [shutil.copy(path, images) for path in data[1].image_paths]
    dev = replace(data[1], image_paths=[Path(path) for path in copies])
    trainer = Trainer(model, data[0], dev, tmp_path / "run", TrainConfig(**OPTIONS | {"epochs": 1}))
    (images / data[1].image_paths[-1].name).unlink()
    with pytest.raises(LapsValueError, match=data[1].image_paths[-1].name):
        trainer.fit()
    shutil.copy(data[1].image_paths[-1], images)
    resumed = tiny_laps(tokenizer=model.tokenizer, seed=1)
    Trainer(resumed, data[0], dev, tmp_path / "run", TrainConfig(**OPTIONS | {"epochs": 1})).fit(resume=True)
    assert same(weights(resumed), weights(model))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_an_image_is_said_in_one_line(
    workers: int, model: laps.LAPS, data: Data, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(data[0].image_paths[0].read_bytes()[:300])
    paths = [broken, *data[0].image_paths[1:]]
    options = OPTIONS | {"num_workers": workers}
    for train, dev in (
        (replace(data[0], image_paths=paths), data[1]),
        (data[0], replace(data[1], image_paths=[broken, *data[1].image_paths[1:]])),
    ):
        folder = tmp_path / f"run{train is data[0]}"
        with pytest.raises(LapsValueError, match=r"broken\.jpg") as caught:
            Trainer(model, train, dev, folder, TrainConfig(**options | {"epochs": 1})).fit()
        assert "\n" not in str(caught.value)
