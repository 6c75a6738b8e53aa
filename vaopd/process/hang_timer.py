"""Ends a process that hangs, so that its supervisor restarts it: exit status 1, after every thread's stack is printed.

By a timer of the C runtime, which needs neither an event loop nor Python's lock. A process has one such timer; the
teacher's is in `vaopd_teacher.hang_watch`. Standard library only.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


def expect_life_within(seconds: float) -> None:
    """The process ends in so many seconds, unless this is called again or `expect_nothing` before."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def expect_nothing() -> None:
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """The block must be over by then."""
    expect_life_within(seconds)
    try:
        yield
    finally:
        expect_nothing()
