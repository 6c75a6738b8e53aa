"""The queue against a real Valkey when trainers and workers die, hang or come back late."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.groups import a_request, an_answer, answer, take_one
from tests.support.lost_replies import LossyRelay
from tests.support.queue_jobs import Job
from tests.support.waiting import wait_until
from vaopd.errors import LeaseLost, NotFound, Unavailable
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis

SHORT_S = 0.15
HELD_S = 3.0
"""A lease that a keeper holds, though other processes leave it no core for two seconds."""


def test_a_slow_worker_keeps_its_request_while_it_renews(a_job: Job) -> None:
    trainer = a_job.trainer()
    slow, other = a_job.worker("slow", lease_s=HELD_S), a_job.worker("other", lease_s=HELD_S)
    trainer.enqueue(a_request("g1"))
    lease = take_one(slow)
    with slow.keeper() as keeper:
        assert other.take(block_s=HELD_S + 0.5) == []
        keeper.check()
    assert lease.deliveries == 1
    assert slow.complete(lease, an_answer(lease.request))


def test_a_trainer_that_could_not_bury_gets_the_groups_before_the_bad_one_again(
    a_job: Job, redis_server: EmbeddedRedis
) -> None:
    with LossyRelay(redis_server.port) as relay:
        url = relay.url
        with closing(TrainerQueue(url=url, job=a_job.name, patience_s=0)) as trainer:
            trainer.acquire()
            trainer.enqueue(a_request("g1"))
            answer(a_job.worker("w1"))
            a_job.put_raw("groups", "torn@0", b"\xff")
            relay.lose_reply_to(b"torn@0")
            with pytest.raises(Unavailable):
                trainer.collect(block_s=1)
            assert relay.lost
            assert [d.group.group_id for d in trainer.collect(block_s=1)] == ["g1"]


def test_a_worker_that_could_not_bury_does_not_hold_on_to_what_nobody_works_on(
    a_job: Job, redis_server: EmbeddedRedis
) -> None:
    with LossyRelay(redis_server.port) as relay:
        queue = WorkerQueue(url=relay.url, job=a_job.name, worker="w1", patience_s=0, lease_s=SHORT_S)
        with closing(queue) as worker:
            a_job.trainer().enqueue(a_request("g1"))
            a_job.put_raw("requests", "torn@0", b"\xff")
            relay.lose_reply_to(b"torn@0")
            with pytest.raises(Unavailable):
                worker.take(block_s=1, max_requests=2)
            assert relay.lost
            assert worker.held() == []  # so nothing is renewed, and the lease runs out
            assert take_one(worker).deliveries == 2


def test_dead_letters_can_be_sent_again_or_dropped(a_job: Job) -> None:
    trainer, worker, letters = a_job.trainer(), a_job.worker("w1"), a_job.dead_letters()
    for name in ("g1", "g2"):
        trainer.enqueue(a_request(name))
        worker.fail(take_one(worker), "for a test")
    first, second = letters.list()
    letters.drop(first.entry_id)
    letters.retry(second.entry_id)
    assert letters.list() == []
    assert answer(worker).group_id == "g2"
    with pytest.raises(NotFound, match="no dead letter"):
        letters.retry(second.entry_id)


def test_the_keeper_holds_the_job_and_says_when_it_is_lost(a_job: Job) -> None:
    trainer = a_job.trainer(lease_s=HELD_S)
    with trainer.keeper() as keeper, closing(TrainerQueue(url=a_job.url, job=a_job.name)) as second:
        with pytest.raises(LeaseLost, match=r"is held by .* another job name"):
            second.acquire(wait_s=HELD_S + 0.5)
        keeper.check()

        a_job.trainer_dies()
        second.acquire()

        def noticed() -> bool:
            try:
                keeper.check()
            except LeaseLost:
                return True
            return False

        wait_until("the keeper has noticed", noticed)
        second.renew()
