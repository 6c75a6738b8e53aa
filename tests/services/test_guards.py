"""The guards of the tests themselves: unit tests start nothing, and nothing is left behind at the end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
STARTING = """
import asyncio, contextlib, multiprocessing, subprocess
import pytest
from vaopd.queue.embedded import EmbeddedRedis

def test_process():
    subprocess.run(["true"])

def test_caught():
    with contextlib.suppress(AssertionError):
        subprocess.run(["true"])

def test_spawned():
    multiprocessing.get_context("spawn").Process(target=print).start()

async def test_socket():
    await asyncio.start_server(print, "127.0.0.1", 0)

@pytest.fixture(scope="session")
def server():
    with EmbeddedRedis() as running:
        yield running

def test_session_fixture(server): ...

def test_nothing(): ...
"""
LEAVING = """
import subprocess

def test_leaves():
    subprocess.Popen(["sh", "-c", "sleep 1000 & exit"], start_new_session=True).wait()
"""


def start_pytest(folder: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "test_some.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "--config-file", ROOT / "pyproject.toml", *arguments, folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_unit_test_that_starts_a_process_or_a_server_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "unit" / "conftest.py", tmp_path)
    said, _ = start_pytest(tmp_path, STARTING).communicate()
    refused = re.findall(r"^ERROR \S+::test_(\w+) - Failed: called ", said, re.M)
    assert sorted(refused) == ["caught", "process", "session_fixture", "socket", "spawned"], said
    assert re.findall(r"^PASSED \S+::test_(\w+)$", said, re.M) == ["caught", "nothing"]  # it fails at its teardown


def test_a_process_that_is_left_is_named_and_ended(tmp_path: Path) -> None:
    plugin = ("-p", "tests.support.leftovers", "--numprocesses")
    for run in [start_pytest(tmp_path / workers, LEAVING, *plugin, workers) for workers in ("0", "1")]:
        said, _ = run.communicate()
        assert run.returncode == 1, said
        assert "1 passed" in said
        [pid] = re.findall(r"^process (\d+) still ran: sleep 1000", said, re.M)
        left = Path("/proc", pid, "cmdline")
        wait_until("it has ended", lambda left=left: not left.exists() or not left.read_bytes())


def test_a_new_file_in_the_checkout_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "ROOT", tmp_path)
    assert leftovers.untracked_files() == set()  # no clone
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n")
    for name in ("runs/first.json", "src/__pycache__/module.pyc"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "src" / "module.py").write_text("")
    subprocess.run(["git", "-C", tmp_path, "add", ".gitignore", "src/module.py"], check=True)
    assert leftovers.untracked_files() == {"runs/"}
