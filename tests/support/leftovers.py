"""A pytest plugin that fails a run whose tests have left a process, or a file in the checkout.

Looks once, after the last test and after xdist's workers have ended. A process is recognised by an environment variable
that it has inherited, whichever process has started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
VARIABLE = "VAOPD_TESTS_RUN"
GRACE_S = 60.0  # for a process that is ending on a busy machine
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}


class Leftovers:
    """The check of one run of pytest."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._before = untracked_files()
        os.environ[VARIABLE] = uuid.uuid4().hex

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Ends what still runs, and makes the tests fail."""
        with contextlib.suppress(AssertionError):
            wait_until("no process of the tests is left", lambda: not processes(), timeout_s=GRACE_S)
        for pid, command in processes().items():
            self.found.append(f"process {pid} still ran: {command}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.found += [f"new in the checkout: {name}" for name in sorted(untracked_files() - self._before)]
        if self.found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints what was left, where there was something."""
        if self.found:
            terminalreporter.section("left behind by the tests", red=True)
            terminalreporter.write("\n".join([*self.found, ""]))


def pytest_configure(config: pytest.Config) -> None:
    """Starts the check in the process that collects the results; xdist's workers are children of it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Leftovers())


def processes() -> dict[int, str]:
    """Processes that have inherited this run's environment, each with its command line.

    But those of multiprocessing that this process keeps (where no xdist worker did): they end with it.
    """
    mark, parent = f"{VARIABLE}={os.environ[VARIABLE]}".encode(), f"PPid:\t{os.getpid()}\n"
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                kept = "from multiprocessing." in command and parent in (folder / "status").read_text()
                found |= {} if kept else {int(folder.name): command[:300]}
    return found


def untracked_files() -> set[str]:
    """Files and folders of the checkout that git does not know, ignored ones as well; none outside of a clone."""
    command = ["git", "ls-files", "--others", "--directory"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {name for name in listed if not CACHES & set(Path(name).parts)}
