"""What the teacher's stores share: values by key within a budget of bytes, the least recently used make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLru(Generic[T]):
    """Not locked: whoever has several threads locks around it."""

    def __init__(self, capacity_bytes: int, *, size_of: Callable[[T], int]) -> None:
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self.dropped = 0
        """Values that had to make room."""
        self._size_of = size_of
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        """The value, which counts as used just now; None when it isn't here."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def fits(self, value: T) -> bool:
        """Whether the budget could hold it at all; what doesn't fit must not be put."""
        return self._size_of(value) <= self.capacity_bytes

    def put(self, key: str, value: T) -> None:
        """Keeps the value; one that is here under `key` already stays, and counts as used just now."""
        if self.get(key) is not None:
            return
        self._values[key] = value
        self.size_bytes += self._size_of(value)
        while self.size_bytes > self.capacity_bytes:
            _, dropped = self._values.popitem(last=False)
            self.size_bytes -= self._size_of(dropped)
            self.dropped += 1
