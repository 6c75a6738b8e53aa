"""Another teacher behind the same address, and a teacher that moves: what a run makes of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import model_folder, save_untrained
from tests.support.system import Job, Process, System, read_lines
from vaopd.client import SyncTeacherClient
from vaopd.run.ledger import audit
from vaopd.run.status import read_status

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def own_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Not the shared one: its teacher is replaced."""
    with System(tmp_path_factory.mktemp("other-teacher")) as running:
        yield running


def resume(job: Job, *arguments: str) -> Process:
    return job.system.start("trainer", job.name, job.overrides, "--resume", *arguments)


def checkpoint_steps(job: Job) -> list[int]:
    states = sorted((job.folder / "checkpoints").glob("*/state.json"))
    return [json.loads(path.read_text())["step"] for path in states]


def revision(system: System) -> str:
    with SyncTeacherClient(system.address) as teacher:
        return teacher.describe().revision


def test_a_replaced_teacher_costs_no_step_and_is_taken_only_when_it_is_accepted(
    own_system: System, tmp_path: Path
) -> None:
    system = own_system
    job = system.job("replaced", trainer__steps=STEPS, trainer__checkpoint_every=100)
    first = revision(system)
    trainer, worker = job.start_trainer(), job.start_worker()
    job.until("two steps are done", lambda: len(job.records()) >= 2, trainer, worker)
    status = read_status(job.folder)
    assert status is not None
    assert status.state == "running"

    system.teacher.kill()
    system.teacher_model = save_untrained(tmp_path / "another", seed=7)
    system.start_teacher()
    second = revision(system)
    assert second != first
    assert trainer.exit_code() == 2
    done = len(job.records())
    assert 2 <= done < STEPS
    assert checkpoint_steps(job) == [done]  # written for this: the next regular one would be step 100's
    refusal = f"revision: {first[:16]} → {second[:16]}"
    assert refusal in trainer.text()
    assert f"Step {done} is in a checkpoint; nothing is lost." in trainer.text()
    status = read_status(job.folder)
    assert status is not None
    assert (status.state, status.step) == ("failed", done)
    assert refusal in status.reason

    for _ in range(2):  # as a supervisor does
        again = resume(job)
        assert again.exit_code() == 2
        assert again.text().rstrip().endswith(f"--resume --accept-teacher {second[:16]}")
    other = resume(job, "--accept-teacher", first[:16])
    assert other.exit_code() == 2
    assert len(job.records()) == done

    job.finished(resume(job, "--accept-teacher", second[:16]))
    worker.kill()
    assert [record["step"] for record in job.records()] == list(range(STEPS))
    assert audit(job.folder).problems == []
    lines = read_lines(job.folder / "settings.jsonl")
    assert [(line["step"], line["teacher"]["revision"], line["accepted"]) for line in lines] == [
        (0, first, False),
        (done, second, True),
    ]
    newest = max((job.folder / "checkpoints").glob("*/state.json"))
    recorded = json.loads(newest.read_text())["teacher"]
    assert recorded["revision"] == second
    assert len(recorded["head_sha256"]) == 64
    status = read_status(job.folder)
    assert status is not None
    assert (status.state, status.step) == ("finished", STEPS)


def test_the_same_teacher_at_another_address_needs_no_word_and_changes_no_bit(own_system: System) -> None:
    """Blue and green: stop the run, start the same model elsewhere, resume with its address."""
    system = own_system
    system.teacher.kill()
    system.teacher_model = model_folder("teacher")
    system.start_teacher()
    undisturbed = system.job("undisturbed", trainer__steps=4)
    undisturbed.run()

    blue = system.job("moved", trainer__steps=4)
    trainer, worker = blue.start_trainer(), blue.start_worker()
    blue.until("a step is done", lambda: len(blue.records()) >= 1, trainer, worker)
    trainer.send(signal.SIGTERM)
    assert trainer.exit_code() == 130
    status = read_status(blue.folder)
    assert status is not None
    assert (status.state, status.step) == ("stopped", len(blue.records()))

    system.teacher.kill()
    old, system.address = system.address, "127.0.0.1:0"
    system.start_teacher()
    assert system.address != old
    green = system.job("moved", trainer__steps=4)
    green.finished(resume(green))
    worker.kill()
    assert green.weights() == undisturbed.weights()
    assert [line["changes"] for line in read_lines(green.folder / "settings.jsonl")] == [{}, {}]
