"""Checkpoints of the published code as models of laps."""

from .run import Conversion, convert

__all__ = ["Conversion", "convert"]
