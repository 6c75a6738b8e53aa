"""The queue against a real Valkey: what a trainer and its workers can rely on while nothing breaks."""
# ruff: noqa: F401, F811  (fixtures are imported, then named as parameters)

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.groups import a_request, an_answer
from tests.support.redis import job, redis_server
from vaopd.errors import ConfigError, InvalidInput, LeaseLost, Mismatch
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.types import PolicyVersion

MakeWorker = Callable[[str], WorkerQueue]


@pytest.fixture
def trainer(redis_server: EmbeddedRedis, job: str) -> Iterator[TrainerQueue]:
    with closing(TrainerQueue(url=redis_server.url, job=job)) as queue:
        queue.acquire()
        yield queue


@pytest.fixture
def make_worker(redis_server: EmbeddedRedis, job: str) -> Iterator[MakeWorker]:
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(closing(WorkerQueue(url=redis_server.url, job=job, worker=name)))


def test_a_group_goes_round(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    worker = make_worker("w1")
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


def test_waiting_ends_when_nothing_comes(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    assert make_worker("w1").take(block_s=0) == []
    assert trainer.collect(block_s=0.05) == []


def test_two_workers_share_the_requests(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    for name in ("g1", "g2", "g3"):
        trainer.enqueue(a_request(name))
    first = make_worker("w1").take(block_s=1, max_requests=2)
    second = make_worker("w2").take(block_s=1, max_requests=2)
    assert [lease.request.group_id for lease in first] == ["g1", "g2"]
    assert [lease.request.group_id for lease in second] == ["g3"]


def test_a_request_is_published_once(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    assert trainer.enqueue(a_request("g1", policy_version=3))
    assert not trainer.enqueue(a_request("g1", policy_version=3))
    assert trainer.requests_in_flight() == 1
    assert trainer.enqueue(a_request("g1", policy_version=4))  # for other weights it is another request

    worker = make_worker("w1")
    for lease in worker.take(block_s=1, max_requests=2):
        worker.complete(lease, an_answer(lease.request))
    assert not trainer.enqueue(a_request("g1", policy_version=3))  # still, after it was answered


def test_the_answer_must_be_to_the_request(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    trainer.enqueue(a_request("g1", policy_version=3))
    worker = make_worker("w1")
    [lease] = worker.take(block_s=1)
    with pytest.raises(Mismatch, match=r"policy version 4 answers another request .* version 3"):
        worker.complete(lease, an_answer(a_request("g1", policy_version=4)))
    assert worker.complete(lease, an_answer(lease.request))


def test_a_job_has_one_trainer(redis_server: EmbeddedRedis, job: str, trainer: TrainerQueue) -> None:
    with closing(TrainerQueue(url=redis_server.url, job=job, owner="the-second")) as second:
        with pytest.raises(LeaseLost, match=rf"held by trainer '{trainer.owner}' .* another job name"):
            second.acquire()
        trainer.release()
        second.acquire()
        with pytest.raises(LeaseLost, match="'the-second' holds it; nothing was committed"):
            trainer.enqueue(a_request())


def test_jobs_do_not_meet(redis_server: EmbeddedRedis, trainer: TrainerQueue) -> None:
    trainer.enqueue(a_request("g1"))
    with closing(TrainerQueue(url=redis_server.url, job="test-other")) as other:
        other.acquire()
        assert other.requests_in_flight() == 0
        assert other.enqueue(a_request("g1"))
        other.purge()
    assert trainer.requests_in_flight() == 1


def test_policies(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    worker = make_worker("w1")
    assert worker.latest_policy() is None
    versions = [PolicyVersion(version=v, path=f"/run/policy/v{v:06d}", sha256=f"{v:064d}") for v in range(4)]
    for policy in versions:
        trainer.publish_policy(policy)
    assert worker.latest_policy() == versions[3]
    assert worker.policy(1) == versions[1]

    # A trainer resumed from version 1 publishes its own 2: the old 3 must not be sampled from any more.
    trainer.publish_policy(versions[2])
    assert worker.latest_policy() == versions[2]
    assert worker.policy(3) is None


def test_forgetting_drops_what_belongs_to_old_versions(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    trainer.enqueue(a_request("g1", policy_version=1))
    trainer.enqueue(a_request("g2", policy_version=2))
    for version in (1, 2):
        trainer.publish_policy(PolicyVersion(version=version, path="/p", sha256="00"))
    assert trainer.forget(before_version=2) == 1
    assert not trainer.enqueue(a_request("g2", policy_version=2))
    assert trainer.enqueue(a_request("g1", policy_version=1))
    assert make_worker("w1").policy(1) is None
    assert make_worker("w1").policy(2) is not None


def test_the_trainer_sees_which_workers_are_up(trainer: TrainerQueue, make_worker: MakeWorker) -> None:
    assert trainer.workers_alive() == []
    first, second = make_worker("w1"), make_worker("w2")
    first.take(block_s=0)
    second.renew()
    assert trainer.workers_alive() == ["w1", "w2"]
    second.close()
    assert trainer.workers_alive() == ["w1"]


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


@pytest.mark.parametrize("name", ["", "a:b", "{x}", "a b", "x" * 201])
def test_names_that_could_reach_other_keys_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 200 characters"):
        TrainerQueue(url="redis://127.0.0.1:1/0", job=name)


def test_messages_do_not_show_the_password() -> None:
    queue = TrainerQueue(url="redis://user:sesame@127.0.0.1:1/0", job="j", patience_s=0.1)
    with closing(queue), pytest.raises(Exception, match=r"127\.0\.0\.1:1 did not answer for 0\.1 s") as caught:
        queue.acquire()
    assert "sesame" not in str(caught.value)


def test_one_module_alone_talks_to_redis() -> None:
    """So time limits, retries and idempotence hold for every command."""
    root = Path(__file__).parents[2]
    importing = {
        str(path.relative_to(root))
        for package in ("vaopd", "services")
        for path in (root / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "redis" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "redis")
    }
    assert importing == {"vaopd/queue/connection.py"}
