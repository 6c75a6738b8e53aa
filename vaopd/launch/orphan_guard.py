"""Ends process groups when the process that started them is gone, even by SIGKILL. Standard library only.

`supervisor.py` starts it in a session of its own and holds the writing end of its standard input: a line "+PGID" adds a
group, "-PGID" removes it. End of file means that the launcher is gone. PR_SET_PDEATHSIG would not be enough: it does
not reach grandchildren, and vLLM's engine is one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

GRACE_S = 10.0


def main() -> None:
    """Reads groups until the launcher is gone, then ends them: SIGTERM, and SIGKILL after a grace period."""
    groups: set[int] = set()
    for line in sys.stdin:
        if line.startswith("+"):
            groups.add(int(line[1:]))
        else:
            groups.discard(int(line[1:]))
    signal_groups(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(group_lives(group) for group in groups):
        time.sleep(0.05)
    signal_groups(groups, signal.SIGKILL)


def signal_groups(groups: set[int], number: signal.Signals) -> None:
    """Sends a signal to every process of the groups."""
    for group in groups:
        # A group that is gone, or has become another user's, needs no signal.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def group_lives(group: int) -> bool:
    """Returns whether a process of the group is left; a zombie counts until its parent reaps it."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
