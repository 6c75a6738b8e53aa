"""The rollout worker as a process of its own, on a real Valkey, with the transformers engine."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from starlette.responses import Response

from tests.support import preloaded
from tests.support.memory_jobs import MemoryJob
from tests.support.preloaded import Child
from tests.support.rollouts import PlainStudent, ask, noise_image, random_student
from tests.support.tolerance import assert_within
from tests.support.waiting import wait_until
from vaopd.errors import InvalidInput
from vaopd.net.ports import free_port
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.sampling.engine import Outcome
from vaopd.types import EncodedImage, PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.weights import fetch as fetching
from vaopd.weights.fetch import PolicyFetcher
from vaopd.weights.serve import SnapshotServer
from vaopd_rollout import worker as worker_module
from vaopd_rollout.worker import RolloutWorker, Stop

CONFIG = """
[run]
name = "{job}"
[data]
source = "unused"
[student]
model = "{model}"
dtype = "float32"
[teacher]
model = "unused"
[rollout]
engine = "transformers"
[trainer]
steps = 1
[queue]
url = "{url}"
lease_s = 20
"""


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[PolicyVersion]:
    folder = tmp_path_factory.mktemp("policy")
    return [random_student(folder, version=version) for version in range(2)]


@pytest.fixture
def trainer(redis_server, job) -> Iterator[TrainerQueue]:
    # Nothing here renews the lease, and a worker may take a minute to start on a busy machine.
    with closing(TrainerQueue(url=redis_server.url, job=job, lease_s=600)) as queue:
        queue.acquire()
        yield queue


@pytest.fixture
def start_worker(redis_server, job, policies, trainer, tmp_path) -> Iterator[Callable[..., Child]]:
    """Starts the process and returns once it is ready; whatever a test leaves is killed."""
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(job=job, model=policies[0].path, url=redis_server.url))
    command = [sys.executable, "-m", "vaopd_rollout", "--config", str(config)]
    started: list[Child] = []

    def start(*arguments: str, name: str = "w1") -> Child:
        argv, log = [*command, "--worker", name, *arguments], tmp_path / f"{name}.log"
        process = preloaded.start(argv, log=log, environment=os.environ)
        started.append(process)
        wait_until("the worker is ready", lambda: name in trainer.workers_alive())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def log_of(process: Child) -> bytes:
    return Path(f"/proc/{process.pid}/fd/1").resolve().read_bytes()


def collect(trainer: TrainerQueue, count: int) -> dict[str, RolloutGroup]:
    groups: dict[str, RolloutGroup] = {}

    def have_all() -> bool:
        groups.update({found.group.group_id: found.group for found in trainer.collect(block_s=0.2)})
        return len(groups) == count

    wait_until(f"{count} groups have arrived", have_all)
    return groups


def assert_sampled_by(policy: PolicyVersion, request: RolloutRequest, group: RolloutGroup) -> None:
    assert (group.policy_version, group.policy_sha256) == (policy.version, policy.sha256)
    for rollout in group.rollouts:
        plain = PlainStudent(policy)
        expected, error = (f(request, rollout.response_ids) for f in (plain.sampled_logprobs, plain.sampled_error))
        assert_within(rollout.rollout_logprobs, expected, error)


@pytest.mark.slow
def test_requests_become_groups_of_the_policy_that_they_name(start_worker, trainer, policies):
    old, new = (ask(f"v{version}", images=(), version=version) for version in (0, 1))
    bad = ask("bad", images=(EncodedImage(data=noise_image(0).data[:100]),))
    trainer.publish_policy(policies[0])
    # Version 1 is not announced yet: its request must wait, and must not hold up the others.
    for request in (new, bad, old):
        trainer.enqueue(request)

    worker = start_worker()

    groups = collect(trainer, 1)
    assert_sampled_by(policies[0], old, groups["v0"])
    [letter] = trainer.dead_letters()
    assert letter.group_id == "bad"
    assert "damaged" in letter.reason

    trainer.publish_policy(policies[1])

    assert_sampled_by(policies[1], new, collect(trainer, 1)["v1"])
    assert trainer.requests_in_flight() == 0

    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=30) == 0
    assert trainer.workers_alive() == []


@pytest.mark.slow
def test_a_second_sigterm_hands_the_batch_back_at_once(start_worker, trainer, policies, redis_server, job):
    trainer.publish_policy(policies[0])
    for index in range(8):
        # Minutes of work in all.
        trainer.enqueue(ask(f"g{index}", rollouts=64, max_new_tokens=900))
    worker = start_worker()
    with closing(WorkerQueue(url=redis_server.url, job=job, worker="w2")) as other:
        wait_until("the worker holds every request, and samples", lambda: b"is loaded" in log_of(worker))

        worker.send_signal(signal.SIGTERM)
        wait_until("the first signal was taken", lambda: b"asked to stop" in log_of(worker))
        worker.send_signal(signal.SIGTERM)

        assert worker.wait(timeout=30) == 0
        leases = other.take(block_s=1, max_requests=8)
        assert sorted(lease.request.group_id for lease in leases) == [f"g{index}" for index in range(8)]
        assert {lease.deliveries for lease in leases} == {1}  # handing back is not a death


@pytest.mark.slow
def test_a_worker_whose_engine_hangs_ends_and_another_one_takes_its_requests_over(
    start_worker, trainer, policies, tmp_path
):
    """For one with so little patience any engine hangs: while it loads the weights, on threads that come and go."""
    short_lease = ("--set", "queue.lease_s=2")
    trainer.publish_policy(policies[0])
    service = tmp_path / "service.toml"
    service.write_text("[rollout]\nstuck_after_s = 0.01\n")
    impatient = start_worker(*short_lease, "--service", str(service))
    log = tmp_path / "w1.log"
    request = ask("g", images=())
    trainer.enqueue(request)
    assert impatient.wait(timeout=60) in (1, -signal.SIGSEGV)  # of reading their stacks, see hang_timer
    assert b"Timeout (0:00:00.01" in log.read_bytes()  # above every thread's stack

    start_worker(*short_lease, name="w2")
    assert_sampled_by(policies[0], request, collect(trainer, 1)["g"])


@pytest.mark.parametrize("call", ["load_policy", "generate"])
def test_it_ends_whichever_call_of_the_engine_hangs(call: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The leases of one that lived on would be renewed for ever."""

    class Engine:
        policy: PolicyVersion | None = None

        def load_policy(self, policy: PolicyVersion) -> None:
            self.hang("load_policy")
            self.policy = policy

        def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
            self.hang("generate")
            return []

        def hang(self, name: str) -> None:
            if name == call:
                signal.pause()

        def close(self) -> None: ...

    job, stop = MemoryJob(), Stop(drain_s=1)
    trainer = job.trainer()
    trainer.publish_policy(PolicyVersion(version=0, path="/nowhere", sha256="0"))
    trainer.enqueue(ask("g", images=()))
    worker = RolloutWorker(engine=Engine(), queue=job.worker("w"), requests_per_batch=1, stop=stop, stuck_after_s=0.01)
    if (pid := os.fork()) == 0:
        try:
            worker.run()
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert "in hang" in capfd.readouterr().err


