"""Kills the trainer at a chosen point, as `kill -9` would; for the fault tests.

VAOPD_KILL_AT=backward:3 ends the process in step 3, after its backward pass. Without the variable, nothing happens.
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
    """Ends the process if the variable names this point and step.

    Steps count from 0; a checkpoint's is the step that follows it.
    """
    if os.environ.get("VAOPD_KILL_AT") == f"{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
