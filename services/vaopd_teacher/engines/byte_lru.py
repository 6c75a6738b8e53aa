"""The base of the teacher's caches: values by key within a budget of bytes, least recently used first out, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from cachetools import LRUCache

T = TypeVar("T")


class _CountingLru(LRUCache[str, T]):
    dropped = 0

    def popitem(self) -> tuple[str, T]:
        self.dropped += 1
        return super().popitem()


class ByteLru(Generic[T]):
    """Holds `capacity_bytes` of values, by `size_of`. Subclasses count hits and misses, and lock `_values`."""

    def __init__(self, capacity_bytes: int, *, size_of: Callable[[T], int]) -> None:
        self.hits = 0
        self.misses = 0
        self._values = _CountingLru[T](capacity_bytes, size_of)

    @property
    def dropped(self) -> int:
        """Values that had to make room."""
        return self._values.dropped

    @property
    def size_bytes(self) -> int:
        """Bytes of the values that are kept now."""
        return int(self._values.currsize)

    @property
    def capacity_bytes(self) -> int:
        """Bytes that the values may take together."""
        return int(self._values.maxsize)

    def _fits(self, value: T) -> bool:
        """Returns whether the value is within the budget; LRUCache raises ValueError for one that isn't."""
        return self._values.getsizeof(value) <= self.capacity_bytes
