"""A device error in the trainer: its context can't be used again, so the process ends; what was durable stays so."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.system import System

PROMPTS = 4  # in a step, by `tests.support.system`

BROKEN = """
import sys
from vaopd_trainer import loop
from vaopd_trainer.__main__ import main

train = loop.Trainer._train

def broken(self, step, *arguments):
    if step == 1:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return train(self, step, *arguments)

loop.Trainer._train = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_trainer_whose_device_fails_ends_and_the_run_goes_on_from_its_checkpoint(system: System) -> None:
    job = system.job("device-error", trainer__steps=2, trainer__checkpoint_every=1)
    worker = job.start_worker()
    trainer = job.start_trainer(launch=("-c", BROKEN))
    assert trainer.exit_code() not in (0, 130)
    assert "device-side assert" in trainer.text()
    assert [folder.name for folder in (job.folder / "checkpoints").iterdir()] == ["step_000001"]

    job.finished(job.start_trainer(resume=True))
    worker.kill()
    assert Counter(line["step"] for line in job.ledger()) == {0: PROMPTS, 1: PROMPTS}
    assert job.pending() == {"requests": 0, "groups": 0}
