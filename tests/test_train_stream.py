"""Training on shards that are read from front to back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import laps
import pytest
import torch
import webdataset
from _models import bert_tokenizer, scenes, tiny_laps
from laps.cli import main
from laps.data import CaptionStream, RetrievalData, load
from laps.distributed import Ranks
from laps.train import TrainConfig, Trainer, TrainingStoppedError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, and the training images again as three shards of webdataset's."""
    place = tmp_path_factory.mktemp("stream")
    train, _ = scenes(place / "scenes", train=18, dev=6)
    (place / "shards").mkdir()
    with webdataset.ShardWriter(str(place / "shards" / "%05d.tar"), maxcount=6, verbose=0) as writer:
        for image, path in enumerate(train.image_paths):
            captions = "\n".join(train.captions[t] for t in train.captions_of(image))
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": captions})
    bert_tokenizer(train.captions).save(place / "tokenizer.json")
    return place


def trainer(folder: Path, out: Path, *, workers: int = 0, **options: Any) -> Trainer:
    """Two epochs of 24 captions, six batches in all."""
    model = tiny_laps(tokenizer=laps.data.CaptionTokenizer.from_file(folder / "tokenizer.json"))
    assert model.tokenizer is not None
    stream = CaptionStream(
        folder / "shards", model.tokenizer, model.transform, epoch_length=24, seed=3, shuffle_buffer=8
    )
    config = TrainConfig(
        epochs=2, batch_size=8, save_every=1, num_workers=workers, device="cpu", progress=False, **options
    )
    return Trainer(model, stream, load(folder / "scenes", "dev"), out, config)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_goes_on_where_it_was(folder: Path, tmp_path: Path, workers: int) -> None:
    whole = trainer(folder, tmp_path / "whole", workers=workers)
    assert whole.source.steps_per_epoch == (3 if workers == 0 else 2)
    history = whole.fit()
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert laps.LAPS.from_pretrained(tmp_path / "whole" / "best").head.name == "laps"

    stopped = trainer(folder, tmp_path / "stopped", workers=workers)
    seen = 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += stopped.model.training
        if seen == stopped.source.steps_per_epoch + 1:
            stopped._stop_signal = 15

    hook = stopped.model.image_encoder.register_forward_pre_hook(stop)
    with pytest.raises(TrainingStoppedError):
        stopped.fit()
    hook.remove()
    assert (stopped.progress.epoch, stopped.progress.batch) == (1, 1)
    again = trainer(folder, tmp_path / "stopped", workers=workers)
    again.fit(resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(again)[name], tensor), name


def test_another_order_is_another_run(folder: Path, tmp_path: Path) -> None:
    trainer(folder, tmp_path / "run").fit()
    with pytest.raises(laps.LapsValueError, match=r"train_data\.workers: 0 before, 1 now"):
        trainer(folder, tmp_path / "run", workers=1).fit(resume=True)


def test_what_does_not_go_with_a_stream_is_refused(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path / "run")
    stream, tokenizer = run.source.dataset, run.tokenizer
    assert isinstance(stream, CaptionStream)
    config = TrainConfig(batch_size=8, device="cpu", num_workers=0)
    with pytest.raises(laps.LapsValueError, match="dense_captions with a stream"):
        Trainer(run.model, stream, None, tmp_path / "a", config, dense_captions=["a"])
    many = TrainConfig(batch_size=8, device="cpu", num_workers=4)
    with pytest.raises(laps.LapsValueError, match="6 examples an epoch for each loader worker"):
        Trainer(run.model, stream, None, tmp_path / "b", many)
    part = CaptionStream(
        folder / "shards", tokenizer, run.model.transform, epoch_length=24, rank=0, world_size=2
    )
    with pytest.raises(laps.LapsValueError, match="divided among other ranks"):
        Trainer(run.model, part, None, tmp_path / "c", config)
    assert Ranks.here().size == 1


def test_the_command_trains_on_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_laps(tokenizer=laps.data.CaptionTokenizer.from_file(folder / "tokenizer.json"))
    model.save_pretrained(tmp_path / "model")
    shards = str(folder / "shards" / "{00000..00002}.tar")
    common = ["train", shards, "--model", str(tmp_path / "model"), "--epochs", "1", "--batch-size", "8"]
    common += ["--device", "cpu", "--num-workers", "1", "--epoch-length", "16"]
    common += ["--out", str(tmp_path / "run")]
    assert main(common) == 2
    assert "--epoch-length without --dev-data" in capsys.readouterr().err
    assert main([*common, "--dev-data", str(folder / "scenes")]) == 0
    assert "best epoch 1 of 1" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train_data"]["epoch_length"] == 16
    found = laps.evaluate(
        laps.LAPS.from_pretrained(tmp_path / "run" / "best"), load(folder / "scenes", "test"), progress=False
    )
    assert 0 <= found.metrics["rsum"] <= 600


def test_shards_are_data_like_any_other(folder: Path) -> None:
    data = load(folder / "shards", "all")
    assert isinstance(data, RetrievalData)
    assert data.num_captions == 36


def test_the_command_streams_the_shards_of_the_train_split_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_laps(tokenizer=laps.data.CaptionTokenizer.from_file(folder / "tokenizer.json"))
    model.save_pretrained(tmp_path / "model")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        (shards / f"{name}.tar").write_bytes((folder / "shards" / f"{number:05d}.tar").read_bytes())
    recipe = ["--epoch-length=8", "--epochs=1", "--batch-size=8", "--num-workers=0", "--device=cpu"]
    arguments = ["train", str(shards), "--model", str(tmp_path / "model"), "--dev-data", str(shards), *recipe]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train_data"]["count"] == 2
    capsys.readouterr()
    again = [*arguments, "--train-split", "val", "--out", str(tmp_path / "other")]
    assert main(again) == 2
    assert "--dev-split dev is streamed too" in capsys.readouterr().err
