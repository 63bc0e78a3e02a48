"""What an evaluation found, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import write_atomically
from .rerank import Reranked

__all__ = ["Evaluation"]

DIRECTIONS = {"i2t": "Image-to-Text", "t2i": "Text-to-Image"}
RECALLS = ("r1", "r5", "r10")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of :func:`laps.evaluate`.

    Attributes:
        metrics: of the whole matrix; the names of :func:`laps.metrics.retrieval_metrics`.
        scores: (B_v, B_t) float32, images as rows.
        settings: what was evaluated and how, as JSON has it.
        seconds: per phase: ``images`` and ``captions`` (encoding), ``pairs`` (scoring), ``metrics``.
        folds: means over the folds, under the same names, or None.
        rerank: the two-stage form, or None.

    ``str(evaluation)`` is the table.

    Example:
        >>> import numpy as np
        >>> from laps.evaluation import Evaluation
        >>> from laps.metrics import retrieval_metrics
        >>> scores = np.eye(3, dtype=np.float32)
        >>> result = Evaluation(retrieval_metrics(scores, [0, 1, 2]), scores, {"data": "example"})
        >>> print("\\n".join(result.table().splitlines()[2:5]))
                                Image-to-Text         Text-to-Image
                              R@1    R@5   R@10     R@1    R@5   R@10     rSum
        all                 100.0  100.0  100.0   100.0  100.0  100.0    600.0
    """

    metrics: dict[str, float]
    scores: NDArray[np.float32]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    folds: dict[str, float] | None = None
    rerank: Reranked | None = None

    @property
    def pairs_per_second(self) -> float | None:
        """Rate of the exhaustive scoring; None where no time was taken."""
        seconds = self.seconds.get("pairs")
        return self.scores.size / seconds if seconds else None

    def protocols(self) -> dict[str, dict[str, float]]:
        """The metrics of each protocol, by name: ``all`` (``embeddings alone`` if that was the scoring), and
        where asked ``mean of 5 folds``, ``embeddings alone`` and ``rerank 100``."""
        alone = self.settings.get("scoring") == "global"
        result = {"embeddings alone" if alone else "all": self.metrics}
        if self.folds is not None:
            result[f"mean of {self.settings['folds']} folds"] = self.folds
        if self.rerank is not None:
            result["embeddings alone"] = self.rerank.embedding_metrics
            result[f"rerank {self.rerank.shortlist}"] = self.rerank.metrics
        return result

    def table(self) -> str:
        """Plain text: recalls as the field's tables have them, then ranks and fractions, then times."""
        images, captions = self.scores.shape
        name = self.settings.get("data") or "data"
        lines = [f"{name}: {images:,} images, {captions:,} captions", "", *self._recalls()]
        lines += ["", *self._ranks(), ""]
        if self.rerank is not None:
            lines += [_rerank_line(self.rerank, self.scores.size)]
        if self.seconds:
            times = (f"{phase} {seconds:,.1f} s" for phase, seconds in self.seconds.items())
            rate = f" ({self.pairs_per_second:,.0f} pairs/s)" if self.pairs_per_second else ""
            lines += [f"time: {', '.join(times)}{rate}"]
        return "\n".join(lines).rstrip()

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scores, as JSON has it."""
        return {
            "metrics": self.metrics,
            "folds": self.folds,
            "rerank": None if self.rerank is None else self.rerank.to_dict(),
            "settings": self.settings,
            "seconds": self.seconds,
            "pairs_per_second": self.pairs_per_second,
        }

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dict`; a failed write leaves the old file. Raises OSError naming `path`."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def save_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one line per protocol with all metrics; a failed write leaves the old file.

        Columns: ``data``, ``protocol``, ``images``, ``captions``, then the metrics. Raises OSError naming
        `path`.
        """
        images, captions = self.scores.shape
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["data", "protocol", "images", "captions", *self.metrics])
        for protocol, metrics in self.protocols().items():
            name = self.settings.get("data", "")
            writer.writerow([name, protocol, images, captions, *(metrics[key] for key in self.metrics)])
        return write_atomically(path, text.getvalue())

    def _recalls(self) -> list[str]:
        rows = self.protocols()
        if self.rerank is not None:
            rows["  its recall loss"] = self.rerank.recall_loss
        header = f"{'':20}" + "".join(f"{title:^22}" for title in DIRECTIONS.values())
        names = f"{'':18}" + 2 * f"{'R@1':>7}{'R@5':>7}{'R@10':>7} " + f"{'rSum':>8}"
        lines = [header.rstrip(), names]
        for label, metrics in rows.items():
            groups = ("".join(f"{metrics[f'{way}_{k}']:7.1f}" for k in RECALLS) for way in DIRECTIONS)
            lines.append(f"{label:18}" + "".join(f"{group} " for group in groups) + f"{metrics['rsum']:8.1f}")
        return lines

    def _ranks(self) -> list[str]:
        """Median and mean ranks, and the share of an image's captions among the first 1, 5, 10."""
        header = f"{'':20}{'Image-to-Text':^18}{'Text-to-Image':^18}{'captions found, %':^22}"
        names = f"{'':18}" + 2 * f"{'median':>8}{'mean':>9} " + f"{'@1':>7}{'@5':>7}{'@10':>7}"
        lines = [header.rstrip(), names]
        for label, metrics in self.protocols().items():
            ranks = (f"{metrics[f'{way}_medr']:8.1f}{metrics[f'{way}_meanr']:9.1f} " for way in DIRECTIONS)
            shares = (f"{metrics[f'i2t_fraction_{k}']:7.1f}" for k in RECALLS)
            lines.append(f"{label:18}" + "".join(ranks) + "".join(shares))
        return lines


def _rerank_line(rerank: Reranked, pairs: int) -> str:
    found, share = rerank.shortlist_recall, 100 * rerank.pairs / pairs
    return (
        f"rerank {rerank.shortlist}: a relevant item is nominated for {found['i2t']:.1f} % of the images and "
        f"{found['t2i']:.1f} % of the captions;\n"
        f"  {rerank.pairs:,} pairs scored ({share:.1f} % of all) in {rerank.seconds:,.1f} s"
    )
