"""The rollout worker's loop on the queue in memory, with an engine that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.groups import a_request, an_answer, collect_one
from tests.support.memory_jobs import MemoryJob
from vaopd.errors import InvalidInput, Mismatch
from vaopd.sampling.engine import Outcome
from vaopd.types import PolicyVersion, RolloutRequest
from vaopd_rollout.worker import RolloutWorker, Stop

POLICIES = [PolicyVersion(version=version, path="/nowhere", sha256=f"{version:064d}") for version in range(2)]


class FakeEngine:
    """Loads anything; dies of a request named "poison", refuses one named "bad", and asks to stop after the rest."""

    def __init__(self, stop: Stop) -> None:
        self.policy: PolicyVersion | None = None
        self.calls: list[tuple[int, list[str]]] = []
        self._stop = stop

    def load_policy(self, policy: PolicyVersion) -> None:
        self.policy = policy

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        assert self.policy is not None
        names = [request.group_id for request in requests]
        self.calls.append((self.policy.version, names))
        if "poison" in names:
            raise MemoryError("out of memory")
        if "last" in names:
            self._stop.request()
        return [
            InvalidInput("damaged") if name == "bad" else an_answer(r) for name, r in zip(names, requests, strict=True)
        ]

    def close(self) -> None: ...


def test_requests_become_groups_of_the_policy_that_they_name(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    engine = FakeEngine(stop)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    for name, version in (("last", 1), ("bad", 0), ("good", 0)):
        trainer.enqueue(a_request(name, policy_version=version))

    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.calls == [(0, ["bad", "good"]), (1, ["last"])]
    assert [collect_one(trainer).group.group_id for _ in range(2)] == ["good", "last"]
    [letter] = trainer.dead_letters()
    assert (letter.group_id, letter.reason) == ("bad", "damaged")
    assert trainer.workers_alive() == []


def test_a_request_whose_policy_is_not_announced_is_handed_back(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    engine = FakeEngine(stop)
    trainer.publish_policy(POLICIES[0])
    trainer.enqueue(a_request("early", policy_version=1))
    trainer.enqueue(a_request("last", policy_version=0))

    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.calls == [(0, ["last"])]
    [lease] = a_job.worker("w2").take(block_s=0)
    assert (lease.request.group_id, lease.deliveries) == ("early", 1)


def test_a_policy_that_is_withdrawn_while_it_is_loaded_is_no_fault(a_job: MemoryJob) -> None:
    """Any other error of loading ends the worker."""
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    trainer.publish_policy(POLICIES[0])
    trainer.publish_policy(POLICIES[1])
    trainer.enqueue(a_request("g1", policy_version=1))

    class Withdrawing(FakeEngine):
        def load_policy(self, policy: PolicyVersion) -> None:
            if withdraws:
                trainer.publish_policy(POLICIES[0])
            stop.request()
            raise Mismatch("no such snapshot")

    withdraws = False
    with pytest.raises(Mismatch, match="no such snapshot"):
        RolloutWorker(engine=Withdrawing(stop), queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()
    withdraws, stop.requested = True, False
    RolloutWorker(engine=Withdrawing(stop), queue=a_job.worker("w2"), requests_per_batch=8, stop=stop).run()
    [lease] = a_job.worker("w3").take(block_s=0)
    assert lease.deliveries == 1


def test_a_request_that_kills_engines_counts_its_deliveries_and_the_others_are_handed_back(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    trainer.enqueue(a_request("poison", policy_version=0))
    trainer.enqueue(a_request("innocent", policy_version=1))

    with pytest.raises(MemoryError):
        RolloutWorker(engine=FakeEngine(stop), queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    other = a_job.worker("w2")
    delivered = {lease.request.group_id: lease.deliveries for lease in other.take(block_s=0, max_requests=8)}
    assert delivered == {"innocent": 1}
    [lease] = other.take(block_s=60)  # the lease of the poisonous request has run out by then
    assert (lease.request.group_id, lease.deliveries) == ("poison", 2)
