"""The queue against a real Valkey when processes die, hang or come back late, and when Redis itself does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import redis

from tests.support.groups import a_request, an_answer
from tests.support.lost_replies import LossyRelay
from tests.support.redis import job, redis_server  # noqa: F401
from tests.support.waiting import wait_until
from vaopd import wire
from vaopd.embedded_redis import EmbeddedRedis
from vaopd.errors import LeaseLost, Mismatch, NotFound, Unavailable
from vaopd.queue import DeadLetters, Delivered, Lease, TrainerQueue, WorkerQueue
from vaopd.types import RolloutRequest

SHORT_S = 0.15


class Job:
    """One job on one server; trainers and workers made here are closed at the end, in whatever state they are."""

    def __init__(self, url: str, name: str, stack: ExitStack) -> None:
        self.url, self.name, self._stack = url, name, stack

    def trainer(self, *, lease_s: float = 30.0, wait_s: float = 0.0, url: str | None = None) -> TrainerQueue:
        queue = self._stack.enter_context(closing(TrainerQueue(url=url or self.url, job=self.name, lease_s=lease_s)))
        queue.acquire(wait_s=wait_s)
        return queue

    def worker(self, name: str, *, lease_s: float = 30.0, url: str | None = None) -> WorkerQueue:
        queue = WorkerQueue(url=url or self.url, job=self.name, worker=name, lease_s=lease_s)
        return self._stack.enter_context(closing(queue))

    def dead_letters(self) -> DeadLetters:
        return self._stack.enter_context(closing(DeadLetters(url=self.url, job=self.name)))

    def put_raw(self, stream: str, key: str, body: bytes) -> None:
        """What no trainer or worker would write."""
        with redis.Redis.from_url(self.url) as client:
            client.xadd(f"vaopd:{{{self.name}}}:{stream}", {"key": key, "body": body})


@pytest.fixture
def a_job(redis_server: EmbeddedRedis, job: str) -> Iterator[Job]:  # noqa: F811
    with ExitStack() as stack:
        yield Job(redis_server.url, job, stack)


@pytest.fixture
def make_job() -> Iterator[Callable[[EmbeddedRedis], Job]]:
    """A job on a server of the test's own."""
    with ExitStack() as stack:
        yield lambda server: Job(server.url, "test", stack)


def take_one(worker: WorkerQueue) -> Lease:
    [lease] = worker.take(block_s=10)
    return lease


def collect_one(trainer: TrainerQueue) -> Delivered:
    [delivered] = trainer.collect(block_s=10, max_groups=1)
    return delivered


def answer(worker: WorkerQueue) -> RolloutRequest:
    lease = take_one(worker)
    worker.complete(lease, an_answer(lease.request, worker=worker.worker))
    return lease.request


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_silent_workers_request_is_taken_over_and_its_late_commit_refused(a_job: Job) -> None:
    trainer = a_job.trainer()
    silent, other = a_job.worker("silent", lease_s=SHORT_S), a_job.worker("other", lease_s=SHORT_S)
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
    before, after = a_job.worker("w1", lease_s=SHORT_S), a_job.worker("w1", lease_s=SHORT_S)
    old, new = take_one(before), take_one(after)
    with pytest.raises(LeaseLost):
        before.complete(old, an_answer(old.request))
    assert after.complete(new, an_answer(new.request))


def test_a_slow_worker_keeps_its_request_while_it_renews(a_job: Job) -> None:
    trainer = a_job.trainer()
    slow, other = a_job.worker("slow", lease_s=0.5), a_job.worker("other", lease_s=0.5)
    trainer.enqueue(a_request("g1"))
    lease = take_one(slow)
    with slow.keeper() as keeper:
        assert other.take(block_s=1.2) == []
        keeper.check()
    assert lease.deliveries == 1
    assert slow.complete(lease, an_answer(lease.request))


