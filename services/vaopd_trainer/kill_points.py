"""For the fault tests: a trainer that dies at a chosen point, as by `kill -9`.

VAOPD_KILL_AT=backward:3 ends the process in step 3, once its gradients are there. Unset, as ever, it does nothing.
"""

from __future__ import annotations

import os
import signal
from typing import Literal, get_args

KillPoint = Literal[
    "collected",  # every group of the step has come
    "scored",
    "backward",  # gradients are there, the optimizer has not stepped
    "stepped",
    "written",  # the checkpoint's files lie aside; nothing is renamed yet
    "renamed",  # the checkpoint is durable; older ones are still there
    "unacknowledged",  # older checkpoints are gone; the queue knows nothing of it
]
KILL_POINTS: tuple[KillPoint, ...] = get_args(KillPoint)


def reached(point: KillPoint, step: int) -> None:
    """`step` counts from 0; of a checkpoint, it is the step that it goes on from."""
    if os.environ.get("VAOPD_KILL_AT") == f"{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
