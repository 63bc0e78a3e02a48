"""What an index may be asked for, by name: light, for the command line says it before anything is loaded."""

from __future__ import annotations

__all__ = ["CANDIDATES", "CANDIDATE_BYTES", "ON_ERROR", "STORAGES"]

# Nominated by the global vectors and scored by the head, unless a search says how many: as many as have so
# many bytes of features, which is what sets the time, and at least so many. benchmarks/search.py has what
# it costs and loses.
CANDIDATES = 500
CANDIDATE_BYTES = 32 * 2**20
ON_ERROR = ("skip", "raise")
STORAGES = ("float16", "int8", "float32")