def test_renewing_tells_what_is_lost(a_job: Job) -> None:
    trainer = a_job.trainer()
    worker, other = a_job.worker("w1", lease_s=SHORT_S), a_job.worker("w2", lease_s=SHORT_S)
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


def test_a_request_that_nobody_can_answer_is_a_dead_letter_at_once(a_job: Job) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w1")
    trainer.enqueue(a_request("g1"))
    worker.fail(take_one(worker), "the prompt is longer than the model's limit")
    [letter] = trainer.dead_letters()
    assert letter.reason == "the prompt is longer than the model's limit"
    assert wire.rollout_request_from_bytes(letter.body) == a_request("g1")
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
    trainer, worker = a_job.trainer(lease_s=SHORT_S), a_job.worker("w1")
    for name in ("g1", "g2", "g3", "g4"):
        trainer.enqueue(a_request(name))
        answer(worker)
    first, *_ = trainer.collect(block_s=1, max_groups=3)
    trainer.acknowledge([first.entry_id])  # in a durable checkpoint; g2 and g3 are not; g4 was never read

    resumed = a_job.trainer(wait_s=10)
    delivered = resumed.collect(block_s=1, max_groups=10) + resumed.collect(block_s=1, max_groups=10)
    assert [(d.group.group_id, d.deliveries) for d in delivered] == [("g2", 2), ("g3", 2), ("g4", 1)]
    assert resumed.collect(block_s=0) == []


def test_a_trainer_that_lost_its_job_can_neither_take_nor_acknowledge(a_job: Job) -> None:
    frozen, worker = a_job.trainer(lease_s=SHORT_S), a_job.worker("w1")
    frozen.enqueue(a_request("g1"))
    answer(worker)
    late = collect_one(frozen)
    resumed = a_job.trainer(wait_s=10)
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
    trainer = a_job.trainer(lease_s=0.3)
    with trainer.keeper() as keeper:
        with pytest.raises(LeaseLost, match="is held by"):
            a_job.trainer(wait_s=0.8)
        keeper.check()
    second = a_job.trainer(wait_s=10)
    with trainer.keeper() as keeper:

        def noticed() -> bool:
            try:
                keeper.check()
            except LeaseLost:
                return True
            return False

        wait_until("the keeper has noticed", noticed)
    second.renew()


def test_a_group_that_kills_the_trainer_five_times_is_a_dead_letter(a_job: Job) -> None:
    trainer = a_job.trainer(lease_s=0.05)
    trainer.enqueue(a_request("g1"))
    answer(a_job.worker("w1"))
    for death in range(1, 6):
        assert collect_one(trainer).deliveries == death
        trainer = a_job.trainer(lease_s=0.05 if death < 5 else 30, wait_s=10)
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


# -- the network ------------------------------------------------------------------------------------------------------


def test_lost_replies_neither_double_nor_lose_anything(a_job: Job, redis_server: EmbeddedRedis) -> None:  # noqa: F811
    with LossyRelay(redis_server.port) as relay:
        trainer = a_job.trainer(url=relay.url)
        worker = a_job.worker("w1", url=relay.url, lease_s=SHORT_S)
        answer_first = a_job.worker("w0")
        trainer.enqueue(a_request("g0"))
        answer(answer_first)
        collect_one(trainer)  # now each script is known to the server, and only EVALSHA travels

        relay.lose_reply_to(b"g1@0")
        assert not trainer.enqueue(a_request("g1"))  # published, though the answer to the first try was lost
        assert relay.lost
        assert trainer.requests_in_flight() == 1

        worker.take(block_s=0, max_requests=1)
        worker.release_all()
        lease = take_one(worker)
        with worker.keeper():
            relay.lose_reply_to(b"g1@0")
            assert worker.complete(lease, an_answer(lease.request))  # the first try was the commit
            assert relay.lost

        relay.lose_reply_to(trainer.owner.encode())
        assert collect_one(trainer).group.group_id == "g1"  # `>` alone would never show it again
        assert relay.lost
        assert trainer.collect(block_s=0) == []


