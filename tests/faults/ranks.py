"""Every rank of a sharded student killed at every named point, and the run resumed on another number of ranks.

    python -m tests.faults.ranks [--ranks A,B] [--points POINT...]

One run of the real tiny training, by turns on A and on B ranks: at each point all ranks are stopped and one is killed;
the others wake beside a dead peer. Then B ranks resume what A ranks left, and so on. At the end every group must have
been trained once, and the weights must be those of an undisturbed run of one rank, but for the order of sums.

Ranks are forked from this process, which has imported torch: dozens of starts then take minutes, not an hour.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from tests.support.models import model_folder
from tests.support.preloaded import QUIET
from tests.support.rank_processes import ROOT, fork_rank
from tests.support.system import Job, Process, System
from vaopd.launch.up import make_service_argv
from vaopd.net.ports import LOOPBACK, free_port
from vaopd.process.ranks import GRACE_S, die_as
from vaopd.run.ledger import audit
from vaopd.vlm.model import Vlm
from vaopd_trainer.__main__ import main as main_of_trainer
from vaopd_trainer.kill_points import KILL_POINTS

CONFIG = ROOT / "configs" / "tiny.toml"
PROMPTS, RATE = 4, 1e-4
SETTINGS = {
    "trainer__prompts_per_step": PROMPTS,
    "trainer__checkpoint_every": 1,
    "trainer__learning_rate": RATE,
    "rollout__max_new_tokens": 8,
    "queue__max_deliveries": 1000,  # a group of a step that dies again and again
    "trainer__sharding__kind": "full",
}
KEPT = ("renamed", "unacknowledged")
"""The checkpoint is in place at these points, whichever rank dies."""


def list_deaths(points: Sequence[str], worlds: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Yields (ranks, the one that dies, point): by turns of each number of ranks; its first and its last die."""
    of_each = [[(world, rank, point) for point in points for rank in sorted({0, world - 1})] for world in worlds]
    for turn in range(max(map(len, of_each))):
        yield from (deaths[turn % len(deaths)] for deaths in of_each)


def run(folder: Path, *, worlds: Sequence[int], points: Sequence[str]) -> list[str]:
    """Prints a line per death; returns what went wrong."""
    deaths = list(list_deaths(points, worlds))
    steps = 2 + sum(point in (*KEPT, "written") for _, _, point in deaths)
    wrong = []
    with System(folder) as system:
        alone = system.job("undisturbed", trainer__steps=steps, **SETTINGS)
        worker = alone.start_worker()
        alone.finished(Trainer(alone, 1, resume=False))
        worker.kill()
        jobs = {n: system.job("killed", trainer__processes=n, trainer__steps=steps, **SETTINGS) for n in worlds}
        job = jobs[worlds[0]]
        worker = job.start_worker()
        done = 0
        for number, (world, rank, point) in enumerate(deaths):
            began = time.monotonic()
            of_checkpoint = point in (*KEPT, "written")
            trainer = Trainer(jobs[world], world, resume=number > 0, stop_at=f"{point}:{done + of_checkpoint}")
            code = trainer.kill_rank(rank, world=world)
            before, done = done, find_step(job)
            # Where rank 0 outlives the other's death at "written", it puts the checkpoint into place.
            allowed = {before + 1} if point in KEPT else {before, before + (point == "written" and rank > 0)}
            took = time.monotonic() - began
            say(
                f"{world} ranks, rank {rank} killed at {point}: exit {code}, a resume begins at step {done} "
                f"({took:.0f} s)"
            )
            if done not in allowed:
                wrong.append(f"rank {rank} of {world} at {point}: step {done} after step {before}")
        job.finished(Trainer(jobs[worlds[-1]], worlds[-1], resume=True))
        worker.kill()
        wrong += audit(job.folder).problems
        if len(job.ledger()) != steps * PROMPTS:
            wrong.append(f"{len(job.ledger())} groups were trained, {steps * PROMPTS} were wanted")
        wrong += compare(alone, job, steps=steps)
    return wrong


class Trainer(Process):
    """As `Job.start_trainer`, but forked. Of several ranks, the others are ended when one has failed."""

    def __init__(self, job: Job, world: int, *, resume: bool, stop_at: str = "") -> None:
        self.log = job.system.folder / f"{job.name}.trainer.log"
        argv = make_service_argv("trainer", CONFIG, job.overrides, *(("--resume",) if resume else ()))
        arguments = argv[argv.index("vaopd_trainer") + 1 :]
        process = multiprocessing.get_context("fork").Process(
            target=self._begin, args=(arguments, world, QUIET | {"VAOPD_STOP_AT": stop_at})
        )
        process.start()
        self._popen = process._popen  # type: ignore[attr-defined]
        job.system.keep(self)

    def _begin(self, arguments: Sequence[str], world: int, environment: dict[str, str]) -> None:
        """In the fork: trains, or starts the ranks and ends as they do."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= environment
        if world == 1:
            sys.exit(main_of_trainer(arguments))
        os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        ranks = [fork_rank(rank, functools.partial(main_of_trainer, arguments)) for rank in range(world)]
        failed = 0
        while ranks:
            ended, status = os.wait()
            ranks.remove(ended)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed = code
                for rank in ranks:
                    os.kill(rank, signal.SIGTERM)
                signal.signal(signal.SIGALRM, lambda *_: [os.kill(rank, signal.SIGKILL) for rank in ranks])
                signal.alarm(round(GRACE_S))
        die_as(failed)
        sys.exit(failed)


def compare(alone: Job, killed: Job, *, steps: int) -> list[str]:
    """Prints how far the weights are apart; returns those that rounding in another order doesn't explain.

    AdamW's step is about the rate for every weight, however small its gradient. Where the gradient is rounding for the
    most part, the weights may part by two steps each time: at most one in 10^4, as in integration/test_runs.py.
    """
    expected, found = load(alone.weights()), load(killed.weights())
    apart = {name: np.abs(tensor - expected[name]) / RATE for name, tensor in found.items()}
    every = np.concatenate([tensor.ravel() for tensor in apart.values()])
    limit = 0.02 * steps
    say(
        f"weights after {steps} steps, in units of the learning rate: {(every == 0).mean():.1%} equal bit for bit, "
        f"mean {every.mean():.2g}, largest {every.max():.2g}, {(every > limit).sum()} of {every.size} above {limit:g}"
    )
    return [
        f"{name} differs by up to {tensor.max():.2g} learning rates"
        for name, tensor in apart.items()
        if tensor.max() > 2 * steps or (tensor > limit).sum() > steps * (1 + 1e-4 * tensor.size)
    ]


def find_step(job: Job) -> int:
    """The newest checkpoint's step; 0 without one."""
    return max((int(path.name[5:]) for path in (job.folder / "checkpoints").glob("step_*")), default=0)


def say(text: str) -> None:
    print(f"ranks: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ranks")
    parser.add_argument("--ranks", default="2,1", metavar="A,B", help="numbers of ranks, by turns (default 2,1)")
    parser.add_argument("--points", nargs="+", choices=KILL_POINTS, default=KILL_POINTS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the processes are ended, too
    importlib.import_module("vaopd_trainer.compose")
    Vlm.load(model_folder("student"))  # imports its family: no fork has to
    with tempfile.TemporaryDirectory(prefix="vaopd-ranks-") as folder:
        worlds = [int(number) for number in arguments.ranks.split(",")]
        problems = run(Path(folder), worlds=worlds, points=arguments.points)
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("FAILED" if problems else "0 lost, 0 trained twice")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
