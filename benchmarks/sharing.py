"""Measures several jobs at one teacher: shares, a light job's latency beside a heavy one, service under overload.

`python benchmarks/sharing.py` prints one table. A real server process has the tiny teacher; real clients are in this
process. A forward holds one large group: a CPU loses nothing by that, and a light job waits at most for the rest of one
forward. `--requests` sets the number of latency samples, `--window-s` the length of every other measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import tables
from serving import TINY_TEACHER, group, percentile, teacher_server, tokens_of

from vaopd.client import TeacherClient
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import GroupScore, ScoreRequest
from vaopd.vlm.model import Vlm
from vaopd.wire.teacher import score_request_to_pb

SERVICE = "[teacher.sharing]\nmax_waiting_groups = 128\nmax_waiting_groups_per_job = 96\nweights = { heavy = 3.0 }\n"
_NAMES = itertools.count()


def renamed(request: ScoreRequest) -> ScoreRequest:
    return replace(request, group_id=f"g{next(_NAMES)}")


async def score(client: TeacherClient, *requests: ScoreRequest) -> float:
    """Scores requests in one call; returns the seconds to its last result."""
    started = time.monotonic()
    async for result in client.score([renamed(request) for request in requests]):
        if not isinstance(result, GroupScore):
            raise result.error
    return time.monotonic() - started


@asynccontextmanager
async def busy(
    target: str, job: str, request: ScoreRequest, *, calls: int, groups: int, done: Callable[[int], object] = int
) -> AsyncIterator[None]:
    """Keeps `calls` calls of `groups` groups each at the teacher; calls `done` with the tokens served."""

    async def forever(client: TeacherClient) -> None:
        while True:
            async for result in client.score([renamed(request) for _ in range(groups)]):
                if not isinstance(result, GroupScore):
                    raise result.error
                done(tokens_of(request))

    async with TeacherClient(target, job=job) as client:
        await score(client, request)
        workers = [asyncio.create_task(forever(client)) for _ in range(calls)]
        try:
            yield
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def latency(target: str, light: ScoreRequest, flood: ScoreRequest, count: int) -> dict[str, list[float]]:
    """Measures single groups with pauses, alone and beside a flood, in turns so that both see the same machine."""
    seconds: dict[str, list[float]] = {"alone": [], "beside a flood": []}
    async with TeacherClient(target, job="light") as client:
        forward_s = min([await score(client, light) for _ in range(5)])

        async def sample(place: str, times: int) -> None:
            for _ in range(times):
                await asyncio.sleep(random.uniform(0, 2) * forward_s)
                seconds[place].append(await score(client, light))

        for _ in range(4):
            await sample("alone", count // 4)
            async with busy(target, "flood", flood, calls=8, groups=8):
                await asyncio.sleep(1.0)
                await sample("beside a flood", count // 4)
    return seconds


async def shares(target: str, window_s: float, **jobs: tuple[ScoreRequest, int, int]) -> dict[str, float]:
    """Returns each job's share of the tokens served; a job is (request, calls, groups in a call)."""
    served: Counter[str] = Counter()

    def counter(job: str) -> Callable[[int], object]:
        return lambda tokens: served.update({job: tokens})

    (one, first), (other, second) = jobs.items()
    async with (
        busy(target, one, first[0], calls=first[1], groups=first[2], done=counter(one)),
        busy(target, other, second[0], calls=second[1], groups=second[2], done=counter(other)),
    ):
        await asyncio.sleep(1.0)
        served.clear()
        await asyncio.sleep(window_s)
        return {job: served[job] / served.total() for job in (one, other)}


async def peak(target: str, request: ScoreRequest, window_s: float) -> float:
    """Measures groups per second with enough calls to keep the device busy."""
    groups: Counter[str] = Counter()
    async with busy(target, "peak", request, calls=8, groups=8, done=lambda _: groups.update(["done"])):
        await asyncio.sleep(1.0)
        groups.clear()
        await asyncio.sleep(window_s)
        return groups["done"] / window_s


