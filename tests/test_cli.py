"""The commands do their work as a user runs them, and say in one line what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import laps
import pytest
from _models import ENVIRONMENT, SIZE, TESTS, bert_tokenizer, clip_tokenizer, text_model, vision_model
from laps.cli import main
from laps.config import PRESETS
from laps.data import load, make_scenes
from laps.train_config import TrainConfig

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


def test_eval_skips_faults_of_the_listing_and_never_an_image(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(scenes, "test")
    rows = [
        {"image": str(data.image_paths[i]), "caption": text}
        for i, text in zip(data.caption_to_image.tolist(), data.captions, strict=True)
    ]
    rows.insert(3, {"image": str(data.image_paths[1]), "caption": "half \ud800"})
    pairs = tmp_path / "test.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["eval", trained / "best", pairs, *FAST, "--quiet", "--json", tmp_path / "r.json"]
    capsys.readouterr()

    status, output, error = called(capsys, *arguments)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"laps: load: {pairs}:4: the caption is no text")
    assert not (tmp_path / "r.json").exists()
    status, _, error = called(capsys, *arguments, "--on-error", "skip")
    assert (status, error.count("\n")) == (0, 1)
    assert error.startswith(f"laps: load: test.jsonl/test: left out 1: {pairs}:4: the caption is no text")
    result = json.loads((tmp_path / "r.json").read_text())
    assert [result["settings"][name] for name in ("images", "captions")] == [8, 16]
    model = laps.LAPS.from_pretrained(trained / "best")
    assert result["metrics"] == laps.evaluate(model, data, progress=False).metrics

    (tmp_path / "a.jpg").write_bytes(data.image_paths[0].read_bytes()[:300])
    for name, match in (("a.jpg", "a.jpg cannot be read"), ("none.jpg", "none.jpg, which is missing")):
        pairs.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"image": name, "caption": "a disc"}]))
        status, output, error = called(capsys, *arguments, "--on-error", "skip", "--images", tmp_path)
        assert (status, output) == (2, "")
        assert match in error


def test_of_all_ranks_the_first_says_what_is_wrong_with_the_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "laps eval: the following arguments are required: model, data (see laps eval --help)\n"
    monkeypatch.delenv("RANK", raising=False)
    assert called(capsys, "eval") == (2, "", said)
    monkeypatch.setenv("RANK", "0")
    assert called(capsys, "eval") == (2, "", said)
    monkeypatch.setenv("RANK", "1")
    assert called(capsys, "eval") == (2, "", "")


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
    assert "; --resume goes on from there" in error
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


def test_data_check_counts_tokens_with_a_tokenizer(
    scenes: Path, checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = Path(checkpoints[3])
    pairs = tmp_path / "test.csv"
    pairs.write_text("image,caption\na.jpg,a red disc\na.jpg,\ufffd\n")
    shutil.copy(next((scenes / "images").iterdir()), tmp_path / "a.jpg")
    for name in (bert, bert / "tokenizer.json"):
        status, output, error = called(capsys, "data", "check", pairs, "--tokenizer", name)
        assert (status, error) == (1, "")
        assert f"  empty captions: 1\n    {pairs}:3\n" in output
        assert "above" not in output
    status, output, _ = called(capsys, "data", "check", pairs, "--tokenizer", bert, "--max-length", 4)
    assert status == 1
    assert f"captions above 4 tokens, which get truncated: 1\n    {pairs}:2: 5 tokens" in output
    for arguments, match in (
        (["--max-length", 4], "laps: laps data check: --max-length counts tokens (expected a --tokenizer"),
        (["--tokenizer", tmp_path / "none"], "laps: CaptionTokenizer.from_pretrained: "),
        (["--tokenizer", pairs], "laps: CaptionTokenizer.from_file: "),
        (["--tokenizer", bert, "--max-length", 1], "laps: check: max_length is out of range"),
    ):
        status, output, error = called(capsys, "data", "check", pairs, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert error.startswith(match)


def test_data_check_leaves_no_bar_in_a_log_and_says_that_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scenes(tmp_path, num_train=2, num_dev=2, num_test=2, image_size=32, workers=1, progress=False)
    done = command("data", "check", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "dataset.json").write_text('{"images": []}')
    status, output, error = called(capsys, "data", "check", tmp_path)
    assert (status, error) == (1, "")
    assert "\nno images and no captions\n" in output


@pytest.fixture
def spoiled(scenes: Path, tmp_path: Path) -> Path:
    """One training image missing, one damaged, one dev image too; a blank caption in either split."""
    folder = tmp_path / "spoiled"
    shutil.copytree(scenes, folder)
    (folder / "images" / "train_000001.jpg").unlink()
    for name in ("train_000002.jpg", "val_000001.jpg"):
        file = folder / "images" / name
        file.write_bytes(file.read_bytes()[:300])
    content = json.loads((folder / "dataset.json").read_text())
    for name in ("train_000003.jpg", "val_000002.jpg"):
        entry = next(entry for entry in content["images"] if entry["filename"] == name)
        entry["sentences"][0]["raw"] = "\u200b"
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_train_skips_all_that_cannot_be_used_and_says_how_much_it_was(
    spoiled: Path, checkpoints: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["train", spoiled, "--out", out, *checkpoints, *FAST, "--epochs", 2]
    done = command(*arguments, "--on-error", "skip")

    assert done.returncode == 0, done.stderr
    assert "best epoch" in done.stdout
    config = json.loads((out / "config.json").read_text())
    assert [config["train_data"][name] for name in ("images", "captions")] == [15, 29]
    assert [config["dev_data"][name] for name in ("images", "captions")] == [3, 5]
    for said in (
        "dataset.json/train: skipped 1 of 16 images, with their captions, and 1 captions without a token; "
        "15 images and 29 of 32 captions are left: ",
        "dataset.json/val: skipped 1 of 4 images, with their captions, and 1 captions without a token; "
        "3 images and 5 of 8 captions are left: ",
        "skipped: open_image: ",
        "laps: skipped 1 of 15 training images",
    ):
        assert done.stderr.count(said) == 1, said


def test_train_refuses_what_cannot_be_used_before_the_first_epoch(
    spoiled: Path, scenes: Path, checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", spoiled, "--out", out, *checkpoints, *FAST, "--epochs", 1]

    def refused(*parts: str) -> None:
        status, output, error = called(capsys, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert all(part in error for part in parts), error
        assert not (out / "last").exists()

    content = json.loads((spoiled / "dataset.json").read_text())
    place = next(i for i, entry in enumerate(content["images"]) if entry["filename"] == "train_000003.jpg")
    refused(f"laps: load: {spoiled / 'dataset.json'}: images[{place}] has an empty caption")
    # BERT's rules drop the replacement character, which load takes.
    text = (spoiled / "dataset.json").read_text()
    (spoiled / "dataset.json").write_text(text.replace("\\u200b", "\\ufffd"))
    refused("laps: load: ", "train_000001.jpg, which is missing")
    shutil.copy(scenes / "images" / "train_000001.jpg", spoiled / "images")
    refused("laps: Trainer: dataset.json/train: caption ", "has no token; its image is ", "train_000003.jpg")
    shutil.copy(scenes / "dataset.json", spoiled)
    refused("laps: Trainer: dataset.json/val: ", "val_000001.jpg cannot be read")


def test_train_refuses_splits_that_share_images(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    names = sorted(path.name for path in (scenes / "images").iterdir())[:3]
    (texts / "id_mapping.json").write_text(json.dumps({str(i): name for i, name in enumerate(names)}))
    for split, ids in (("train", "0\n1"), ("dev", "1\n2")):
        (texts / f"{split}_ids.txt").write_text(ids)
        (texts / f"{split}_caps.txt").write_text("a\nb\n")
    for arguments, what in (
        ([scenes, "--train-split", "test", "--dev-split", "test"], "--dev-split test share images"),
        ([scenes, "--train-split", "val"], "--train-split val and --dev-split dev share images"),
        ([texts, "--images", scenes / "images"], f"got 1 in both, {scenes / 'images' / names[1]}"),
    ):
        status, output, error = called(capsys, "train", *arguments, "--out", tmp_path / "run")
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert error.startswith("laps: laps train: --train-split ")
        assert what in error
        assert "or --dev-split none" in error
        assert not (tmp_path / "run").exists()


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
        (
            ["train", "SCENES", "--out", "o", "--head", "scam"],
            "laps train: argument --head: invalid choice: 'scam' (choose from ",
        ),
        (["train", "SCENES", "--out", "o", "--train-split", "trian"], "laps: load"),
        (
            ["train", "SCENES", "--out", "o", "--head-option", "rho"],
            "laps: laps train: --head-option is no pair",
        ),
        (
            ["train", "SCENES", "--out", "o", "--model", "m", "--head", "vse"],
            "laps: laps train: --head with --model",
        ),
        (
            ["train", "d", "--out", "o", "--schedule", "cosine"],
            "laps train: argument --schedule: invalid choice",
        ),
        (["train", "d", "--out", "o", "--loggers", "x"], "laps train: argument --loggers: invalid choice"),
        (["train", "d", "--out", "o", "--augment", "no"], "laps train: argument --augment: invalid prob"),
        (
            ["train", "SCENES", "--out", "o", "--loss", "info_nce", "--margin", "0.2"],
            'laps: Objective: "info_nce" has no margin (expected another loss, or no margin, got 0.2)',
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


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_eval_finds_out_first_whether_its_result_can_be_written(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    # There is no model and no data: what is said first was looked at first.
    for path in (tmp_path / "file" / "result", Path("/proc/no/result"), tmp_path):
        status, output, error = called(capsys, "eval", tmp_path / "absent", tmp_path / "none", option, path)
        assert (status, output) == (2, "")
        assert str(path.parent) in error
        assert "absent" not in error
        assert error.count("\n") == 1


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the help of a command says of each option, on one line."""
    status, output, _ = called(capsys, name, "--help")
    assert status == 0
    texts = [" ".join(text.split()) for text in re.split(r"\n  (?=-)", output.split("\noptions:")[1])]
    # A word is broken at its hyphen.
    joined = [text.replace("- large", "-large") for text in texts if text]
    return {text.split()[0].rstrip(","): text for text in joined}


