"""Requests and finished groups through Redis Streams: at least once on the wire, exactly once in effect.

    trainer ── enqueue ──►  requests  ── take ──►  worker    (a lease; renewed, taken over when it runs out)
    trainer ◄── collect ──  groups  ◄── complete ──  worker  (one commit; fenced by the lease)
    trainer ── acknowledge ──►  groups                       (after a durable checkpoint; fenced by the job's lease)

The scripts beside this file are the commits; each is atomic. `docs/decisions/2026-11-24-queue.md` says why it is so.
"""

from vaopd.queue.dead_letters import DeadLetter, DeadLetters
from vaopd.queue.keeper import LeaseKeeper
from vaopd.queue.trainer import Delivered, TrainerQueue
from vaopd.queue.worker import Lease, WorkerQueue

__all__ = ["DeadLetter", "DeadLetters", "Delivered", "Lease", "LeaseKeeper", "TrainerQueue", "WorkerQueue"]
