"""Requests and finished groups through Redis Streams: at least once on the wire, exactly once in effect.

`protocol.py` says what the trainer's and the worker's end promise; the other files keep it with Redis. Each script in
`lua/` is one atomic commit, and `scripts.py` has their signatures. `docs/decisions/2026-11-24-queue.md` says why.
"""

from vaopd.queue.dead_letters import DeadLetters
from vaopd.queue.keeper import LeaseKeeper
from vaopd.queue.protocol import DeadLetter, Delivered, Lease, TrainerEnd, WorkerEnd
from vaopd.queue.trainer import TrainerQueue
from vaopd.queue.worker import WorkerQueue
