"""Supervision: what a launcher owes its children, tried on small real processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.runs import MINIMAL
from tests.support.waiting import wait_until
from vaopd.config import load_config
from vaopd.errors import ChildFailed
from vaopd.launch import up
from vaopd.launch.supervisor import Child, Supervisor

SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_processes_share_the_host_s_cores_and_count_gpus_as_nvidia_smi_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 cores for a teacher, two workers and three ranks."""
    (tmp_path / "run.toml").write_text(MINIMAL)
    config = load_config(tmp_path / "run.toml", ["rollout.workers=2", "trainer.processes=3"])
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = up.make_environment(config, devices="2,3")
    expected = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert {name: found[name] for name in expected} == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in up.make_environment(config, devices=None)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, said: list[str]) -> Supervisor:
    return Supervisor(logs=tmp_path / "logs", grace_s=5, backoff_s=0.01, say=said.append)


def test_the_main_child_s_exit_code_is_the_answer_and_the_others_end(supervisor: Supervisor) -> None:
    with supervisor:
        other = supervisor.start(Child(name="other", argv=python(SLEEPER)))
        supervisor.start(Child(name="main", argv=python("raise SystemExit(7)"), stop_order=0))
        assert supervisor.run_until_exit("main") == 7
    assert gone(other)


def test_a_child_that_dies_before_it_is_ready_is_reported_with_the_end_of_its_log(supervisor: Supervisor) -> None:
    code = "print('no such model'); raise SystemExit(3)"
    with supervisor:
        supervisor.start(Child(name="teacher", argv=python(code), is_ready=lambda: False))
        with pytest.raises(ChildFailed, match=r"ended with code 3 before it was ready(.|\n)*no such model"):
            supervisor.wait_ready("teacher", timeout_s=60)


