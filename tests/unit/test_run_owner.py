"""One process on a run's folder: a second one is refused with the owner's words, unless the owner is frozen."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tests.support.disks import full_disk
from vaopd.errors import ConfigError
from vaopd.run import owner
from vaopd.run.owner import LAUNCHER, TRAINER, UP, own
from vaopd.run.status import StatusWriter


@pytest.mark.parametrize("second", [UP, TRAINER])
@pytest.mark.parametrize("first", [UP, TRAINER])
def test_a_second_process_is_refused_with_the_owners_words(first: str, second: str, tmp_path: Path) -> None:
    role = "vaopd up" if first == UP else "trainer"
    words = rf"in use by {role}, process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-.* UTC; .* Stop that"
    with own(tmp_path, first):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match=words), own(tmp_path, second):
            pass
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with own(tmp_path, second):  # the lock ends with its holder
        pass


def test_the_trainer_of_a_launch_shares_the_folder_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own(tmp_path, UP):
        monkeypatch.setenv(LAUNCHER, str(os.getpid()))
        with own(tmp_path, TRAINER), pytest.raises(ConfigError, match="in use by trainer"), own(tmp_path, TRAINER):
            pass
        monkeypatch.setenv(LAUNCHER, "1")
        with pytest.raises(ConfigError, match="in use by vaopd up"), own(tmp_path, TRAINER):
            pass


def test_a_frozen_owner_is_replaced_and_its_successor_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/faults/test_kills.py freezes a real one."""
    with own(tmp_path, TRAINER):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "_is_frozen", lambda words: True)
            successor = own(tmp_path, TRAINER)
            successor.__enter__()
        with pytest.raises(ConfigError, match="in use by trainer"), own(tmp_path, TRAINER):
            pass
        successor.__exit__(None, None, None)


def test_an_owner_that_is_silent_for_longer_than_its_lease_refuses_none(tmp_path: Path) -> None:
    """For example a trainer in a paused container: no process of its name can be seen here."""
    seen_s = time.time()
    with own(tmp_path, TRAINER), StatusWriter(tmp_path, role="trainer", clock=lambda: seen_s) as status:
        status.write("running", lease_s=60.0)
        with pytest.raises(ConfigError), own(tmp_path, TRAINER):
            pass
        seen_s -= 61
        status.write("running", lease_s=60.0)
        with own(tmp_path, TRAINER):
            pass


@pytest.mark.parametrize("content", [b"\xff", b"[]", b""])
def test_a_lock_without_words_still_refuses(content: bytes, tmp_path: Path) -> None:
    with own(tmp_path, TRAINER):
        (tmp_path / TRAINER).write_bytes(content)
        with pytest.raises(ConfigError, match="process unknown on unknown"), own(tmp_path, UP):
            pass


def test_a_full_disk_lets_no_second_process_in(tmp_path: Path) -> None:
    with (
        full_disk(0),
        pytest.raises(OSError, match=rf"File too large: '{tmp_path}/trainer.lock'"),
        own(tmp_path, TRAINER),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_the_locks_place_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / TRAINER)
    with own(tmp_path, TRAINER), pytest.raises(ConfigError), own(tmp_path, TRAINER):
        pass
