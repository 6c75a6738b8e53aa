"""`vaopd up --resume RUN`: the run's own settings, what may change of them, and what becomes of it on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.system import Job, System, read_lines
from tests.support.waiting import wait_until
from vaopd.cli import main
from vaopd.report import write_report
from vaopd.run.status import read_status

pytestmark = pytest.mark.slow


def up(job: Job, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vaopd.cli", "up", *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def state(job: Job) -> str:
    status = read_status(job.folder)
    return "" if status is None else status.state


def test_a_run_is_resumed_as_what_it_is(system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = system.job("resumed", trainer__steps=500, trainer__checkpoint_every=1, api__address="127.0.0.1:0")
    log, settings = tmp_path / "up.log", [word for setting in job.overrides for word in ("--set", setting)]
    process = up(job, log, "configs/tiny.toml", *settings, "--teacher", system.address, "--no-api")
    job.until("two steps are done", lambda: len(job.records()) >= 2 or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    assert state(job) == "running"
    assert main(["up", "--resume", str(job.folder)]) == 2
    assert "is running: trainer, process" in capsys.readouterr().err

    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until("its orphans have ended, and the run says so", lambda: state(job) in ("failed", "stopped"))
    done = len(job.records())

    run = str(job.folder)
    for change, told in (
        ("objective.variant=standard", 'objective.variant: "va_opd" → "standard"'),
        ("run.seed=9", "run.seed: 0 → 9"),
        ("trainer.prompts_per_step=2", "trainer.prompts_per_step: 4 → 2"),
        ("trainer.steps=1", "give at least as many"),
    ):
        assert main(["up", "--resume", run, "--set", change]) == 2
        assert told in capsys.readouterr().err
    assert len(job.records()) == done

    more = ["--set", f"trainer.steps={done + 2}", "--set", "trainer.learning_rate=1e-4", "--no-api"]
    process = up(job, log, "--resume", run, *more)  # the teacher, too, is that of the first start
    assert process.wait(600) == 0, log.read_text()
    assert f"finished: the model is in {job.folder / 'model'}" in log.read_text()
    assert [record["step"] for record in job.records()] == list(range(done + 2))
    assert state(job) == "finished"
    line = read_lines(job.folder / "settings.jsonl")[-1]
    assert line["changes"] == {"trainer.steps": [500, done + 2], "trainer.learning_rate": [0.0006, 0.0001]}
    assert f"steps = {done + 2}\n" in (job.folder / "config.toml").read_text()
    page = write_report([job.folder]).read_text()
    assert f"From step {line['step']} on, trainer.steps is {done + 2}; before, it was 500." in page
    assert main(["watch", run, "--once"]) == 0
    assert f"step {done + 2}/{done + 2}" in capsys.readouterr().out
    assert json.loads((job.folder / "launch.json").read_text())["teacher"] == system.address

    assert main(["up", "--resume", run]) == 0
    assert f"run 'resumed' is finished: all {done + 2} steps are done" in capsys.readouterr().err
