"""Trained = published − dead-lettered, each once: workers that die now and then, a trainer killed twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.groups import a_request, an_answer
from tests.support.queue_jobs import Job
from vaopd.errors import LeaseLost
from vaopd.queue import Lease, WorkerQueue

GROUPS = 60
UNANSWERABLE = "g13"


class UnreliableWorker(threading.Thread):
    """Lets every fifth of its leases run out, and commits it all the same at the end, when others have answered."""

    def __init__(self, queue: WorkerQueue, done: threading.Event) -> None:
        super().__init__(daemon=True)
        self.queue, self.done = queue, done
        self.taken = self.refused = 0
        self.left: list[Lease] = []

    def run(self) -> None:
        while not self.done.is_set():
            for lease in self.queue.take(block_s=0.05, max_requests=2):
                self.taken += 1
                if self.taken % 5 == 0:
                    self.left.append(lease)
                else:
                    self.commit(lease)
        for lease in self.left:
            self.commit(lease)

    def commit(self, lease: Lease) -> None:
        try:
            if lease.request.group_id == UNANSWERABLE:
                self.queue.fail(lease, "for the test")
            else:
                self.queue.complete(lease, an_answer(lease.request, worker=self.queue.worker))
        except LeaseLost:
            self.refused += 1


@pytest.fixture
def workers(a_job: Job) -> Iterator[list[UnreliableWorker]]:
    done = threading.Event()
    threads = [UnreliableWorker(a_job.worker(f"w{i}", lease_s=0.3), done) for i in range(3)]
    for thread in threads:
        thread.start()
    yield threads
    done.set()
    for thread in threads:
        thread.join()


def test_every_published_group_is_trained_once(a_job: Job, workers: list[UnreliableWorker]) -> None:
    trainer = a_job.trainer()
    published = [f"g{i}" for i in range(GROUPS)]
    for name in published:
        trainer.enqueue(a_request(name))

    durable: Counter[str] = Counter()  # what checkpoints contain: outlives the trainer, as files do
    deaths = 0
    while durable.total() + len(trainer.dead_letters()) < GROUPS:
        with trainer.keeper():
            delivered = trainer.collect(block_s=1, max_groups=4)
            new = [d.group.group_id for d in delivered if d.group.group_id not in durable]
            # The first death comes before the checkpoint is durable, the second before its groups are acknowledged.
            dies = deaths < 2 and durable.total() > 20 * (deaths + 1)
            if not dies or deaths == 1:
                durable.update(new)
            if not dies:
                trainer.acknowledge(d.entry_id for d in delivered)
        if dies:
            deaths += 1
            a_job.trainer_dies()
            trainer = a_job.trainer()

    assert deaths == 2
    assert [letter.group_id for letter in trainer.dead_letters()] == [UNANSWERABLE]
    assert durable == Counter(set(published) - {UNANSWERABLE})
    assert trainer.requests_in_flight() == 0

    for worker in workers:
        worker.done.set()
        worker.join()
    assert sum(len(worker.left) for worker in workers) > 0
    assert all(worker.refused >= len(worker.left) for worker in workers)
    assert trainer.collect(block_s=0) == []
