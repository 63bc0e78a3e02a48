"""Shards that webdataset has written: as finite data, and as a stream that workers and ranks divide."""

from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import laps
import laps.cli
import numpy as np
import pytest
import torch
from _models import ENVIRONMENT, tiny_laps
from _refused import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from laps import LapsTypeError, LapsValueError
from laps.data import (
    Batch,
    CaptionStream,
    CaptionTokenizer,
    ImageDataset,
    ImageTransform,
    RegionTransform,
    RetrievalData,
    check,
    load,
    open_image,
)
from laps.data.shards import expand_braces
from PIL import Image
from torch.utils.data import DataLoader

webdataset = pytest.importorskip("webdataset")

TOKENIZER = CaptionTokenizer.train([f"picture number {i} again" for i in range(10)], vocab_size=80)
TRANSFORM = ImageTransform(image_size=8)


def encoded(i: int, kind: str = "PNG") -> bytes:
    """A picture whose first channel says its number."""
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (i, 50, 100)).save(
        stream, kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return stream.getvalue()


def write(
    folder: Path, numbers: range = range(12), per_shard: int = 4, pattern: str = "%05d.tar", **more: Any
) -> Path:
    """Shards as webdataset writes them: two captions an image, where its number is odd."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=per_shard, verbose=0) as sink:
        for i in numbers:
            text = f"picture {i}" + (f"\nnumber {i}\n" if i % 2 else "")
            sink.write({"__key__": f"{i:06d}", "png": encoded(i), "txt": text, **more})
    return folder


def tar(file: Path, members: list[tuple[str, bytes]], *, whole: bool = True) -> Path:
    """A tar file of these members, by Python's own writer, which takes any name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file


def captions(numbers: range) -> list[str]:
    return [t for i in numbers for t in [f"picture {i}", *([f"number {i}"] if i % 2 else [])]]


def numbers_of(data: RetrievalData) -> list[int]:
    return [open_image(path).getpixel((0, 0))[0] for path in data.image_paths]


# ---- as finite data


def test_shards_are_read_from_a_folder_a_file_or_a_name_with_braces(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    for path in (folder, folder / "{00000..00002}.tar", folder / "{00000,00001,00002}.tar"):
        data = load(path, "all")
        assert (data.captions, numbers_of(data)) == (captions(range(12)), list(range(12)))
    assert data.image_paths[5] == folder / "00001.tar" / "000005.png"
    assert data.caption_to_image.tolist()[:3] == [0, 1, 1]
    assert load(folder / "00001.tar", "all").captions == captions(range(4, 8))
    refused(lambda: load(folder / "{00000..00009}.tar", "all"), "00003.tar is missing", "7 of 10")
    refused(lambda: load(folder / "{0..x}.tar", "all"), "{0..x}")
    refused(lambda: load(folder, "train"), "no split 'train'", "one of all")


def test_folders_or_names_tell_the_splits_and_numbers_the_order(tmp_path: Path) -> None:
    """As CLIP_benchmark's sets on the hub: test/0.tar, test/nshards.txt, ..."""
    write(tmp_path / "set" / "test", range(24), 2, "%d.tar")
    (tmp_path / "set" / "test" / "nshards.txt").write_text("12\n")
    (tmp_path / "set" / "dataset_type.txt").write_text("retrieval")
    write(tmp_path / "set" / "train", range(3))
    data = load(tmp_path / "set", "test")
    assert (numbers_of(data), data.name) == (list(range(24)), "test/test")
    assert numbers_of(load(tmp_path / "set", "train")) == [0, 1, 2]
    write(tmp_path / "flat", range(2), pattern="coco-val-%04d.tar")
    write(tmp_path / "flat", range(2, 4), pattern="coco-train-%04d.tar")
    assert numbers_of(load(tmp_path / "flat", "dev")) == [0, 1]


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
def test_images_of_any_ending_and_captions_in_text_or_json_are_found(tmp_path: Path, kind: str) -> None:
    meta = {"caption": "from json", "status": "success", "key": "0", "url": "http://x"}
    (tmp_path / "set").mkdir()
    with webdataset.TarWriter(str(tmp_path / "set" / "00000.tar")) as sink:
        content = encoded(9, {"jpg": "JPEG"}.get(kind, kind.upper()))
        sink.write({"__key__": "a", kind: content, "json": meta})
        sink.write({"__key__": "b", kind: content, "txt": "from text", "json": meta})
        sink.write(
            {"__key__": "sub/c", kind: content, "json": {"caption": ["one", "two"]}, "seg.png": encoded(1)}
        )
        sink.write({"__key__": "d", kind: content, "json": {"caption": None}})
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    # What img2dataset leaves beside each shard.
    pyarrow.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "set" / "00000.parquet")
    (tmp_path / "set" / "00000_stats.json").write_text("{}")
    data = load(tmp_path / "set", "all")
    assert data.captions == ["from json", "from text", "one", "two"]
    assert (data.caption_to_image.tolist(), data.num_images) == ([0, 1, 2, 2], 4)
    assert data.image_paths[2] == tmp_path / "set" / "00000.tar" / "sub" / f"c.{kind}"
    assert all(open_image(path).size == (9, 7) for path in data.image_paths)


def test_names_of_gnu_tar_begin_with_a_dot_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    members = [("./0.png", encoded(7)), ("./._0.png", b"macOS"), ("./0.txt", b"seven"), ("./.DS_Store", b"")]
    data = load(tar(tmp_path / "set" / "0.tar", members), "all")
    assert (numbers_of(data), data.captions) == ([7], ["seven"])


def test_workers_forked_and_spawned_read_what_this_process_reads(tmp_path: Path) -> None:
    images = ImageDataset(load(write(tmp_path / "set"), "all"), TRANSFORM)
    alone = torch.stack([images[i][1] for i in range(len(images))])  # type: ignore[index]
    for method, workers in (("fork", 2), ("spawn", 1)):
        context = multiprocessing.get_context(method)
        options: dict[str, Any] = {"collate_fn": images.collate, "multiprocessing_context": context}
        loader = DataLoader(images, batch_size=5, num_workers=workers, **options)
        assert torch.equal(torch.cat([batch for _, batch in loader]), alone)


def test_headers_are_read_once_and_again_when_the_file_has_changed(tmp_path: Path) -> None:
    file = tar(tmp_path / "set" / "0.tar", [("a.png", encoded(1)), ("a.txt", b"one")])
    path = load(file, "all").image_paths[0]
    tar(file, [("b.txt", b"first"), ("b.png", encoded(3)), ("a.txt", b"two"), ("a.png", encoded(2))])
    assert open_image(path).getpixel((0, 0))[0] == 2
    refused(lambda: open_image(file / "c.png"), f"{file / 'c.png'} is missing")
    file.unlink()
    refused(lambda: open_image(path), f"{file} cannot be read")


def test_training_and_evaluation_take_shards(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train", range(6))
    write(tmp_path / "set" / "val", range(6, 9))
    train, dev = load(tmp_path / "set", "train"), load(tmp_path / "set", "val")
    config = laps.train.TrainConfig(epochs=1, batch_size=4, device="cpu", progress=False, num_workers=1)
    trainer = laps.train.Trainer(tiny_laps(tokenizer=TOKENIZER), train, dev, tmp_path / "run", config)
    assert np.isfinite(trainer.fit()[0]["loss"])
    assert laps.evaluate(trainer.model.eval(), dev, progress=False).metrics["i2t_r10"] == 100


def test_a_check_names_members_and_finds_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set" / "train", range(3))
    members = [("0.png", encoded(2)), ("0.txt", b" "), ("1.png", b"no image"), ("1.txt", b"one\none")]
    file = tar(tmp_path / "set" / "test" / "0.tar", members)
    report = check(tmp_path / "set", progress=False)
    test = report.splits["test"]
    assert test.empty_captions == [str(file / "0.txt")]
    assert test.duplicate_captions == [str(file / "1.txt")]
    assert list(test.unreadable) == [str(file / "1.png")]
    assert laps.cli.main(["data", "check", str(tmp_path / "set")]) == 1
    assert f"unreadable images: 1\n    {file / '1.png'}: " in capsys.readouterr().out
    assert report.leaks[0].images == [(str(file / "0.png"), str(tmp_path / "set/train/00000.tar/000002.png"))]


# ---- what is refused


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        ([("../../etc/0.png", b"x")], ("'../../etc/0.png'", "inside")),
        ([("/etc/0.png", b"x")], ("'/etc/0.png'", "inside")),
        ([("a/../../0.txt", b"x")], ("'a/../../0.txt'",)),
        ([("0.png", b"x"), ("0.png", b"y")], ("0.png twice",)),
        ([("0.png", b"x"), ("0.jpg", b"y"), ("0.txt", b"z")], ("two images for 0", "0.jpg")),
        ([("0.txt", b"x")], ("0.tar/0.txt has no image",)),
        ([("0.png", b"x"), ("0.txt", b"\xff\xfe")], ("0.tar/0.txt is not UTF-8",)),
        ([("0.png", b"x"), ("0.json", b"{")], ("0.tar/0.json:1 is malformed",)),
        ([("0.png", b"x"), ("0.json", b"[1]")], ("0.tar/0.json is no object", "list")),
        ([("0.png", b"x"), ("0.json", b'{"caption": 3}')], ("0.tar/0.json", "'caption'", "3")),
        ([("0.png", b"x"), ("0.json", b'{"caption": ["a", null]}')], ("0.tar/0.json", "'caption'", "None")),
        ([("0.png", b"x"), ("0.txt", b"\n \n")], ("0.tar/0.txt has an empty caption",)),
        ([("readme.md", b"x")], ("lists no image",)),
    ],
)
def test_hostile_members_are_refused_with_their_place(
    tmp_path: Path, members: list[tuple[str, bytes]], parts: tuple[str, ...]
) -> None:
    file = tar(tmp_path / "set" / "0.tar", members)
    assert str(file) in refused(lambda: load(file, "all"), *parts)


