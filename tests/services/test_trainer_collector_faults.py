"""The trainer's collector when Redis is full, away or empty, and when groups come that are not what was asked for."""
# ruff: noqa: F401, F811  (fixtures are imported, then named as parameters)

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis

from tests.support.collectors import MakeCollector, a_policy, make_collector, never
from tests.support.groups import a_request, an_answer
from tests.support.queue_jobs import Job, a_job, answer, take_one
from tests.support.redis import job, redis_server
from vaopd.errors import LeaseLost
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.run.ledger import audit
from vaopd.types import RolloutGroup, RolloutRequest
from vaopd_trainer.collector import Collector

MIB = 2**20


def ask(collector: Collector, *requests: RolloutRequest, check: Callable[[], None] = never) -> None:
    collector.enqueue(requests, oldest_version=0, step=0, check=check)


def collect(collector: Collector, *group_ids: str, check: Callable[[], None] = never) -> list[RolloutGroup]:
    return [group for groups in collector.groups(group_ids, check=check) for group in groups]


class Stopped(Exception):
    """What the trainer raises when it was asked to stop."""


def stop() -> None:
    raise Stopped


# -- groups that are not what was asked for ----------------------------------------------------------------------------


def test_a_group_of_other_weights_with_the_same_number_is_dropped_and_asked_for_again(
    make_collector: MakeCollector, a_job: Job
) -> None:
    """A trainer died in step 1 and was resumed at step 0: its policy 1 need not be the successor's."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("g1", policy_version=1))
    lease = take_one(worker)
    worker.complete(lease, dataclasses.replace(an_answer(lease.request), policy_sha256="cd" * 32))
    collector = make_collector(queue)
    ask(collector, a_request("g1", policy_version=1))

    def serve() -> None:
        for lease in worker.take(block_s=0):
            worker.complete(lease, an_answer(lease.request))

    [group] = collect(collector, "g1", check=serve)
    assert group.policy_sha256 == a_policy(1).sha256
    assert collector.counts == {"other_weights": 1}
    collector.acknowledge(["g1"])
    assert queue.requests_in_flight() == 0


def test_a_group_of_an_older_policy_is_compared_with_the_weights_that_the_queue_knows(
    make_collector: MakeCollector, a_job: Job
) -> None:
    """With a lag allowed, after a resume: version 1 was published by the trainer before this one."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    collector.forget(3)  # of its own record
    queue.publish_policy(a_policy(1, sha256="cd" * 32))
    queue.publish_policy(a_policy(2))
    queue.publish_policy(a_policy(3))
    ask(collector, a_request("g1", policy_version=1), a_request("g2", policy_version=2))
    answer(worker)
    answer(worker)
    assert [group.group_id for group in collect(collector, "g2")] == ["g2"]
    assert collector.counts == {"other_weights": 1}


