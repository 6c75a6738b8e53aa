"""Runs the one thread that drives the device, and the line before it that all jobs share.

In: units of prepared groups, from many calls of many jobs. Out: each group's answer, on the event loop of its call. The
thread takes units in the fair queue's order while they fit into one forward together, so a forward mixes jobs. Units of
a cancelled or expired call leave the line before they reach the device. An exception of the engine itself ends the
thread: every waiting group gets Unavailable, and `on_failure` lets the process end, so that its supervisor restarts it
with a sound device. A watchdog reads `busy_s`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field

from vaopd.errors import Unavailable, VaopdError
from vaopd.telemetry import tracing
from vaopd.types import GroupFailure
from vaopd_teacher.engines.engine import Engine, EngineResult, PreparedGroup
from vaopd_teacher.line.fair_queue import FairQueue

log = logging.getLogger(__name__)

Answer = EngineResult | GroupFailure

JOBS_REMEMBERED = 1024
"""Jobs with counts; their names come from clients and must not pile up."""
_SMOOTHING = 0.1


@dataclass(slots=True, eq=False)
class Unit:
    """Groups of one call that go to the device together.

    `room`: the tokens that it takes of a forward, estimated from the request; `tokens`: the exact cost to its job.
    `on_delivery` is called on `loop` for each group, in order. `cancelled`: the call has ended; `expires`: the call's
    deadline, of time.monotonic. `trace`: the call's, for the device's span.
    """

    job: str
    groups: tuple[PreparedGroup, ...]
    room: int
    on_delivery: Callable[[Answer], None]
    loop: asyncio.AbstractEventLoop
    expires: float | None = None
    cancelled: bool = False
    trace: tracing.Context | None = None
    tokens: int = field(init=False)
    delivered: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(group.tokens for group in self.groups)

    @property
    def unwanted(self) -> bool:
        """Whether its call was cancelled or has expired."""
        return self.cancelled or (self.expires is not None and time.monotonic() >= self.expires)

    def deliver(self, result: EngineResult | VaopdError) -> None:
        """Hands the next group's result to the call; runs on the scheduler's thread."""
        group = self.groups[self.delivered]
        self.delivered += 1
        answer: Answer = (
            result if isinstance(result, EngineResult) else GroupFailure(group_id=group.group_id, error=result)
        )
        try:
            self.loop.call_soon_threadsafe(self.on_delivery, answer)
        except RuntimeError:  # the loop is closed: the server has stopped
            self.cancelled = True


@dataclass(slots=True)
class Served:
    """Counts the groups and tokens that a job was served since the server started."""

    groups: int = 0
    tokens: int = 0


@dataclass(eq=False)
class Scheduler:
    """Drives an engine with the units of all jobs. Thread-safe."""

    engine: Engine
    _: KW_ONLY
    batch_tokens: int
    on_failure: Callable[[], object]
    """Called on the device's thread, as the other two, when the engine breaks."""
    on_taken: Callable[[], object] = lambda: None
    """Called when a batch has left the line."""
    on_batch: Callable[[float], object] = lambda fill: None
    """Called with the batch's share of `batch_tokens`, above 1 for a unit that needs several forwards."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """The jobs' weights in the fair queue."""

    def __post_init__(self) -> None:
        self.seconds_per_token: float | None = None
        """The pace of the last forwards, smoothed; None before the first."""
        self.busy_seconds = 0.0
        """Time inside the engine since the start; divided by the time on the clock, the device's load."""
        self.forwards = 0
        self._line: FairQueue[Unit] = FairQueue(self.weights)
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._changed = threading.Condition()
        self._stopping = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="teacher-engine", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds that the thread has been inside the engine without a result; 0 while it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting_units(self) -> int:
        """Units in the line."""
        with self._changed:
            return len(self._line)

    def waiting_tokens(self, job: str) -> float:
        """Returns the tokens of a job's units in the line."""
        with self._changed:
            return self._line.cost(job)

    def waiting_tokens_by_job(self) -> dict[str, float]:
        """Returns the tokens in the line of each job that has some."""
        with self._changed:
            return self._line.costs()

    def weight(self, job: str) -> float:
        """Returns a job's weight in the fair queue."""
        return self._line.weight(job)

    def served(self, job: str) -> Served:
        """Returns the counts of a job."""
        with self._changed:
            return self._served.get(job, Served())

    def served_by_job(self) -> dict[str, Served]:
        """Returns the counts of the last `JOBS_REMEMBERED` jobs."""
        with self._changed:
            return dict(self._served)

    def submit(self, unit: Unit) -> None:
        """Puts a unit in the line. Raises Unavailable once the thread is ending."""
        with self._changed:
            if self._stopping:
                raise _make_stopped_error()
            self._line.push(unit.job, unit, cost=unit.tokens)
            self._changed.notify()

    def withdraw(self, units: Sequence[Unit]) -> None:
        """Cancels units; those that are not on the device yet leave the line now."""
        for unit in units:
            unit.cancelled = True
        with self._changed:
            self._line.remove(lambda unit: unit.cancelled)

    def stop(self, longest_s: float | None = None) -> bool:
        """Ends the thread after the forward in progress; groups that still wait get Unavailable.

        Returns whether the thread has ended within `longest_s`; None waits until it has.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(longest_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        units: list[Unit] = []
        try:
            while units := self._take():
                self.on_taken()
                self.on_batch(sum(unit.room for unit in units) / self.batch_tokens)
                with _open_span(units):
                    self._score(units)
        except Exception:
            log.exception("the engine failed; the process has to end")
            self.on_failure()
        with self._changed:
            self._stopping = True
            waiting = list(units)
            while self._line:
                waiting.append(self._line.pop())
        for unit in waiting:
            for _ in range(len(unit.groups) - unit.delivered):
                unit.deliver(_make_stopped_error())

    def _take(self) -> list[Unit]:
        """Waits for units and takes those of the next forward; none when the thread has to end."""
        with self._changed:
            while not self._stopping:
                self._line.remove(lambda unit: unit.unwanted)
                if self._line:
                    break
                self._line.rest()
                self._changed.wait()
            else:
                return []
            units = [self._line.pop()]
            room = self.batch_tokens - units[0].room
            # Strictly in order: a smaller unit that would still fit doesn't overtake the next one in turn.
            while self._line and self._line.head().room <= room:
                units.append(self._line.pop())
                room -= units[-1].room
            return units

    def _score(self, units: Sequence[Unit]) -> None:
        owners = [unit for unit in units for _ in unit.groups]
        groups = [group for unit in units for group in unit.groups]
        started = self._busy_since = time.monotonic()
        try:
            for owner, group, result in zip(owners, groups, self.engine.score(groups), strict=True):
                self._busy_since = time.monotonic()
                self._count(owner.job, group.tokens)
                owner.deliver(result)
                if all(unit.cancelled for unit in units):
                    return  # the device is free for other units
            self._measure_pace(time.monotonic() - started, sum(unit.tokens for unit in units))
        finally:
            self._busy_since = None
            self.busy_seconds += time.monotonic() - started
            self.forwards += 1

    def _count(self, job: str, tokens: int) -> None:
        with self._changed:
            served = self._served.setdefault(job, Served())
            served.groups += 1
            served.tokens += tokens
            self._served.move_to_end(job)
            while len(self._served) > JOBS_REMEMBERED:
                self._served.popitem(last=False)

    def _measure_pace(self, elapsed_s: float, tokens: int) -> None:
        now, before = elapsed_s / max(1, tokens), self.seconds_per_token
        self.seconds_per_token = now if before is None else before + _SMOOTHING * (now - before)


def _open_span(units: Sequence[Unit]) -> AbstractContextManager[None]:
    """Opens a span in the first call's trace, with links to the other calls that share the batch."""
    if units[0].trace is None:
        return nullcontext()
    return tracing.span(
        "teacher batch",
        parent=units[0].trace,
        links=[unit.trace for unit in units[1:]],
        jobs=list(dict.fromkeys(unit.job for unit in units)),
        groups=[group.group_id for unit in units for group in unit.groups],
        tokens=sum(unit.tokens for unit in units),
    )


def _make_stopped_error() -> Unavailable:
    return Unavailable("the teacher is stopping; try again, another replica may answer")
