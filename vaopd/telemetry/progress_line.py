"""How far long work is, and how long it will still take: one line, drawn over itself in a terminal, plain elsewhere.

progress = Progress("evaluating", total=300, unit="problems")
progress.at(64)                                  # evaluating: 64/300 problems, 0:41 left
progress.at(300)                                 # evaluating: 300/300 problems in 0:52
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

PLAIN_EVERY_S = 10.0
DRAWN_EVERY_S = 0.1


class Progress:
    """`stream` is standard error where nothing is said: what a command prints stays clean."""

    def __init__(
        self,
        what: str,
        *,
        total: int,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = PLAIN_EVERY_S,
    ) -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._every_s = DRAWN_EVERY_S if self._terminal else every_s
        self._started = self._told = clock()

    def at(self, done: int, note: str = "") -> None:
        """So much is done. Told when it is time, and always at the end, where the line stays."""
        now = self._clock()
        ended = done >= self._total
        if not ended and now - self._told < self._every_s:
            return
        self._told = now
        seconds = now - self._started
        if ended:
            left = f" in {duration(seconds)}"
        else:
            left = f", {duration(seconds / done * (self._total - done))} left" if done else ""
        line = f"{self._what}: {done}/{self._total} {self._unit}{left}{f'  {note}' if note else ''}"
        draw(self._stream, line, stays=ended)


def draw(stream: TextIO, line: str, *, stays: bool) -> None:
    """In a terminal over the last line that didn't stay, cut to its width; elsewhere a line like any other."""
    if stream.isatty():
        shown = line if stays else line[: shutil.get_terminal_size().columns - 1]
        stream.write(f"\r\x1b[K{shown}" + ("\n" if stays else ""))
    else:
        stream.write(line + "\n")
    stream.flush()


def duration(seconds: float) -> str:
    """
    >>> duration(3671), duration(65)
    ('1:01:11', '1:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
