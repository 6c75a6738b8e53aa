"""A run's status: who writes it, and what it is once its writer is gone."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vaopd.errors import ConfigError, InvalidInput, LeaseLost
from vaopd.run.status import FILE, RunStatus, StatusWriter, read_status


def read(folder: Path, *, now_s: float = 0.0) -> RunStatus:
    status = read_status(folder, now_s=now_s)
    assert status is not None
    return status


def test_from_its_start_to_its_end(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    with StatusWriter(tmp_path, role="trainer", clock=lambda: 1000.0) as writer:
        writer.write("starting")
        assert (read(tmp_path).state, read(tmp_path).alive) == ("starting", True)
        writer.write("running", step=4, lease_s=60.0)
        writer.note_step(7)
        writer.beat()
        assert (read(tmp_path, now_s=1060.0).label, read(tmp_path).step) == ("running", 7)
        assert read(tmp_path).writer == f"trainer, process {os.getpid()} on {socket.gethostname()}"
        writer.write("stopped")
    assert read(tmp_path).label == "stopped at step 7"


def test_a_lease_that_has_run_out_ends_the_run_for_readers(tmp_path: Path) -> None:
    """Even while its process is still there: it may be frozen."""
    with StatusWriter(tmp_path, role="trainer", clock=lambda: 1000.0) as writer:
        writer.write("running", step=3, lease_s=60.0)
        assert read(tmp_path, now_s=1059.0).alive
        late = read(tmp_path, now_s=1061.0)
        assert (late.state, late.step) == ("failed", 3)
        assert "no sign of life" in late.reason
        assert "for 61 s, and its lease is 60 s" in late.reason


def test_a_killed_writer_shows_at_once_on_its_own_host_and_after_the_lease_elsewhere(tmp_path: Path) -> None:
    """Its lock is let go without a word, as the kernel does after kill -9."""
    with StatusWriter(tmp_path, role="trainer", clock=lambda: 1000.0) as writer:
        writer.write("running", step=3, lease_s=60.0)
    dead = read(tmp_path, now_s=1001.0)
    assert (dead.state, dead.step) == ("failed", 3)
    assert re.fullmatch(r"the trainer, process \d+ on \S+ ended without a word: killed, .*", dead.reason)
    written = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(written | {"host": "another"}))
    assert read(tmp_path, now_s=1001.0).state == "running"
    assert read(tmp_path, now_s=1061.0).state == "failed"


def test_an_error_is_the_reason_and_a_lost_lease_is_not_a_word_of_this_trainer_any_more(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with StatusWriter(tmp_path, role="trainer") as writer, writer.record_failure():
            writer.write("running", step=5, lease_s=60.0)
            raise error

    with pytest.raises(ConfigError):
        fail(ConfigError("no such model"))
    assert read(tmp_path).label == "failed at step 5: no such model"
    with pytest.raises(KeyError):
        fail(KeyError("x"))
    assert read(tmp_path).reason == "KeyError: 'x'"
    with StatusWriter(tmp_path, role="trainer", clock=lambda: 0.0) as successor:
        with pytest.raises(LeaseLost):
            fail(LeaseLost("another has it"))
        assert read(tmp_path).state == "running"
        successor.write("finished", step=9)
    assert read(tmp_path).label == "finished"


def test_a_second_trainer_says_nothing_while_the_first_has_the_job(tmp_path: Path) -> None:
    with StatusWriter(tmp_path, role="trainer") as first:
        first.write("running", step=5, lease_s=60.0)
        before = (tmp_path / FILE).read_bytes()
        with StatusWriter(tmp_path, role="trainer") as second:
            second.write("starting")
            second.fail("the job is held")
            assert (tmp_path / FILE).read_bytes() == before
            second.write("running", step=5, lease_s=60.0)  # now it has the lease
            assert (tmp_path / FILE).read_bytes() != before


def concluded(folder: Path, state: str, reason: str) -> str:
    """What the launcher's word makes of a status that a trainer has left."""
    with StatusWriter(folder, role="vaopd up") as launcher:
        launcher.write("starting")
        with StatusWriter(folder, role="trainer") as trainer:
            trainer.write(state, step=2, reason="its own" if state == "failed" else "")  # type: ignore[arg-type]
        launcher.conclude(reason)
    return read(folder).label


@pytest.mark.parametrize(
    ("state", "reason", "label"),
    [
        ("running", "the trainer was killed by SIGKILL", "failed at step 2: the trainer was killed by SIGKILL"),
        ("running", "", "stopped at step 2"),
        ("stopped", "teacher can't be kept alive", "failed at step 2: teacher can't be kept alive"),
        ("failed", "the trainer ended with code 2", "failed at step 2: its own"),
        ("finished", "", "finished"),
    ],
)
def test_the_launcher_says_what_the_trainer_could_not(tmp_path: Path, state: str, reason: str, label: str) -> None:
    assert concluded(tmp_path, state, reason) == label


@pytest.mark.parametrize("end", [lambda writer: writer.fail("refused"), lambda writer: writer.conclude("refused")])
def test_a_finished_run_that_is_refused_stays_finished(tmp_path: Path, end: Callable[[StatusWriter], None]) -> None:
    with StatusWriter(tmp_path, role="trainer") as writer:
        writer.write("finished", step=9)
    with StatusWriter(tmp_path, role="vaopd up") as launcher:
        launcher.write("starting")
        end(launcher)
    assert (read(tmp_path).label, read(tmp_path).step) == ("finished", 9)


@pytest.mark.parametrize("text", ["", "[]", '{"state": "running"}', '{"state": "dancing"}'])
def test_a_damaged_status_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InvalidInput, match=r"status\.json"):
        read_status(tmp_path)
