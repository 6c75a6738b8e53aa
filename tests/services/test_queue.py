"""The queue on a real Valkey keeps the contract, and what only Redis has: its keys, its settings and its address."""

from __future__ import annotations

from contextlib import closing

import pytest
import redis

from tests.support.groups import a_request
from tests.support.queue_contract import QueueContract
from tests.support.queue_jobs import Job
from vaopd.errors import ConfigError, InvalidInput, VaopdError
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis


class TestRedisQueue(QueueContract):
    """Each test of the contract."""


def test_jobs_do_not_meet(redis_server: EmbeddedRedis, a_job: Job) -> None:
    trainer = a_job.trainer()
    trainer.enqueue(a_request("g1"))
    with closing(TrainerQueue(url=redis_server.url, job="test-other")) as other:
        other.acquire()
        assert other.requests_in_flight() == 0
        assert other.enqueue(a_request("g1"))
        other.purge()
    assert trainer.requests_in_flight() == 1


def test_a_redis_that_evicts_is_refused(tmp_path: object) -> None:
    with EmbeddedRedis(maxmemory_policy="allkeys-lru") as server:
        with (
            closing(TrainerQueue(url=server.url, job="j")) as trainer_queue,
            pytest.raises(ConfigError, match=r"'allkeys-lru' .* --maxmemory-policy noeviction"),
        ):
            trainer_queue.acquire()
        with (
            closing(WorkerQueue(url=server.url, job="j", worker="w")) as worker_queue,
            pytest.raises(ConfigError, match="noeviction"),
        ):
            worker_queue.take(block_s=0)


@pytest.mark.parametrize(
    "key", ["epoch", "trainer", "requests", "groups", "seen:requests", "policies", "workers", "dead"]
)
@pytest.mark.parametrize("kind", ["SET", "RPUSH"])
def test_what_another_program_wrote_to_its_keys_is_named(
    key: str, kind: str, redis_server: EmbeddedRedis, a_job: Job
) -> None:
    trainer, worker = a_job.trainer(), a_job.worker("w")
    server = redis.Redis(port=redis_server.port)
    place = f"vaopd:{{{a_job.name}}}:{key}"
    server.delete(place)
    server.execute_command(kind, place, b"\xff")

    def use_all() -> None:
        trainer.acquire()
        trainer.renew()
        trainer.enqueue(a_request("g1"))
        trainer.dead_letters()
        trainer.policy(0)
        trainer.workers_alive()

    with pytest.raises(VaopdError, match="another program has written to the job's keys; use a Redis"):
        use_all()
    worker.close()
    server.delete(place)


@pytest.mark.parametrize("name", ["", "a:b", "{x}", "a b", "x" * 201])
def test_names_that_could_reach_other_keys_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 200 characters"):
        TrainerQueue(url="redis://127.0.0.1:1/0", job=name)


def test_messages_do_not_show_the_password() -> None:
    queue = TrainerQueue(url="redis://user:sesame@127.0.0.1:1/0", job="j", patience_s=0.1)
    with closing(queue), pytest.raises(Exception, match=r"127\.0\.0\.1:1 did not answer for 0\.1 s") as caught:
        queue.acquire()
    assert "sesame" not in str(caught.value)
