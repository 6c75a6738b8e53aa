"""Processes that hang must end with a status that gets them restarted.

The teacher's test is tests/services/test_teacher_watchdog.py, the worker's tests/services/test_rollout_worker.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.teacher import write_config
from tests.support.waiting import wait_until

TIMER = "import time\nfrom vaopd.process.hang_timer import limit_time\n"


def test_a_block_that_takes_too_long_ends_the_process_and_tells_where_it_was() -> None:
    code = f"{TIMER}with limit_time(0.2):\n    time.sleep(1000)\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert 'File "<string>", line 4' in ended.stderr


def test_a_block_that_is_done_in_time_ends_nothing() -> None:
    code = f"{TIMER}with limit_time(0.2):\n    pass\ntime.sleep(0.5)\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


HANGING_API = """
import sys, time
import vaopd_api.__main__ as api
from vaopd_api.teachers import Teachers

async def describe(self):
    time.sleep(1000)  # a blocking call in a handler: the event loop stands still

Teachers.describe = describe
sys.exit(api.main(sys.argv[1:]))
"""


def test_an_api_whose_event_loop_stands_still_ends(tmp_path: Path) -> None:
    announce = tmp_path / "address"
    arguments = ["--config", str(write_config(tmp_path, model=tmp_path, address="127.0.0.1:1")), "--announce", announce]
    (tmp_path / "service.toml").write_text("[api]\nstuck_after_s = 1.0\n")
    arguments += ["--service", tmp_path / "service.toml", "--set", "api.address=127.0.0.1:0"]
    command = [sys.executable, "-c", HANGING_API, *arguments]
    with (tmp_path / "api.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until("the API listens", lambda: announce.exists() or process.poll() is not None)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{announce.read_text()}/readyz", timeout=60)
        assert process.wait(30) == 1
    finally:
        process.kill()
        process.wait()
    assert "in describe" in (tmp_path / "api.log").read_text()
