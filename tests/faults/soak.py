"""A long mixed load, bad input included: memory stays flat; descriptors, threads and keys don't become more by it.

    python -m tests.faults.soak [--minutes N] [--json FILE]      (also: make soak MINUTES=N)

Real processes: a teacher with the tiny model and small caches, which are full and turn over soon; the API before it; a
Valkey; and, of the chaos run, a trainer, two rollout workers and a teacher without a model, which pass groups, poison,
duplicates and corrupt messages through queue, ledger and checkpoints all the while. After a first part, in which caches
fill and threads start, everybody rests and is counted; then again at the end. What there is more of then may have been
made at its first need: the load is repeated, and what it makes more of every time is lost. A light job asks four times
a second, at first beside the mixed load (`soak_load`), then beside the dearest requests too (`soak_worst`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import redis

from tests.faults.chaos import roles
from tests.faults.chaos.world import JOB, World
from tests.faults.soak_load import Load
from tests.faults.soak_worst import Light, Worst
from tests.support.api import start_api
from tests.support.teacher import teacher_process
from tests.support.waiting import wait_until
from vaopd.net.ports import free_port
from vaopd.queue.embedded import EmbeddedRedis

SERVICE = "[teacher.images]\nencoded_bytes = 500_000\nprepared_bytes = 8_000_000\nvision_bytes = 2_000_000\n"
FIRST_PART, LONGEST_FIRST_PART_S = 0.4, 120.0
QUIET_PART = 0.2  # of the rest: without the dearest requests
MOST_REPEATS = 2
SAMPLE_EVERY_S = 1.0
MOST_GROWTH_MIB = 16.0
"""From the first to the last fifth of the second part; a leak of one small image per second is twice that."""
_STREAMS, _HASHES = ("requests", "groups"), ("seen:requests", "seen:groups", "policies")


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of a process, by /proc."""

    rss_mib: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Count:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
            threads=int(status["Threads"]),
        )


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What is left while nobody asks for anything."""

    teacher: Count
    api: Count
    redis_keys: int


@dataclass(kw_only=True)
class Result:
    minutes: float
    calls: dict[str, int] = field(default_factory=dict)
    """By what was sent and how it was answered."""
    groups_trained: int = 0
    before: Rest | None = None
    after: Rest | None = None
    growth_mib: dict[str, float] = field(default_factory=dict)
    """Of each process's resident memory, from the first to the last fifth of the second part."""
    slope_mib_per_minute: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    rss_mib: dict[str, list[int]] = field(default_factory=dict)
    """Every 15 s."""
    light_ms: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """How long the light job's calls took: beside the mixed load, and beside the dearest requests too."""
    longest_s: dict[str, float] = field(default_factory=dict)
    """Of each of the dearest requests."""
    redis_entries: dict[str, float] = field(default_factory=dict)
    """Of the streams and hashes of the queue: the mean of the first and of the last fifth."""
    problems: list[str] = field(default_factory=list)


