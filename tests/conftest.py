"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores, and so do those that tests start. Before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

import laps.heads.base
import pytest
import torch

collect_ignore_glob = ["_*.py"]  # what tests import or run; pytest looks for doctests everywhere else


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: threads that wait for each other cost a busy machine more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that a test registers are forgotten after it."""
    monkeypatch.setattr(laps.heads.base, "_HEADS", dict(laps.heads.base._HEADS))
