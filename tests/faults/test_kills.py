"""kill -9 of each process in mid-run: the run finishes, and every group is trained exactly once.

Sampling is seeded by run and group, scoring is pure and the CPU deterministic. So a disturbed run must not only finish:
it must end with the very weights of an undisturbed one, bit for bit. Nothing lost, nothing twice, nothing in another
order could do that.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter

import pytest

from tests.support.system import Job, System
from vaopd.run.ledger import audit
from vaopd_trainer.kill_points import KILL_POINTS

STEPS, PROMPTS = 8, 4
SETTINGS = {"trainer__steps": STEPS, "trainer__prompts_per_step": PROMPTS, "evaluation__every": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(system: System) -> Job:
    job = system.job("undisturbed", **SETTINGS)
    job.run()
    return job


def assert_each_group_once(job: Job) -> None:
    wanted = {(f"train-{step:06d}-{index:04d}", step) for step in range(STEPS) for index in range(PROMPTS)}
    trained = Counter((line["group_id"], line["step"]) for line in job.ledger())
    assert trained == Counter(wanted)
    assert job.pending() == {"requests": 0, "groups": 0}
    assert [record["step"] for record in job.records()] == list(range(STEPS))
    assert [record["step"] for record in job.records("eval")] == [0, 2, 4, 6, 8]
    books = audit(job.folder)
    assert books.problems == []
    assert {fate.name_outcome(books.step) for fate in books.fates} == {"trained", "evaluated"}


def test_an_undisturbed_run_trains_every_group_once(undisturbed: Job) -> None:
    assert_each_group_once(undisturbed)


def test_a_killed_worker_teacher_and_redis_leave_no_trace_in_the_result(system: System, undisturbed: Job) -> None:
    job = system.job("killed-servers", **SETTINGS)
    trainer, worker = job.start_trainer(), job.start_worker()

    job.until("the second step is done", lambda: len(job.records()) >= 2, trainer, worker)
    job.kill_in_mid_batch(worker)
    worker = job.start_worker("w1")

    job.until("the third step is done", lambda: len(job.records()) >= 3, trainer, worker)
    system.teacher.kill()
    system.start_teacher()

    job.until("the fifth step is done", lambda: len(job.records()) >= 5, trainer, worker)
    system.redis.kill()
    system.redis.start()  # without an append-only file: it comes back empty

    job.finished(trainer)
    worker.kill()
    assert "republishing from this trainer's own record" in trainer.text()
    assert_each_group_once(job)
    assert job.losses() == undisturbed.losses()
    assert job.weights() == undisturbed.weights()


def test_a_killed_trainer_resumes_and_ends_with_the_same_weights(system: System, undisturbed: Job) -> None:
    """Its newest checkpoint is damaged as well, so that it goes on from the one before. Groups that were acknowledged
    since are sampled anew, those that were not come again, and the evaluations are repeated.
    """
    job = system.job("killed-trainer", **SETTINGS)
    trainer, worker = job.start_trainer(), job.start_worker()
    job.until("the fifth step is done", lambda: len(job.records()) >= 5, trainer, worker)
    trainer.kill()
    assert len(job.ledger()) < len(job.records()) * PROMPTS  # work that no checkpoint holds is lost

    again = job.start_trainer()
    assert again.exit_code() == 2
    assert "is in use; pass --resume to continue" in again.text()

    older, newest = sorted((job.folder / "checkpoints").iterdir())
    weights = newest / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused = job.start_trainer(resume=True)
    assert refused.exit_code() == 2
    assert f"checkpoint {newest} can't be read" in refused.text()
    shutil.rmtree(newest)  # as the message says

    resumed = job.start_trainer(resume=True)
    job.finished(resumed)
    worker.kill()
    step = int(older.name.removeprefix("step_"))
    assert f"resumed at step {step} with {step * PROMPTS} trained groups" in resumed.text()
    assert_each_group_once(job)
    assert job.losses() == undisturbed.losses()
    assert job.weights() == undisturbed.weights()


DEATHS = ["collected:1", "scored:2", "backward:3", "stepped:4", "written:6", "renamed:6", "unacknowledged:8"]
RESUMED_AT = [0, 2, 2, 4, 4, 6, 8]  # a checkpoint every second step; the last one holds the whole run


def test_a_trainer_that_dies_at_each_of_its_points_in_turn_ends_with_the_same_weights(
    system: System, undisturbed: Job
) -> None:
    job = system.job("killed-everywhere", **SETTINGS)
    assert [death.partition(":")[0] for death in DEATHS] == list(KILL_POINTS)
    worker = job.start_worker()
    for number, death in enumerate(DEATHS):
        trainer = job.start_trainer(resume=number > 0, kill_at=death)
        assert trainer.exit_code() == -signal.SIGKILL, f"at {death}: {trainer.text()[-4000:]}"
    last = job.start_trainer(resume=True)
    job.finished(last)
    worker.kill()
    resumed_at = [int(step) for step in re.findall(r"resumed at step (\d+)", last.text())]
    assert resumed_at == [step for step in RESUMED_AT if step > 0]
    assert_each_group_once(job)
    assert job.losses() == undisturbed.losses()
    assert job.weights() == undisturbed.weights()


def test_a_frozen_trainer_that_lost_its_job_is_refused_when_it_wakes(system: System, undisturbed: Job) -> None:
    """Another one has finished the run meanwhile."""
    job = system.job("frozen-trainer", **SETTINGS)
    frozen, worker = job.start_trainer(), job.start_worker()
    job.until("the third step is done", lambda: len(job.records()) >= 3, frozen, worker)
    frozen.send(signal.SIGSTOP)
    job.finished(job.start_trainer(resume=True))
    worker.kill()
    frozen.send(signal.SIGCONT)
    assert frozen.exit_code() == 2
    assert "lost job 'frozen-trainer'" in frozen.text()
    assert audit(job.folder).problems == []
    assert len(job.ledger()) == STEPS * PROMPTS
    assert job.weights() == undisturbed.weights()


def test_a_new_run_of_an_old_name_does_not_meet_what_the_old_one_left(system: System) -> None:
    """Killed before a checkpoint, and its folder removed: Redis still holds its groups, of prompts in another order."""
    settings = {"trainer__steps": 2, "trainer__checkpoint_every": 2}
    old, new = (system.job("old-name", run__seed=seed, **settings) for seed in (1, 2))
    trainer, worker = old.start_trainer(), old.start_worker()
    old.until("the first step is done", lambda: len(old.records()) >= 1, trainer, worker)
    trainer.kill()
    shutil.rmtree(old.folder)

    new.finished(new.start_trainer())
    worker.kill()
    assert len(new.ledger()) == 2 * PROMPTS
    assert not {key for record in new.records() for key in record if key.startswith("groups_")}  # none was dropped
    assert new.pending() == {"requests": 0, "groups": 0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_while_waiting_checkpoints_and_the_run_goes_on_from_there(system: System, ranks: int) -> None:
    """With several ranks the signal reaches torch's launcher, which passes it on."""
    job = system.job(f"interrupted-{ranks}", trainer__steps=2, trainer__processes=ranks)
    trainer = job.start_trainer()
    job.until("the first step's requests wait", lambda: job.stream_length("requests") >= PROMPTS, trainer)
    trainer.send(signal.SIGTERM)
    assert trainer.exit_code() == 130
    assert "stopped at step 0; continue with --resume" in trainer.text()
    assert [folder.name for folder in (job.folder / "checkpoints").iterdir()] == ["step_000000"]

    worker = job.start_worker()
    job.finished(job.start_trainer(resume=True))
    worker.kill()
    assert Counter(line["step"] for line in job.ledger()) == {0: PROMPTS, 1: PROMPTS}
    assert job.pending() == {"requests": 0, "groups": 0}