class Queue:
    """The other half of the system, on a Valkey of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._redis = stack.enter_context(EmbeddedRedis())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.chaos.roles"])
        port = free_port()
        (folder / "run").mkdir(parents=True)
        self.world = World(
            seed=1, steps=10**6, groups_per_step=25, folder=folder, redis_url=self._redis.url,
            teacher_target=f"127.0.0.1:{port}", lease_s=5.0,
        )  # fmt: skip
        parts: list[tuple[str, Callable[..., None], tuple[object, ...]]] = [
            ("fake teacher", roles.run_teacher, (port,)),
            ("worker", roles.run_worker, (0.0,)),
            ("second worker", roles.run_worker, (0.0,)),
            ("trainer", roles.run_trainer, ()),
        ]
        self.processes: dict[str, BaseProcess] = {}
        for name, role, more in parts:
            process = context.Process(target=role, args=(self.world, name.replace(" ", "-"), *more), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            self.processes[name] = process

    @property
    def steps(self) -> int:
        found = (self.world.run / "checkpoints").glob("step_*")
        return max((int(folder.name.removeprefix("step_")) for folder in found), default=0)

    def keys(self) -> int:
        with redis.Redis.from_url(self._redis.url) as client:
            return int(client.dbsize())

    def entries(self) -> int:
        """But the dead letters, which stay until somebody has looked at them."""
        with redis.Redis.from_url(self._redis.url) as client:
            streams = sum(client.xlen(f"vaopd:{{{JOB}}}:{name}") for name in _STREAMS)
            return streams + sum(client.hlen(f"vaopd:{{{JOB}}}:{name}") for name in _HASHES)


class Samples:
    """Taken once a second beside the load."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._values: dict[str, list[float]] = {}

    async def follow(self, pids: dict[str, int], queue: Queue) -> None:
        while True:
            self._times.append(time.monotonic())
            found = {name: Count.of(pid).rss_mib for name, pid in pids.items()}
            for name, value in (found | {"redis": float(queue.entries())}).items():
                self._values.setdefault(name, []).append(value)
            await asyncio.sleep(SAMPLE_EVERY_S)

    def ends(self, name: str) -> tuple[float, float]:
        """The means of the first and of the last fifth."""
        values = self._values[name]
        fifth = max(1, len(values) // 5)
        return float(np.mean(values[:fifth])), float(np.mean(values[-fifth:]))

    def every(self, seconds: int, name: str) -> list[int]:
        return [round(value) for value in self._values[name][:: round(seconds / SAMPLE_EVERY_S)]]

    def peak(self, name: str) -> float:
        return round(max(self._values[name]), 1)

    def per_minute(self, name: str) -> float:
        return float(np.polyfit(np.array(self._times) / 60, self._values[name], 1)[0])


def run(folder: Path, *, minutes: float, say: Callable[[str], None] = print) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "service.toml").write_text(SERVICE)
    result = Result(minutes=minutes)
    first_s = min(FIRST_PART * 60 * minutes, LONGEST_FIRST_PART_S)
    launch = ("-m", "vaopd_teacher", "--service", str(folder / "service.toml"))
    with ExitStack() as stack:
        teacher = stack.enter_context(teacher_process(folder, launch=launch, batch_tokens=2000))
        (folder / "api").mkdir()
        api = stack.enter_context(contextmanager(start_api)(folder / "api", teacher.target))
        address = str(api.http.base_url).removeprefix("http://").rstrip("/")
        queue = Queue(folder / "queue", stack)
        servers = {"teacher": teacher.process.pid, "api": api.process.pid}
        pids = servers | {name: process.pid or 0 for name, process in queue.processes.items()}
        load = Load(teacher.target)
        worst = Worst(api=address, teacher=teacher.target, share=min(1.0, minutes / 10))
        golden = asyncio.run(load.known_answer())
        lights = {name: Light(api=address, teacher=teacher.target) for name in ("mixed load", "dearest requests")}

        asyncio.run(_beside(first_s, load, worst))
        wait_until("the trainer has made a step", lambda: queue.steps > 0)
        before = _rest(servers, queue)
        say(f"after {first_s:.0f} s: {before}")

        samples = Samples()
        rest_s = 60 * minutes - first_s
        asyncio.run(_beside(QUIET_PART * rest_s, load, lights["mixed load"]))
        asyncio.run(_sampled((1 - QUIET_PART) * rest_s, samples, pids, queue, load, worst, lights["dearest requests"]))

        result.before, result.after = before, _rest(servers, queue)
        for repeats in range(MOST_REPEATS + 1):
            if repeats:
                say(f"again, since there is more than before: {_more(before, result.after)}")
                before = result.after
                asyncio.run(_beside(first_s, load, worst))
            if not (more := _settle(before, servers, queue)):
                break
            result.after = _rest(servers, queue)
        else:
            result.problems.append(f"each of {MOST_REPEATS + 1} loads leaves more, the last one {more}")
        if asyncio.run(load.known_answer()) != golden:
            result.problems.append("the known request has another answer now")
        dead = [name for name, process in queue.processes.items() if not process.is_alive()]
        dead += [name for name, server in (("teacher", teacher), ("api", api)) if server.process.poll() is not None]
        if dead:
            result.problems.append(f"ended in the midst of it: {dead}; {folder} has the logs")
        result.groups_trained = queue.steps * queue.world.groups_per_step
    calls = load.calls + worst.calls
    result.calls = {f"{kind}: {answer}": number for (kind, answer), number in sorted(calls.items())}
    result.longest_s = worst.longest_s
    result.light_ms = {name: light.percentiles_ms() for name, light in lights.items()}
    result.problems += [
        *load.problems,
        *worst.problems,
        *(line for light in lights.values() for line in light.problems),
    ]
    for name in pids:
        first, last = samples.ends(name)
        result.growth_mib[name] = round(last - first, 2)
        result.slope_mib_per_minute[name] = round(samples.per_minute(name), 3)
        result.peak_mib[name] = samples.peak(name)
        result.rss_mib[name] = samples.every(15, name)
    result.redis_entries = dict(zip(("first fifth", "last fifth"), samples.ends("redis"), strict=True))
    return result


