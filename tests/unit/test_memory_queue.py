"""The queue in memory keeps the contract; what unit tests show with it holds for Redis."""

from __future__ import annotations

from tests.support.groups import a_request, an_answer, take_one
from tests.support.memory_jobs import MemoryJob
from tests.support.queue_contract import QueueContract


class TestMemoryQueue(QueueContract):
    """Each test of the contract."""


def test_a_slow_worker_keeps_its_request_while_it_renews(a_job: MemoryJob) -> None:
    """With Redis the keeper's thread renews, in real time: tests/services/test_queue_faults.py."""
    trainer = a_job.trainer()
    slow, other = a_job.worker("slow", lease_s=30), a_job.worker("other", lease_s=30)
    trainer.enqueue(a_request("g1"))
    lease = take_one(slow)
    for _ in range(3):
        assert other.take(block_s=20) == []
        assert slow.renew() == []
    assert slow.complete(lease, an_answer(lease.request))


def test_waiting_takes_no_time_and_moves_the_clock(a_job: MemoryJob) -> None:
    trainer = a_job.trainer(lease_s=120)
    before_s = a_job.broker.clock()
    assert trainer.collect(block_s=60) == []
    assert a_job.broker.clock() - before_s >= 60
    trainer.renew()