def test_a_group_with_siblings_missing_is_a_dead_letter(
    make_collector: MakeCollector, a_job: Job, tmp_path: Path
) -> None:
    """The rollout weights need all of them."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, a_request("g1"), a_request("g2"))
    lease = take_one(worker)
    group = an_answer(lease.request)
    worker.complete(lease, dataclasses.replace(group, rollouts=group.rollouts[:1]))
    answer(worker)
    assert [group.group_id for group in collect(collector, "g1", "g2")] == ["g2"]
    [letter] = queue.dead_letters()
    assert (letter.group_id, letter.reason) == ("g1", "it holds 1 rollouts, 2 were asked for")
    [fate] = [fate for fate in audit(tmp_path).fates if fate.dead]
    assert fate.group_id == "g1"


def test_letters_without_a_readable_key_stop_nobody(make_collector: MakeCollector, a_job: Job) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    a_job.put_fields("groups", {"colour": "blue"})
    a_job.put_raw("groups", "\x00@@", b"\xff")
    collector = make_collector(queue)
    ask(collector, a_request("g1"))
    answer(worker)
    assert len(collect(collector, "g1")) == 1


# -- Redis is full -----------------------------------------------------------------------------------------------------


def test_publishing_waits_while_redis_is_full_and_goes_on_by_itself(make_collector: MakeCollector) -> None:
    with EmbeddedRedis(maxmemory_bytes=8 * MIB) as server, closing(TrainerQueue(url=server.url, job="j")) as queue:
        queue.acquire()
        collector = make_collector(queue)
        requests = [a_request(f"g{index}", image_bytes=MIB) for index in range(10)]
        with closing(WorkerQueue(url=server.url, job="j", worker="w")) as worker:

            def serve() -> None:
                """Called while the collector waits for room: the worker makes some."""
                for lease in worker.take(block_s=0.05):
                    worker.complete(lease, an_answer(lease.request))

            ask(collector, *requests, check=serve)
            groups = collect(collector, *(request.group_id for request in requests), check=serve)
        assert len(groups) == 10


def test_a_request_to_stop_is_heard_while_redis_is_full(make_collector: MakeCollector) -> None:
    with EmbeddedRedis(maxmemory_bytes=8 * MIB) as server, closing(TrainerQueue(url=server.url, job="j")) as queue:
        queue.acquire()
        collector = make_collector(queue)
        with pytest.raises(Stopped):
            ask(collector, *(a_request(f"g{index}", image_bytes=MIB) for index in range(10)), check=stop)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", 1 * MIB)
        with pytest.raises(Stopped):
            collector.publish(a_policy(4), check=stop)


# -- Redis is away, or comes back empty --------------------------------------------------------------------------------


def test_what_can_not_be_acknowledged_now_is_acknowledged_with_the_next_checkpoint(
    make_collector: MakeCollector, tmp_path: Path
) -> None:
    with (
        EmbeddedRedis(folder=tmp_path / "redis", append_only="always") as server,
        closing(TrainerQueue(url=server.url, job="j", patience_s=0.2)) as queue,
        closing(WorkerQueue(url=server.url, job="j", worker="w")) as worker,
    ):
        queue.acquire()
        collector = make_collector(queue)
        ask(collector, a_request("g1"), a_request("g2"))
        answer(worker)
        collect(collector, "g1")
        server.kill()
        collector.acknowledge(["g1"])
        collector.forget(0)
        server.start()
        answer(worker)
        collect(collector, "g2")
        collector.acknowledge(["g2"])
        with redis.Redis.from_url(server.url) as client:
            assert client.xlen("vaopd:{j}:groups") == 0


def test_waiting_for_groups_outlasts_an_absent_redis(make_collector: MakeCollector, tmp_path: Path) -> None:
    with (
        EmbeddedRedis(folder=tmp_path / "redis", append_only="always") as server,
        closing(TrainerQueue(url=server.url, job="j", patience_s=0.1)) as queue,
    ):
        queue.acquire()
        collector = make_collector(queue)
        ask(collector, a_request("g1"))
        with closing(WorkerQueue(url=server.url, job="j", worker="w")) as worker:
            answer(worker)
        server.kill()
        revival = threading.Timer(0.5, server.start)
        revival.start()
        assert [group.group_id for group in collect(collector, "g1")] == ["g1"]
        revival.join()


def test_an_empty_redis_gets_every_policy_that_a_request_still_names(make_collector: MakeCollector) -> None:
    """With a lag of one, requests of the last version are still out when the next is announced."""
    with EmbeddedRedis() as server, closing(TrainerQueue(url=server.url, job="j", lease_s=5)) as queue:
        queue.acquire()
        collector = make_collector(queue)
        ask(collector, a_request("g1", policy_version=2))
        server.kill()
        server.start()
        with closing(WorkerQueue(url=server.url, job="j", worker="w")) as worker:

            def serve() -> None:
                for lease in worker.take(block_s=0.05):
                    assert worker.policy(lease.request.policy_version) == a_policy(2)
                    assert worker.latest_policy() == a_policy(3)
                    worker.complete(lease, an_answer(lease.request))

            assert [group.group_id for group in collect(collector, "g1", check=serve)] == ["g1"]


def test_an_empty_redis_gives_no_job_back_to_a_trainer_whose_successor_has_begun(make_collector: MakeCollector) -> None:
    """The lease that would refuse it is gone with Redis; the books know the successor."""
    with (
        EmbeddedRedis() as server,
        closing(TrainerQueue(url=server.url, job="j", lease_s=0.2)) as sleeper,
        closing(TrainerQueue(url=server.url, job="j", lease_s=5)) as successor,
    ):
        sleeper.acquire()
        collector = make_collector(sleeper)
        ask(collector, a_request("g1"))
        successor.acquire(wait_s=5)
        make_collector(successor)
        server.kill()
        server.start()
        with pytest.raises(LeaseLost, match=f"'{successor.owner}' has gone on"):
            collect(collector, "g1")
        successor.acquire()  # at once: nobody holds it