def test_who_is_still_starting_is_told_now_and_then(
    supervisor: Supervisor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaopd.launch.supervisor.SAY_EVERY_S", 0.01)
    with supervisor:
        supervisor.start(Child(name="teacher", argv=python(SLEEPER), is_ready=lambda: len(said) >= 2))
        supervisor.wait_ready("teacher", timeout_s=60)
    assert re.match(r"still starting: teacher \(\d+ s\); logs in ", said[0])
    assert said[-1].startswith("teacher is ready after ")


def test_in_a_terminal_they_are_shown_with_what_they_said_last(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's progress bar is a line that is written again and again; the last state of it counts."""
    monkeypatch.setattr("vaopd.launch.supervisor.SHOW_EVERY_S", 0.01)
    shown: list[str] = []
    code = "print('loading: 10 %\\rloading: 40 %', flush=True); import time; time.sleep(600)"
    with Supervisor(logs=tmp_path, grace_s=5, say=said.append, show=shown.append) as supervisor:
        is_ready = lambda: any("40 %" in line for line in shown)  # noqa: E731
        supervisor.start(Child(name="teacher", argv=python(code), is_ready=is_ready))
        supervisor.wait_ready("teacher", timeout_s=60)
    assert re.fullmatch(r"starting: teacher \d+ s  loading: 40 %", shown[-1])
    assert [line.split(" after")[0] for line in said] == ["teacher is ready"]


def test_an_end_that_takes_a_while_names_who_is_left(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaopd.launch.supervisor.SAY_EVERY_S", 0.01)
    monkeypatch.setattr("vaopd.launch.supervisor.ENDING_SILENT_S", 0.05)
    ready = tmp_path / "ready"
    code = f"import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch()"
    with Supervisor(logs=tmp_path, grace_s=0.5, say=said.append) as supervisor:
        supervisor.start(Child(name="rollout-0", argv=python(code + "; time.sleep(600)"), is_ready=ready.exists))
        supervisor.wait_ready("rollout-0", timeout_s=60)
    assert said[-1] == "ending: rollout-0 (0 s)"


def test_a_child_that_dies_later_is_restarted(supervisor: Supervisor, tmp_path: Path, said: list[str]) -> None:
    log = tmp_path / "logs" / "worker.log"
    with supervisor:
        first = supervisor.start(Child(name="worker", argv=python(SLEEPER), is_ready=lambda: "up" in log.read_text()))
        supervisor.wait_ready("worker", timeout_s=60)
        os.kill(first, signal.SIGKILL)
        wait_until("the second one is up", lambda: supervisor.check() or log.read_text().count("up") == 2)
    assert any("worker was killed by SIGKILL; it is restarted" in line for line in said)


def test_logs_that_were_removed_end_it_in_plain_words(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor:
        supervisor.start(Child(name="other", argv=python("raise SystemExit(3)"), restarts=0))
        supervisor.start(Child(name="main", argv=python(SLEEPER), stop_order=0))
        shutil.rmtree(tmp_path / "logs")
        with pytest.raises(ChildFailed, match=r"code 3 .*other.log:\n  \(nothing: its disk may be full, or it was rem"):
            supervisor.run_until_exit("main")
        with pytest.raises(ChildFailed, match=r"third can't be started: '.*/logs/third.log': No such file or direct"):
            supervisor.start(Child(name="third", argv=python(SLEEPER)))


def test_restarts_are_bounded(supervisor: Supervisor) -> None:
    with supervisor:
        supervisor.start(Child(name="worker", argv=python("raise SystemExit(1)"), restarts=2))
        with pytest.raises(ChildFailed, match="restarted 2 times"):
            wait_until("the supervisor gives up", supervisor.check)


@pytest.mark.parametrize(
    ("codes", "restarts", "answer", "starts"),
    [
        ([75, 1, -9, 0], True, 0, ["", "--resume", "--resume", "--resume"]),  # Redis away, a device error, SIGKILL
        ([1, 2], True, 2, ["", "--resume"]),  # an error by name would come back
        ([130], True, 130, [""]),  # a signal asked for it
        ([1] * 7, True, 1, ["", *["--resume"] * 5]),
        ([75], False, 75, [""]),
    ],
)
def test_the_trainer_is_restarted_after_what_a_resume_may_cure(
    supervisor: Supervisor,
    tmp_path: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    restarts: bool,
    answer: int,
    starts: list[str],
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(MINIMAL)
    given: list[str] = []

    def exiting(role: str, path: Path, overrides: list[str], *arguments: str) -> tuple[str, ...]:
        code = codes[len(given)]
        given.append(" ".join(arguments))
        return python(
            "import os, sys; n = int(sys.argv[1]); os.kill(os.getpid(), -n) if n < 0 else os._exit(n)", str(code)
        )

    monkeypatch.setattr(up, "make_service_argv", exiting)
    monkeypatch.setattr(up, "RESTART_S", 0.01)
    options = up.UpOptions(config_path=config, restart_trainer=restarts)
    with supervisor:
        assert up._Launch(load_config(config), options, supervisor, said.append)._run_trainer() == answer
    assert given == starts
    assert sum("it continues from its last checkpoint" in line for line in said) == len(starts) - 1


def test_a_restart_may_run_with_other_arguments(supervisor: Supervisor, tmp_path: Path) -> None:
    """The teacher keeps the port that it was given: those who know its address go on using it."""
    log = tmp_path / "logs" / "teacher.log"
    code = "import sys; print('port', sys.argv[1])"
    with supervisor:
        supervisor.start(Child(name="teacher", argv=python(code, "0")))
        supervisor.set_restart_argv("teacher", python(code, "50051"))
        wait_until("it ran again", lambda: supervisor.check() or "port 50051" in log.read_text())


def test_what_a_child_started_itself_ends_with_it(supervisor: Supervisor, tmp_path: Path) -> None:
    """vLLM's engine is a process of its own: it must not outlive a worker that was killed."""
    note = tmp_path / "grandchild"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    with supervisor:
        worker = supervisor.start(Child(name="worker", argv=python(code, str(note)), restarts=1))
        wait_until("the grandchild runs", lambda: note.exists() and note.read_text())
        grandchild = int(note.read_text())
        os.kill(worker, signal.SIGKILL)
        wait_until("the grandchild is gone", lambda: supervisor.check() or gone(grandchild))


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    log = tmp_path / "deaf.log"
    with Supervisor(logs=tmp_path, grace_s=0.1, say=print) as supervisor:
        code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER
        deaf = supervisor.start(Child(name="deaf", argv=python(code)))
        wait_until("it is up", lambda: "up" in log.read_text())
    assert gone(deaf)


# A launcher as a process of its own, so that it can be signalled: two children, the second one the main one.
LAUNCHER = f"""
import sys
from pathlib import Path
from vaopd.launch.supervisor import Child, Interrupted, Supervisor
code = {SLEEPER!r}
try:
    with Supervisor(logs=Path(sys.argv[1]), say=print) as supervisor:
        pids = [supervisor.start(Child(name=name, argv=(sys.executable, "-c", code))) for name in ("other", "main")]
        print(*pids, flush=True)
        supervisor.run_until_exit("main")
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_is_left_behind_however_the_launcher_ends(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    """SIGKILL included: then the watchdog, a process of its own, ends the children."""
    launcher = subprocess.Popen(python(LAUNCHER, str(tmp_path)), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout:
        children = [int(pid) for pid in launcher.stdout.readline().split()]
        watchers = psutil.Process(launcher.pid).children()
        launcher.send_signal(number)
        assert launcher.wait() == exit_code
        wait_until("launcher, children and watchdog are gone", lambda: all(map(gone, children)))
        wait_until("the watchdog is gone", lambda: not any(watcher.is_running() for watcher in watchers))