class _Sender(Protocol):
    async def run(self, ends: float) -> None: ...


async def _beside(seconds: float, *senders: _Sender) -> None:
    ends = time.monotonic() + seconds
    await asyncio.gather(*(sender.run(ends) for sender in senders))


async def _sampled(seconds: float, samples: Samples, pids: dict[str, int], queue: Queue, *senders: _Sender) -> None:
    follower = asyncio.create_task(samples.follow(pids, queue))
    await _beside(seconds, *senders)
    if follower.done():
        follower.result()
    follower.cancel()


def _rest(servers: dict[str, int], queue: Queue) -> Rest:
    counts = {name: Count.of(pid) for name, pid in servers.items()}
    return Rest(teacher=counts["teacher"], api=counts["api"], redis_keys=queue.keys())


def _settle(before: Rest, servers: dict[str, int], queue: Queue) -> dict[str, tuple[int, int]]:
    """Waits until there is no more of anything than before, and returns what there is more of in the end."""

    def is_as_before() -> bool:
        return not _more(before, _rest(servers, queue))

    with contextlib.suppress(AssertionError):
        wait_until("descriptors, threads and keys are as many as before", is_as_before)
    return _more(before, _rest(servers, queue))


def _more(before: Rest, after: Rest) -> dict[str, tuple[int, int]]:
    """What there is more of."""
    pairs = {"keys": (before.redis_keys, after.redis_keys)}
    for name, first, last in (("teacher", before.teacher, after.teacher), ("api", before.api, after.api)):
        pairs[f"{name}'s descriptors"] = (first.descriptors, last.descriptors)
        pairs[f"{name}'s threads"] = (first.threads, last.threads)
    return {name: pair for name, pair in pairs.items() if pair[1] > pair[0]}


def memory_problems(result: Result) -> Iterator[str]:
    """The trainer's own books grow by design: a line for each group that it has trained."""
    for name, growth in result.growth_mib.items():
        if growth > MOST_GROWTH_MIB:
            yield f"the {name}'s memory grew by {growth:.1f} MiB"
    first, last = result.redis_entries.values()
    if last > 2 * first + 200:
        yield f"the queue holds {last:.0f} entries, {first:.0f} before"


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="vaopd-soak-") as scratch:
        yield Path(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and files there")
    arguments = parser.parse_args()
    with _folder(arguments.keep) as folder:
        result = run(folder, minutes=arguments.minutes, say=_say)
    result.problems += memory_problems(result)
    figures: dict[str, Any] = asdict(result)
    for name in figures.keys() - {"minutes", "problems"}:
        _say(f"{name.replace('_', ' ')}: {json.dumps(figures[name])}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))
    for problem in result.problems:
        _say(f"PROBLEM: {problem}")
    _say("FAILED" if result.problems else "flat")
    return 1 if result.problems else 0


def _say(text: str) -> None:
    print(f"soak: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
