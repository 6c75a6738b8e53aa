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
from dataclasses import KW_ONLY, dataclass

log = logging.getLogger(__name__)

_LONGEST_PERIOD_S = 5.0


@dataclass(eq=False)
class Watchdog:
    """Calls `on_stuck` once `busy_s` exceeds `stuck_after_s`. Runs on the event loop.

    `ends_process`: also uses the second net, which ends the process; for a process with one server only.
    """

    busy_s: Callable[[], float]
    _: KW_ONLY
    stuck_after_s: float
    on_stuck: Callable[[], Awaitable[object]]
    ends_process: bool

    def __post_init__(self) -> None:
        self._period_s = min(_LONGEST_PERIOD_S, self.stuck_after_s / 4)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Ends both nets."""
        if self._task is not None:
            self._task.cancel()
        if self.ends_process:
            faulthandler.cancel_dump_traceback_later()

    async def _watch(self) -> None:
        while (busy_s := self.busy_s()) <= self.stuck_after_s:
            if self.ends_process:
                faulthandler.dump_traceback_later(2 * self.stuck_after_s, exit=True)
            await asyncio.sleep(self._period_s)
        log.critical("the device has given no result for %.0f s, stuck_after_s = %g", busy_s, self.stuck_after_s)
        await self.on_stuck()
