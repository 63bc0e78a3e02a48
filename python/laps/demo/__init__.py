"""The demo: scenes drawn on the disk, two small models trained on them, measured side by side, and a report.

It is ``laps demo`` on the command line. Nothing is downloaded and no GPU is needed; on two processor cores it
takes about four minutes.
"""

from .run import run

__all__ = ["run"]
