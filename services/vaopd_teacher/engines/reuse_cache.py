"""The base of the teacher's caches of computed images: values by key within a budget of bytes, counted.

A data set is read epoch after epoch. When it is larger than the budget, dropping the least recently used value means
dropping each one just before it is wanted: nothing is ever hit. Here a value stays until it was used again; from then
on it makes room, the least recently used first, but only for values that are new. One that was looked up before and
was missing finds none: it belongs to the same data set, in which no value is better than another. So of N equal
values, C are hit in an epoch, where C fit.

After `PATIENCE` times the mean time between two uses, any value makes room for any other: its job has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 3.0
"""In a shuffled epoch a value waits at most twice as long as on average."""
_UNTRIED_PATIENCE = 64
"""Before any value was used again: look-ups for each value that is held."""
_REMEMBERED = 65_536
"""Keys of missing values whose last look-up is remembered."""
_SMOOTHING = 0.02


@dataclass(slots=True, eq=False)
class _Held(Generic[T]):
    value: T
    nbytes: int
    seen: int
    """The look-up that made or last used it."""


class ReuseCache(Generic[T]):
    """Holds `capacity_bytes` of values, by `size_of`. Subclasses count hits and misses, and lock their calls.

    `dropped`: values that had to make room. `refused`: values that found none.
    """

    def __init__(self, capacity_bytes: int, *, size_of: Callable[[T], int]) -> None:
        self.hits = 0
        self.misses = 0
        self.dropped = 0
        self.refused = 0
        self.size_bytes = 0
        self.capacity_bytes = capacity_bytes
        self._size_of = size_of
        self._waiting: OrderedDict[str, _Held[T]] = OrderedDict()
        self._used: OrderedDict[str, _Held[T]] = OrderedDict()
        self._missing: OrderedDict[str, tuple[int, int | None]] = OrderedDict()  # its last two look-ups
        self._lookups = 0
        self._mean_wait: float | None = None

    def _find(self, key: str) -> T | None:
        """Returns the value of `key`, which may make room from now on; None if there is none."""
        self._lookups += 1
        held = self._waiting.pop(key, None) or self._used.pop(key, None)
        if held is None:
            self._remember(key, self._lookups)
            return None
        wait = self._lookups - held.seen
        self._mean_wait = wait if self._mean_wait is None else self._mean_wait + _SMOOTHING * (wait - self._mean_wait)
        held.seen = self._lookups
        self._used[key] = held
        return held.value

    def _keep(self, key: str, value: T) -> None:
        """Keeps the value of a key that `_find` did not find, if there is room or others can make it."""
        nbytes = self._size_of(value)
        while self.size_bytes + nbytes > self.capacity_bytes:
            if nbytes > self.capacity_bytes or not self._drop_one(for_new=not self._was_missed(key)):
                self.refused += 1
                return
        self._missing.pop(key, None)
        self.size_bytes += nbytes
        self._waiting[key] = _Held(value, nbytes, self._lookups)

    def _remember(self, key: str, lookup: int) -> None:
        before, _ = self._missing.pop(key, (None, None))
        self._missing[key] = lookup, before
        if len(self._missing) > _REMEMBERED:
            self._missing.popitem(last=False)

    def _was_missed(self, key: str) -> bool:
        """Whether the look-up before the last one found the value missing, not long ago."""
        now, before = self._missing.get(key, (0, None))
        return before is not None and now - before <= self._longest_wait()

    def _longest_wait(self) -> float:
        typical = self._mean_wait
        return _UNTRIED_PATIENCE * len(self._waiting) if typical is None else PATIENCE * typical

    def _drop_one(self, *, for_new: bool) -> bool:
        """Drops a value that no job uses any more or, for a new one, that was used; returns whether there was one."""
        for values in (self._used, self._waiting):
            oldest = next(iter(values.values()), None)
            idle = oldest is not None and self._lookups - oldest.seen > self._longest_wait()
            if idle or (for_new and oldest is not None and values is self._used):
                key, held = values.popitem(last=False)
                self._remember(key, held.seen)
                self.size_bytes -= held.nbytes
                self.dropped += 1
                return True
        return False
