"""The commands do their work as a user runs them, and say in one line what is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import laps
import pytest
from _models import ENVIRONMENT, SIZE, bert_tokenizer, clip_tokenizer, text_model, vision_model
from laps.cli import main
from laps.data import load, make_scenes

pytestmark = pytest.mark.usefixtures("one_thread")

LAPS = [sys.executable, "-m", "laps.cli"]
FAST = ["--device", "cpu", "--num-workers", "0", "--batch-size", "8"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What a command prints and how it ends."""
    return subprocess.run(
        [*LAPS, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The same within this process, which spares the seconds of the imports."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(
        folder,
        num_train=16,
        num_dev=4,
        num_test=8,
        image_size=40,
        captions_per_image=2,
        workers=1,
        progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def checkpoints(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that put tiny encoders in the place of the preset's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = bert_tokenizer(load(scenes, "train").captions)
    vision_model("vit").save_pretrained(folder / "vit")
    text_model(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "bert")
    tokenizer.save(folder / "bert" / "tokenizer.json")
    return ["--image-checkpoint", str(folder / "vit"), "--text-checkpoint", str(folder / "bert")]


@pytest.fixture(scope="module")
def trained(scenes: Path, checkpoints: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, made by the command."""
    out = tmp_path_factory.mktemp("runs") / "one"
    done = command(
        "train",
        scenes,
        "--out",
        out,
        *checkpoints,
        *FAST,
        "--epochs",
        1,
        "--head-option",
        "selection_ratio=0.6",
    )
    assert done.returncode == 0, done.stderr
    rsum = json.loads((out / "log.jsonl").read_text())["rsum"]
    assert done.stdout == f"best epoch 1 of 1, dev rSum {rsum:.1f}: {out / 'best'}\n"
    return out


def test_train_then_eval_gives_recalls_as_a_table_json_and_csv(
    trained: Path, scenes: Path, tmp_path: Path
) -> None:
    files = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv"]
    done = command("eval", trained / "best", scenes, *FAST, "--rerank", 4, *files)
    assert done.returncode == 0, done.stderr
    model = laps.LAPS.from_pretrained(trained / "best")
    expected = laps.evaluate(model, load(scenes, "test"), progress=False).metrics

    result = json.loads((tmp_path / "r.json").read_text())
    assert result["metrics"] == expected
    assert result["settings"]["images"] == 8
    assert result["settings"]["rerank"] == 4
    assert f"{result['metrics']['rsum']:.1f}" in done.stdout
    with (tmp_path / "r.csv").open() as file:
        assert len(list(csv.reader(file))) >= 2


def test_train_takes_the_presets_recipe_and_the_options_over_it(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())

    assert config["train"]["learning_rate"] == 2e-4
    assert config["train"]["batch_size"] == 8
    assert config["train"]["epochs"] == 1
    assert config["model"]["head_options"]["selection_ratio"] == 0.6
    assert config["model"]["head_options"]["aggregation_ratio"] == 0.4
    assert config["model"]["image_size"] == SIZE


def test_train_stops_at_a_signal_with_a_checkpoint_and_resumes_where_it_was(
    scenes: Path, checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", scenes, "--out", out, *checkpoints, *FAST, "--dev-split", "none", "--epochs", 10]
    process = subprocess.Popen(
        [*LAPS, *map(str, arguments)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not (out / "last" / "state.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()

    assert process.returncode == 128 + signal.SIGTERM
    assert error.startswith("laps: Trainer: SIGTERM after step ")
    assert error.count("\n") == 1
    step = json.loads((out / "last" / "state.json").read_text())["progress"]["step"]
    assert f"after step {step};" in error

    status, _, error = called(capsys, *arguments[:-1], 11, "--resume")
    assert status == 2
    assert "train.epochs: 10 before, 11 now" in error
    status, _, error = called(capsys, *arguments)
    assert status == 2
    assert "holds a run already" in error
    status, output, _ = called(capsys, *arguments, "--resume")
    assert (status, output) == (0, f"best epoch 10 of 10: {out / 'best'}\n")


def test_a_clip_preset_trains_with_its_defaults(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = clip_tokenizer(load(scenes, "train").captions)
    vision_model("clip").save_pretrained(tmp_path / "images")
    text_model("clip", vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "texts")
    tokenizer.save(tmp_path / "texts" / "tokenizer.json")
    arguments = [
        "train",
        scenes,
        "--preset",
        "clip-vit-base-224",
        *FAST,
        "--epochs",
        1,
        "--dev-split",
        "none",
    ]
    arguments += ["--image-checkpoint", tmp_path / "images", "--text-checkpoint", tmp_path / "texts"]
    capsys.readouterr()
    status, output, error = called(capsys, *arguments, "--no-progress", "--out", tmp_path / "run")

    assert (status, error) == (0, "")
    assert output == f"best epoch 1 of 1: {tmp_path / 'run' / 'best'}\n"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["learning_rate"] == 1e-4
    status, _, error = called(capsys, *arguments, "--augment", 0.2, "--out", tmp_path / "other")
    assert status == 2
    assert "the tokenizer has no mask token (expected augment=0, got augment=0.2)" in error


def test_data_commands_make_scenes_and_find_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--train", 4, "--dev", 4, "--test", 4, "--size", 32]
    status, output, _ = called(capsys, "data", "make-scenes", tmp_path / "scenes", *sizes, "--seed", 3)
    assert (status, output) == (0, f"{tmp_path / 'scenes' / 'dataset.json'}\n")

    status, output, _ = called(capsys, "data", "check", tmp_path / "scenes", "--json")
    assert status == 0
    assert json.loads(output)
    (tmp_path / "scenes" / "images" / "test_000001.jpg").unlink()
    status, output, _ = called(capsys, "data", "check", tmp_path / "scenes")
    assert status == 1
    assert "test_000001.jpg" in output


def test_heads_list_and_info_tell_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = called(capsys, "heads", "list")
    assert status == 0
    assert {"laps", "vse"} <= set(output.split())
    status, output, _ = called(capsys, "info")
    assert status == 0
    assert laps.__version__ in output
    status, output, _ = called(capsys, "--version")
    assert (status, output) == (0, f"laps {laps.__version__}\n")


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        gone = subprocess.run(
            [*LAPS, "info"], env=ENVIRONMENT, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert gone.returncode == 128 + signal.SIGPIPE
    assert gone.stderr == ""


def test_laps_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = called(capsys)

    assert status == 2
    for name in ("demo", "train", "eval", "data", "heads", "info"):
        assert f"\n    {name} " in output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["trian"], "laps: argument COMMAND: invalid choice: 'trian'"),
        (["train"], "laps train: the following arguments are required: data, --out"),
        (
            ["train", "d", "--out", "o", "--preset", "vit-huge"],
            "laps train: argument --preset: invalid choice",
        ),
        (
            ["train", "d", "--out", "o", "--epochs", "many"],
            "laps train: argument --epochs: invalid int value",
        ),
        (["train", "d", "--out", "o", "--epochs", "0"], "laps: TrainConfig: epochs"),
        (["train", "nowhere", "--out", "o"], "laps: load: nowhere is missing"),
        (["train", "SCENES", "--out", "o", "--head", "scam"], "laps: laps train: --head is unknown"),
        (["train", "SCENES", "--out", "o", "--train-split", "trian"], "laps: load"),
        (
            ["train", "SCENES", "--out", "o", "--head-option", "rho"],
            "laps: laps train: --head-option is no pair",
        ),
        (
            ["train", "SCENES", "--out", "o", "--model", "m", "--head", "vse"],
            "laps: laps train: --head with --model",
        ),
        (["eval", "nowhere/at/all", "SCENES"], "laps: LAPS.from_pretrained: nowhere/at/all does not exist"),
        (["eval", "model", "SCENES", "--device", "gpu"], "laps: laps eval: device gpu cannot be used"),
        (["data"], "laps data: the following arguments are required: COMMAND"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    arguments: list[str], match: str, scenes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    filled = [{"SCENES": str(scenes), "o": str(tmp_path / "o")}.get(a, a) for a in arguments]
    status, output, error = called(capsys, *filled)

    assert (status, output) == (2, "")
    assert error.startswith(match)
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_an_error_leaves_no_traceback(tmp_path: Path) -> None:
    done = command("eval", tmp_path / "absent", tmp_path)

    assert done.returncode == 2
    assert done.stderr == (
        f"laps: LAPS.from_pretrained: {tmp_path / 'absent'} does not exist (expected a folder or a hub id)\n"
    )