def test_help_of_train_tells_what_each_option_does_its_choices_and_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = help_of("train", capsys)
    for field in dataclasses.fields(TrainConfig):
        text = texts["--" + field.name.replace("_", "-")]
        assert "(default: " in text
        assert len(text.split("(default: ")[0].split()) >= 3

    preset = "from the preset: {} for clip-vit-base-224 and clip-vit-large-224; else {})"
    assert preset.format("64", "128") in texts["--batch-size"]
    assert (
        preset.format("0.0001", "0.0002").replace(";", ", 0.0005 for region-36;") in texts["--learning-rate"]
    )
    assert "(default: 0.1)" in texts["--backbone-lr-ratio"]
    for option, choices in {
        "--head": f"{{{','.join(laps.heads.head_names())}}}",
        "--loss": "{hinge,triplet,info_nce}",
        "--schedule": "{milestones,one_cycle}",
        "--on-error": "{raise,skip}",
        "--loggers": "{tensorboard,wandb,trackio}",
        "--preset": f"{{{','.join(sorted(PRESETS))}}}",
    }.items():
        assert choices in texts[option]
    assert '"none" for 0' in texts["--augment"]


def test_help_of_eval_tells_what_each_option_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = help_of("eval", capsys)
    for option in ("--split", "--folds", "--batch-size", "--num-workers", "--device", "--amp", "--json"):
        # The option, its value's name, and some words.
        assert len(texts[option].split()) >= 5, texts[option]


