"""Waiting for something observable, in place of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(description: str, condition: Callable[[], object], *, timeout_s: float = 180.0) -> None:
    """Polls `condition` until it is true; fails with `description` when it does not become true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up after {timeout_s:g} s waiting until {description}")
        time.sleep(0.02)
