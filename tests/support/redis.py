"""A Valkey server for the tests, and a check that a test leaves no key behind. Import the fixtures where they are used:

from tests.support.redis import job, redis_server  # noqa: F401
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import redis

from vaopd.queue.embedded import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def job(redis_server: EmbeddedRedis) -> Iterator[str]:
    """A job name of the test's own. Afterwards the job is purged, as its trainer would, and no key may be left."""
    from vaopd.queue import TrainerQueue

    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    with redis.Redis.from_url(redis_server.url) as client:
        client.delete(f"vaopd:{{{name}}}:trainer")  # a test may leave its trainer in possession
        trainer = TrainerQueue(url=redis_server.url, job=name)
        trainer.acquire()
        trainer.purge()
        trainer.close()
        leaked = sorted(key.decode() for key in client.scan_iter("vaopd:*"))
    assert not leaked, f"keys left behind: {leaked}"