def test_a_sparse_member_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "0.png").open("wb") as stream:
        stream.truncate(2**33)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "0.tar"
    subprocess.run(["tar", "--sparse", "-cf", file, "-C", tmp_path, "0.png"], check=True)
    assert file.stat().st_size < 2**16
    refused(lambda: load(file, "all"), f"{file}/0.png is sparse")
    stream_of = CaptionStream(file, TOKENIZER, TRANSFORM, epoch_length=1)
    refused(lambda: list(stream_of), f"{file}/0.png is sparse")


@settings(deadline=None)
@given(cut=st.integers(0, 2**13 - 1))
def test_a_shard_that_ends_early_never_passes_for_a_whole_one(cut: int) -> None:
    """tarfile itself takes a header that is cut off for the end of the archive."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = tar(
            Path(folder) / "0.tar", [(f"{i}.{end}", b"x" * 600) for i in range(2) for end in ("png", "txt")]
        )
        # Four members of three blocks each, then the first of the zeros that end it.
        os.truncate(file, min(cut, 12 * 512))
        refused(lambda: load(file, "all"), str(file), "cannot be read")
        refused(lambda: list(stream(file, epoch_length=1)), str(file), "cannot be read")


@settings(deadline=None)
@given(place=st.integers(0, 12 * 512 - 1), value=st.integers(0, 255))
def test_a_changed_byte_raises_nothing_but_our_error(place: int, value: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = tar(
            Path(folder) / "0.tar", [(f"{i}.{end}", b"x" * 600) for i in range(2) for end in ("png", "txt")]
        )
        content = bytearray(file.read_bytes())
        content[place] = value
        file.write_bytes(content)
        for call in (
            lambda: load(file, "all"),
            lambda: list(CaptionStream(file, TOKENIZER, TRANSFORM, epoch_length=1)),
        ):
            with contextlib.suppress(LapsValueError):
                call()


def test_braces_are_expanded_as_shells_do() -> None:
    assert expand_braces("load", "a{8..11}-{x,y}") == [f"a{i}-{c}" for i in (8, 9, 10, 11) for c in "xy"]
    assert expand_braces("load", "{008..010}") == ["008", "009", "010"]
    for wrong in ("{3..1}", "{1}", "{0..99999999999999999999}", "{0..9999}{0..9999}"):
        refused(lambda wrong=wrong: expand_braces("load", wrong), wrong)


# ---- as a stream


def stream(shards: Path | list[Path] | str, **options: Any) -> CaptionStream:
    return CaptionStream(shards, TOKENIZER, TRANSFORM, **{"augment": 0, "train": False, **options})


def seen(batches: list[Batch]) -> list[tuple[int, int]]:
    """Image's number and caption's number of each row, by the pixels and the tokens."""
    red = [x for batch in batches for x in batch.pixel_values[:, 0, 0, 0].tolist()]
    scale = TRANSFORM.std[0] * 255
    numbers = [round(x * scale + TRANSFORM.mean[0] * 255) for x in red]
    ids = [row.tolist() for batch in batches for row in batch.input_ids]
    return [(i, ids[k][1]) for k, i in enumerate(numbers)]


def run(dataset: CaptionStream, workers: int = 0, **options: Any) -> list[Batch]:
    return list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collate, **options))


def rows(dataset: CaptionStream) -> list[Any]:
    """All of an epoch, of two workers."""
    return [(b.caption_ids.tolist(), b.input_ids.tolist(), b.pixel_values.tolist()) for b in run(dataset, 2)]


WHOLE = 18  # captions of write()'s twelve images


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_pass_has_every_caption_once_however_many_workers_divide_it(tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path / "set")
    batches = run(stream(folder, epoch_length=WHOLE, shuffle_buffer=5), workers)
    # Of three shards with six captions each; two workers have twelve and six, and nine of them are asked for.
    if workers != 2:
        assert Counter(i for i, _ in seen(batches)) == Counter({i: 1 + i % 2 for i in range(12)})
        assert len({c for batch in batches for c in batch.caption_ids.tolist()}) == WHOLE
    assert sum(map(len, batches)) == WHOLE
    for batch in batches:
        pairs = zip(batch.image_ids.tolist(), seen([batch]), strict=True)
        # Two captions of an image have its id.
        assert len({(image_id, i) for image_id, (i, _) in pairs}) == len(set(batch.image_ids.tolist()))


def test_workers_that_share_a_shard_divide_its_captions(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", per_shard=100)
    ranks = [stream(folder, epoch_length=WHOLE, rank=r, world_size=3) for r in range(3)]
    found = [c for part in ranks for batch in run(part, 2) for c in batch.caption_ids.tolist()]
    assert len(found) == len(set(found)) == WHOLE


def test_the_order_depends_on_seed_and_epoch_alone_also_in_another_process(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    code = (
        "import sys; from test_data_shards import rows, stream, Path\n"
        "s = stream(Path(sys.argv[1]), epoch_length=18, shuffle_buffer=4, seed=5, train=True, augment=0.2)\n"
        "s.set_epoch(2)\n"
        "print(rows(s))"
    )

    def listed(seed: int, epoch: int) -> str:
        one = stream(folder, epoch_length=18, shuffle_buffer=4, seed=seed, train=True, augment=0.2)
        one.set_epoch(epoch)
        return str(rows(one))

    here = listed(5, 2)
    other = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT | {"PYTHONHASHSEED": "77"},
    )
    assert other.stdout.strip() == here == listed(5, 2)
    assert len({here, listed(5, 3), listed(6, 2)}) == 3


def test_an_epoch_longer_than_the_shards_reads_them_again_in_another_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    found = [c for batch in run(stream(folder, epoch_length=2 * WHOLE)) for c in batch.caption_ids.tolist()]
    first, second = found[:WHOLE], found[WHOLE:]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == WHOLE
    assert first != second


def test_workers_that_outlive_an_epoch_see_the_next_one(tmp_path: Path) -> None:
    one = stream(write(tmp_path / "set"), epoch_length=8)
    loader = DataLoader(one, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=one.collate)
    epochs = []
    for epoch in range(2):
        one.set_epoch(epoch)
        epochs.append([batch.caption_ids.tolist() for batch in loader])
    assert epochs[0] != epochs[1]


def test_the_generators_of_the_process_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert len(list(stream(write(tmp_path / "set"), epoch_length=8, train=True, augment=0.2))) == 8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_never_seeks_so_a_pipe_and_a_compressed_file_do(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", per_shard=100)
    content = (folder / "00000.tar").read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(content))
    assert sum(map(len, run(stream(tmp_path / "0.tar.gz", epoch_length=WHOLE)))) == WHOLE
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert sum(map(len, run(stream(pipe, epoch_length=WHOLE)))) == WHOLE
    writer.join()


def test_a_training_step_takes_a_batch_of_a_stream_from_two_workers(tmp_path: Path) -> None:
    model = tiny_laps(tokenizer=TOKENIZER).train()
    one = CaptionStream(write(tmp_path / "set"), TOKENIZER, model.transform, epoch_length=8)
    for batch in run(one, 2):
        loss, _ = model(batch)
        loss.backward()
        assert torch.isfinite(loss)


def test_what_is_damaged_is_named_and_raised_or_skipped_and_counted(tmp_path: Path) -> None:
    good = [("0.png", encoded(0)), ("0.txt", b"picture 0")]
    bad = [
        ("1.png", b"no image"), ("1.txt", b"one"),
        ("2.png", encoded(2)), ("2.txt", b"\xff"),
        ("3.png", encoded(3)), ("3.txt", b"\n"),
        ("4.png", encoded(4)),
        ("../5.png", encoded(5)),
        ("6.txt", b"picture 6"),
    ]  # fmt: skip
    names = ("1.png", "2.txt", "3.png", "4.png", "../5.png", "6.txt")
    last = [("7.png", encoded(7)), ("7.txt", b"picture 7")]
    file = tar(tmp_path / "set" / "0.tar", good + bad + last)
    for i, name in enumerate(names):
        parts = [(2, 0), (2, 2), (2, 4), (1, 6), (1, 7), (1, 8)][i]
        alone = tar(tmp_path / f"{i}" / "x.tar", bad[parts[1] : parts[1] + parts[0]])
        message = refused(lambda alone=alone: run(stream(alone, epoch_length=1)), str(alone), name)
        assert message.startswith(("CaptionStream: ", "open_image: "))
    one = stream(file, epoch_length=2, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = run(one)
    assert sorted(i for i, _ in seen(batches)) == [0, 7]
    text = "\n".join(str(entry.message) for entry in caught)
    assert all(name in text for name in names)
    assert one.skipped == len(names)


def test_a_shard_that_ends_early_is_named_or_left_for_the_next(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    os.truncate(folder / "00001.tar", 2000)
    refused(lambda: run(stream(folder, epoch_length=WHOLE)), str(folder / "00001.tar"), "cannot be read")
    one = stream(folder, epoch_length=12, on_error="skip")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = {i for i, _ in seen(run(one, 1))}
    assert found <= set(range(12)) - {6, 7}
    assert one.skipped >= 1


def test_shards_without_examples_end_in_an_error_and_not_in_a_loop(tmp_path: Path) -> None:
    empty = tar(tmp_path / "set" / "0.tar", [("readme.md", b"x")])
    refused(lambda: run(stream(empty, epoch_length=1)), "finds no example", str(empty))
    blank = tar(tmp_path / "set" / "1.tar", [("0.png", b"x"), ("0.txt", b"y")])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        refused(lambda: run(stream(blank, epoch_length=1, on_error="skip")), "finds no example")
    one = write(tmp_path / "one", range(1))
    refused(lambda: run(stream(one, epoch_length=2), 2), "worker 1", "fewer workers")


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", range(2))
    refused(lambda: stream(folder / "x.tar", epoch_length=1), "x.tar is missing")
    refused(lambda: stream([], epoch_length=1), "shards is empty")
    refused(lambda: stream(tmp_path, epoch_length=1), "has no shard", "set")
    refused(lambda: stream(folder, epoch_length=0), "epoch_length")
    refused(lambda: stream(folder, epoch_length=1, rank=0, world_size=2), "epoch_length")
    refused(lambda: stream(folder, epoch_length=4, rank=2, world_size=2), "rank is out of range")
    refused(lambda: stream(folder, epoch_length=4, rank=0), "rank or world_size is given alone")
    refused(lambda: stream(folder, epoch_length=1, shuffle_buffer=0), "shuffle_buffer")
    refused(lambda: stream(folder, epoch_length=1, on_error="ignore"), "on_error")
    with pytest.raises(LapsTypeError, match="transform"):
        CaptionStream(folder, TOKENIZER, RegionTransform(), epoch_length=1)
    with pytest.raises(LapsTypeError, match="shards"):
        stream(7, epoch_length=1)  # type: ignore[arg-type]


# ---- splits of a stream


def test_a_stream_takes_the_shards_of_one_split_as_the_finite_reading_does(tmp_path: Path) -> None:
    write(tmp_path / "flat", range(4), pattern="train-%05d.tar")
    write(tmp_path / "flat", range(4, 8), pattern="val-%05d.tar")
    write(tmp_path / "below" / "test", range(3))
    flat = tmp_path / "flat"
    assert stream(flat, epoch_length=1, split="train").shards == [flat / "train-00000.tar"]
    assert stream(flat, epoch_length=1, split="dev").shards == [flat / "val-00000.tar"]
    assert stream(flat / "train-{00000..00000}.tar", epoch_length=1).shards == [flat / "train-00000.tar"]
    refused(lambda: stream(flat, epoch_length=1), "several splits", "train-00000.tar", "val-00000.tar")
    refused(lambda: stream(flat, epoch_length=1, split="test"), "no split 'test'", "train, val")
    assert len(stream(tmp_path / "below", epoch_length=1).shards) == 1
    untold = write(tmp_path / "set", range(2))
    assert stream(untold, epoch_length=1, split="train").shards == [untold / "00000.tar"]
    refused(lambda: stream(untold, epoch_length=1, split="dev"), "no split 'dev'", "one of all")


# ---- what is left out


STRAY = [("README.txt", b"about"), ("info.json", b"[1]"), ("data/license.json", b'{"caption": "x"}')]
FAULTS = [
    ("1.txt", b"lost"),
    ("2.png", encoded(2)), ("2.txt", "Häuschen".encode("latin-1")),
    ("3.png", encoded(3)), ("3.json", b'{"caption": {"raw": "x"}}'),
    ("4.png", encoded(4)), ("4.json", b'{"caption": ["whole", "half \\ud800"]}'),
]  # fmt: skip
GOOD = [("0.png", encoded(0)), ("0.txt", b"picture 0")]


def test_members_that_are_no_sample_are_passed_over(tmp_path: Path) -> None:
    file = tar(tmp_path / "set" / "0.tar", [*STRAY, *GOOD])
    assert load(file, "all").captions == ["picture 0"]
    assert len(run(stream(file, epoch_length=1))) == 1


def test_faults_of_a_shard_are_raised_or_left_out_and_a_check_lists_all(tmp_path: Path) -> None:
    file = tar(tmp_path / "set" / "0.tar", [*GOOD, *FAULTS])
    places = [str(file / name) for name in ("1.txt", "2.txt", "3.json", "4.json")]
    faults = check(file, progress=False).splits["all"].faults
    assert [any(fault.startswith(place) for fault in faults) for place in places] == [True] * 4
    assert len(faults) == 4
    assert not check(file, progress=False).ok
    refused(lambda: load(file, "all"), places[0], "3 more")
    with pytest.warns(UserWarning, match="left out 4"):
        data = load(file, "all", on_error="skip")
    assert (data.captions, numbers_of(data)) == (["picture 0", "whole"], [0, 4])


def test_a_damaged_shard_is_one_fault_and_the_others_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    (folder / "00001.tar").write_bytes(b"<html>")
    report = check(folder, progress=False).splits["all"]
    assert (len(report.faults), report.images) == (1, 8)
    with pytest.warns(UserWarning, match="00001.tar cannot be read"):
        assert load(folder, "all", on_error="skip").num_images == 8


def test_shards_without_captions_or_images_say_what_they_hold(tmp_path: Path) -> None:
    other = tar(
        tmp_path / "set" / "0.tar", [("0.png", encoded(0)), ("0.cls", b"3"), ("0.json", b'{"text": "a"}')]
    )
    parts = ("1 .png", "1 .cls", "1 .json", "in the .json text 1x")
    refused(lambda: load(other, "all"), "lists no captions", *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: run(stream(other, epoch_length=1, on_error="skip")), "finds no example", *parts)
    without = tar(tmp_path / "set" / "1.tar", [("a.caption", b"x")])
    refused(lambda: load(without, "all"), "lists no images", "1 .caption")


def test_compression_is_named_where_random_access_needs_a_plain_file(tmp_path: Path) -> None:
    content = gzip.compress((write(tmp_path / "set", range(2)) / "00000.tar").read_bytes())
    for name in ("a/0.tar.gz", "b/0.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    refused(lambda: check(tmp_path / "a" / "0.tar.gz"), "is a compressed tar file")
    refused(lambda: check(tmp_path / "a"), "compressed tar files can only be streamed")
    refused(lambda: stream(tmp_path / "a", epoch_length=1), "compressed files have to be named")
    refused(lambda: load(tmp_path / "b", "all"), "0.tar is compressed by gzip, and can only be streamed")
    assert len(run(stream(tmp_path / "b" / "0.tar", epoch_length=1))) == 1
