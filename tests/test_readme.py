"""The Python blocks of the README and of docs/ run as they stand, each in a namespace of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from laps import demo
from laps.demo.recipe import Sizes

ROOT = Path(__file__).resolve().parent.parent


def python_blocks() -> list[tuple[str, int, str]]:
    """The file of each ```python block, the line at which it starts, and its code."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        blocks = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        found += [(path.name, text[: block.start(1)].count("\n"), block[1]) for block in blocks]
    return found


def test_there_are_python_blocks() -> None:
    names = [name for name, _, _ in python_blocks()]
    assert names.count("README.md") >= 3
    assert "heads.md" in names


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small `make demo` has run."""
    folder = tmp_path_factory.mktemp("readme")
    sizes = Sizes(train=64, dev=16, test=16, epochs=1, batch_size=16)
    demo.run(folder / "out" / "demo", sizes=sizes, progress=False)
    return folder


@pytest.mark.usefixtures("own_heads")
@pytest.mark.parametrize(
    ("name", "line", "code"), python_blocks(), ids=lambda value: str(value).split("\n")[0][:20]
)
def test_python_block_runs(
    name: str, line: int, code: str, after_the_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(after_the_demo)
    # Blank lines before the code, so that a traceback names the file's own line.
    exec(compile("\n" * line + code, name, "exec"), {"__name__": "readme"})
