"""Folders of models, here or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from . import _check
from .errors import LapsValueError

__all__ = ["find_folder"]


def find_folder(operation: str, source: str | Path, patterns: Sequence[str], **options: Any) -> Path:
    """The folder `source`, or the local copy of the hub's repository of that id.

    Args:
        operation: for messages.
        source: a path or an id.
        patterns: the files to download.
        options: of :func:`huggingface_hub.snapshot_download`.

    Raises:
        LapsValueError: neither is there.
    """
    name, folder = str(source), Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise LapsValueError(_check.message(operation, f"{name} does not exist", "a folder or a hub id"))
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LapsValueError(
            _check.message(operation, f"{name} cannot be had", "a folder or a hub id", reason)
        ) from error
