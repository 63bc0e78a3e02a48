"""Tests that need an NVIDIA GPU, and nothing beside it but torch, numpy, pytest and laps."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
