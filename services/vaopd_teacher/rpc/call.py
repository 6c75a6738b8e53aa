"""One ScoreGroups call between its feeder (which prepares groups), the scheduler (which scores them) and its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from vaopd.errors import VaopdError
from vaopd.telemetry import tracing
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_teacher.line.scheduler import Delivery, Scheduler, Unit

UNITS_AHEAD = 2
"""Units that may be prepared before the reader has taken the first of them: one on the device, one behind it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A group that never reached the device."""

    group_id: str
    error: VaopdError


class Call:
    """Lives on the event loop. After `expires` (of time.monotonic) its work is dropped."""

    def __init__(self, scheduler: Scheduler, *, job: str, expires: float | None) -> None:
        self.job = job
        self.feeder: asyncio.Task[None] | None = None
        self._scheduler = scheduler
        self._expires = expires
        self._results: asyncio.Queue[Delivery | Refusal | Exception] = asyncio.Queue()
        self._unread: dict[Unit, int] = {}
        self._unit_read = asyncio.Event()

    async def room_for_a_unit(self) -> None:
        """Waits until fewer than UNITS_AHEAD are on their way."""
        while len(self._unread) >= UNITS_AHEAD:
            self._unit_read.clear()
            await self._unit_read.wait()

    def submit(self, groups: Sequence[PreparedGroup], *, room: int) -> None:
        """Puts a unit of these groups in the line."""
        unit = Unit(
            job=self.job,
            groups=tuple(groups),
            room=room,
            on_delivery=self._results.put_nowait,
            loop=asyncio.get_running_loop(),
            expires=self._expires,
            trace=tracing.current(),
        )
        self._unread[unit] = len(unit.groups)
        self._scheduler.submit(unit)

    def refuse(self, group_id: str, error: VaopdError) -> None:
        self._results.put_nowait(Refusal(group_id, error))

    def fail(self, error: Exception) -> None:
        """Ends the call: its reader gets the error."""
        self._results.put_nowait(error)

    async def next(self) -> Delivery | Refusal:
        item = await self._results.get()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Delivery):
            self._unread[item.unit] -= 1
            if self._unread[item.unit] == 0:
                del self._unread[item.unit]
                self._unit_read.set()
        return item

    def cancel(self) -> None:
        """Nobody reads any more: what hasn't reached the device never will."""
        if self.feeder is not None:
            self.feeder.cancel()
        if self._unread:
            self._scheduler.withdraw(tuple(self._unread))
            self._unread.clear()
