"""How the ranks of one host begin and end together: real processes, small scripts in the place of the trainer."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.support.sharded_training import make_config
from tests.support.waiting import wait_until
from vaopd.config import TrainerConfig
from vaopd.errors import ConfigError
from vaopd.process.ranks import check_devices
from vaopd_trainer.compose import make_accelerator
from vaopd_trainer.rank_messages import SILENCE_S, watch_connections

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

# Rank 1 ends with 3, and rank 0, which misses it, with 75 before the launcher looks.
MISSING = """
import os, pathlib, sys, time
own, other = (pathlib.Path(name) for name in ("pid-" + os.environ["RANK"], "pid-1"))
own.with_suffix(".new").write_text(str(os.getpid()))
own.with_suffix(".new").rename(own)
if os.environ["RANK"] == "1":
    sys.exit(3)
while not other.exists() or pathlib.Path("/proc", other.read_text(), "stat").read_text().split()[2] != "Z":
    time.sleep(0.001)
os._exit(75)
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
        (MISSING, 3),
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


def test_a_rank_that_is_killed_is_named_and_ends_the_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = start(WAITING, tmp_path)
    _, second = wait_for_ranks(tmp_path)
    subprocess.run(["kill", "-KILL", str(second)], check=True)
    assert launcher.wait(60) == -signal.SIGKILL  # reached only once every rank has been waited for
    assert "rank 1 ended first, by SIGKILL" in capfd.readouterr().err


def test_connections_to_other_hosts_alone_end_in_silence() -> None:
    """A rank of this host may be frozen for long: it would end the run once its peer's transfer fills its buffer."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.1", 0)) as near,
            socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) as far,
        ):
            watch_connections()
            found = [
                (
                    end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                )
                for end in (listener, near, far)
            ]
    assert found == [(0, 0), (0, 0), (1, 1000 * SILENCE_S)]


@pytest.mark.parametrize(
    ("ranks", "of_this_host", "cards", "refused"),
    [(4, "4", 2, True), (4, None, 2, True), (4, "4", 4, False), (4, "4", 0, False), (16, "8", 8, False)],
    ids=["too_few", "before_they_start", "enough", "none", "two_hosts"],
)
def test_ranks_of_a_host_need_a_card_each(
    monkeypatch: pytest.MonkeyPatch, ranks: int, of_this_host: str | None, cards: int, refused: bool
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_this_host is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_this_host)
    with pytest.raises(ConfigError, match=r"trainer.processes = 4 .* sees 2; give") if refused else nullcontext():
        check_devices("trainer", ranks, there=cards)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    if refused:  # before it takes a card
        with pytest.raises(ConfigError, match=r"trainer.processes = 4"):
            make_accelerator(
                make_config("none").model_copy(update={"trainer": TrainerConfig(steps=1, processes=ranks)})
            )
