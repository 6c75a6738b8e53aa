"""The serving processes under faults of their surroundings: a full disk, a silent network, SIGKILL."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.api import Api, error_of, start_api
from tests.support.models import tiny_vlm
from tests.support.runs import MINIMAL
from tests.support.teacher import TeacherInProcess, drawing, teacher_process, token_request
from vaopd.client import SyncTeacherClient
from vaopd.types import GroupScore


def fill_disk(pid: int, log: Path) -> int:
    """From now on the process can't write a byte more to a file of this size or larger. Returns the size."""
    size = log.stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    return size


@pytest.mark.slow
def test_a_teacher_that_can_not_write_its_log_goes_on_serving(tmp_path: Path) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    with teacher_process(tmp_path) as teacher, SyncTeacherClient(teacher.target, timeout_s=60) as client:
        (before,) = client.score([request])
        size = fill_disk(teacher.process.pid, tmp_path / "teacher.log")
        for _ in range(3):
            (after,) = client.score([request])
            assert isinstance(before, GroupScore)
            assert isinstance(after, GroupScore)
            assert np.array_equal(after.teacher_logprobs[0], before.teacher_logprobs[0])
        assert teacher.process.poll() is None
        assert (tmp_path / "teacher.log").stat().st_size == size  # lines were dropped, nothing else


PROCESS = """
import argparse, sys
from vaopd import process
from vaopd.errors import ConfigError
def run(arguments, config):
    print("ready", flush=True)
    print("no such model", file=sys.stderr)
    if config.run.seed:
        raise ConfigError("seed")
    return 0
sys.exit(process.main(run, process.make_parser("teacher", "Serves.")))
"""


@pytest.mark.parametrize(("seed", "code"), [(0, 0), (1, 2)])
def test_a_process_that_can_log_nothing_from_its_start_runs_and_ends_as_it_would(
    seed: int, code: int, tmp_path: Path
) -> None:
    """The code says to `vaopd up` whether to start it again."""
    (tmp_path / "run.toml").write_text(MINIMAL)
    command = [sys.executable, "-c", PROCESS, "--config", str(tmp_path / "run.toml"), "--set", f"run.seed={seed}"]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stdout=full, stderr=full).returncode == code
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run(command, stdout=writer, stderr=writer).returncode == code
    os.close(writer)
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-']
    assert subprocess.run([*closed, *command]).returncode == code


def test_an_api_that_can_not_write_its_log_goes_on_serving(teacher: TeacherInProcess, tmp_path: Path) -> None:
    for api in start_api(tmp_path, teacher.target):
        before = api.known_answer()
        size = fill_disk(api.process.pid, tmp_path / "api.log")
        assert [api.known_answer() for _ in range(3)] == [before] * 3
        assert api.process.poll() is None
        assert (tmp_path / "api.log").stat().st_size == size


def test_an_api_that_was_killed_has_lost_nothing(teacher: TeacherInProcess, tmp_path: Path) -> None:
    """It has no state: started again, it answers the same."""
    answers = []
    for _ in range(2):
        for api in start_api(tmp_path, teacher.target):
            answers.append(api.known_answer())
            api.process.kill()
            api.process.wait()
    assert answers[0] == answers[1]


def test_an_api_whose_teacher_is_silent_is_503(tmp_path: Path) -> None:
    """As behind a cut: connections are made, and nothing ever comes back."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for api in start_api(tmp_path, f"127.0.0.1:{silent.getsockname()[1]}"):
            assert_unavailable(api)


def assert_unavailable(api: Api) -> None:
    for answer in (api.http.get("/readyz"), api.score(question="How long?", response="12")):
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
