"""Connects the parts of one ScoreGroups call: its feeder prepares groups, the scheduler scores, its reader answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vaopd.errors import VaopdError
from vaopd.telemetry import tracing
from vaopd.types import GroupFailure
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_teacher.line.scheduler import Answer, Scheduler, Unit

UNITS_AHEAD = 2
"""Units of a call that may be prepared and unread: one on the device, one behind it."""


class Call:
    """One call's units and answers. Runs on the event loop; `expires` (of time.monotonic): its work is dropped then."""

    def __init__(self, scheduler: Scheduler, *, job: str, expires: float | None) -> None:
        self.job = job
        self.feeder: asyncio.Task[None] | None = None
        self._scheduler = scheduler
        self._expires = expires
        self._results: asyncio.Queue[Answer | Exception] = asyncio.Queue()
        self._unread: dict[str, Unit] = {}  # group_id -> its unit, until the reader has taken the group's answer
        self._unit_read = asyncio.Event()

    async def wait_for_room(self) -> None:
        """Waits until fewer than UNITS_AHEAD units are unread."""
        while len(set(self._unread.values())) >= UNITS_AHEAD:
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
            trace=tracing.get_context(),
        )
        self._unread.update((group.group_id, unit) for group in groups)
        self._scheduler.submit(unit)

    def refuse(self, group_id: str, error: VaopdError) -> None:
        """Answers a group that never reaches the device."""
        self._results.put_nowait(GroupFailure(group_id=group_id, error=error))

    def fail(self, error: Exception) -> None:
        """Ends the call: `next` raises the error."""
        self._results.put_nowait(error)

    async def next(self) -> Answer:
        """Waits for the next group's answer, in the order in which they are ready. Raises the error of `fail`."""
        item = await self._results.get()
        if isinstance(item, Exception):
            raise item
        if self._unread.pop(item.group_id, None) is not None:
            self._unit_read.set()
        return item

    def cancel(self) -> None:
        """Ends the feeder and withdraws the units that are not on the device yet: the reader has gone."""
        if self.feeder is not None:
            self.feeder.cancel()
        if self._unread:
            self._scheduler.withdraw(tuple(set(self._unread.values())))
            self._unread.clear()
