"""The one thread that drives the device, and the first-in-first-out line before it.

What arrives: units of prepared groups, from many calls at once. What leaves: each group's result, on the event loop of
its call. The thread takes units from the front while they fit into one forward together. The work of a call that was
cancelled is dropped before it reaches the device. An exception of the engine itself ends the thread: every waiting
group gets Unavailable, and `on_failure` lets the process end, so that its supervisor restarts it with a sound device.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.teacher.engine import Engine, PreparedGroup, ScoredGroup, padded_tokens
from vaopd.errors import Unavailable, VaopdError

log = logging.getLogger(__name__)

Result = ScoredGroup | VaopdError


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """The result of one group of a unit."""

    unit: Unit
    group: PreparedGroup
    result: Result


@dataclass(slots=True, eq=False)
class Unit:
    """Groups of one call that go to the device together.

    `on_delivery` is called on `loop` for each group, in order. `cancelled` is set when nobody wants them any more.
    """

    groups: tuple[PreparedGroup, ...]
    on_delivery: Callable[[Delivery], None]
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False
    delivered: int = field(default=0, init=False)

    def deliver(self, result: Result) -> None:
        """Hands on the next group's result; called from the scheduler's thread."""
        group = self.groups[self.delivered]
        self.delivered += 1
        try:
            self.loop.call_soon_threadsafe(self.on_delivery, Delivery(self, group, result))
        except RuntimeError:  # the loop is closed: the server has stopped and nobody waits any more
            self.cancelled = True


class Scheduler:
    def __init__(self, engine: Engine, *, batch_tokens: int, on_failure: Callable[[], object]) -> None:
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._on_failure = on_failure
        self._line: deque[Unit] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="teacher-engine", daemon=True)
        self._thread.start()

    def submit(self, unit: Unit) -> None:
        with self._changed:
            if self._stopping:
                raise _stopped()
            self._line.append(unit)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the forward in progress; what still waits gets Unavailable."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _main(self) -> None:
        units: list[Unit] = []
        try:
            while units := self._take():
                self._score(units)
        except Exception:
            log.exception("the engine failed; the process can't go on")
            self._on_failure()
        with self._changed:
            self._stopping = True
            waiting = [*units, *self._line]
            self._line.clear()
        for unit in waiting:
            for _ in range(len(unit.groups) - unit.delivered):
                unit.deliver(_stopped())

    def _take(self) -> list[Unit]:
        """The units of the next forwards; empty when the thread is to end."""
        with self._changed:
            while not self._stopping:
                self._drop_cancelled()
                if self._line:
                    break
                self._changed.wait()
            else:
                return []
            units = [self._line.popleft()]
            self._drop_cancelled()
            while self._line and self._fits([*units, self._line[0]]):
                units.append(self._line.popleft())
                self._drop_cancelled()
            return units

    def _drop_cancelled(self) -> None:
        while self._line and self._line[0].cancelled:
            self._line.popleft()

    def _fits(self, units: Sequence[Unit]) -> bool:
        return padded_tokens([group for unit in units for group in unit.groups]) <= self._batch_tokens

    def _score(self, units: Sequence[Unit]) -> None:
        owners = [unit for unit in units for _ in unit.groups]
        results = self._engine.score([group for unit in units for group in unit.groups])
        for owner, result in zip(owners, results, strict=True):
            owner.deliver(result)
            if all(unit.cancelled for unit in units):
                return  # the next forward is somebody else's


def _stopped() -> Unavailable:
    return Unavailable("the teacher is stopping; try again, another replica may answer")