async def overload(target: str, request: ScoreRequest, per_second: float, window_s: float) -> tuple[float, list[float]]:
    """Sends calls of one group at a fixed rate, without retries.

    Returns the goodput in groups per second, and the seconds to each refusal.
    """
    finished: list[float] = []
    refused: list[float] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)

        async def call(message: object) -> None:
            started = time.monotonic()
            try:
                async for _ in stub.ScoreGroups(message):
                    pass
                finished.append(time.monotonic())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                refused.append(time.monotonic() - started)

        calls: set[asyncio.Task[None]] = set()
        started, sent = time.monotonic(), 0
        fill_s = 2.0  # until the queue is full
        while (now := time.monotonic() - started) < fill_s + window_s:
            while sent < now * per_second:
                message = score_request_to_pb([renamed(request)], job=f"job{sent % 4}", payload="hidden")
                task = asyncio.create_task(call(message))
                calls.add(task)
                task.add_done_callback(calls.discard)
                sent += 1
            await asyncio.sleep(0.002)
        good = sum(started + fill_s <= at <= started + fill_s + window_s for at in finished)
        for task in tuple(calls):
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    return good / window_s, refused


Row = tuple[str, str, str]


async def under_overload(target: str, large: ScoreRequest, window_s: float) -> list[Row]:
    before = await peak(target, large, window_s)
    goodput, refusals = await overload(target, large, 10 * before, window_s)
    capacity = max(before, await peak(target, large, window_s))
    refused_ms = [1000 * percentile(refusals, percent) for percent in (50, 99)]
    return [
        ("peak, groups per second", f"{capacity:.2f}", ""),
        (f"goodput at 10 × that ({len(refusals)} refused)", f"{goodput / capacity:.3f} of the peak", "≥ 0.9"),
        ("refused within, p50 / p99", f"{refused_ms[0]:.1f} / {refused_ms[1]:.1f} ms", "p99 ≤ 50 ms"),
    ]


async def among_jobs(target: str, large: ScoreRequest, small: ScoreRequest, options: argparse.Namespace) -> list[Row]:
    seconds = await latency(target, large, large, options.requests)
    p50 = {place: 1000 * percentile(values, 50) for place, values in seconds.items()}
    p99 = {place: 1000 * percentile(values, 99) for place, values in seconds.items()}
    equal = await shares(target, options.window_s, flood=(large, 8, 8), modest=(small, 4, 1))
    weighted = await shares(target, options.window_s, heavy=(large, 4, 8), flood=(small, 4, 8))
    return [
        (f"light job alone, p50 / p99 of {len(seconds['alone'])}", f"{p50['alone']:.0f} / {p99['alone']:.0f} ms", ""),
        ("beside a flood of 64 groups", f"{p50['beside a flood']:.0f} / {p99['beside a flood']:.0f} ms", ""),
        ("ratio of the p99", f"{p99['beside a flood'] / p99['alone']:.2f}", "≤ 2"),
        ("shares of the tokens, equal weights, 64 groups of 4 against 4 of 2",
         f"{equal['flood']:.3f} : {equal['modest']:.3f}", "0.5 ± 0.05"),
        ("weights 3 : 1, both flooding", f"{weighted['heavy'] / weighted['flood']:.2f} : 1", "3 : 1"),
    ]  # fmt: skip


async def measure(target: str, large: ScoreRequest, small: ScoreRequest, options: argparse.Namespace) -> None:
    rows = [] if options.only_overload else await among_jobs(target, large, small, options)
    rows += await under_overload(target, large, options.window_s)
    title = f"Sharing a teacher: {tokens_of(large)} and {tokens_of(small)} tokens per group"
    tables.table(title, ("", "measured", "target"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=TINY_TEACHER)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=200, help="latency samples on each side")
    parser.add_argument("--window-s", type=float, default=15.0)
    parser.add_argument("--only-overload", action="store_true", help="a larger --model wants a longer window")
    options = parser.parse_args()
    vlm = Vlm.load(options.model)
    large, small = (
        group(vlm, f"{k}", seed=k, side_px=256, rollouts=k, response_tokens=options.response_tokens) for k in (4, 2)
    )
    # As the server does: a garbage collection of torch's objects takes 0.3 s, and would count as the server's delay.
    gc.collect()
    gc.freeze()
    with teacher_server(options.model, batch_tokens=tokens_of(large), service=SERVICE) as server:
        asyncio.run(measure(server.target, large, small, options))


if __name__ == "__main__":
    main()
