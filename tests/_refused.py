"""What a call that must be refused says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from laps import LapsValueError


def refused(call: Callable[[], object], *parts: str) -> str:
    """The message of the LapsValueError that the call raises, in which all parts are."""
    with pytest.raises(LapsValueError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message