class Idle:
    """An engine that samples nothing; its worker is stopped once it has weights."""

    def __init__(self, stop: Stop) -> None:
        self.policy: PolicyVersion | None = None
        self._stop = stop

    def load_policy(self, policy: PolicyVersion) -> None:
        self.policy = policy
        self._stop.request()

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        return [InvalidInput("nothing is sampled here") for _ in requests]

    def close(self) -> None: ...


def test_a_trainer_that_begins_again_at_its_address_is_waited_for_until_it_announces(policies, tmp_path, monkeypatch):
    """It has another secret: what its predecessor announced isn't served."""
    monkeypatch.setattr(worker_module, "RETRY_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    job, stop = MemoryJob(), Stop(drain_s=1)
    trainer = job.trainer()
    with closing(SnapshotServer(address)) as old:
        trainer.publish_policy(old.offer(policies[0]))
    trainer.enqueue(ask("g", images=()))
    tries = itertools.count(1)
    with closing(SnapshotServer(address)) as new, closing(PolicyFetcher(tmp_path)) as fetcher:

        def fetch(policy: PolicyVersion) -> PolicyVersion:
            if next(tries) == 3:
                trainer.publish_policy(new.offer(policies[0]))
            return fetcher.fetch(policy)

        engine = Idle(stop)
        worker = RolloutWorker(engine=engine, queue=job.worker("w"), requests_per_batch=1, stop=stop, fetch=fetch)
        worker.run()
    assert next(tries) == 5
    assert engine.policy is not None
    assert engine.policy.sha256 == policies[0].sha256


def test_a_worker_hands_back_what_it_holds_when_it_is_stopped_while_its_trainer_is_silent(
    policies, tmp_path, monkeypatch
):
    """SIGTERM amid a range of the weights that doesn't come."""
    monkeypatch.setattr(fetching, "_TIMEOUT", None)
    asked, over = threading.Event(), threading.Event()

    def say_nothing(*_: object) -> Response:
        asked.set()
        over.wait()
        return Response()

    monkeypatch.setattr(SnapshotServer, "_send_file", say_nothing)
    job = MemoryJob()
    trainer = job.trainer()
    with closing(SnapshotServer("127.0.0.1:0")) as server:
        trainer.publish_policy(server.offer(policies[0]))
        trainer.enqueue(ask("g", images=()))
        if (pid := os.fork()) == 0:
            code = 1
            try:
                stop = Stop(drain_s=0.01)
                stop.install()
                held = job.worker("w")
                fetch = PolicyFetcher(tmp_path).fetch
                RolloutWorker(engine=Idle(stop), queue=held, requests_per_batch=1, stop=stop, fetch=fetch).run()
                code = len(held.held())
            finally:
                os._exit(code)
        try:
            wait_until("a file is asked for", asked.is_set)
            os.kill(pid, signal.SIGTERM)
            wait_until("it has ended", lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        finally:
            over.set()
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_help_needs_nothing_heavy():
    code = (
        "import sys, vaopd_rollout.__main__; "
        "sys.exit([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules] or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
