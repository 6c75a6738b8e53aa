"""How the ranks of one host begin and end together: real processes, small scripts in the place of the trainer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

LAUNCH = """
import sys
from vaopd.process.ranks import die_as, launch
sys.exit(die_as(launch((sys.executable, "-c", sys.argv[1]), processes=2)))
"""
# Each rank says that it is there, then waits; SIGTERM ends it with the trainer's "interrupted".
WAITING = """
import os, pathlib, signal, sys, threading
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
pathlib.Path("rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
told.wait()
sys.exit(130)
"""


def start(script: str, folder: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", LAUNCH, script], cwd=folder, env={"PYTHONPATH": str(root)})


def wait_for_ranks(folder: Path) -> list[int]:
    files = [folder / f"rank-{rank}" for rank in range(2)]
    wait_until("both ranks are there", lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("import os, sys; sys.exit(3 * int(os.environ['RANK']))", 3),
        ("import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_it_ends_as_its_ranks_do(script: str, code: int, tmp_path: Path) -> None:
    assert start(script, tmp_path).wait(60) == code


def test_each_rank_knows_its_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    script = f"import os, pathlib; pathlib.Path(os.environ['RANK']).write_text(' '.join(map(os.environ.get, {names})))"
    assert start(script, tmp_path).wait(60) == 0
    one, two = ((tmp_path / rank).read_text().split() for rank in ("0", "1"))
    assert (one[:5], two[:5]) == (["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"])
    assert one[5] == two[5]


def test_sigterm_is_passed_on(tmp_path: Path) -> None:
    launcher = start(WAITING, tmp_path)
    wait_for_ranks(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 130


def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    launcher = start(WAITING, tmp_path)
    _, second = wait_for_ranks(tmp_path)
    subprocess.run(["kill", "-KILL", str(second)], check=True)
    assert launcher.wait(60) == -signal.SIGKILL  # reached only once every rank has been waited for
