"""The queue over a Unix socket, of a server that wants a password."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vaopd.config import QueueConfig
from vaopd.errors import ConfigError
from vaopd.queue import TrainerQueue
from vaopd.queue.connection import find_problem
from vaopd.queue.embedded import find_server_binary


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "redis.sock"
    settings = ("--port", "0", "--unixsocket", str(path), "--requirepass", "s3cret/", "--save", "")
    argv = [find_server_binary(), *settings, "--maxmemory-policy", "noeviction", "--dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until("the server listens", lambda: find_problem(f"unix://{path}") is None)
            yield path
        finally:
            server.terminate()


def test_the_password_of_a_file_opens_it(socket: Path, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret/\n")
    secret.chmod(0o600)
    settings = QueueConfig(url=f"unix://{socket}", password_file=secret)
    queue = TrainerQueue(url=settings.find_url(), job="test", patience_s=1.0)
    queue.acquire()
    assert queue.requests_in_flight() == 0
    queue.close()


def test_without_it_the_refusal_names_the_socket_and_no_password(socket: Path) -> None:
    settings = QueueConfig(url=f"unix://:wr0ng@{socket}")
    queue = TrainerQueue(url=settings.find_url(), job="test", patience_s=1.0)
    with pytest.raises(ConfigError, match=rf"Redis at {socket} refuses these credentials") as refused:
        queue.acquire()
    assert "wr0ng" not in str(refused.value)
    queue.close()
