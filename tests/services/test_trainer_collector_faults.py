"""The trainer's collector on a Valkey that is full, away, or comes back empty."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis

from tests.support.collectors import MakeCollector, a_policy, never
from tests.support.groups import a_request, an_answer, answer
from vaopd.errors import LeaseLost
from vaopd.queue import TrainerQueue, WorkerQueue, connection
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.types import RolloutGroup, RolloutRequest
from vaopd_trainer.collector import Collector

MIB = 2**20


def ask(collector: Collector, *requests: RolloutRequest, check: Callable[[], None] = never) -> None:
    collector.enqueue(requests, oldest_version=0, step=0, check=check)


def collect(collector: Collector, *group_ids: str, check: Callable[[], None] = never) -> list[RolloutGroup]:
    return [group for groups in collector.wait_for_groups(group_ids, check=check) for group in groups]


class Stopped(Exception):
    """What the trainer raises when it was asked to stop."""


def stop() -> None:
    raise Stopped


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


def test_a_redis_frozen_for_longer_than_the_lease_costs_the_trainer_nothing(
    make_collector: MakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    with (
        EmbeddedRedis() as server,
        closing(TrainerQueue(url=server.url, job="j", lease_s=0.3, patience_s=0.1)) as queue,
    ):
        queue.acquire()
        said: list[str] = []
        collector = make_collector(queue, say=said.append)
        ask(collector, a_request("g1"))
        with closing(WorkerQueue(url=server.url, job="j", worker="w", patience_s=60)) as worker:
            answer(worker)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            with queue.keeper() as keeper:
                thaw = threading.Timer(1.0, lambda: os.kill(server.pid or 0, signal.SIGCONT))
                thaw.start()
                assert [group.group_id for group in collect(collector, "g1")] == ["g1"]
                thaw.join()
                ask(collector, a_request("g2"))
                answer(worker)
                assert [group.group_id for group in collect(collector, "g2")] == ["g2"]
                keeper.check()
        assert re.match(r"waiting for Redis: Redis at .* did not answer for 0\.1 s", said[0])
        assert said[1:] == ["Redis answers again; the run continues"]


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
                    assert worker.policy(3) == a_policy(3)
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
        with pytest.raises(LeaseLost, match=f"'{successor.owner}' has continued"):
            collect(collector, "g1")
        successor.acquire()  # at once: nobody holds it


@pytest.mark.parametrize("gone", ["all", "requests", "groups", "epoch", "group of requests", "group of groups"])
def test_a_redis_that_came_back_empty_gets_policy_and_missing_requests_again(
    gone: str, make_collector: MakeCollector
) -> None:
    """Or in part: somebody removed a key. What is in the trainer's hands already isn't asked for again."""
    with EmbeddedRedis() as server, closing(TrainerQueue(url=server.url, job="job", lease_s=5)) as queue:
        queue.acquire()
        collector = make_collector(queue)
        ask(collector, a_request("g1"), a_request("g2"), a_request("g3"))
        with closing(WorkerQueue(url=server.url, job="job", worker="w0")) as worker:
            answer(worker)
            assert [group.group_id for group in collect(collector, "g1")] == ["g1"]
            answer(worker)  # g2, which is lost before the trainer reads it

        key = f"vaopd:{{job}}:{gone.rpartition(' ')[2]}"
        if gone == "all":
            server.kill()
            server.start()  # without an append-only file: empty
        elif gone.startswith("group of"):
            redis.Redis(port=server.port).xgroup_destroy(key, "rollout" if gone.endswith("requests") else "trainer")
        else:
            redis.Redis(port=server.port).delete(key)

        with closing(WorkerQueue(url=server.url, job="job", worker="w1")) as worker:
            answered: list[str] = []

            def serve() -> None:
                """Called whenever the collector is about to wait: the worker answers what has been published."""
                for lease in worker.take(block_s=0.05):
                    assert worker.policy(0) == a_policy(0)
                    answered.append(lease.request.group_id)
                    worker.complete(lease, an_answer(lease.request))

            assert sorted(group.group_id for group in collect(collector, "g2", "g3", check=serve)) == ["g2", "g3"]
            assert answered == ["g2", "g3"]
            collector.dead_letter("g1", "refused after its entry was lost")  # no entry, no letter, no error
            assert queue.dead_letters() == []
