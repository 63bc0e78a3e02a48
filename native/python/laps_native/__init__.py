"""The native half of :mod:`laps.encoders.native`, which is what to import.

``laps_native._native`` is linked to libtorch. Loading it beside another torch could crash the interpreter, so
nothing is loaded here: ``laps.encoders.native`` first compares versions.
"""

BUILT_FOR_TORCH = "2.11"
