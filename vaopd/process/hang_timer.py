"""Ends a process that hangs, so that its supervisor restarts it.

A timer of the C runtime, which needs neither an event loop nor Python's lock, prints every thread's stack and exits
with status 1. Stacks are read without a lock: where threads come and go meanwhile, that may crash, and the process ends
by SIGSEGV. A process has one such timer; teacher and API, which live on an event loop, set it by themselves. Standard
library only.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Ends the process when the `with` block takes longer than `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
