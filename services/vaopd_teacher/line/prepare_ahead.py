"""How far the preparation of a job's groups runs ahead of the device: far enough to keep it fed, not further.

Prepared groups hold their images' pixels, some 10 MB each and more, so a full queue of them would fill the memory; what
waits beyond a forward's worth of each job stays as small as it arrived. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

AT_ONCE = 2
"""Units of a job that are prepared at the same time: one would leave the job without work for the time it takes."""
FEW_TOKENS = 8192
"""A job may always have so much prepared, however small the forwards are."""


class Ahead:
    """`waiting_tokens`: what of a job is prepared and waits for the device; `look` when there may be less of it."""

    def __init__(self, waiting_tokens: Callable[[str], float], *, batch_tokens: int) -> None:
        self._waiting_tokens = waiting_tokens
        self._limit_tokens = max(batch_tokens, FEW_TOKENS)
        self._preparing: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, job: str) -> AsyncIterator[None]:
        """A job's calls take turns in the order in which they came; one unit is prepared and submitted in a turn."""
        if self._queues.get(job) or not self._open(job):
            await self._wait(job)
        else:
            self._preparing[job] += 1
        try:
            yield
        finally:
            self._leave(job)

    def look(self) -> None:
        """The device has taken something, or a call has gone: lets those prepare that may."""
        for job in list(self._queues):
            self._admit(job)

    def _open(self, job: str) -> bool:
        return self._preparing[job] < AT_ONCE and self._waiting_tokens(job) < self._limit_tokens

    async def _wait(self, job: str) -> None:
        """Returns with the turn taken."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(job, deque())
        queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._admit(job)
            else:  # the turn came together with the cancellation
                self._leave(job)
            raise

    def _admit(self, job: str) -> None:
        queue = self._queues.get(job, deque())
        while queue and (queue[0].cancelled() or self._open(job)):
            if not (first := queue.popleft()).cancelled():
                self._preparing[job] += 1
                first.set_result(None)
        if not queue:
            self._queues.pop(job, None)
        if not self._preparing[job]:  # names of jobs must not pile up
            del self._preparing[job]

    def _leave(self, job: str) -> None:
        self._preparing[job] -= 1
        self._admit(job)
