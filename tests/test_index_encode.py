"""What ends the encoding of a folder: what was encoded is in the index, and the process is as before."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import PIL.Image
import pytest
from _models import at_batch, tiny_laps
from laps import Index, LapsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        PIL.Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index.create(tmp_path / "index", tiny_laps())


def fail() -> None:
    raise RuntimeError("CUDA out of memory")


def test_an_error_of_the_encoder_leaves_what_was_encoded_before(index: Index, photos: Path) -> None:
    at_batch(index.model, 3, fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        index.add(photos, batch_size=2, progress=False)
    assert len(Index.open(index.folder)) == 4
    assert index.add(photos, progress=False).added == 4


def test_a_killed_loader_process_is_named_and_what_was_encoded_is_kept(index: Index, photos: Path) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    at_batch(index.model, 2, kill)
    with pytest.raises(LapsError, match=r"a process that loads images was killed .*num_workers"):
        # More batches than a worker has ready ahead of the encoder.
        index.add(photos, batch_size=1, num_workers=1, progress=False)
    assert 2 <= len(Index.open(index.folder)) < 8
    assert len(index) + index.add(photos, progress=False).added == 8


def test_signals_do_what_they_did_while_an_error_is_held(index: Index, photos: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    (index.folder / "shards").write_text("no folder")
    with pytest.raises(OSError, match="shards") as caught:
        index.add(photos, progress=False)
    assert caught.value.__traceback__ is not None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
