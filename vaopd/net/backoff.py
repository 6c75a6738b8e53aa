"""The delays between a client's attempts to reach a server."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from vaopd.errors import Busy, ConfigError

_HINT_JITTER = 0.2
_SHORTEST_HINT_S = 0.01


class Backoff:
    """Delays that double from `first_s` up to `longest_s`, until `patience_s` have passed since the last success.

    Delays are jittered, so that the clients of a server that returns don't all call at the same instant.
    """

    def __init__(
        self,
        patience_s: float,
        *,
        first_s: float = 0.1,
        longest_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`jitter` returns numbers from 0 to 1."""
        self._patience_s = patience_s
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._jitter = jitter
        self.renew()

    def renew(self) -> None:
        """Starts from the beginning, after an attempt that succeeded."""
        self._deadline = self._clock() + self._patience_s
        self._next_s = self._first_s

    def delay_s(self, error: Exception) -> float:
        """Returns how long to wait after an attempt that failed with `error`; raises `error` when the time is over.

        The hint of a Busy error is waited for in full, since the server refuses earlier attempts; otherwise the delay
        is half to all of the next step.
        """
        if isinstance(error, Busy) and math.isfinite(error.retry_after_s):
            delay_s = max(error.retry_after_s, _SHORTEST_HINT_S) * (1 + _HINT_JITTER * self._jitter())
        else:
            delay_s = self._next_s * (0.5 + 0.5 * self._jitter())
        if self._clock() + delay_s > self._deadline:
            raise error from None
        self._next_s = min(2 * self._next_s, self._longest_s)
        return delay_s


MAX_TIMEOUT_S = 7 * 24 * 3600.0


def check_timeout(name: str, seconds: float) -> float:
    """Returns a time limit that every library takes. Raises ConfigError for NaN, infinity and more than a week."""
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ConfigError(f"{name} = {seconds} must be above 0 and at most {MAX_TIMEOUT_S:.0f} seconds, a week")
    return seconds
