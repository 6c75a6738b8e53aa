"""`vaopd up`: what it offers to people while the run goes on, at the addresses that it tells."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.api import PNG, QUESTION
from tests.support.system import System
from tests.support.waiting import wait_until


@pytest.mark.slow
def test_viewer_report_and_student_while_the_run_goes_on(system: System, tmp_path: Path) -> None:
    job = system.job("watched", trainer__steps=500, api__address="127.0.0.1:0")
    settings = [word for setting in job.overrides for word in ("--set", setting)]
    command = [sys.executable, "-m", "vaopd.cli", "up", "configs/tiny.toml", *settings, "--teacher", system.address]
    told = tmp_path / "told.log"
    with told.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:

        def announced(pattern: str) -> str:
            wait_until(
                pattern, lambda: re.search(pattern, told.read_text()) or process.poll() is not None, timeout_s=120
            )
            found = re.search(pattern, told.read_text())
            assert found, told.read_text()
            return found[1]

        viewer = announced(r"visual advantage: (http://\S+/) ")
        report = announced(r"follow the run: (http://\S+/runs/watched/report)")
        with httpx.Client(base_url=viewer, timeout=120) as http:
            assert "Visual advantage viewer" in http.get("/").text
            # The trainer writes the run's configuration first.
            wait_until("the report is there", lambda: http.get(report).status_code == 200, timeout_s=600)
            assert '<body data-again="15">' in http.get(report).text
            assert http.get("/v1/students").json()["students"] == [{"model": "tiny-student", "loaded": False}]
            asked = {"image": PNG, "question": QUESTION, "num_responses": 2, "max_new_tokens": 8}
            sampled = http.post("/v1/sample", json=asked).json()["responses"]
            ids = [response["token_ids"] for response in sampled]
            scored = http.post("/v1/score", json={"image": PNG, "question": QUESTION, "responses": ids}).json()
            assert sum(rollout["rollout_weight"] for rollout in scored["rollouts"]) == pytest.approx(1)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_each_gpus_teacher_starts_a_replica(system: System, tmp_path: Path) -> None:
    """Without a GPU, both are given no device. That calls are balanced is tests/faults/test_replicas.py's."""
    job = system.job("replicas", trainer__steps=1, queue__url="embedded", teacher__address="127.0.0.1:0")
    settings = [word for setting in job.overrides for word in ("--set", setting)]
    command = [sys.executable, "-m", "vaopd.cli", "up", "configs/tiny.toml", *settings, "--no-api"]
    done = subprocess.run(
        [*command, "--gpus", "teacher=", "--gpus", "teacher="], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = job.folder / "logs"
    ready = [re.search(r"teacher ready on (\S+)", (logs / f"teacher-{k}.log").read_text()) for k in (0, 1)]
    assert all(ready)
    addresses = [found[1] for found in ready if found]
    assert len(set(addresses)) == 2
    assert f'address = "{",".join(addresses)}"' in (job.folder / "config.toml").read_text()
