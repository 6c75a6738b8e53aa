"""Two teacher replicas under load, restarted in turn: no accepted call fails, and every answer is right.

    python -m tests.faults.restarts [--rounds N]

Real processes with the tiny teacher. In a round each of them gets SIGTERM, drains, ends with status 0 and is started
again at its address, while clients score groups with images through both. What a client was refused for (a server that
drains takes no new call) it asks of the other; what a server had accepted it must have answered, which its log tells.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.support import tolerance
from tests.support.models import LARGEST_LOGIT, tiny_vlm
from tests.support.teacher import TeacherProcess, drawing, teacher_process, token_request
from vaopd.client import TeacherClient
from vaopd.net.ports import free_port
from vaopd.types import GroupScore, ScoreRequest

CALLERS, GROUPS_PER_CALL, PICTURES = 4, 3, 12
_DRAIN_S = 70.0  # the teacher's grace and the little that follows it
_FINISHED = re.compile(r": (\d+) groups, (\d+) refused, (\d+) given up")


@dataclass(kw_only=True)
class Report:
    restarts: int = 0
    groups: int = 0
    """Answered to the clients."""
    calls: int = 0
    """Finished by the servers, by their logs."""
    problems: list[str] = field(default_factory=list)


class Replica:
    """One of them: started, and started again at the same address."""

    def __init__(self, folder: Path, address: str) -> None:
        folder.mkdir(parents=True)
        self.address = address
        self._folder = folder
        self._stack = ExitStack()
        self._process = self._start()

    def _start(self) -> TeacherProcess:
        # Small forwards, so that many calls are in their middle at any moment.
        return self._stack.enter_context(teacher_process(self._folder, address=self.address, batch_tokens=400))

    def restart(self) -> int:
        """Returns the status with which it ended."""
        self._process.send(signal.SIGTERM)
        status = self._process.process.wait(_DRAIN_S)
        self._stack.close()
        self._process = self._start()
        return status

    def close(self) -> None:
        self._stack.close()

    def log(self) -> str:
        return (self._folder / "teacher.log").read_text()


@contextmanager
def replicas(folder: Path) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        started = []
        for name in ("one", "two"):
            started.append(Replica(folder / name, f"127.0.0.1:{free_port()}"))
            stack.callback(started[-1].close)
        yield started


def run(folder: Path, *, rounds: int, say: Callable[[str], None] = print) -> Report:
    report = Report()
    with replicas(folder) as both:
        asyncio.run(_under_load(both, rounds, report, say))
        for replica in both:
            for _, _, given_up in (found := _FINISHED.findall(replica.log())):
                if given_up != "0":
                    report.problems.append(f"{replica.address} gave up {given_up} groups of an accepted call")
            report.calls += len(found)
    return report


async def _under_load(both: list[Replica], rounds: int, report: Report, say: Callable[[str], None]) -> None:
    groups = [token_request(tiny_vlm(), f"g{n}", pictures=[drawing(n)]) for n in range(PICTURES)]
    async with TeacherClient(",".join(replica.address for replica in both), payload="none", timeout_s=60) as client:
        expected = {score.group_id: score.teacher_logprobs async for score in client.score(groups) if _is_score(score)}
        assert len(expected) == PICTURES
        assert not any(_alike(one, other) for one, other in itertools.combinations(expected.values(), 2))
        over = asyncio.Event()
        callers = [asyncio.create_task(_call(client, groups, n, expected, over, report)) for n in range(CALLERS)]
        began = time.monotonic()
        try:
            for number in range(rounds):
                for replica in both:
                    status = await asyncio.to_thread(replica.restart)
                    report.restarts += 1
                    if status != 0:
                        report.problems.append(f"{replica.address} ended with status {status} after SIGTERM")
                after = f"{time.monotonic() - began:4.0f} s"
                say(f"{after}: round {number + 1} of {rounds}, {report.groups} groups answered")
        finally:
            over.set()
            await asyncio.gather(*callers)


async def _call(
    client: TeacherClient,
    groups: list[ScoreRequest],
    number: int,
    expected: dict[str, tuple[np.ndarray, ...]],
    over: asyncio.Event,
    report: Report,
) -> None:
    """One caller, which always has a call at one of the replicas."""
    turn = number
    while not over.is_set():
        part = [groups[(turn + offset) % PICTURES] for offset in range(GROUPS_PER_CALL)]
        turn += GROUPS_PER_CALL
        try:
            async for result in client.score(part):
                report.groups += 1
                if not _is_score(result):
                    report.problems.append(f"a group was refused: {result.error}")
                elif not _alike(result.teacher_logprobs, expected[result.group_id]):
                    report.problems.append(f"group {result.group_id} was answered with another group's score")
        except Exception as error:
            report.problems.append(f"a call failed: {type(error).__name__}: {error}")


def _is_score(result: object) -> bool:
    return isinstance(result, GroupScore)


def _alike(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    """As near as two float32 forwards are: which groups share one shows in the last bits."""
    error = 2 * tolerance.forward(tiny_vlm().config) * LARGEST_LOGIT
    return all((np.abs(mine - others) <= error).all() for mine, others in zip(one, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.restarts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="vaopd-restarts-") as scratch:
        report = run(Path(scratch), rounds=rounds, say=lambda text: print(f"restarts: {text}", flush=True))
    print(f"restarts: {report.restarts} restarts, {report.groups} groups answered, {report.calls} calls finished")
    for problem in report.problems:
        print(f"restarts: PROBLEM: {problem}")
    print("restarts: FAILED" if report.problems else "restarts: no accepted call failed")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
