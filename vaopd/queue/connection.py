"""Sends a job's commands to Redis: time limits, retries and errors in one place.

Retries are done here and not by redis-py, which by default repeats any command ten times. Each command that passes
`call` may be repeated after a lost reply: the scripts check what exists before they write, a read with `>` is delivered
again (trainer: from its last id; worker: once the lease runs out), all others are plain reads.
"""

from __future__ import annotations

import logging
import re
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vaopd.errors import ConfigError, InvalidInput, Unavailable, VaopdError
from vaopd.net.backoff import Backoff
from vaopd.net.ports import join_address
from vaopd.queue import scripts
from vaopd.types import PolicyVersion
from vaopd.wire.queue import policy_version_from_bytes

log = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 3.0
BLOCK_SLICE_S = 0.5
"""How long one blocking read may wait: well below the socket's limit. Expired leases are looked for as often."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")

T = TypeVar("T")

_TRANSIENT = (
    redis.ConnectionError,  # BusyLoadingError included
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)


class GroupMissing(Exception):
    """A stream or its consumer group is missing: Redis came back empty. Caught in this package."""


def find_problem(url: str) -> str | None:
    """Returns why no connection to Redis can be opened, or None; a scheme other than redis and rediss is not tried.

    Quick, and nothing is sent: for a look before a process starts.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        try:
            with socket.socket(socket.AF_UNIX) as tried:
                tried.settimeout(PROBE_TIMEOUT_S)
                tried.connect(parts.path)
        except OSError as error:
            return f"no Redis listens on {parts.path} ({error.strerror or error}); start it with --unixsocket"
        return None
    if parts.scheme not in ("redis", "rediss"):
        return None
    try:
        host, port = parts.hostname or "localhost", parts.port or 6379
    except ValueError:
        return "its port is no number from 0 to 65535; it has the form redis://HOST:PORT/0"
    try:
        socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        return (
            f"Redis at {join_address(host, port)} can't be reached ({error.strerror or error}); start it, or let "
            "`vaopd up` start one: --set queue.url=embedded"
        )
    return None


def check_name(kind: str, name: str) -> str:
    """Returns a name that is safe inside a key; raises InvalidInput for others."""
    if not NAME.fullmatch(name):
        raise InvalidInput(f"{kind} {name!r} must be 1 to 200 characters out of A-Z a-z 0-9 . _ -")
    return name


def make_dedupe_key(group_id: str, policy_version: int) -> str:
    """Returns the key under which a request and its group are published once."""
    return f"{group_id}@{policy_version}"


def check_key(key: bytes, group_id: str, policy_version: int) -> None:
    """Raises InvalidInput for a body under another body's key, which would be recorded twice."""
    if key != (named := make_dedupe_key(group_id, policy_version)).encode():
        raise InvalidInput(f"it is filed under {key.decode(errors='replace')!r} and holds {named!r}")


