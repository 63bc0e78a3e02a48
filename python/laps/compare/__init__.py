"""Heads trained and evaluated alike, in one table: ``laps compare CONFIG.yaml --out DIR``.

:func:`read` takes a YAML file, or the name of a comparison that comes with laps (:func:`configs`);
:func:`run` trains what is not trained yet and writes the table in four formats.
"""

from .run import Result, run
from .settings import Comparison, Row, Scenes, Start, configs, read
from .table import Table, published

__all__ = ["Comparison", "Result", "Row", "Scenes", "Start", "Table", "configs", "published", "read", "run"]
