"""Detects a device that hangs: a forward that never returns can't be interrupted, only its process can be ended.

There are two nets. A task reads for how long the device's thread has given no result. If the event loop itself stands
still (a blocking handler, a library that keeps Python's lock), a timer of the C runtime, which needs neither loop nor
lock, prints every thread's stack and ends the process with status 1.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_LONGEST_PERIOD_S = 5.0


class Watchdog:
    """Calls `on_stuck` once `busy_s` exceeds `stuck_after_s`. Runs on the event loop.

    `ends_process`: also uses the second net, which ends the process; for a process with one server only.
    """

    def __init__(
        self,
        busy_s: Callable[[], float],
        *,
        stuck_after_s: float,
        on_stuck: Callable[[], Awaitable[object]],
        ends_process: bool,
    ) -> None:
        self._busy_s = busy_s
        self._stuck_after_s = stuck_after_s
        self._on_stuck = on_stuck
        self._ends_process = ends_process
        self._period_s = min(_LONGEST_PERIOD_S, stuck_after_s / 4)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Ends both nets."""
        if self._task is not None:
            self._task.cancel()
        if self._ends_process:
            faulthandler.cancel_dump_traceback_later()

    async def _watch(self) -> None:
        while (busy_s := self._busy_s()) <= self._stuck_after_s:
            if self._ends_process:
                faulthandler.dump_traceback_later(2 * self._stuck_after_s, exit=True)
            await asyncio.sleep(self._period_s)
        log.critical("the device has given no result for %.0f s, stuck_after_s = %g", busy_s, self._stuck_after_s)
        await self._on_stuck()