class Connection:
    """Holds one job's keys in one Redis.

    Thread-safe: a lease keeper renews while another thread waits in a blocking read.
    """

    def __init__(self, *, url: str, job: str, patience_s: float) -> None:
        """Connects with the first command only. Raises ConfigError for a malformed URL, InvalidInput for a job's name.

        patience_s: how long a command is repeated while Redis does not answer.
        """
        self.job = check_name("job", job)
        self.patience_s = patience_s
        try:
            # For messages: without the user and password that a URL may hold.
            parts = urlsplit(url)
            unix = parts.scheme == "unix"
            self.where = parts.path if unix else join_address(str(parts.hostname), parts.port or 6379)
            self.redis: Any = redis.Redis.from_url(
                url,
                protocol=2,  # replies keep their shape if redis-py's default changes
                socket_timeout=SOCKET_TIMEOUT_S,
                socket_connect_timeout=SOCKET_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                **({} if unix else {"socket_keepalive": True}),
            )
            pool = self.redis.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # options that redis-py doesn't know fail here only
        except (ValueError, TypeError, redis.RedisError):
            raise ConfigError(
                # Never the library's message: of a malformed URL it may quote the password.
                "the Redis URL can't be used; write redis://HOST:PORT/0, rediss://… or unix:///PATH, and the password, "
                "percent-encoded, in it or in queue.password_file; after ? only options of redis-py"
            ) from None
        self.key = {name: f"vaopd:{{{job}}}:{name}" for name in scripts.KEY_NAMES}
        self._scripts: dict[str, Any] = {}
        self._away_since: float | None = None

    def call(self, operation: Callable[[], T], *, patience_s: float | None = None) -> T:
        """Runs an operation that may be repeated, and repeats it for `patience_s` while Redis does not answer.

        Raises Unavailable when Redis is full, can't write to its disk or still does not answer, ConfigError when it
        refuses the credentials, VaopdError when it refuses the command.
        """
        patience_s = self.patience_s if patience_s is None else patience_s
        backoff = Backoff(patience_s, first_s=0.05, longest_s=1.0)
        while True:
            try:
                result = operation()
                self._note_answer()
                return result
            except redis.exceptions.OutOfMemoryError:
                raise Unavailable(
                    f"Redis at {self.where} is full (maxmemory); nothing was written. It takes writes again once "
                    "groups are acknowledged, or with a larger maxmemory"
                ) from None
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                raise ConfigError(
                    f"Redis at {self.where} refuses these credentials; check the URL's user and password"
                ) from None
            except _TRANSIENT as error:
                silence = Unavailable(
                    f"Redis at {self.where} did not answer for {patience_s:g} s ({type(error).__name__}); "
                    "is it up, and reachable from here?"
                )
                delay_s = backoff.delay_s(silence)
                self._note_silence(error)
                time.sleep(delay_s)
            except redis.ResponseError as error:
                text = str(error)
                if "NOGROUP" in text:
                    raise GroupMissing from None
                if text.startswith("MISCONF"):
                    raise Unavailable(f"Redis at {self.where} can't write to its disk; free some space there") from None
                if text.startswith("WRONGTYPE"):
                    text = scripts.FOREIGN
                raise VaopdError(f"Redis at {self.where} refused a command of job {self.job!r}: {text}") from None

    def _note_silence(self, error: Exception) -> None:
        """Says once in an outage what is waited for; waiting itself is silent until the patience is over."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("Redis at %s does not answer (%s); waiting for it", self.where, type(error).__name__)

    def _note_answer(self) -> None:
        if (since := self._away_since) is not None:
            self._away_since = None
            log.info("Redis at %s answers again after %.0f s", self.where, time.monotonic() - since)

    def run(self, name: str, *args: str | int | bytes, patience_s: float | None = None) -> Any:
        """Runs NAME.lua on this job's keys, as `call`; `vaopd.queue.scripts` has its signature."""
        if name not in self._scripts:
            self._scripts[name] = self.redis.register_script(scripts.read_script(name))
        script = self._scripts[name]
        return self.call(lambda: script(keys=list(self.key.values()), args=args), patience_s=patience_s)

    def join(self) -> str:
        """Checks the server, creates streams and groups, and returns the epoch.

        Raises ConfigError for a server that evicts entries when memory is full, or is too old.
        """
        info = self.call(lambda: self.redis.info())
        policy = info.get("maxmemory_policy")
        if policy != "noeviction":
            raise ConfigError(
                f"Redis at {self.where} has maxmemory-policy {policy!r} and would evict requests and groups when "
                "memory is full; start it with --maxmemory-policy noeviction"
            )
        version = str(info.get("redis_version", "0"))
        if int(version.split(".")[0]) < 7:
            raise ConfigError(f"Redis at {self.where} has version {version}; this needs Redis 7 or Valkey 8, or newer")
        return scripts.join(self.run, uuid.uuid4().hex)

    def read_entry(self, stream: str, entry_id: str) -> tuple[bytes, bytes] | None:
        """Returns dedupe key and body of an entry of "requests" or "groups"; None when it is gone."""
        found = self.call(lambda: self.redis.xrange(self.key[stream], entry_id, entry_id))
        return (found[0][1][b"key"], found[0][1][b"body"]) if found else None

    def policy(self, version: int) -> PolicyVersion | None:
        """Returns a published policy; None when there is none of this version."""
        found = self.call(lambda: self.redis.hget(self.key["policies"], str(version)))
        return policy_version_from_bytes(found) if found else None

    def close(self) -> None:
        """Closes the connections."""
        self.redis.close()
