"""The processes of a chaos run: a trainer, rollout workers and teachers, each without a model.

Queue, collector, ledger, checkpoint folder, worker loop, teacher client and wire are the real ones, in the real order;
only what a model would compute is a function of `world`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from tests.faults.chaos import world as w
from tests.faults.chaos.world import JOB, World
from vaopd.errors import InvalidInput, Mismatch, VaopdError
from vaopd.files.durable import atomic_folder
from vaopd.queue import LeaseKeeper, TrainerQueue, WorkerQueue
from vaopd.run.checkpoints import (
    FILE,
    LedgerLine,
    RunState,
    find_latest_checkpoint,
    list_checkpoints,
    load_run_state,
    write_run_state,
)
from vaopd.run.ledger import Ledger
from vaopd.sampling.engine import Outcome
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.wire.queue import rollout_group_to_bytes, rollout_request_to_bytes
from vaopd_rollout.worker import RolloutWorker, Stop
from vaopd_trainer.collector import Collector

log = logging.getLogger(__name__)

ScoresOf = Callable[[Sequence[RolloutGroup]], dict[str, list[float]]]

GAVE_UP = 3
PATIENCE_S = 5.0
_PR_SET_PDEATHSIG = 1


def begin(world: World, name: str) -> None:
    """In each process first: a log, and an end with the driver's."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with (world.folder / f"{name}.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")


class Outside:
    """Writes into the job's streams as no process of vaopd would, and notes what it did."""

    def __init__(self, world: World) -> None:
        self._redis: Any = redis.Redis.from_url(world.redis_url, socket_timeout=2, socket_connect_timeout=2)
        self._notes = world.folder / "outside.log"

    def put(self, what: str, stream: str, key: str, body: bytes) -> None:
        with contextlib.suppress(redis.RedisError):
            self._redis.xadd(f"vaopd:{{{JOB}}}:{stream}", {"key": key, "body": body})
            self.note(what)

    def note(self, what: str) -> None:
        with self._notes.open("a") as file:
            file.write(what + "\n")


# -- the teacher -------------------------------------------------------------------------------------------------------


def run_teacher(world: World, name: str, port: int) -> None:
    begin(world, name)
    from tests.faults.chaos import teacher  # gRPC does not survive a fork: it is imported after it

    teacher.serve(port)


# -- rollout workers ---------------------------------------------------------------------------------------------------


class _Engine:
    """A RolloutEngine."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._outside = Outside(world)
        self.policy: PolicyVersion | None = None

    def load_policy(self, policy: PolicyVersion) -> None:
        self.policy = policy

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        time.sleep(0.001 * len(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request: RolloutRequest) -> Outcome:
        assert self.policy is not None
        name = request.group_id
        if self._world.is_killer(name):
            self._outside.note("killer")
            os.kill(os.getpid(), signal.SIGKILL)
        if self._world.is_poison(name):
            return InvalidInput(f"group {name} is poison")
        group = w.group_for(request, self.policy.sha256, worker=self._name)
        key = f"{name}@{request.policy_version}"
        if self._world.has_a_corrupt_neighbour("groups", name):
            self._outside.put("corrupt", "groups", f"corrupt-{key}", b"\xff\xff")
        if self._world.is_duplicated("groups", name):
            self._outside.put("duplicate", "groups", key, rollout_group_to_bytes(group))
        return group

    def close(self) -> None: ...


def run_worker(world: World, name: str, skew_s: float) -> None:
    """Its host's clock is wrong by `skew_s`."""
    begin(world, name)
    right = time.time
    time.time = lambda: right() + skew_s
    queue = WorkerQueue(
        url=world.redis_url, job=JOB, worker=f"{name}-{os.getpid()}", lease_s=world.lease_s, patience_s=PATIENCE_S
    )
    stop = Stop(drain_s=1.0)
    stop.install()
    worker = RolloutWorker(engine=_Engine(world, name), queue=queue, requests_per_batch=16, stop=stop)
    _until_it_gives_up(worker.run)


# -- the trainer -------------------------------------------------------------------------------------------------------


def run_trainer(world: World, name: str) -> None:
    begin(world, name)
    with contextlib.ExitStack() as stack:
        _until_it_gives_up(lambda: _train(world, stack))


