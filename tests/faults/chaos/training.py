"""The real tiny training, again and again, each time with one process killed at random: same weights at the end.

Trainer (at one of its named points, or anywhere), rollout worker, teacher, or Redis, which comes back empty.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.system import Job, System
from vaopd.run.ledger import audit
from vaopd_trainer.kill_points import KILL_POINTS

STEPS, PROMPTS = 4, 4
SETTINGS = {
    "trainer__steps": STEPS,
    "trainer__prompts_per_step": PROMPTS,
    "evaluation__every": 2,
    "rollout__max_new_tokens": 8,
}
VICTIMS = ("trainer at a point", "trainer", "worker", "teacher", "redis")
LONGEST_DELAY_S = 1.0


def run(folder: Path, *, seed: int, runs: int, say: Callable[[str], None]) -> list[str]:
    """Prints a line per run; returns what went wrong."""
    problems = []
    with System(folder) as system:
        undisturbed = system.job("undisturbed", **SETTINGS)
        undisturbed.run()
        for number in range(runs):
            dice = random.Random(f"training {seed} {number}")
            victim = VICTIMS[number % len(VICTIMS)]
            job = system.job(f"run-{number:02d}", **SETTINGS)
            began = time.monotonic()
            where = _disturbed(system, job, victim, dice)
            books = audit(job.folder)
            wrong = list(books.problems)
            if job.weights() != undisturbed.weights():
                wrong.append("its weights are not those of the undisturbed run")
            if len(job.ledger()) != STEPS * PROMPTS:
                wrong.append(f"{len(job.ledger())} groups were trained, {STEPS * PROMPTS} were wanted")
            verdict = "; ".join(wrong) or "same weights, every group once"
            say(f"run {number:2d}: {victim}, {where}: {verdict} ({time.monotonic() - began:.0f} s)")
            problems += [f"run {number}: {what}" for what in wrong]
    return problems


def _disturbed(system: System, job: Job, victim: str, dice: random.Random) -> str:
    """Runs the job to its end with one death on the way; returns where it was."""
    worker = job.start_worker()
    if victim == "trainer at a point":
        point = dice.choice(KILL_POINTS)
        # A checkpoint is written after every second step.
        of_checkpoint = point in ("written", "renamed", "unacknowledged")
        death = f"{point}:{dice.choice((2, 4)) if of_checkpoint else dice.randrange(STEPS)}"
        trainer = job.start_trainer(kill_at=death)
        if trainer.exit_code() != -signal.SIGKILL:
            raise AssertionError(f"the trainer did not die at {death}: {trainer.text()[-2000:]}")
        trainer = job.start_trainer(resume=True)
        where = death
    else:
        trainer = job.start_trainer()
        steps, delay_s = dice.randrange(STEPS - 1), dice.uniform(0, LONGEST_DELAY_S)
        job.until(f"{steps} steps are done", lambda: len(job.records()) >= steps, trainer, worker)
        time.sleep(delay_s)
        where = f"{delay_s:.1f} s after step {steps}" if steps else f"{delay_s:.1f} s after its start"
        match victim:
            case "trainer":
                trainer.kill()
                trainer = job.start_trainer(resume=True)
            case "worker":
                worker.kill()
                worker = job.start_worker("w1")
            case "teacher":
                system.teacher.kill()
                system.start_teacher()
            case "redis":
                system.redis.kill()
                system.redis.start()
    job.finished(trainer)
    worker.kill()
    return where