# -- Redis ------------------------------------------------------------------------------------------------------------


def test_a_full_redis_refuses_new_work_lets_finished_work_out_and_recovers(
    make_job: Callable[[EmbeddedRedis], Job],
) -> None:
    with EmbeddedRedis(maxmemory_bytes=8 * 2**20) as server:
        full = make_job(server)
        trainer, worker = full.trainer(), full.worker("w1")
        trainer.enqueue(a_request("small"))
        answer(worker)
        group = collect_one(trainer)

        def fill() -> None:
            for count in range(100):
                trainer.enqueue(a_request(f"big{count}", image_bytes=2**20))

        with pytest.raises(Unavailable, match=r"is full \(maxmemory\); nothing was written"):
            fill()
        published = trainer.requests_in_flight()
        assert 0 < published < 8
        assert trainer.acknowledge([group.entry_id]) == 1
        trainer.renew()
        trainer.release()
        trainer = full.trainer()  # even a restart works

        for _ in range(published):
            answer(worker)
        assert len(trainer.collect(block_s=1)) == published
        wait_until("there is room again", lambda: trainer.enqueue(a_request(f"big{published}")) or True)


def test_a_killed_redis_with_an_append_only_file_loses_nothing_acknowledged(
    tmp_path: Path, make_job: Callable[[EmbeddedRedis], Job]
) -> None:
    with EmbeddedRedis(folder=tmp_path / "redis", append_only="always") as server:
        survivor = make_job(server)
        trainer, worker = survivor.trainer(), survivor.worker("w1")
        for name in ("g1", "g2", "g3"):
            trainer.enqueue(a_request(name))
        answer(worker)
        acknowledged = collect_one(trainer)
        trainer.acknowledge([acknowledged.entry_id])
        answer(worker)
        lease = take_one(worker)

        server.kill()
        revival = threading.Timer(0.3, server.start)
        revival.start()
        assert trainer.enqueue(a_request("g4"))  # waits until Redis is back
        revival.join()

        assert collect_one(trainer).group.group_id == "g2"  # g1 is gone for good
        assert not trainer.enqueue(a_request("g1"))
        assert worker.complete(lease, an_answer(lease.request))  # the lease outlived Redis
        assert answer(worker).group_id == "g4"
        assert [d.group.group_id for d in trainer.collect(block_s=1)] == ["g3", "g4"]
        trainer.check_epoch()


def test_a_redis_that_came_back_empty_is_noticed_and_filled_again(make_job: Callable[[EmbeddedRedis], Job]) -> None:
    with EmbeddedRedis() as server:
        emptied = make_job(server)
        trainer, worker = emptied.trainer(), emptied.worker("w1")
        trainer.enqueue(a_request("g1"))
        lost = take_one(worker)
        server.kill()
        server.start()

        with pytest.raises(LeaseLost):
            worker.complete(lost, an_answer(lost.request))
        assert worker.take(block_s=0.01) == []  # makes its streams anew
        for call in (trainer.check_epoch, trainer.renew, lambda: trainer.collect(block_s=0)):
            with pytest.raises(Mismatch, match=r"came back empty.* acquire\(\) again and enqueue"):
                call()
        trainer.acquire()
        assert trainer.enqueue(a_request("g1"))
        assert answer(worker).group_id == "g1"
        assert collect_one(trainer).group.group_id == "g1"


def test_an_unreachable_redis_is_unavailable_not_a_hang(make_job: Callable[[EmbeddedRedis], Job]) -> None:
    with EmbeddedRedis() as server:
        url = server.url
    with closing(WorkerQueue(url=url, job="j", worker="w", patience_s=0.2)) as worker:
        with pytest.raises(Unavailable, match=r"did not answer for 0\.2 s"):
            worker.take(block_s=10)
        with pytest.raises(Unavailable):
            worker.latest_policy()
