"""What trainer and workers can rely on, as tests of both implementations of the queue.

A test module makes a subclass of `QueueContract`; its folder's fixture `a_job` is on Redis, or in memory (tests/unit).
Messages are compared where both must name the same things. `queue_fault_contract` has the tests of
trainers and workers that fail.
"""

from __future__ import annotations

import pytest

from tests.support.groups import a_request, an_answer, answer, collect_one, take_one
from tests.support.queue_fault_contract import QueueJob, TrainersThatFail, WorkersThatFail
from vaopd.errors import Mismatch
from vaopd.types import PolicyVersion


class RequestsAndGroups:
    """While nothing breaks."""

    def test_a_group_goes_round(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        request = a_request("g1")

        assert trainer.enqueue(request)
        [lease] = worker.take(block_s=1)
        assert lease.request == request
        assert trainer.requests_in_flight() == 1  # until it is answered

        assert worker.complete(lease, an_answer(lease.request))
        assert trainer.requests_in_flight() == 0
        [delivered] = trainer.collect(block_s=1)
        assert (delivered.group.group_id, delivered.deliveries) == ("g1", 1)
        assert delivered.group.rollouts[1].response_ids.tolist() == [5, 6, 8]

        assert trainer.acknowledge([delivered.entry_id]) == 1
        assert trainer.acknowledge([delivered.entry_id]) == 0  # again does no harm
        assert trainer.collect(block_s=0) == []

    def test_waiting_ends_when_nothing_comes(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        assert a_job.worker("w1").take(block_s=0) == []
        assert trainer.collect(block_s=0.05) == []

    def test_two_workers_share_the_requests(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        for name in ("g1", "g2", "g3"):
            trainer.enqueue(a_request(name))
        first = a_job.worker("w1").take(block_s=1, max_requests=2)
        second = a_job.worker("w2").take(block_s=1, max_requests=2)
        assert [lease.request.group_id for lease in first] == ["g1", "g2"]
        assert [lease.request.group_id for lease in second] == ["g3"]

    def test_a_request_is_published_once(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        assert trainer.enqueue(a_request("g1", policy_version=3))
        assert not trainer.enqueue(a_request("g1", policy_version=3))
        assert trainer.requests_in_flight() == 1
        assert trainer.enqueue(a_request("g1", policy_version=4))  # for other weights it is another request

        for lease in worker.take(block_s=1, max_requests=2):
            worker.complete(lease, an_answer(lease.request))
        assert not trainer.enqueue(a_request("g1", policy_version=3))  # still, after it was answered
        unknown = a_request("g2", policy_version=3)
        assert trainer.unpublished([a_request("g1", policy_version=3), unknown]) == [unknown]

    def test_a_repeated_commit_is_the_same_commit(self, a_job: QueueJob) -> None:
        """As after a lost reply."""
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1"))
        lease = take_one(worker)
        assert worker.complete(lease, an_answer(lease.request))
        assert worker.complete(lease, an_answer(lease.request))
        assert collect_one(trainer).group.group_id == "g1"
        assert trainer.collect(block_s=0) == []

    def test_the_answer_must_be_to_the_request(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1", policy_version=3))
        lease = take_one(worker)
        with pytest.raises(Mismatch, match="answers another request"):
            worker.complete(lease, an_answer(a_request("g1", policy_version=4)))
        assert worker.complete(lease, an_answer(lease.request))

    def test_a_group_that_can_not_be_used_is_asked_for_again(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1"))
        answer(worker)
        delivered = collect_one(trainer)
        trainer.ask_again(delivered.entry_id, delivered.group, a_request("g1"))
        trainer.ask_again(delivered.entry_id, delivered.group, a_request("g1"))  # again does no harm
        assert trainer.requests_in_flight() == 1
        answer(worker)
        assert collect_one(trainer).group.group_id == "g1"

    def test_policies(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        assert worker.policy(0) is None
        versions = [PolicyVersion(version=v, path=f"/run/policy/v{v:06d}", sha256=f"{v:064d}") for v in range(4)]
        for policy in versions:
            trainer.publish_policy(policy)
        assert worker.policy(1) == trainer.policy(1) == versions[1]

        # A trainer resumed from version 1 publishes its own 2: the old 3 must not be sampled from any more.
        trainer.publish_policy(versions[2])
        assert worker.policy(2) == versions[2]
        assert worker.policy(3) is None

    def test_forgetting_drops_what_belongs_to_old_versions(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1", policy_version=1))
        trainer.enqueue(a_request("g2", policy_version=2))
        for version in (1, 2):
            trainer.publish_policy(PolicyVersion(version=version, path="/p", sha256="00"))
        assert trainer.forget(before_version=2) == 1
        assert not trainer.enqueue(a_request("g2", policy_version=2))
        assert trainer.enqueue(a_request("g1", policy_version=1))
        assert worker.policy(1) is None
        assert worker.policy(2) is not None
        trainer.forget(before_version=3)
        assert worker.policy(2) is not None  # the latest stays

    def test_the_trainer_sees_which_workers_are_up(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        assert trainer.workers_alive() == []
        first, second = a_job.worker("w1"), a_job.worker("w2")
        first.take(block_s=0)
        second.renew()
        assert trainer.workers_alive() == ["w1", "w2"]
        second.close()
        assert trainer.workers_alive() == ["w1"]


class QueueContract(RequestsAndGroups, WorkersThatFail, TrainersThatFail):
    """All of it."""
