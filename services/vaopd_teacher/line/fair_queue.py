"""Chooses the job that the device serves next: start-time fair queueing by token cost, with a weight for each job.

Every job has a line of its own and a virtual time at which its head may start; the head with the earliest start goes
next, and its job's next start moves on by cost / weight. The queue's clock is the start of the last item taken; a job
that returns after a pause starts at the clock, with no credit for the pause and no debt beyond what it was served.

Why not deficit round robin: a round there serves every other job's quantum first, so a light job's delay grows with the
number of jobs that flood; here it is next after the forward in progress. Why not finish times (WFQ): they need the
device's speed. The service per weight of two busy jobs differs by at most one unit of each, at any speed
(Goyal, Vin, Cheng: Start-time fair queueing, 1996).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

JOBS_KNOWN = 1024
"""Job names come from clients: beyond this many, jobs without work are forgotten, and their debts if necessary."""


@dataclass(slots=True)
class _Line(Generic[T]):
    weight: float
    start: float
    items: deque[tuple[T, float]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """A line for each job, served by weight; a job's own items keep their order. Not thread-safe.

    >>> queue = FairQueue({"heavy": 2.0})
    >>> for n in range(3):
    ...     queue.push("heavy", f"h{n}", cost=10)
    ...     queue.push("light", f"l{n}", cost=10)
    >>> [queue.pop() for _ in range(6)]
    ['h0', 'l0', 'h1', 'h2', 'l1', 'l2']
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._lines: dict[str, _Line[T]] = {}
        self._clock = 0.0

    def __bool__(self) -> bool:
        return any(line.items for line in self._lines.values())

    def __len__(self) -> int:
        return sum(len(line.items) for line in self._lines.values())

    def cost(self, job: str) -> float:
        """Returns the cost of a job's waiting items."""
        return sum(cost for _, cost in self._lines[job].items) if job in self._lines else 0.0

    def costs(self) -> dict[str, float]:
        """Returns the cost of the waiting items of each job that has some."""
        return {job: self.cost(job) for job, line in self._lines.items() if line.items}

    def weight(self, job: str) -> float:
        """Returns a job's weight; 1 unless the configuration gives another."""
        return self._weights.get(job, 1.0)

    def push(self, job: str, item: T, *, cost: float) -> None:
        """Appends an item to its job's line."""
        line = self._lines.setdefault(job, _Line(self.weight(job), self._clock))
        if not line.items:
            line.start = max(line.start, self._clock)
        line.items.append((item, cost))

    def head(self) -> T:
        """Returns the item that `pop` would take. Raises LookupError when nothing waits."""
        return self._choose_next().items[0][0]

    def pop(self) -> T:
        """Takes the next item and charges its job. Raises LookupError when nothing waits."""
        line = self._choose_next()
        item, cost = line.items.popleft()
        self._clock = line.start
        line.start += cost / line.weight
        self._forget()
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> None:
        """Removes unwanted items, at no cost to their jobs."""
        for line in self._lines.values():
            line.items = deque(entry for entry in line.items if not unwanted(entry[0]))

    def rest(self) -> None:
        """Ends the busy period if nothing waits: the device idles, and all debts are forgotten."""
        if not self:
            self._lines.clear()
            self._clock = 0.0

    def _forget(self) -> None:
        """Forgets jobs without work: those without debt, and the older half of those with debt."""
        if len(self._lines) <= JOBS_KNOWN:
            return
        idle = [job for job, line in self._lines.items() if not line.items]
        indebted = [job for job in idle if self._lines[job].start > self._clock]
        for job in {*idle} - {*indebted[len(indebted) // 2 :]}:
            del self._lines[job]

    def _choose_next(self) -> _Line[T]:
        # Among equal starts, the job that has been known longest.
        line = min(self._lines.values(), key=lambda line: line.start if line.items else math.inf, default=None)
        if line is None or not line.items:
            raise LookupError("nothing waits")
        return line
