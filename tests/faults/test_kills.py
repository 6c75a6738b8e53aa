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
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.support import tolerance
from tests.support.models import LARGEST_LOGIT, model_folder
from tests.support.system import Job, System, read_lines
from vaopd.run.ledger import audit
from vaopd.vlm.model import Vlm
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
    held_out = Counter((record["step"], record["problem"]) for record in read_lines(job.folder / "heldout.jsonl"))
    assert {step for step, _ in held_out} == {0, 2, 4, 6, 8}
    assert set(held_out.values()) == {1}
    books = audit(job.folder)
    assert books.problems == []
    assert {fate.name_outcome(books.step) for fate in books.fates} == {"trained", "evaluated"}


def test_an_undisturbed_run_trains_every_group_once(undisturbed: Job) -> None:
    assert_each_group_once(undisturbed)


def test_a_killed_worker_teacher_and_redis_leave_no_trace_in_the_result(system: System, undisturbed: Job) -> None:
    job = system.job("killed-servers", **SETTINGS, weights__transport="http")
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


DEATHS = [
    *("collected:1", "scored:2", "backward:3", "device:3", "stepped:4"),
    *("written:6", "renamed:6", "unacknowledged:8"),
]
# A checkpoint every second step; the last one holds the whole run. What "renamed:6" has written is damaged.
RESUMED_AT = [0, 2, 2, 2, 4, 4, 4, 8]
BROKEN_DEVICE = """
import sys
from vaopd_trainer import loop
from vaopd_trainer.__main__ import main

train = loop.Trainer._train

def broken(self, step, *arguments):
    if step == 3:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return train(self, step, *arguments)

loop.Trainer._train = broken
sys.exit(main(sys.argv[1:]))
"""


def test_a_trainer_that_dies_at_each_of_its_points_in_turn_ends_with_the_same_weights(
    system: System, undisturbed: Job
) -> None:
    """Once its device fails: the process ends, since its context can't be used again. Once its newest checkpoint is
    damaged, so that it resumes from the one before: groups that were acknowledged since are sampled again, those that
    were not come again, and the evaluations are repeated.
    """
    job = system.job("killed-everywhere", **SETTINGS, weights__transport="http")
    assert [point for point, _, _ in (death.partition(":") for death in DEATHS) if point != "device"] == [*KILL_POINTS]
    worker = job.start_worker()
    for number, death in enumerate(DEATHS):
        fails = death.startswith("device")
        trainer = job.start_trainer(
            resume=number > 0, kill_at="" if fails else death, launch=("-c", BROKEN_DEVICE) if fails else ()
        )
        if fails:
            assert trainer.exit_code() not in (0, 130)
            assert "device-side assert" in trainer.text()
        else:
            assert trainer.exit_code() == -signal.SIGKILL, f"at {death}: {trainer.text()[-4000:]}"
        if death == "renamed:6":
            newest = job.folder / "checkpoints" / "step_000006"
            damage(newest / "student.safetensors")
    last = job.start_trainer(resume=True)
    job.finished(last)
    worker.kill()
    aside = re.findall(r"step_000006 can't be read .*; the run continues from step_000004", last.text())
    assert len(aside) == 1
    resumed = re.findall(r"resumed at step (\d+) with (\d+) trained groups", last.text())
    assert resumed == [(f"{step}", f"{step * PROMPTS}") for step in RESUMED_AT if step > 0]
    assert_each_group_once(job)
    assert job.losses() == undisturbed.losses()
    assert job.weights() == undisturbed.weights()


