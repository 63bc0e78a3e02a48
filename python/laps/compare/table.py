"""The table of a comparison, laid out as the paper's: means and spreads over seeds, and published figures."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically
from .settings import Comparison, Row

if TYPE_CHECKING:
    from .run import Result

__all__ = ["Table", "published"]

COLUMNS = {
    "retrieval": ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"),
    "ablation": ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "rsum"),
}
TITLES = {f"{way}_r{k}": f"R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"rsum": "rSum"}
WAYS = {"i2t": "Image-to-Text", "t2i": "Text-to-Image"}


@cache
def published() -> dict[tuple[str, str, str], dict[str, float]]:
    """Figures that were published, by (data, backbone, method); metrics by :mod:`laps.metrics`' names.

    Source: Tables 1, 2 and 4 of the LAPS paper (CVPR 2024), of which its authors measured some and copied
    others.
    """
    text = (resources.files(__package__) / "published.csv").read_text(encoding="utf-8")
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for entry in csv.DictReader(io.StringIO(text)):
        numbers = {name: float(entry[name]) for name in COLUMNS["retrieval"] if entry[name]}
        # Table 4's complete row is a row of Table 1, with fewer columns.
        found.setdefault((entry["data"], entry["backbone"], entry["method"]), numbers)
    return found


@dataclass(frozen=True)
class Cell:
    """Mean of a metric over seeds, and their standard deviation (of a sample; None of one seed)."""

    mean: float
    spread: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: of the row.
        cells: by metric.
        seeds: how many it is the mean of; 0 for published figures.
        steps, seconds: of a training, on average; None for published figures.
    """

    name: str
    cells: dict[str, Cell]
    seeds: int
    steps: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Table:
    """What a comparison has found so far; ``print(table)`` is Markdown.

    Attributes:
        comparison: what was asked for.
        results: in any order.
    """

    comparison: Comparison
    results: Sequence[Result]

    def __str__(self) -> str:
        return self.markdown()

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics that the table shows."""
        return COLUMNS[self.comparison.layout]

    def parts(self) -> dict[str, list[Line]]:
        """The lines by protocol: "all", and "folds" where they were asked for."""
        protocols = ["all"] if self.comparison.folds is None else ["folds", "all"]
        return {protocol: list(self._lines(protocol)) for protocol in protocols}

    def markdown(self) -> str:
        """A table for each protocol; the best mean of a column is bold."""
        blocks = [f"### {self.comparison.title}"]
        for protocol, lines in self.parts().items():
            header = ["", *(f"{WAYS.get(c[:3], '')} {TITLES[c]}".strip() for c in self.columns)]
            header += ["seeds", "steps", "minutes"]
            body = [self._cells(line, lines, "**", "**") for line in lines]
            block = ["| " + " | ".join(header) + " |", "|:--" + "|--:" * (len(header) - 1) + "|"]
            block += ["| " + " | ".join(row) + " |" for row in body]
            blocks.append("\n".join([self._about(protocol), "", *block]))
        return "\n\n".join(blocks) + "\n"

    def latex(self) -> str:
        """For the package booktabs."""
        blocks = []
        for protocol, lines in self.parts().items():
            ways = [(title, sum(c.startswith(way) for c in self.columns)) for way, title in WAYS.items()]
            spans = " & ".join(f"\\multicolumn{{{count}}}{{c}}{{{title}}}" for title, count in ways)
            names = " & ".join(TITLES[column] for column in self.columns)
            body = []
            for line in lines:
                name, *cells = self._cells(line, lines, r"\textbf{", "}")
                numbers = (cell.replace("±", r"$\pm$") for cell in cells[: len(self.columns)])
                body.append(" & ".join([_escaped(name), *numbers]))
            blocks.append(
                "\n".join(
                    [
                        f"% {self.comparison.title}: {self._about(protocol)}".replace("\n", " "),
                        rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
                        r"\toprule",
                        rf" & {spans} & \\",
                        rf"Method & {names} \\",
                        r"\midrule",
                        *(rf"{row} \\" for row in body),
                        r"\bottomrule",
                        r"\end{tabular}",
                    ]
                )
            )
        return "\n\n".join(blocks) + "\n"

    def csv(self) -> str:
        """One line per row and protocol, with mean and spread of every metric."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        pairs = [name for column in self.columns for name in (column, f"{column}_stdev")]
        writer.writerow(["protocol", "row", "seeds", "steps", "seconds", *pairs])
        for protocol, lines in self.parts().items():
            for line in lines:
                values: list[Any] = [protocol, line.name, line.seeds, line.steps, line.seconds]
                for column in self.columns:
                    cell = line.cells.get(column)
                    values += [None, None] if cell is None else [cell.mean, cell.spread]
                writer.writerow(["" if value is None else value for value in values])
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Settings, every result, and the lines, as JSON has them."""
        settings = json.loads(json.dumps(asdict(self.comparison), default=str))
        return {
            "comparison": settings,
            "results": [asdict(result) for result in self.results],
            "lines": {protocol: [asdict(line) for line in lines] for protocol, lines in self.parts().items()},
        }

    def save(self, folder: Path) -> None:
        """Write ``table.md``, ``table.tex``, ``table.csv`` and ``table.json``."""
        for suffix, text in (
            ("md", self.markdown()),
            ("tex", self.latex()),
            ("csv", self.csv()),
            ("json", json.dumps(self.to_dict(), indent=2) + "\n"),
        ):
            write_atomically(folder / f"table.{suffix}", text)

    def _lines(self, protocol: str) -> Iterator[Line]:
        for row in self.comparison.rows:
            own = [result for result in self.results if result.row == row.name]
            metrics = [result.metrics if protocol == "all" else result.folds for result in own]
            found = [each for each in metrics if each is not None]
            if found:
                cells = {column: _cell([each[column] for each in found]) for column in self.columns}
                steps = statistics.mean(result.steps for result in own)
                yield Line(row.name, cells, len(found), steps, statistics.mean(r.seconds for r in own))
            line = self._published(row, protocol)
            if line is not None:
                yield line

    def _published(self, row: Row, protocol: str) -> Line | None:
        data = self.comparison.published.get(protocol)
        backbone = self.comparison.published.get("backbone", "")
        numbers = published().get((data or "", backbone, row.published or ""))
        if numbers is None:
            return None
        cells = {name: Cell(value) for name, value in numbers.items() if name in self.columns}
        return Line(f"{row.name}, published", cells, 0)

    def _cells(self, line: Line, lines: Sequence[Line], opening: str, closing: str) -> list[str]:
        """A line's texts; published figures are no candidates for the best."""
        # A bar would end the cell in Markdown.
        texts = [line.name.replace("|", "/")]
        for column in self.columns:
            cell = line.cells.get(column)
            best = max((each.cells[column].mean for each in lines if each.seeds), default=None)
            marked = cell is not None and line.seeds > 0 and cell.mean == best
            texts.append("" if cell is None else f"{opening}{cell}{closing}" if marked else str(cell))
        if not line.seeds:
            return [*texts, "", "", ""]
        assert line.steps is not None
        assert line.seconds is not None
        return [*texts, str(line.seeds), f"{line.steps:.0f}", f"{line.seconds / 60:.1f}"]

    def _about(self, protocol: str) -> str:
        data = self.comparison.published.get(protocol)
        split = f"mean over {self.comparison.folds} folds" if protocol == "folds" else "all"
        about = f"{split} of the test split, in percent; ± is the standard deviation over the seeds."
        return f"{data}: {about}" if data else about


def _escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))


def _cell(values: Sequence[float]) -> Cell:
    return Cell(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