def _train(world: World, stack: contextlib.ExitStack) -> None:
    queue = TrainerQueue(url=world.redis_url, job=JOB, lease_s=world.lease_s, patience_s=PATIENCE_S)
    queue.acquire(wait_s=world.lease_s + 5)
    ledger = Ledger(world.run / FILE, owner=queue.owner, fresh=False)

    def renew() -> None:
        with contextlib.suppress(Mismatch):  # an empty Redis is the collector's to fill
            queue.renew()

    keeper = stack.enter_context(LeaseKeeper(renew=renew, every_s=world.lease_s / 3))
    from tests.faults.chaos import teacher

    ask = stack.enter_context(teacher.Asking(world.teacher_target))
    collector = Collector(queue=queue, ledger=ledger, remind_every_s=2.0)
    trainer = _Trainer(world, collector, ledger, keeper, ask)
    trainer.run()
    queue.release()


class _Trainer:
    def __init__(
        self, world: World, collector: Collector, ledger: Ledger, keeper: LeaseKeeper, scores_of: ScoresOf
    ) -> None:
        self._world = world
        self._collector = collector
        self._ledger = ledger
        self._keeper = keeper
        self._scores_of = scores_of
        self._outside = Outside(world)
        self._checkpoints = world.run / "checkpoints"
        self._weights = w.first_weights(world)
        self._state = RunState()
        newest = find_latest_checkpoint(self._checkpoints)
        if newest is not None:
            self._state = load_run_state(newest)
            self._weights = (newest / "weights.txt").read_text()
            collector.resume(self._state.step, (line.group_id for line in self._state.ledger))

    def run(self) -> None:
        while self._state.step < self._world.steps:
            while self._state.step == self._world.steps - 1 and not self._world.quiet.exists():
                self._keeper.check()
                time.sleep(0.02)
            self._step(self._state.step)
            self._checkpoint()

    def _step(self, step: int) -> None:
        world, check = self._world, self._keeper.check
        policy = PolicyVersion(version=step, path="/nowhere", sha256=w.policy_sha256(self._weights))
        self._collector.publish(policy, check=check)
        requests = [w.request_for(group_id, step) for group_id in world.group_ids(step)]
        self._collector.enqueue(requests, oldest_version=step, step=step, check=check)
        for request in requests:
            key = f"{request.group_id}@{step}"
            if world.is_duplicated("requests", request.group_id):
                self._outside.put("duplicate", "requests", key, rollout_request_to_bytes(request))
            if world.has_a_corrupt_neighbour("requests", request.group_id):
                self._outside.put("corrupt", "requests", f"corrupt-{key}", b"\xff\xff")
        logprobs: dict[str, list[float]] = {}
        groups: dict[str, RolloutGroup] = {}
        for arrived in self._collector.wait_for_groups(world.group_ids(step), check=check):
            groups |= {group.group_id: group for group in arrived}
            logprobs |= self._scores_of(arrived)
        for group_id in world.group_ids(step):
            if group_id not in logprobs:
                continue
            if world.is_refused(group_id):
                self._collector.dead_letter(group_id, "the trainer can't train on it")
                continue
            responses = [rollout.response_ids.tolist() for rollout in groups[group_id].rollouts]
            self._weights = w.train(self._weights, group_id, responses, logprobs[group_id])
            self._state.ledger.append(LedgerLine(group_id=group_id, step=step, policy_version=step))
        self._state.step = step + 1

    def _checkpoint(self) -> None:
        """In the order of `vaopd_trainer.coordinator`: durable first, then acknowledged."""
        step = self._state.step
        self._collector.confirm()
        self._ledger.sync()
        with atomic_folder(self._checkpoints / f"step_{step:06d}") as part:
            (part / "weights.txt").write_text(self._weights)
            write_run_state(part, self._state, files={})
        for old in list_checkpoints(self._checkpoints)[:-2]:
            shutil.rmtree(old)
        self._ledger.write("checkpoint", step=step)
        self._collector.acknowledge(line.group_id for line in self._state.ledger if line.step == step - 1)
        self._collector.forget(step)
        log.info("checkpoint %d", step)


def _until_it_gives_up(work: Callable[[], None]) -> None:
    """What a service's __main__ does: an error that was foreseen is told, and the exit status is not 0."""
    try:
        work()
    except (VaopdError, OSError) as error:
        log.error("%s: %s", type(error).__name__, error)
        sys.exit(GAVE_UP)
