"""A run of queue, ledger and checkpoints under faults: nothing may be lost, and nothing trained twice.

    python -m tests.faults.chaos [--seed N] [--groups N]

Real processes (trainer, rollout workers, two teachers over gRPC) and a real Valkey whose append-only file is
fsynced `always` and `everysec` in turn. `world` says what must come out, `roles` are the processes, `faults` the plan,
`proxy` the network.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import redis

from tests.faults.chaos import proxy, roles
from tests.faults.chaos import world as w
from tests.faults.chaos.faults import Fault, Kind, plan
from tests.faults.chaos.world import JOB, World
from vaopd.net.ports import free_port
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.run.checkpoints import find_latest_checkpoint, read_checkpoint
from vaopd.run.ledger import Audit, audit

STEPS = 40
FEWEST_STEPS, FULL_STEP = 8, 250
WORKERS = 4
LEASE_S = 1.0
LIMIT_S = 300.0
POLL_S = 0.02
DISK_LIMIT_BYTES = 2048


@dataclass(kw_only=True)
class Result:
    """What a run has shown."""

    seed: int
    took_s: float
    faults: Counter[str]
    outside: Counter[str]
    exits: Counter[str]
    """How trainers ended by themselves, by what they said."""
    books: Audit
    weights: str
    expected_weights: str
    dead: set[str]
    expected_dead: set[str]
    left: dict[str, int]
    problems: list[str] = field(default_factory=list)


class Chaos:
    """One run. Every process that it started is gone afterwards."""

    def __init__(self, folder: Path, *, seed: int, groups: int, say: Callable[[str], None] = print) -> None:
        self._say = say
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.chaos.roles", "tests.faults.chaos.proxy"])
        self._dice = random.Random(f"driver {seed}")
        self._folder = folder
        (folder / "run").mkdir(parents=True)
        self._appends = "always"
        self._redis = EmbeddedRedis(port=free_port(), folder=folder / "redis", append_only=self._appends)
        self._steps = min(STEPS, max(FEWEST_STEPS, groups // FULL_STEP))
        self._groups_per_step = groups // self._steps
        self._seed = seed
        self._plan = plan(seed, steps=self._steps, share=groups / 10_000)
        self._teacher_ports = [free_port() for _ in range(2)]
        self._workers: list[BaseProcess | None] = [None] * WORKERS
        self._teachers: list[BaseProcess | None] = [None] * 2
        self._trainer: BaseProcess | None = None
        self._asleep: list[BaseProcess] = []  # trainers that were stopped and have lost their job
        self._started: list[BaseProcess] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._faults: Counter[str] = Counter()
        self._exits: Counter[str] = Counter()

    def run(self) -> Result:
        began = time.monotonic()
        ours, theirs = self._context.Pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(self._end_processes)
            self._redis.start()
            stack.callback(lambda: self._redis.kill())  # another object, once it was restarted
            network = self._start(proxy.run, self._redis.port, theirs)
            theirs.close()
            if not ours.poll(30):
                raise TimeoutError(f"the proxy (exit {network.exitcode}) did not start within 30 s")
            self._orders = ours
            self._world = World(
                seed=self._seed,
                steps=self._steps,
                groups_per_step=self._groups_per_step,
                folder=self._folder,
                redis_url=f"redis://127.0.0.1:{ours.recv()}/0",
                teacher_target="ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self._teacher_ports),
                lease_s=LEASE_S,
            )
            self._until_trained(began)
            return self._result(time.monotonic() - began)

    # -- the run ------------------------------------------------------------------------------------------------------

    def _until_trained(self, began: float) -> None:
        planned, done, told = list(self._plan), -1, began
        while True:
            self._keep_alive()
            if self._trainer is not None and self._trainer.exitcode == 0:
                return
            now = time.monotonic()
            step = self._step()
            if step > done:
                done = step
                due = [fault for fault in planned if fault.step <= step]
                planned = planned[len(due) :]
                self._later += [(now + fault.delay_s, lambda fault=fault: self._commit(fault)) for fault in due]  # type: ignore[misc]
            for when, action in [entry for entry in self._later if entry[0] <= now]:
                self._later.remove((when, action))
                action()
            if not planned and not self._later:
                self._world.quiet.touch()
            if now - told > 15:
                told = now
                self._say(f"{now - began:4.0f} s: step {step} of {self._steps}, {self._faults.total()} faults")
            if now - began > LIMIT_S:
                raise TimeoutError(
                    f"not done after {LIMIT_S:g} s: step {step} of {self._steps}; logs in {self._folder}"
                )
            time.sleep(POLL_S)

    def _step(self) -> int:
        newest = find_latest_checkpoint(self._world.run / "checkpoints")
        return int(newest.name.removeprefix("step_")) if newest is not None else 0

    def _keep_alive(self) -> None:
        """A supervisor: what has ended is started again."""
        for index in range(WORKERS):
            if not _lives(self._workers[index]):
                self._workers[index] = self._start_role(
                    roles.run_worker, f"worker-{index}", self._dice.uniform(-3600, 3600)
                )
        for index, port in enumerate(self._teacher_ports):
            if not _lives(self._teachers[index]):
                self._teachers[index] = self._start_role(roles.run_teacher, f"teacher-{index}", port)
        if self._trainer is None or self._trainer.exitcode not in (None, 0):
            if self._trainer is not None:
                self._exits["by SIGKILL" if self._trainer.exitcode == -signal.SIGKILL else "by itself"] += 1
            self._trainer = self._start_role(roles.run_trainer, "trainer")
        for sleeper in [sleeper for sleeper in self._asleep if not _lives(sleeper)]:
            self._asleep.remove(sleeper)
            if sleeper.exitcode == 0 and self._step() == self._steps:
                continue  # it was stopped with its last step done
            if sleeper.exitcode != roles.GAVE_UP:
                raise AssertionError(f"a trainer that had lost its job ended with {sleeper.exitcode}")
            self._exits["woken without its job"] += 1

    def _start_role(self, role: Callable[..., None], name: str, *more: object) -> BaseProcess:
        return self._start(role, self._world, name, *more)

    def _start(self, target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._started.append(process)
        return process

    def _end_processes(self) -> None:
        for process in self._started:
            if _lives(process):
                process.kill()
            process.join()

    # -- faults -------------------------------------------------------------------------------------------------------

    def _commit(self, fault: Fault) -> None:
        victims: dict[Kind, list[BaseProcess | None]] = {
            "kill worker": self._workers,
            "stop worker": self._workers,
            "kill teacher": self._teachers,
            "stop teacher": self._teachers,
            "kill trainer": [self._trainer],
            "stop trainer": [self._trainer],
            "fill disk of trainer": [self._trainer],
        }
        victim = None
        if fault.kind in victims:
            living = [process for process in victims[fault.kind] if _lives(process)]
            if not living:  # it has just died of another fault; once more, when it is up again
                self._later.append((time.monotonic() + 0.2, lambda: self._commit(fault)))
                return
            victim = self._dice.choice(living)
        self._faults[fault.kind] += 1
        match fault.kind:
            case "kill worker" | "kill trainer" | "kill teacher":
                assert victim is not None
                victim.kill()
                victim.join()
            case "stop worker" | "stop teacher":
                assert victim is not None
                self._stop(victim, self._dice.uniform(0.2, 2.0) * LEASE_S)
            case "stop trainer":
                assert victim is not None
                self._stop(victim, 2.5 * LEASE_S)
                self._asleep.append(victim)
                self._trainer = None
            case "fill disk of trainer":
                assert victim is not None
                assert victim.pid is not None
                _, hard = resource.prlimit(victim.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (DISK_LIMIT_BYTES, hard))
            case "kill redis" | "cut power of redis" | "empty redis":
                self._kill_redis(fault.kind)
            case "stop redis":
                assert self._redis.pid is not None
                pid = self._redis.pid
                os.kill(pid, signal.SIGSTOP)
                self._after(0.7, lambda: _wake(pid))
            case "fill redis":
                self._limit_redis(2**20)
                self._after(1.0, lambda: self._limit_redis(0))
            case "cut network":
                self._orders.send(("cut", 0.5))
            case "lose replies":
                self._orders.send(("lose", 8))
            case "slow network":
                self._orders.send(("latency", 0.02))
                self._after(1.5, lambda: self._orders.send(("latency", 0.0)))

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + delay_s, action))

    def _stop(self, process: BaseProcess, for_s: float) -> None:
        assert process.pid is not None
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)
        self._after(for_s, lambda: _wake(pid))

    def _kill_redis(self, kind: Kind) -> None:
        self._redis.kill()
        files = self._folder / "redis" / "appendonlydir"
        if kind == "empty redis":
            shutil.rmtree(files)
        elif kind == "cut power of redis":
            newest = max(files.glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)
            os.truncate(newest, max(0, newest.stat().st_size - 10_000))
        self._appends = "everysec" if self._appends == "always" else "always"
        self._redis = EmbeddedRedis(port=self._redis.port, folder=self._folder / "redis", append_only=self._appends)
        self._redis.start()

    def _limit_redis(self, maxmemory_bytes: int) -> None:
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self._redis.url, socket_timeout=2) as client:
            client.config_set("maxmemory", maxmemory_bytes)

    # -- what came out ------------------------------------------------------------------------------------------------

    def _result(self, took_s: float) -> Result:
        world = self._world
        newest = find_latest_checkpoint(world.run / "checkpoints")
        assert newest is not None
        _, lines = read_checkpoint(newest)
        wanted = {group_id for step in range(world.steps) for group_id in world.group_ids(step)}
        outside = (self._folder / "outside.log").read_text().splitlines()
        with redis.Redis.from_url(self._redis.url) as client:
            left = {name: client.xlen(f"vaopd:{{{JOB}}}:{name}") for name in ("requests", "groups", "dead")}
        result = Result(
            seed=world.seed,
            took_s=took_s,
            faults=self._faults,
            outside=Counter(outside),
            exits=self._exits,
            books=audit(world.run),
            weights=(newest / "weights.txt").read_text(),
            expected_weights=w.expected_weights(world),
            dead=wanted - {line.group_id for line in lines},
            expected_dead={group_id for group_id in wanted if world.must_die(group_id)},
            left=left,
        )
        result.problems = [*result.books.problems, *self._contradictions(result)]
        return result

    def _contradictions(self, result: Result) -> list[str]:
        problems = []
        if lost := result.dead - result.expected_dead:
            problems.append(f"{len(lost)} sound groups were not trained: {sorted(lost)[:5]}")
        if result.weights != result.expected_weights:
            problems.append(f"weights {result.weights[:12]}…, undisturbed {result.expected_weights[:12]}…")
        return problems


def _wake(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have been killed in its sleep
        os.kill(pid, signal.SIGCONT)


def _lives(process: BaseProcess | None) -> bool:
    return process is not None and process.exitcode is None