def test_augment_none_leaves_the_captions_alone(
    scenes: Path, checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", scenes, "--out", tmp_path / "run", *checkpoints, *FAST, "--epochs", 1]
    status, _, _ = called(
        capsys, *arguments, "--dev-split", "none", "--augment", "none", "--clip-norm", "none"
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())["train"]

    assert status == 0
    assert (config["augment"], config["clip_norm"]) == (0.0, None)


def test_ctrl_c_while_the_command_imports_is_one_line_and_status_130() -> None:
    # What the console script is made of.
    assert '\nlaps = "laps_command:main"\n' in (TESTS.parent / "pyproject.toml").read_text()
    # A shell that starts the tests in the background has them ignore the signal.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from laps_command import main; sys.exit(main())"
    for moment in ("numpy", "torch._tensor", "laps.nn"):
        # The interpreter tells of each import as it is done.
        with subprocess.Popen(
            [sys.executable, "-X", "importtime", "-c", code, "info"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            assert any(line.split("|")[-1].strip() == moment for line in process.stderr)
            process.send_signal(signal.SIGINT)
            rest = [line for line in process.stderr if not line.startswith("import time:")]
            process.wait()
        assert process.returncode == 128 + signal.SIGINT
        assert rest == ["laps: interrupted\n"]


def test_the_console_script_does_what_the_module_does_and_ctrl_c_works_in_it() -> None:
    code = "import signal, sys, laps_command; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "status = laps_command.main()\n"
    code += "sys.exit(status or signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", code, "heads", "list"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == laps.heads.head_names()


def test_the_parser_loads_no_library_of_images_models_or_the_hub() -> None:
    code = "import sys; from laps.cli import _parser; _parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    ours = {"laps.data", "laps.encoders", "laps.index", "laps.model", "laps.train"}
    others = {"PIL", "huggingface_hub", "safetensors", "tokenizers", "torchvision", "transformers"}
    assert set(done.stdout.split()) & (ours | others) == set()


def test_an_error_leaves_no_traceback(tmp_path: Path) -> None:
    done = command("eval", tmp_path / "absent", tmp_path)

    assert done.returncode == 2
    assert done.stderr == (
        f"laps: LAPS.from_pretrained: {tmp_path / 'absent'} does not exist (expected a folder or a hub id)\n"
    )
