"""Kills the trainer at a chosen point, as `kill -9` would, or stops it there; for the fault tests.

VAOPD_KILL_AT=backward:3 ends the process in step 3, after its backward pass. VAOPD_STOP_AT=backward:3 freezes every
rank there, so that a test can kill one of them. Without the variables, nothing happens.
"""

from __future__ import annotations

import os
import signal
from typing import Literal, get_args

KillPoint = Literal[
    "collected",  # every group of the step has arrived
    "scored",
    "backward",  # gradients are there, the optimizer has not stepped
    "stepped",
    "written",  # the checkpoint's files are written beside its place, and not yet renamed
    "renamed",  # the checkpoint is durable; older ones are still there
    "unacknowledged",  # older checkpoints are gone; nothing is acknowledged yet
]
KILL_POINTS: tuple[KillPoint, ...] = get_args(KillPoint)


def pass_point(point: KillPoint, step: int) -> None:
    """Ends or freezes the process if a variable names this point and step.

    Steps count from 0; a checkpoint's is the step that follows it.
    """
    for variable, number in (("VAOPD_KILL_AT", signal.SIGKILL), ("VAOPD_STOP_AT", signal.SIGSTOP)):
        if os.environ.get(variable) == f"{point}:{step}":
            os.kill(os.getpid(), number)
