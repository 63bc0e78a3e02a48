"""What an index may be asked for, by name: light, for the command line says it before anything is loaded."""

from __future__ import annotations

__all__ = ["CANDIDATES", "ON_ERROR", "STORAGES"]

# Nominated by the global vectors and scored by the head; benchmarks/search.py has what it costs and loses.
CANDIDATES = 500
ON_ERROR = ("skip", "raise")
STORAGES = ("float16", "int8", "float32")
