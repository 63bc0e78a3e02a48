"""A file or folder written by laps is whole, old or new, whatever stops the writer."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from laps import LapsValueError, _files
from laps._files import atomic_folder, atomic_path, recover_folder, require_writable, write_atomically

# Twenty times: a process writes versions 0, 1, 2, ... without end and is killed; what it leaves must be
# whole. A version is a megabyte that repeats one byte, and a folder has two of them.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from laps import _files

kind, path, generator = sys.argv[1], Path(sys.argv[2]), random.Random(0)
if kind == "two_steps":
    _files._exchange = lambda one, other: False

def write(version):
    data = bytes([version % 256]) * 1_000_000
    if kind == "file":
        _files.write_atomically(path, data)
    else:
        with _files.atomic_folder(path) as folder:
            (folder / "a").write_bytes(data)
            (folder / "b").write_bytes(data)

write(0)
interrupted = 0
for _ in range(20):
    child = os.fork()
    if not child:
        for version in range(1_000_000):
            write(version)
    time.sleep(generator.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _files.recover_folder(path)
    first, *others = [path] if kind == "file" else [path / "a", path / "b"]
    data = first.read_bytes()
    assert data == data[:1] * 1_000_000, "torn"
    assert all(other.read_bytes() == data for other in others), "mixed"
    left = [name for name in os.listdir(path.parent) if name.endswith(".tmp")]
    assert len(left) <= 1, left
    interrupted += len(left)
write(0)
assert os.listdir(path.parent) == [path.name], os.listdir(path.parent)
print(interrupted)
"""


def test_writes_text_and_bytes_and_makes_the_parent_folder(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "a" / "b.txt", "größer").read_bytes() == "größer".encode()
    assert write_atomically(tmp_path / "a" / "b.txt", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_an_error_in_the_block_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_has_the_old_ones_permissions_and_else_the_umasks(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    write_atomically(written, "")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    written.chmod(0o640)
    write_atomically(written, "again")
    assert stat.S_IMODE(written.stat().st_mode) == 0o640


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    write_atomically(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LapsValueError, match=r"is a folder \(expected a file's path\)"):
        write_atomically(tmp_path, "x")
    (tmp_path / "file").touch()
    with pytest.raises(LapsValueError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_a_block_that_writes_nothing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(LapsValueError, match="was not written"), atomic_path(tmp_path / "a") as temporary:
        temporary.unlink()


def test_a_full_disk_keeps_the_old_file_and_the_error_names_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write itself fails, half done."""
    path = write_atomically(tmp_path / "checkpoint", "old")
    script = (
        "import resource, sys; from laps._files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_atomically(sys.argv[1], bytes(1_000_000))\n"
        "except OSError as error: print(error.filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two_steps"])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, two_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if two_steps:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    path = tmp_path / "model"
    for version in ("old", "new"):
        with atomic_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / version).write_text(version)
            assert path.exists() == (version == "new")
        assert [entry.name for entry in (path / "sub").iterdir()] == [version]
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), atomic_folder(path) as folder:  # noqa: PT012
        (folder / "half").touch()
        raise RuntimeError
    assert [entry.name for entry in (path / "sub").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "exchange", "two_steps"])
def test_a_killed_writer_leaves_something_whole_and_no_litter_for_long(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, kind, str(tmp_path / "written")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    # Some of the kills came in the middle of a write, or the test tells nothing.
    assert int(done.stdout) > 0


def test_a_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".model.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_writer_at_work_is_not_disturbed_by_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_path(path) as first:
        first.write_text("first")
        write_atomically(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(LapsValueError, match="no regular file"), atomic_path(pipe):
        raise AssertionError
    write_atomically("/dev/null", "nowhere")
    assert Path("/dev/null").is_char_device()


def test_a_place_that_can_be_written_to_is_left_as_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.json"
    old.write_text("old")
    # Nobody reads from it yet, which may come.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (old, new, pipe, Path("/dev/null"), Path("/dev/stdout")):
        require_writable(path)

    assert old.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", old, pipe]


def test_a_place_that_cannot_be_written_to_is_named_as_it_would_be_later(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", Path("/proc/no/a.json"), tmp_path):
        with pytest.raises((OSError, LapsValueError)) as caught:
            require_writable(path)
        with pytest.raises((OSError, LapsValueError)) as later:
            write_atomically(path, "")
        assert str(caught.value) == str(later.value)


def test_standard_output_in_a_file_keeps_what_was_printed(tmp_path: Path) -> None:
    code = "from laps._files import write_atomically as w; print('a', flush=True); w('/dev/stdout', 'b')"
    with (tmp_path / "log").open("ab") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").stat().st_size > 0


def test_an_error_in_a_folder_names_the_file_where_it_was_to_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_folder(tmp_path / "run") as folder:
        (folder / "missing" / "file").write_text("")
    assert str(caught.value).endswith(f"'{tmp_path}/run/missing/file'")
