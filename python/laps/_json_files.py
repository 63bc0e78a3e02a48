"""JSON files that hold one object, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import _check
from .errors import LapsValueError

__all__ = ["read_object"]


def read_object(operation: str, path: Path, expected: str) -> dict[str, Any]:
    """The file's object, as a dictionary.

    Args:
        operation: for messages.
        path: of the file.
        expected: what the file should be, for messages: ``"a transform's JSON file"``.

    Raises:
        LapsValueError: naming the file: it is missing, cannot be read, is no JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LapsValueError(_check.message(operation, f"{path} does not exist", expected)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise LapsValueError(_check.message(operation, f"{path} cannot be read", expected, error)) from None
    if not isinstance(values, dict):
        raise LapsValueError(
            _check.message(operation, f"{path} holds no JSON object", expected, _check.name_of(values))
        )
    return values
