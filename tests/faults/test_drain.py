"""SIGTERM where the drain can't come to its own end: a device that hangs, a teacher that is away."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.support.models import tiny_vlm
from tests.support.system import Job, Process, System, read_lines
from tests.support.teacher import teacher_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.errors import Unavailable
from vaopd.run.checkpoints import FILE

PROMPTS = 4  # in a step, by `tests.support.system`

HANGING = """
import sys, threading
from vaopd_teacher.__main__ import main
from vaopd_teacher.engines.transformers_engine import GroupEngine

def hang(self, groups):
    print("the device hangs", flush=True)
    threading.Event().wait()
    yield

GroupEngine.score = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_teacher_whose_device_hangs_with_a_status_that_tells(tmp_path: Path) -> None:
    """Long before the watchdog, which by default gives the device 300 s."""
    request = token_request(tiny_vlm(), "g")
    errors: list[Unavailable] = []

    def ask(target: str) -> None:
        with SyncTeacherClient(target, patience_s=0.0) as client:
            try:
                list(client.score([request]))
            except Unavailable as error:
                errors.append(error)

    service = tmp_path / "service.toml"
    service.write_text("[teacher]\ndrain_s = 1.0\n")
    with teacher_process(tmp_path, launch=("-c", HANGING, "--service", str(service))) as teacher:
        caller = threading.Thread(target=ask, args=(teacher.target,))
        caller.start()
        wait_until("the device hangs", lambda: "the device hangs" in (tmp_path / "teacher.log").read_text())
        teacher.send(signal.SIGTERM)
        assert teacher.process.wait(30) == 1
        caller.join(30)
    assert len(errors) == 1  # the call that was accepted is not left without an answer


def delivered(job: Job) -> int:
    return sum(line["event"] == "delivered" for line in read_lines(job.folder / FILE))


def assert_stopped(trainer: Process, job: Job, *, times: int) -> None:
    """It has ended by itself, with the checkpoint of a run that has trained nothing. The log is that of all tries."""
    wait_until("the trainer ends", lambda: trainer.returncode is not None)
    assert trainer.exit_code() == 130
    assert trainer.text().count("stopped at step 0; continue with --resume") == times
    assert [folder.name for folder in (job.folder / "checkpoints").iterdir()] == ["step_000000"]


@pytest.mark.slow
def test_sigterm_ends_a_trainer_whatever_it_waits_for_and_the_run_goes_on_from_its_checkpoint(system: System) -> None:
    """First for a worker, then for the teacher; tests/integration/test_runs.py stops one of two ranks."""
    job = system.job("stopped", trainer__steps=2, trainer__checkpoint_every=1)
    trainer = job.start_trainer()
    job.until("the first step's requests wait", lambda: job.stream_length("requests") >= PROMPTS, trainer)
    trainer.send(signal.SIGTERM)
    assert_stopped(trainer, job, times=1)

    trainer = job.start_trainer(resume=True)
    job.until("it has asked the teacher who it is", lambda: trainer.text().count("groups requested") >= 2, trainer)
    system.teacher.kill()
    worker = job.start_worker()
    job.until("the trainer has every group, and asks the teacher", lambda: delivered(job) == PROMPTS, trainer, worker)
    trainer.send(signal.SIGTERM)
    assert_stopped(trainer, job, times=2)

    system.start_teacher()
    job.finished(job.start_trainer(resume=True))
    worker.kill()
    assert Counter(line["step"] for line in job.ledger()) == {0: PROMPTS, 1: PROMPTS}
    assert job.pending() == {"requests": 0, "groups": 0}
