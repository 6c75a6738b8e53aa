"""The queue against a real Valkey that loses replies, is full, is killed, or comes back empty."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.groups import a_request, an_answer, answer, collect_one, take_one
from tests.support.lost_replies import LossyRelay
from tests.support.queue_jobs import Job
from tests.support.waiting import wait_until
from vaopd.errors import LeaseLost, Mismatch, Unavailable
from vaopd.queue import TrainerQueue, WorkerQueue, connection
from vaopd.queue.embedded import EmbeddedRedis

SHORT_S = 0.15


@pytest.fixture
def make_job() -> Iterator[Callable[[EmbeddedRedis], Job]]:
    """A job on a server of the test's own."""
    with ExitStack() as stack:
        yield lambda server: Job(server.url, "test", stack)


def test_lost_replies_neither_double_nor_lose_anything(a_job: Job, redis_server: EmbeddedRedis) -> None:
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
        for held in worker.held():
            worker.release(held)
        lease = take_one(worker)
        with worker.keeper():
            relay.lose_reply_to(b"g1@0")
            assert worker.complete(lease, an_answer(lease.request))  # the first try was the commit
            assert relay.lost

        relay.lose_reply_to(trainer.owner.encode())
        assert collect_one(trainer).group.group_id == "g1"  # `>` alone would never show it again
        assert relay.lost
        assert trainer.collect(block_s=0) == []


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
        trainer.renew()


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
        for call in (trainer.renew, lambda: trainer.collect(block_s=0)):
            with pytest.raises(Mismatch, match=r"came back empty.* acquire\(\) again and enqueue"):
                call()
        trainer.acquire()
        assert trainer.enqueue(a_request("g1"))
        assert answer(worker).group_id == "g1"
        assert collect_one(trainer).group.group_id == "g1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_redis_whose_disk_is_full_refuses_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    with (
        EmbeddedRedis(folder=small_disk / "redis", append_only="everysec") as server,
        closing(TrainerQueue(url=server.url, job="test", lease_s=60)) as trainer,
    ):
        trainer.acquire()

        def fill() -> None:
            for count in range(10):
                trainer.enqueue(a_request(f"g{count}", image_bytes=300_000))

        with pytest.raises(Unavailable, match="can't write to its disk; free some space there"):
            fill()
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)

        def goes_on() -> bool:
            try:
                return trainer.enqueue(a_request("afterwards"))
            except Unavailable:
                return False

        wait_until("there is room, and Redis has noticed", goes_on)


def test_a_redis_that_finds_its_disk_full_says_so_at_once(small_disk: Path) -> None:
    """Not that its port is taken: other ports were tried for 20 s."""
    (small_disk / "redis").mkdir()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    server = EmbeddedRedis(folder=small_disk / "redis", append_only="everysec")
    with pytest.raises(Unavailable, match=r"ended at once: no log, so the disk of .*/redis may be full"):
        server.start()
    server.stop()


def test_a_frozen_redis_is_noticed_and_what_it_answers_later_does_no_harm(
    make_job: Callable[[EmbeddedRedis], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket still takes requests: on waking it serves those that nobody waits for any more, too."""
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    with EmbeddedRedis() as server, closing(TrainerQueue(url=server.url, job="test", patience_s=0.3)) as trainer:
        trainer.acquire()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match=r"did not answer for 0\.3 s \(TimeoutError\)"):
            trainer.enqueue(a_request("g1"))
        os.kill(server.pid, signal.SIGCONT)
        trainer.enqueue(a_request("g1"))
        assert trainer.requests_in_flight() == 1


def test_an_unreachable_redis_is_unavailable_not_a_hang(make_job: Callable[[EmbeddedRedis], Job]) -> None:
    with EmbeddedRedis() as server:
        url = server.url
    with closing(WorkerQueue(url=url, job="j", worker="w", patience_s=0.2)) as worker:
        with pytest.raises(Unavailable, match=r"did not answer for 0\.2 s"):
            worker.take(block_s=10)
        with pytest.raises(Unavailable):
            worker.policy(1)
