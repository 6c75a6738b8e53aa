"""Limits how many prompt groups of a job are prepared before the device takes them.

A prepared group holds its images' pixels, 10 MB and more, so a full queue of them would fill the memory. Groups beyond
one forward's worth of each job stay as small as they arrived. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

AT_ONCE = 2
"""Units of a job that are prepared at the same time; with one, the job would have no work ready meanwhile."""
FEW_TOKENS = 8192
"""Tokens that a job may always have prepared, however small the forwards are."""


class Ahead:
    """Lets a job's calls prepare one unit each in turn, while few of its tokens wait.

    `waiting_tokens` returns a job's prepared tokens in the line; call `look` whenever they may have become fewer.
    """

    def __init__(self, waiting_tokens: Callable[[str], float], *, batch_tokens: int) -> None:
        self._waiting_tokens = waiting_tokens
        self._limit_tokens = max(batch_tokens, FEW_TOKENS)
        self._preparing: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, job: str) -> AsyncIterator[None]:
        """Waits for the job's turn, in the order of arrival; the caller prepares and submits one unit within it."""
        if self._queues.get(job) or not self._open(job):
            await self._wait(job)
        else:
            self._preparing[job] += 1
        try:
            yield
        finally:
            self._leave(job)

    def look(self) -> None:
        """Starts the turns that have become possible: the device took a unit, or a call ended."""
        for job in list(self._queues):
            self._admit(job)

    def _open(self, job: str) -> bool:
        return self._preparing[job] < AT_ONCE and self._waiting_tokens(job) < self._limit_tokens

    async def _wait(self, job: str) -> None:
        """Waits in the job's queue and returns with the turn taken."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(job, deque())
        queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._admit(job)
            else:  # the turn was given together with the cancellation
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
        if not self._preparing[job]:  # job names must not pile up
            del self._preparing[job]

    def _leave(self, job: str) -> None:
        self._preparing[job] -= 1
        self._admit(job)
