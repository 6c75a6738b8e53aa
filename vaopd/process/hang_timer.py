"""Ends a process that hangs, so that its supervisor restarts it.

A timer of the C runtime, which needs neither an event loop nor Python's lock, prints every thread's stack and exits
with status 1. A process has one such timer; the teacher sets its own in `vaopd_teacher.hang_watch`. Standard library
only.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


def expect_life_within(seconds: float) -> None:
    """Ends the process in `seconds`, unless this is called again or `expect_nothing` before."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def expect_nothing() -> None:
    """Stops the timer."""
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Ends the process when the `with` block takes longer than `seconds`."""
    expect_life_within(seconds)
    try:
        yield
    finally:
        expect_nothing()
