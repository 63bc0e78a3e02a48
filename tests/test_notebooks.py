"""Every notebook runs from top to bottom, offline, and is stored without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Two minutes a notebook on two idle cores; a busy machine may take longer.
SECONDS = 600


def test_there_are_notebooks() -> None:
    assert {"quickstart", "your_own_photos", "training_loop", "reproduce"} == {p.stem for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    book = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown: list[Any] = [out for cell in book.cells for out in cell.get("outputs", [])]
    assert not [out for out in shown if out.output_type == "error"]
    kinds = {kind for out in shown for kind in out.get("data", {})}
    if path.stem != "training_loop":
        assert "image/png" in kinds, "figures"
    if path.stem in ("quickstart", "your_own_photos"):
        assert any("laps-why" in out.get("data", {}).get("text/html", "") for out in shown), "the view"