def damage(file: Path) -> None:
    """Flips one bit of the last weight: the file still loads."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_frozen_trainer_that_lost_its_job_is_refused_when_it_wakes(system: System, undisturbed: Job) -> None:
    """Another one has finished the run meanwhile. Before it is frozen, another one is refused at once."""
    job = system.job("frozen-trainer", **SETTINGS)
    frozen = job.start_trainer()
    job.until("it owns the folder", lambda: (job.folder / "trainer.lock").exists(), frozen)
    second = job.start_trainer(resume=True)  # meanwhile the first waits: no worker answers it
    assert second.exit_code() == 2
    assert re.search(r"is in use by trainer, process \d+ on \S+, since .*; `vaopd watch", second.text())
    worker = job.start_worker()
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


def test_two_ranks_of_a_sharded_student_die_in_a_checkpoint_and_one_whole_rank_goes_on(system: System) -> None:
    """Rank 1 in its backward pass; then the coordinator when both ranks' files of step 2 are there, not yet in place.

    `python -m tests.faults.ranks` kills every rank at every point.
    """
    settings = {"trainer__steps": 3, "trainer__checkpoint_every": 1, "trainer__prompts_per_step": 3}
    sharded = system.job("sharded", trainer__processes=2, trainer__sharding__kind="full", **settings)
    worker = sharded.start_worker()
    assert sharded.start_trainer(stop_at="backward:1").kill_rank(1, world=2) == -signal.SIGKILL
    assert "rank 0 has lost another of the 2 ranks" in (sharded.folder / "status.json").read_text()
    assert sharded.start_trainer(resume=True, kill_at="written:2").exit_code() == -signal.SIGKILL
    (checkpoint,) = (sharded.folder / "checkpoints").glob("step_*")
    assert [len(list(checkpoint.glob(f"shard-0000{rank}.safetensors"))) for rank in range(3)] == [1, 1, 0]

    whole = system.job("sharded", **settings)
    last = whole.start_trainer(resume=True)
    whole.finished(last)
    worker.kill()
    assert "resumed at step 1 with 3 trained groups" in last.text()
    wanted = [(f"train-{step:06d}-{index:04d}", step) for step in range(3) for index in range(3)]
    assert sorted((line["group_id"], line["step"]) for line in whole.ledger()) == wanted
    assert audit(whole.folder).problems == []
    Vlm.load(whole.folder / "model")


LORA: dict[str, Any] = {"trainer__steps": 4, "student__lora__rank": 4, "trainer__learning_rate": 3e-3}


@pytest.fixture(scope="module")
def adapted(system: System) -> Job:
    job = system.job("lora-undisturbed", **LORA)
    job.run()
    return job


def test_a_killed_student_of_adapters_resumes_with_them_and_leaves_both_forms(system: System, adapted: Job) -> None:
    """At any time its worker samples with the trainer's own weights, and a policy version is adapters alone."""
    job = system.job("lora", **LORA)
    worker = job.start_worker()
    killed = job.start_trainer(kill_at="stepped:3")
    assert killed.exit_code() == -signal.SIGKILL, killed.text()[-4000:]
    last = job.start_trainer(resume=True)
    job.finished(last)
    worker.kill()

    assert "resumed at step 2 with 8 trained groups" in last.text()
    assert audit(job.folder).problems == []
    rounding = tolerance.forward(AutoConfig.from_pretrained(job.folder / "model")) * LARGEST_LOGIT
    assert max(record["policy_drift_max"] for record in job.records()) < rounding
    adapters = load_file(job.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name), "some adapters learnt nothing"
    newest = max((job.folder / "policy").glob("v*"))
    assert {file.name for file in newest.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert job.weights() == adapted.weights()


def test_a_student_is_taught_by_its_own_base_without_a_teacher_and_through_a_kill(system: System, adapted: Job) -> None:
    """The trainer computes the teacher on the same weights: port 9 has none."""
    shared: dict[str, Any] = {
        "student__lora__start": adapted.folder / "adapter",
        "teacher__shared_base": True,
        "teacher__model": model_folder("student"),
        "teacher__address": "127.0.0.1:9",
    }
    job, undisturbed = (system.job(name, **LORA, **shared) for name in ("own-base", "own-base-undisturbed"))
    worker = job.start_worker()
    killed = job.start_trainer(kill_at="stepped:3")
    assert killed.exit_code() == -signal.SIGKILL, killed.text()[-4000:]
    job.finished(job.start_trainer(resume=True))
    worker.kill()
    undisturbed.run()

    assert audit(job.folder).problems == []
    assert min(record["kl_mean"] for record in job.records()) > 0.01  # the adapters that it begins with
    assert job.weights() == undisturbed.weights()
