"""The queue against a real Valkey when trainers and workers die, hang or come back late."""
# ruff: noqa: F401, F811  (fixtures are imported, then named as parameters)

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.groups import a_request, an_answer
from tests.support.lost_replies import LossyRelay
from tests.support.queue_jobs import Job, a_job, answer, collect_one, take_one
from tests.support.redis import job, redis_server
from tests.support.waiting import wait_until
from vaopd.errors import LeaseLost, NotFound, Unavailable
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.wire.queue import rollout_group_to_bytes, rollout_request_from_bytes, rollout_request_to_bytes

SHORT_S = 0.15


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_silent_workers_request_is_taken_over_and_its_late_commit_refused(a_job: Job) -> None:
    trainer = a_job.trainer()
    silent, other = a_job.worker("silent"), a_job.worker("other", lease_s=SHORT_S)
    trainer.enqueue(a_request("g1"))
    late = take_one(silent)

    lease = take_one(other)
    assert (lease.entry_id, lease.deliveries) == (late.entry_id, 2)
    with pytest.raises(LeaseLost, match="'silent' lost its lease on group 'g1'"):
        silent.complete(late, an_answer(late.request, worker="silent"))
    assert trainer.collect(block_s=0) == []

    assert other.complete(lease, an_answer(lease.request, worker="other"))
    with pytest.raises(LeaseLost):
        silent.complete(late, an_answer(late.request, worker="silent"))
    assert collect_one(trainer).group.worker == "other"
    assert trainer.collect(block_s=0) == []


def test_a_restarted_worker_of_the_same_name_does_not_commit_for_its_predecessor(a_job: Job) -> None:
    trainer = a_job.trainer()
    trainer.enqueue(a_request("g1"))
    before, after = a_job.worker("w1"), a_job.worker("w1", lease_s=SHORT_S)
    old, new = take_one(before), take_one(after)
    with pytest.raises(LeaseLost):
        before.complete(old, an_answer(old.request))
    assert after.complete(new, an_answer(new.request))


def test_a_slow_worker_keeps_its_request_while_it_renews(a_job: Job) -> None:
    trainer = a_job.trainer()
    slow, other = a_job.worker("slow", lease_s=0.8), a_job.worker("other", lease_s=0.8)
    trainer.enqueue(a_request("g1"))
    lease = take_one(slow)
    with slow.keeper() as keeper:
        assert other.take(block_s=1.6) == []
        keeper.check()
    assert lease.deliveries == 1
    assert slow.complete(lease, an_answer(lease.request))


def test_renewing_tells_what_is_lost(a_job: Job) -> None:
    trainer = a_job.trainer()
    worker, other = a_job.worker("w1"), a_job.worker("w2", lease_s=SHORT_S)
    trainer.enqueue(a_request("g1"))
    lease = take_one(worker)
    assert worker.renew() == []
    take_one(other)
    assert worker.renew() == [lease]
    assert worker.held() == []


def test_a_request_handed_back_can_be_taken_at_once_and_does_not_age(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=3600)
    trainer.enqueue(a_request("g1"))
    for _ in range(7):  # more than max_deliveries
        assert take_one(worker).deliveries == 1
        worker.release_all()
    other = a_job.worker("w2", lease_s=3600)
    lease = take_one(other)
    assert worker.renew([lease]) == [lease]
    assert other.complete(lease, an_answer(lease.request))


def test_a_request_whose_fifth_worker_dies_is_a_dead_letter(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=0.02)
    trainer.enqueue(a_request("g1", policy_version=7))
    assert [take_one(worker).deliveries for _ in range(5)] == [1, 2, 3, 4, 5]
    wait_until("the entry is given up", lambda: worker.take(block_s=0) == [] and trainer.requests_in_flight() == 0)

    [letter] = trainer.dead_letters()
    assert (letter.group_id, letter.policy_version, letter.stream, letter.deliveries) == ("g1", 7, "requests", 5)
    assert "5 deliveries without a commit" in letter.reason
    assert trainer.dead_letters(after=letter.entry_id) == []


def test_a_request_that_kills_its_workers_does_not_draw_its_neighbours_with_it(a_job: Job) -> None:
    """Each worker takes what it can get, and dies of "killer"; who survives answers the rest."""
    trainer = a_job.trainer()
    for name in ("g1", "killer", "g2"):
        trainer.enqueue(a_request(name))
    answered: list[str] = []

    def all_settled() -> bool:
        worker = a_job.worker("w1", lease_s=0.02)  # each a new process
        leases = worker.take(block_s=0, max_requests=8)
        leases += worker.take(block_s=0, max_requests=8)  # as a worker that lingers for a fuller batch
        if "killer" not in [lease.request.group_id for lease in leases]:
            for lease in leases:
                answered.append(lease.request.group_id)
                worker.complete(lease, an_answer(lease.request))
        return trainer.requests_in_flight() == 0

    wait_until("every request is settled", all_settled)
    assert sorted(answered) == ["g1", "g2"]
    [letter] = trainer.dead_letters()
    assert (letter.group_id, letter.deliveries) == ("killer", 5)


