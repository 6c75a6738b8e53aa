"""Which of a job's calls may prepare a unit now."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from vaopd_teacher.line.prepare_ahead import AT_ONCE, FEW_TOKENS, Ahead


class Calls:
    """Calls that take a turn, note their name and stay in it until they are told to leave."""

    def __init__(self) -> None:
        self.waiting_tokens: Counter[str] = Counter()
        self.ahead = Ahead(lambda job: self.waiting_tokens[job], batch_tokens=1)
        self.in_turn: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, *names: str, job: str = "a") -> None:
        for name in names:
            self.leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._prepare(job, name))
        await settle()

    async def _prepare(self, job: str, name: str) -> None:
        async with self.ahead.turn(job):
            self.in_turn.append(name)
            await self.leave[name].wait()

    async def end(self, *names: str) -> None:
        for name in names:
            self.leave[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def calls() -> Calls:
    return Calls()


async def test_so_many_prepare_at_once_and_the_others_follow_in_order(calls: Calls) -> None:
    assert AT_ONCE == 2
    await calls.start("1", "2", "3", "4")
    assert calls.in_turn == ["1", "2"]
    await calls.end("2")
    assert calls.in_turn == ["1", "2", "3"]
    await calls.end("1", "3", "4")
    assert calls.in_turn == ["1", "2", "3", "4"]


async def test_a_job_with_enough_prepared_waits_until_the_device_has_taken_some(calls: Calls) -> None:
    calls.waiting_tokens["a"] = FEW_TOKENS
    await calls.start("1")
    assert calls.in_turn == []
    calls.waiting_tokens["a"] = FEW_TOKENS - 1
    calls.ahead.look()
    await settle()
    assert calls.in_turn == ["1"]
    await calls.end("1")


async def test_one_jobs_backlog_holds_back_nobody_else(calls: Calls) -> None:
    calls.waiting_tokens["a"] = FEW_TOKENS
    await calls.start("flood", job="a")
    await calls.start("light", job="b")
    assert calls.in_turn == ["light"]
    await calls.end("light")
    await calls.cancel("flood")


async def test_a_call_that_goes_while_it_waits_makes_way(calls: Calls) -> None:
    await calls.start("1", "2", "3", "4")
    await calls.cancel("3")
    await calls.end("1")
    assert calls.in_turn == ["1", "2", "4"]
    await calls.end("2", "4")


async def test_a_call_that_goes_in_its_turn_makes_way(calls: Calls) -> None:
    await calls.start("1", "2", "3")
    await calls.cancel("1")
    assert calls.in_turn == ["1", "2", "3"]
    await calls.end("2", "3")


async def test_a_turn_that_comes_together_with_the_cancellation_is_given_back(calls: Calls) -> None:
    calls.waiting_tokens["a"] = FEW_TOKENS
    await calls.start("1")
    calls.waiting_tokens["a"] = 0
    calls.ahead.look()  # 1 has its turn now, but doesn't know yet
    await calls.cancel("1")
    await calls.start("2", "3")
    assert calls.in_turn == ["2", "3"]
    await calls.end("2", "3")


async def test_jobs_that_are_done_leave_nothing_behind(calls: Calls) -> None:
    for number in range(10):
        await calls.start(f"{number}", job=f"job{number}")
        await calls.end(f"{number}")
    assert not calls.ahead._queues
    assert not calls.ahead._preparing
