"""A job on the tests' Valkey, as a pytest plugin. Its trainers and workers are closed at the end, in any state."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import redis

from vaopd.queue import DeadLetters, TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis


class Job:
    def __init__(self, url: str, name: str, stack: ExitStack) -> None:
        self.url, self.name, self._stack = url, name, stack

    def trainer(
        self, *, owner: str | None = None, lease_s: float = 30.0, acquire: bool = True, url: str | None = None
    ) -> TrainerQueue:
        queue = TrainerQueue(url=url or self.url, job=self.name, owner=owner, lease_s=lease_s)
        self._stack.enter_context(closing(queue))
        if acquire:
            queue.acquire()
        return queue

    def worker(self, name: str, *, lease_s: float = 30.0, url: str | None = None) -> WorkerQueue:
        queue = WorkerQueue(url=url or self.url, job=self.name, worker=name, lease_s=lease_s)
        return self._stack.enter_context(closing(queue))

    def dead_letters(self) -> DeadLetters:
        return self._stack.enter_context(closing(DeadLetters(url=self.url, job=self.name)))

    def trainer_dies(self) -> None:
        """Without a word, and its lease has run out."""
        with redis.Redis.from_url(self.url) as client:
            client.pexpire(f"vaopd:{{{self.name}}}:trainer", 0)

    def comes_back_empty(self) -> None:
        """To the job it looks as if Redis did: every key is gone."""
        with redis.Redis.from_url(self.url) as client:
            client.delete(*client.scan_iter(f"vaopd:{{{self.name}}}:*"))

    def put_raw(self, stream: str, key: str, body: bytes) -> None:
        """A body that no trainer or worker would write."""
        self.put_fields(stream, {"key": key, "body": body})

    def put_fields(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """An entry that no trainer or worker would write."""
        with redis.Redis.from_url(self.url) as client:
            client.xadd(f"vaopd:{{{self.name}}}:{stream}", fields)


@pytest.fixture
def job(redis_server: EmbeddedRedis) -> Iterator[str]:
    """The name of a job of the test's own. Afterwards the job is purged, as its trainer would; no key may be left."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    with redis.Redis.from_url(redis_server.url) as client:
        client.delete(f"vaopd:{{{name}}}:trainer")  # a test may leave its trainer in possession
        with closing(TrainerQueue(url=redis_server.url, job=name)) as trainer:
            trainer.acquire()
            trainer.purge()
        leaked = sorted(key.decode() for key in client.scan_iter("vaopd:*"))
    assert not leaked, f"keys left behind: {leaked}"


@pytest.fixture
def a_job(redis_server: EmbeddedRedis, job: str) -> Iterator[Job]:
    """Trainers and workers of that job. tests/unit has a fixture of this name whose queue is in memory."""
    with ExitStack() as stack:
        yield Job(redis_server.url, job, stack)