def test_a_request_that_nobody_can_answer_is_a_dead_letter_at_once(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1")
    trainer.enqueue(a_request("g1"))
    worker.fail(take_one(worker), "the prompt is longer than the model's limit")
    [letter] = trainer.dead_letters()
    assert letter.reason == "the prompt is longer than the model's limit"
    assert rollout_request_from_bytes(letter.body) == a_request("g1")
    assert trainer.requests_in_flight() == 0


def test_corrupt_entries_are_dead_letters_and_hold_nothing_up(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1")
    a_job.put_raw("requests", "broken@0", b"\xff\xff")
    trainer.enqueue(a_request("g1"))
    a_job.put_raw("groups", "torn@0", b"\xff\xff")
    assert answer(worker).group_id == "g1"
    assert collect_one(trainer).group.group_id == "g1"
    letters = {letter.group_id: letter for letter in trainer.dead_letters()}
    assert letters["broken"].reason == "2 bytes are not a RolloutRequest message"
    assert letters["torn"].reason == "2 bytes are not a RolloutGroup message"
    assert letters["torn"].body == b"\xff\xff"


FOREIGN = {
    "no key, no body": ({"colour": "blue"}, "a rollout request needs a group_id"),
    "key of no form": ({"key": b"\xff@@", "body": rollout_request_to_bytes(a_request("g9"))}, "filed under"),
    "another's body": ({"key": "g8@0", "body": rollout_request_to_bytes(a_request("g9"))}, "holds 'g9@0'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_somebody_else_put_into_a_stream_is_a_dead_letter_and_holds_nothing_up(a_job: Job, case: str) -> None:
    fields, complaint = FOREIGN[case]
    trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=SHORT_S)
    a_job.put_fields("requests", fields)
    trainer.enqueue(a_request("g1"))
    assert answer(worker).group_id == "g1"
    [letter] = trainer.dead_letters()
    assert complaint in letter.reason
    assert trainer.requests_in_flight() == 0


def test_a_group_filed_under_another_ones_key_is_a_dead_letter(a_job: Job) -> None:
    trainer = a_job.trainer()
    body = rollout_group_to_bytes(an_answer(a_request("g2")))
    a_job.put_fields("groups", {"key": "g1@0", "body": body})
    a_job.put_fields("groups", {"colour": "blue"})
    a_job.put_fields("groups", {"key": "g2@0", "body": body})
    assert collect_one(trainer).group.group_id == "g2"
    first, second = trainer.dead_letters()
    assert (first.key, first.reason) == ("g1@0", "it is filed under 'g1@0' and holds 'g2@0'")
    assert (second.group_id, second.policy_version) == ("", None)


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


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_a_resumed_trainer_first_gets_what_was_not_acknowledged(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1")
    for name in ("g1", "g2", "g3", "g4"):
        trainer.enqueue(a_request(name))
        answer(worker)
    first, *_ = trainer.collect(block_s=1, max_groups=3)
    trainer.acknowledge([first.entry_id])  # in a durable checkpoint; g2 and g3 are not; g4 was never read

    a_job.trainer_dies()
    resumed = a_job.trainer()
    delivered = resumed.collect(block_s=1, max_groups=10) + resumed.collect(block_s=1, max_groups=10)
    assert [(d.group.group_id, d.deliveries) for d in delivered] == [("g2", 2), ("g3", 2), ("g4", 1)]
    assert resumed.collect(block_s=0) == []


def test_a_trainer_that_lost_its_job_can_neither_take_nor_acknowledge(a_job: Job) -> None:
    frozen, worker = a_job.trainer(), a_job.worker("w1")
    frozen.enqueue(a_request("g1"))
    answer(worker)
    late = collect_one(frozen)
    a_job.trainer_dies()
    resumed = a_job.trainer()
    for refused in (
        lambda: frozen.collect(block_s=0),
        lambda: frozen.acknowledge([late.entry_id]),
        lambda: frozen.enqueue(a_request("g2")),
        lambda: frozen.dead_letter(late.entry_id, "late"),
        lambda: frozen.forget(9),
        frozen.renew,
        frozen.release,
        frozen.purge,
    ):
        with pytest.raises(LeaseLost):
            refused()
    assert collect_one(resumed).group.group_id == "g1"
    assert resumed.requests_in_flight() == 0


def test_the_keeper_holds_the_job_and_says_when_it_is_lost(a_job: Job) -> None:
    trainer = a_job.trainer(lease_s=0.8)
    with trainer.keeper() as keeper, closing(TrainerQueue(url=a_job.url, job=a_job.name)) as second:
        with pytest.raises(LeaseLost, match="is held by"):
            second.acquire(wait_s=1.6)
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


def test_a_dead_trainers_job_is_free_once_its_lease_has_run_out(a_job: Job) -> None:
    a_job.trainer(lease_s=0.3)
    with closing(TrainerQueue(url=a_job.url, job=a_job.name)) as second:
        second.acquire(wait_s=10)
        second.renew()


def test_a_group_that_kills_the_trainer_five_times_is_a_dead_letter(a_job: Job) -> None:
    trainer = a_job.trainer()
    trainer.enqueue(a_request("g1"))
    answer(a_job.worker("w1"))
    for death in range(1, 6):
        assert collect_one(trainer).deliveries == death
        a_job.trainer_dies()
        trainer = a_job.trainer()
    assert trainer.collect(block_s=0) == []
    [letter] = trainer.dead_letters()
    assert (letter.group_id, letter.stream, letter.deliveries) == ("g1", "groups", 5)


def test_clean_restarts_of_the_trainer_do_not_age_its_groups(a_job: Job) -> None:
    trainer = a_job.trainer()
    trainer.enqueue(a_request("g1"))
    answer(a_job.worker("w1"))
    for _ in range(7):  # more than max_deliveries
        assert collect_one(trainer).deliveries == 1
        trainer.release()
        trainer = a_job.trainer()


def test_a_group_can_be_given_up(a_job: Job) -> None:
    trainer = a_job.trainer()
    trainer.enqueue(a_request("g1"))
    answer(a_job.worker("w1"))
    trainer.dead_letter(collect_one(trainer).entry_id, "the teacher refuses it")
    assert [(x.group_id, x.stream, x.reason) for x in trainer.dead_letters()] == [
        ("g1", "groups", "the teacher refuses it")
    ]
