"""An index finds what the model finds, says what is damaged, and follows what happens to the photographs."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laps
import numpy as np
import PIL.Image
import pytest
import torch
from _models import tiny_laps
from _rights import mode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from laps import Index, LapsError, LapsTypeError, LapsValueError
from laps.data import make_scenes
from laps.index import graph
from laps.index.checksum import checksum
from laps.index.fingerprint import fingerprint, folder_fingerprint
from laps.index.manifest import json_checksum
from laps.index.page import page
from laps.index.records import RecordLayout
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY = "a red circle above a blue square"
ALL: dict[str, int] = {"k": 1000, "candidates": 1000}


@pytest.fixture(scope="module")
def model() -> laps.LAPS:
    return tiny_laps()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(
        folder,
        num_train=24,
        num_dev=0,
        num_test=0,
        image_size=40,
        captions_per_image=1,
        workers=1,
        progress=False,
    )
    return folder / "images"


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(scenes, tmp_path / "photos"))


def add(index: Index, source: Any, **options: Any) -> Any:
    return index.add(source, **{"batch_size": 8, "progress": False} | options)


def made(folder: Path, model: laps.LAPS, photos: Path, storage: str = "float16", **options: Any) -> Index:
    """An index of photos, four or so in a shard."""
    index = Index.create(folder, model, storage=storage)
    add(index, photos, **{"batch_size": 4, "shard_bytes": 1} | options)
    return index


def names(hits: Any) -> list[str]:
    return [hit.path.name for hit in hits]


# ---- scores


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("laps", {}),
        ("laps", {"variant": "paper", "sampling": "topk"}),
        ("scan", {}),
        ("sgraf", {}),
        ("tgdt", {}),
        ("vse", {}),
        ("gpo", {}),
        ("cpfean", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_with_all_images_as_candidates_hits_are_those_of_rank(
    head: str, options: dict[str, Any], scenes: Path, tmp_path: Path
) -> None:
    model = tiny_laps(head=head, **options)
    index = made(tmp_path / "index", model, scenes, "float32")
    gallery = model.encode_files(index.paths, batch_size=4)

    scores, best = model.rank(model.encode_captions([QUERY]), gallery, 10)

    hits = index.search(QUERY, 10, candidates=len(index))
    assert [hit.path for hit in hits] == [index.paths[i] for i in best[0].tolist()]
    assert [hit.score for hit in hits] == scores[0].tolist()
    assert [hit.rank for hit in hits] == list(range(1, 11))


@pytest.mark.parametrize(("storage", "bound", "share"), [("float16", 5e-4, 0.51), ("int8", 1e-2, 0.4)])
def test_storage_costs_little_of_the_scores_and_saves_bytes(
    storage: str, bound: float, share: float, model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    whole, small = (
        made(tmp_path / name, model, scenes, name, shard_bytes=2**30) for name in ("float32", storage)
    )
    scores = [
        {hit.path: hit.score for hit in index.search(QUERY, len(index), candidates=len(index))}
        for index in (whole, small)
    ]

    assert max(abs(scores[0][path] - scores[1][path]) for path in scores[0]) < bound
    layouts = [index._snapshot.manifest.layout for index in (whole, small)]
    nbytes = [sum(field.nbytes for field in layout.fields) for layout in layouts if layout is not None]
    assert nbytes[1] < share * nbytes[0]


def test_records_are_read_one_by_one(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    made(tmp_path / "index", model, scenes, shard_bytes=2**30)
    index = Index.open(tmp_path / "index", model=model)
    index.search(QUERY, 1)
    record = index._snapshot.shards[0].record_bytes

    before = bytes_read()
    index.search(QUERY, 1, candidates=2)

    # And what asking costs.
    assert 2 * record <= bytes_read() - before < 3 * record


def bytes_read() -> int:
    line = Path("/proc/self/io").read_text().splitlines()[0]
    return int(line.removeprefix("rchar: "))


def test_candidates_are_those_of_the_global_vectors(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    hits = index.search(QUERY, **ALL)
    nominated = sorted(hits, key=lambda hit: -hit.global_score)[:5]

    few = index.search(QUERY, 3, candidates=5)

    assert names(few) == names([hit for hit in hits if hit in nominated or hit.path in paths(nominated)][:3])


def paths(hits: Any) -> list[Path]:
    return [hit.path for hit in hits]


def test_an_image_finds_itself_first_by_global_vectors(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index.paths[5]

    hits = index.search(path, 3)

    assert hits[0].path == path
    assert hits[0].score == hits[0].global_score == pytest.approx(1, abs=1e-5)


def test_several_queries_have_a_list_of_hits_each(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index.paths[0]

    results = index.search([QUERY, path], 2)

    assert [hits.query for hits in results] == [QUERY, path]
    assert names(results[0]) == names(index.search(QUERY, 2))


def test_a_deleted_or_stale_graph_still_finds_what_the_exact_product_finds(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    late = sorted(photos.iterdir())[-3:]
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in late:
        path.rename(aside / path.name)
    index = Index.create(tmp_path / "index", model, exact_below=1)
    add(index, photos, shard_bytes=1, batch_size=4)
    built = json.loads((index.folder / graph.FILE).read_text())["file"]
    index.delete(index.paths[:2])
    for path in aside.iterdir():
        path.rename(photos / path.name)
    index = Index.open(index.folder, model=model, exact_below=10_000)
    index.delete(index.paths[:1])
    add(index, [photos / path.name for path in late])

    for approximate in (True, False):
        hits = index.search(QUERY, **ALL, approximate=approximate)
        assert len(hits) == len(index) == 21
        assert names(hits) == names(index.search(QUERY, **ALL))
    few = [index.search(QUERY, 5, candidates=5, approximate=value) for value in (True, False)]
    assert names(few[0]) == names(few[1])
    # The images outside, and those that are deleted, are enough for a new one.
    index.exact_below = 1
    index.compact(progress=False)
    assert json.loads((index.folder / graph.FILE).read_text())["file"] != built


@pytest.fixture
def graphed(model: laps.LAPS, scenes: Path, tmp_path: Path) -> Index:
    """An index with a graph, which nobody has loaded yet."""
    index = made(tmp_path / "index", model, scenes)
    with pytest.raises(LapsError, match="without a graph"):
        index.search(QUERY, approximate=True)
    index.build_graph(progress=False)
    return Index.open(index.folder, model=model, exact_below=1)


def values_of(index: Index) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((index.folder / graph.FILE).read_text())
    return values


@pytest.mark.parametrize("mended_by", ["add", "compact", "build_graph", "check"])
def test_a_damaged_graph_is_named_and_mended(mended_by: str, graphed: Index, scenes: Path) -> None:
    exact = graphed.search(QUERY, **ALL, approximate=False)
    path = graphed.folder / values_of(graphed)["file"]
    flip(path, path.stat().st_size // 2)

    with pytest.raises(LapsError, match=rf"{path.name}.*Index\.build_graph\(\)"):
        graphed.search(QUERY)
    assert path.name in str(Index.check(graphed.folder, progress=False))
    if mended_by == "add":
        add(graphed, scenes)
    elif mended_by == "check":
        assert not Index.check(graphed.folder, repair=True, progress=False).ok
    else:
        getattr(graphed, mended_by)(progress=False)
    assert Index.check(graphed.folder, progress=False).ok
    assert (graphed.folder / graph.FILE).exists() == (mended_by != "check")
    assert names(graphed.search(QUERY, **ALL)) == names(exact)


def test_a_damaged_graph_of_few_images_is_mended_too(graphed: Index, scenes: Path) -> None:
    (graphed.folder / graph.FILE).write_text("{")
    graphed.exact_below = 10_000
    add(graphed, scenes)
    assert len(graphed.search(QUERY, **ALL, approximate=True)) == 24
    (graphed.folder / graph.FILE).write_text("{")
    graphed.delete([scenes])
    graphed.compact(progress=False)
    assert not list(graphed.folder.glob("graph*"))


def test_changes_of_the_graphs_description_are_errors(graphed: Index) -> None:
    path, values = graphed.folder / graph.FILE, values_of(graphed)
    assert {"embed_dim", "shards", "file", "checksum"} <= values.keys()
    texts = [json.dumps(values | {name: value}) for name in values for value in (7, "7", None, [7])]
    for text in ["", "{", "[]", "null", "5", '"a"', "\xff", *texts]:
        path.write_text(text, encoding="latin1")
        with pytest.raises(LapsError, match=r"graph\.json is damaged"):
            graphed.search(QUERY)
    path.unlink()
    path.mkdir()
    with pytest.raises(LapsError, match=r"graph\.json is damaged"):
        graphed.search(QUERY)
    assert "graph.json is damaged" in str(Index.check(graphed.folder, progress=False))


def test_a_graph_of_another_state_of_the_index_is_not_used(graphed: Index, scenes: Path) -> None:
    values = values_of(graphed)
    del values["checksum"]
    values["shards"][0] = values["shards"][0][:-20] + "00000000.safetensors"
    (graphed.folder / graph.FILE).write_text(json.dumps({"checksum": json_checksum(values), **values}))
    assert len(graphed.search(QUERY, **ALL)) == 24
    with pytest.raises(LapsError, match="without a graph"):
        graphed.search(QUERY, approximate=True)


# ---- files that change


def test_a_second_run_encodes_what_is_new_or_changed(model: laps.LAPS, photos: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, photos)
    first, second = index.paths[:2]
    PIL.Image.new("RGB", (40, 40), "red").save(first)
    shutil.copy(second, photos / "new.jpg")

    done = add(index, photos)

    assert (done.added, done.updated, done.unchanged, done.deleted, done.skipped) == (1, 1, 23, 0, 0)
    assert len(index) == len(set(index.paths)) == 25
    assert names(index.search(first, 1)) == [first.name]
    assert index.search(first, 1)[0].score == pytest.approx(1, abs=1e-5)
    assert add(index, photos).unchanged == 25


def test_pruning_deletes_what_is_gone_and_nothing_else(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(next(photos.iterdir()), other / "one.jpg")
    index = made(tmp_path / "index", model, photos)
    add(index, other)
    gone = index.paths[3]
    gone.unlink()

    assert add(index, photos).deleted == 0
    assert add(index, photos, prune=True).deleted == 1
    assert len(index) == 24
    assert gone not in index.paths
    assert other / "one.jpg" in index.paths


@pytest.mark.parametrize("bits", [0, 0o444, 0o111])
def test_pruning_spares_what_is_in_a_folder_that_cannot_be_read(
    bits: int, model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    below = photos / "below"
    below.mkdir()
    shutil.copy(next(photos.glob("*.jpg")), below / "one.jpg")
    index = made(tmp_path / "index", model, photos)
    with mode(below, bits), pytest.warns(UserWarning, match="below.*Permission denied"):
        assert add(index, photos, prune=True).deleted == 0


def test_pruning_spares_what_was_not_listed_and_is_there(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    one = next(photos.glob("*.jpg"))
    index = made(tmp_path / "index", model, photos)
    odd = [photos / name for name in ("scan.img", ".hidden.jpg")]
    for path in odd:
        shutil.copy(one, path)
    add(index, odd)
    other = tmp_path / "other"
    (other / "below").mkdir(parents=True)
    for path in (other / "two.jpg", other / "below" / "three.jpg"):
        shutil.copy(one, path)
    (photos / "disk").symlink_to(other, target_is_directory=True)
    (photos / "file.jpg").symlink_to(other / "two.jpg")
    assert add(index, photos).added == 3
    other.rename(tmp_path / "not mounted")

    done = add(index, photos, prune=True)

    assert (done.deleted, len(index)) == (0, 29)
    # Through another folder: not ENOENT but ELOOP.
    (photos / "disk").unlink()
    (photos / "disk").symlink_to(photos / "disk")
    assert add(index, photos, prune=True).deleted == 0
    (photos / "disk").unlink()
    (photos / "file.jpg").unlink()
    assert add(index, photos, prune=True).deleted == 3


def test_a_new_link_to_a_folder_does_not_rename_what_is_in_it(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    (photos / "z").mkdir()
    shutil.copy(next(photos.glob("*.jpg")), photos / "z" / "one.jpg")
    index = made(tmp_path / "index", model, photos)
    (photos / "a").symlink_to("z", target_is_directory=True)

    done = add(index, photos, prune=True)

    assert (done.added, done.unchanged, done.deleted) == (0, 25, 0)


def test_a_folder_without_any_image_left_prunes_nothing(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, photos)
    for path in photos.iterdir():
        path.unlink()

    with pytest.raises(LapsValueError, match=r"has no image any more.*laps index delete INDEX"):
        add(index, photos, prune=True)
    assert len(index) == 24


def test_links_and_files_that_cannot_be_looked_at_are_named(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    long = photos / "long.jpg"
    # No right is needed for this one: the system gives up as it reads the link.
    long.symlink_to("n" * 300)
    index = Index.create(tmp_path / "index", model)

    with pytest.warns(UserWarning, match=r"skipped: .*long\.jpg: File name too long"):
        done = add(index, photos)
    assert (done.added, done.skipped) == (24, 1)
    with pytest.warns(UserWarning, match=r"absent\.jpg: No such file"):
        assert add(index, [photos / "absent.jpg"]).skipped == 1
    with pytest.raises(LapsValueError, match=r"long\.jpg"):
        add(index, photos, on_error="raise")


def test_a_folder_that_is_missing_prunes_nothing(model: laps.LAPS, photos: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, photos)
    shutil.rmtree(photos)

    with pytest.raises(LapsValueError, match="is missing"):
        add(index, photos, prune=True)
    assert len(index) == 24
    assert len(index.search(QUERY, 5)) == 5


def test_deleted_images_are_not_found_and_compaction_frees_them(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, photos)
    before = {hit.path: hit.score for hit in index.search(QUERY, **ALL)}
    gone = index.paths[:7]

    assert index.delete(gone) == 7
    left = {hit.path: hit.score for hit in index.search(QUERY, **ALL)}
    assert index.compact(progress=False) > 0

    assert left == {path: score for path, score in before.items() if path not in gone}
    assert {hit.path: hit.score for hit in index.search(QUERY, **ALL)} == left
    assert len(list((index.folder / "shards").iterdir())) == len(index._snapshot.shards) == 1
    assert Index.check(index.folder, progress=False).ok
    assert index.delete([photos]) == 17
    assert index.search(QUERY) == []


def test_a_path_that_is_not_there_deletes_nothing(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    with pytest.raises(LapsValueError, match=r"absent\.jpg is not in the index"):
        index.delete([index.paths[0], scenes / "absent.jpg"])
    with pytest.raises(LapsTypeError, match="one path"):
        index.delete(index.paths[0])  # type: ignore[arg-type]
    assert len(index) == 24


def test_a_reader_keeps_its_state_while_a_writer_compacts(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    writer = made(tmp_path / "index", model, scenes)
    reader = Index.open(writer.folder, model=model)
    before = reader.search(QUERY, **ALL)
    writer.delete(writer.paths[:20])
    writer.compact(progress=False)

    assert reader.search(QUERY, **ALL) == before
    assert reader.refresh()
    assert len(reader) == len(reader.search(QUERY, **ALL)) == 4
    assert not reader.refresh()
    shutil.rmtree(writer.folder)
    assert len(reader.search(QUERY, **ALL)) == 4


def test_an_index_that_is_removed_meanwhile_is_not_half_made_again(scenes: Path, tmp_path: Path) -> None:
    model = tiny_laps()
    index = Index.create(tmp_path / "index", model)
    handle = model.image_encoder.register_forward_pre_hook(
        lambda *_: shutil.rmtree(index.folder, ignore_errors=True)
    )
    with pytest.raises(LapsError, match="was removed"):
        add(index, scenes)
    handle.remove()
    assert not index.folder.exists()


def test_damaged_images_are_skipped_and_counted_or_stop_the_run(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    damaged = sorted(photos.iterdir())[10]
    damaged.write_bytes(damaged.read_bytes()[:300])
    index = Index.create(tmp_path / "index", model)

    with pytest.warns(UserWarning, match=damaged.name):
        done = add(index, photos)

    assert (done.added, done.skipped) == (23, 1)
    strict = Index.create(tmp_path / "strict", model)
    with pytest.raises(LapsValueError, match=damaged.name):
        add(strict, photos, on_error="raise")
    # What was encoded before is kept.
    assert len(strict) == 8


def test_features_that_float16_cannot_hold_are_refused(scenes: Path, tmp_path: Path) -> None:
    model = tiny_laps()
    with torch.no_grad():
        for parameter in model.image_encoder.projection.parameters():
            parameter.mul_(1e6)
    index = Index.create(tmp_path / "half", model)
    with pytest.raises(LapsValueError, match=r"train_000000\.jpg: its features are not finite in float16"):
        add(index, scenes, on_error="raise")
    assert len(made(tmp_path / "whole", model, scenes, "float32")) == 24


# ---- files of every kind


def test_odd_names_hidden_files_and_links_in_circles(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    photos = tmp_path / "ph ö\u4e2d"
    (photos / "a" / "b").mkdir(parents=True)
    one = next(scenes.iterdir())
    odd = ["two\nlines.jpg", "\x1b[31mred.JPG", "<b>&.jpeg", "日本.jpg", "a/b/-o.jpg"]
    for name in odd:
        shutil.copy(one, photos / name)
    shutil.copy(one, os.fsencode(photos) + b"/\xff\xfe.jpg")
    for hidden in (".hidden.jpg", "._mac.jpg", "notes.txt"):
        shutil.copy(one, photos / hidden)
    (photos / "a" / "b" / "up").symlink_to(photos, target_is_directory=True)
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    (photos / "nowhere.jpg").symlink_to(photos / "absent.jpg")
    os.mkfifo(photos / "pipe.jpg")
    index = Index.create(tmp_path / "index", model)

    done = add(index, photos)

    assert (done.added, done.skipped) == (len(odd) + 1, 0)
    assert add(index, photos).unchanged == len(odd) + 1
    hits = Index.open(index.folder, model=model).search(QUERY)
    assert all(hit.path.is_file() for hit in hits)
    assert len(str(hits).splitlines()) == len(odd) + 2
    assert "\x1b" not in str(hits)
    html = page([hits])
    assert html.encode()
    assert "<b>&" not in html
    assert html.count("<img") == len(odd) + 1
    assert json.dumps(hits.to_dict())


def test_files_and_folders_within_folders_are_one_image_each(
    model: laps.LAPS, photos: Path, tmp_path: Path
) -> None:
    below = photos / "below"
    below.mkdir()
    first = next(photos.glob("*.jpg"))
    shutil.copy(first, below / "one.jpg")
    index = Index.create(tmp_path / "index", model)

    assert add(index, [first, first]).added == 1
    assert add(index, below).added == 1
    assert add(index, photos).added == 23
    assert len(index) == len(set(index.paths)) == 25
    assert add(index, below, prune=True).deleted == 0


def test_folders_without_images_are_refused(model: laps.LAPS, tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LapsValueError, match="empty has no image files"):
        add(index, tmp_path / "empty")
    with pytest.raises(LapsValueError, match="absent is missing"):
        add(index, tmp_path / "absent")
    assert index.search(QUERY) == []
    assert index.search([QUERY]) == [[]]


def test_wrong_arguments_are_named(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    with pytest.raises(LapsValueError, match="k is out of range"):
        index.search(QUERY, 0)
    with pytest.raises(LapsValueError, match="candidates is out of range"):
        index.search(QUERY, candidates=0)
    with pytest.raises(LapsTypeError, match="query has the wrong type"):
        index.search(3)  # type: ignore[call-overload]
    with pytest.raises(LapsValueError, match=r"absent\.jpg is missing"):
        index.search(Path("absent.jpg"))
    with pytest.raises(LapsValueError, match="holds an index already"):
        Index.create(index.folder, model)
    with pytest.raises(LapsValueError, match="is not empty"):
        Index.create(scenes, model)
    with pytest.raises(LapsValueError, match="storage is unknown"):
        Index.create(tmp_path / "other", model, storage="int4")
    with pytest.raises(LapsValueError, match="holds no index"):
        Index.open(scenes)
    with pytest.raises(LapsValueError, match="made with another model"):
        Index.open(index.folder, model=tiny_laps(seed=1))
    wrong: Any = 5
    for call, said in [
        (lambda: Index.open(index.folder, model="model"), "model has the wrong type"),  # type: ignore[arg-type]
        (lambda: Index.open(wrong), "folder is no path"),
        (lambda: Index.check(wrong), "folder is no path"),
        (lambda: Index.create(wrong, model), "folder is no path"),
        (lambda: index.add(wrong), "source has the wrong type"),
        (lambda: index.add([wrong]), r"source\[0\] is no path"),
        (lambda: index.add(scenes, ranks=wrong), "ranks has the wrong type"),
        (lambda: index.delete(wrong), "paths has the wrong type"),
        (lambda: index.delete([wrong]), r"paths\[0\] is no path"),
        (lambda: index.search(QUERY, approximate=wrong), "approximate is no flag"),
        (lambda: index.compact(progress=wrong), "progress is no flag"),
    ]:
        with pytest.raises(LapsTypeError, match=said):
            call()
    with pytest.raises(LapsValueError, match=r"paths\[0\] is no path"):
        index.delete(["a\0b"])


def test_the_copy_of_the_model_is_the_model(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    assert Index.open(index.folder, device="cpu").search(QUERY, **ALL) == index.search(QUERY, **ALL)


# ---- damage


def flip(path: Path, position: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_named(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes, shard_bytes=2**30)
    [path] = (index.folder / "shards").iterdir()
    generator, size = random.Random(0), path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little")
    # Header, checksums and global vectors, records.
    positions = [0, 7, 8, 8 + header + 1, 8 + header + 4 * 24 + 5, size - 1]
    for position in positions + [generator.randrange(size) for _ in range(30)]:
        bit = generator.randrange(8)
        flip(path, position, bit)
        with pytest.raises(LapsError, match=path.name):
            Index.open(index.folder, model=model).search(QUERY, **ALL)
        flip(path, position, bit)
    assert len(Index.open(index.folder, model=model).search(QUERY, **ALL)) == 24


def test_a_damaged_record_names_its_image_and_is_repaired(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    shard = index._snapshot.shards[2]
    name = shard.images[1].path
    flip(shard.path, shard._offset(1) + 100)

    with pytest.raises(LapsError, match=name):
        index.search(QUERY, **ALL)
    checked = Index.check(index.folder, repair=True, progress=False)
    assert (checked.lost, len(checked.problems)) == (1, 1)
    assert name in checked.problems[0]
    index = Index.open(index.folder, model=model)
    assert len(index.search(QUERY, **ALL)) == 23
    assert add(index, scenes).added == 1
    assert Index.check(index.folder, progress=False).ok


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_broken_shard_is_found_at_open_and_repaired(
    damage: str, model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index._snapshot.shards[1].path
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "gone":
        path.unlink()
    else:
        flip(path, 20)

    with pytest.raises(LapsError, match=path.name):
        Index.open(index.folder)
    assert Index.check(index.folder, repair=True, progress=False).lost == 4
    index = Index.open(index.folder, model=model)
    assert len(index) == 20
    assert add(index, scenes).added == 4


def test_a_shard_that_cannot_be_read_now_is_not_repaired_away(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index._snapshot.shards[1].path
    aside = path.rename(tmp_path / path.name)
    # Refused (ELOOP) to whoever asks, root too.
    path.symlink_to(path)
    manifest = (index.folder / "index.json").read_text()

    checked = Index.check(index.folder, progress=False)
    assert (checked.lost, path.name in str(checked)) == (4, True)
    with pytest.raises(LapsError, match=rf"{path.name}: the shard cannot be read.*nothing was repaired"):
        Index.check(index.folder, repair=True, progress=False)
    with pytest.raises(LapsError, match=rf"{path.name}: the shard cannot be read"):
        Index.open(index.folder)
    assert (index.folder / "index.json").read_text() == manifest
    aside.replace(path)
    assert Index.check(index.folder, progress=False).ok


def test_a_check_while_others_compact_finds_no_damage(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    meanwhile = [lambda: index.delete(index.paths[:1]), lambda: index.compact(progress=False)]

    def when_opened(event: str, arguments: tuple[Any, ...]) -> None:
        # The check has read the manifest, and is about to open the first shard.
        while meanwhile and event == "open" and "/index/shards/" in str(arguments[0]):
            meanwhile.pop(0)()

    sys.addaudithook(when_opened)
    checked = Index.check(index.folder, progress=False)

    assert not meanwhile
    assert (checked.ok, checked.images, checked.shards) == (True, 23, 1)


def damage_config(place: Path) -> None:
    path = place / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"head_options": {}, "embed_dim": 17}))


MODEL_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights": lambda place: flip(place / "model.safetensors", 50_000),
    "weights gone": lambda place: (place / "model.safetensors").unlink(),
    "config": damage_config,
    "tokenizer": lambda place: (place / "tokenizer.json").unlink(),
    "transform": lambda place: (place / "transform.json").write_text("{}"),
    "swapped": lambda place: tiny_laps(seed=1).save_pretrained(place),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
def test_a_damaged_copy_of_the_model_answers_nothing_and_is_put_back(
    damage: str, model: laps.LAPS, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made(tmp_path / "index", model, photos)
    truth = index.search(QUERY, 3)
    MODEL_DAMAGE[damage](index.folder / "model")
    next(photos.iterdir()).touch()
    # A name that the hub would be asked for, were it taken for one.
    monkeypatch.chdir(tmp_path)
    place = Path("index")

    said = rf"{tmp_path}/index/model.*" + ("is missing" if damage == "gone" else "") + ".*--model M"
    with pytest.raises(LapsError, match=said):
        Index.open(place).search(QUERY)
    with pytest.raises(LapsError, match=said):
        add(Index.open(place), photos)
    assert f"{tmp_path}/index/model" in str(Index.check(place, progress=False))
    assert not Index.check(place, repair=True, progress=False).ok
    assert add(Index.open(place, model=model), photos).updated == 1
    assert Index.check(place, progress=False).ok
    assert Index.open(place, device="cpu").search(QUERY, 3) == truth


def test_a_copy_that_is_whole_is_left_alone(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    before = (index.folder / "model").stat().st_ino
    add(Index.open(index.folder, model=model), scenes)
    assert (index.folder / "model").stat().st_ino == before


@pytest.mark.parametrize("family", ["vit", "swin", "clip"])
def test_a_saved_models_fingerprint_is_that_of_its_folder(family: str, tmp_path: Path) -> None:
    parts = {"text": "clip", "head": "clip"} if family == "clip" else {}
    model = tiny_laps(family=family, **parts)
    model.save_pretrained(tmp_path)
    assert folder_fingerprint(tmp_path) == fingerprint(model)
    assert fingerprint(laps.LAPS.from_pretrained(tmp_path)) == fingerprint(model)


def test_a_shard_that_is_cut_while_it_is_open_is_an_error(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index._snapshot.shards[1].path
    os.truncate(path, 100)
    with pytest.raises(LapsError, match=rf"{path.name}: the shard ends early"):
        index.search(QUERY, **ALL)


def test_a_changed_manifest_is_found(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    path = index.folder / "index.json"
    text = path.read_text()
    path.write_text(text.replace('"images": 4', '"images": 3', 1))
    with pytest.raises(LapsValueError, match=r"index\.json is damaged"):
        Index.open(index.folder)
    path.write_text(text.replace('"version": 1', '"version": 2', 1))
    with pytest.raises(LapsValueError, match=r"index\.json has another version"):
        Index.open(index.folder)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(LapsValueError, match=r"index\.json cannot be read"):
        Index.open(index.folder)


def test_what_killed_writers_left_is_removed_by_the_next(
    model: laps.LAPS, scenes: Path, tmp_path: Path
) -> None:
    index = made(tmp_path / "index", model, scenes)
    shards = index.folder / "shards"
    orphans = [shards / "000099-0123abcd.safetensors", shards / ".000099-0123abcd.safetensors.0123abcd.tmp"]
    for path in [*orphans, shards / "mine.txt"]:
        path.touch()

    add(index, scenes)

    assert not any(path.exists() for path in orphans)
    # Nothing of ours.
    assert (shards / "mine.txt").exists()


def test_shards_are_safetensors_files(model: laps.LAPS, scenes: Path, tmp_path: Path) -> None:
    index = made(tmp_path / "index", model, scenes)
    layout = index._snapshot.manifest.layout
    assert layout is not None
    path = index._snapshot.shards[0].path

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        images = json.loads(file.metadata()["images"])

    features = model.encode_files([scenes / image[1] for image in images])
    assert torch.equal(tensors["embedding"], features.embedding)
    found = layout.unpack(tensors["records"], {})
    assert features.patches is not None
    assert torch.equal(found["patches"], features.patches.half().float())


# ---- checksum and records


@settings(max_examples=50, deadline=None)
@given(
    data=arrays(np.uint8, st.integers(1, 3000)),
    position=st.integers(0, 2**30),
    change=st.integers(1, 255),
)
def test_checksum_sees_every_change_of_a_byte(data: Any, position: int, change: int) -> None:
    before = checksum(data)
    data[position % len(data)] ^= change
    assert checksum(data) != before
    assert checksum(data.tobytes()) == checksum(data)


def test_checksum_sees_blocks_that_changed_places_or_were_lost() -> None:
    data = np.random.default_rng(0).integers(0, 256, 64 * 1024, dtype=np.uint8)
    before = checksum(data)
    swapped, lost = data.copy(), data.copy()
    swapped[4096:8192], swapped[8192:12288] = data[8192:12288], data[4096:8192]
    lost[4096:8192] = 0
    assert len({before, checksum(swapped), checksum(lost)}) == 3


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 4),
    patches=st.integers(1, 9),
    channels=st.integers(1, 12),
    prefix=st.booleans(),
    storage=st.sampled_from(laps.index.STORAGES),
    seed=st.integers(0, 2**16),
)
def test_records_give_back_what_they_were_made_of(
    images: int, patches: int, channels: int, prefix: bool, storage: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=generator)

    features = laps.features.ImageFeatures(
        numbers(channels),
        patches=numbers(patches, channels),
        prefix=numbers(1, channels) if prefix else None,
        logits=numbers(patches, 3),
    )
    layout = RecordLayout.of(features, storage)
    records, finite = layout.pack(features)
    found = RecordLayout.from_list(json.loads(json.dumps(layout.to_list()))).unpack(records, {})

    assert finite.all()
    assert found.keys() == {field.name for field in layout.fields}
    for name, values in found.items():
        original = getattr(features, name)
        # int8: half of a step, which is a 127th of the vector's largest number.
        step = original.abs().amax(-1, keepdim=True) / 127 if storage == "int8" else 0
        bound = {"float32": 0.0, "float16": 1e-3, "int8": 1e-3}[storage]
        assert bool(((values - original).abs() <= bound * original.abs() + 0.5001 * step + 1e-7).all())
