"""Fixtures that every test may use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

# Each process gets one core: two OpenMP threads per process under contention ran up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def wait_until(description: str, condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Polls `condition` until it is true; fails with `description` when it does not become true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up after {timeout_s:g} s waiting until {description}")
        time.sleep(0.02)
