"""Limits how much each client may ask for in a minute, by token buckets in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from cachetools import LRUCache

WINDOW_S = 60.0
MAX_CLIENTS = 10_000
"""Clients that are remembered. The one that has been silent for longest is dropped, which fills its bucket."""


class Balance(NamedTuple):
    """Units left after a request, and the seconds after which it could be granted; 0 if it was."""

    left: float
    wait_s: float


class TokenBuckets:
    """Grants each client `per_minute` units at once, refilled evenly over a minute. Not thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(MAX_CLIENTS)  # units left, and when that was

    def take(self, client: str, units: int, *, per_minute: int) -> Balance:
        """Takes `units`, which are at most `per_minute`, or nothing where too few are left."""
        now = self._clock()
        left, since = self._buckets.get(client, (float(per_minute), now))
        left = min(per_minute, left + (now - since) * per_minute / WINDOW_S)
        granted = units <= left
        if granted:
            left -= units
        self._buckets[client] = (left, now)
        return Balance(left, 0.0 if granted else (units - left) * WINDOW_S / per_minute)
