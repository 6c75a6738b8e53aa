"""Shows the progress of long work in one line: drawn over itself in a terminal, printed now and then elsewhere.

progress = Progress("evaluating", total=300, unit="problems")
progress.report(64)                              # evaluating: 64/300 problems, 0:41 left
progress.report(300)                             # evaluating: 300/300 problems in 0:52
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from vaopd.telemetry.visible import escape

PLAIN_EVERY_S = 10.0
DRAWN_EVERY_S = 0.1


class Progress:
    """Prints how much is done and how long the rest will take."""

    def __init__(
        self,
        task: str,
        *,
        total: int,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = PLAIN_EVERY_S,
    ) -> None:
        """task, unit: for the line. stream: standard error by default, so that a command's output stays clean.

        every_s: between two lines where there is no terminal. clock: returns seconds.
        """
        self._task = task
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._every_s = DRAWN_EVERY_S if self._terminal else every_s
        self._started = self._last_printed = clock()

    def report(self, done: int, note: str = "") -> None:
        """Prints `done` of `total`, at most every `every_s` seconds, and always at the end, where the line stays."""
        now = self._clock()
        ended = done >= self._total
        if not ended and now - self._last_printed < self._every_s:
            return
        self._last_printed = now
        seconds = now - self._started
        if ended:
            left = f" in {format_duration(seconds)}"
        else:
            left = f", {format_duration(seconds / done * (self._total - done))} left" if done else ""
        line = f"{self._task}: {done}/{self._total} {self._unit}{left}{f'  {note}' if note else ''}"
        draw(self._stream, line, stays=ended)


def draw(stream: TextIO, line: str, *, stays: bool) -> None:
    """Prints a line; in a terminal over the last line that didn't stay, cut to the terminal's width."""
    line = escape(line)
    if stream.isatty():
        shown = line if stays else line[: shutil.get_terminal_size().columns - 1]
        stream.write(f"\r\x1b[K{shown}" + ("\n" if stays else ""))
    else:
        stream.write(line + "\n")
    stream.flush()


def format_duration(seconds: float) -> str:
    """Returns hours, minutes and seconds.

    >>> format_duration(3671), format_duration(65)
    ('1:01:11', '1:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
