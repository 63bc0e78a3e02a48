"""The README's Python blocks run as they stand, each pasted into a fresh interpreter's namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from laps import demo
from laps.demo.recipe import Sizes

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[tuple[int, str]]:
    """The line at which each ```python block starts, and its code."""
    text = README.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


def test_readme_has_python_blocks() -> None:
    assert len(python_blocks()) >= 3


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small `make demo` has run."""
    folder = tmp_path_factory.mktemp("readme")
    sizes = Sizes(train=64, dev=16, test=16, epochs=1, batch_size=16)
    demo.run(folder / "out" / "demo", sizes=sizes, progress=False)
    return folder


@pytest.mark.parametrize(("line", "code"), python_blocks(), ids=lambda value: str(value).split("\n")[0][:20])
def test_python_block_of_the_readme_runs(
    line: int, code: str, after_the_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(after_the_demo)
    # Blank lines before the code, so that a traceback names the README's own line.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "readme"})
