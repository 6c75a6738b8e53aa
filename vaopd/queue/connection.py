"""The only module that talks to Redis: keys, scripts, time limits, retries and errors.

Retrying is ours, not redis-py's (which by default repeats anything, ten times). Everything that goes through `call` may
be repeated after a lost reply: the scripts check what is there before they write, a read with `>` whose reply was lost
is delivered again (trainer: from its last id; worker: once the lease runs out), the rest are plain reads.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vaopd.errors import ConfigError, InvalidInput, Unavailable, VaopdError
from vaopd.types import PolicyVersion
from vaopd.wire.queue import policy_version_from_bytes

# The order in which keys.lua names them.
KEY_NAMES = (
    "requests",  # stream, group "rollout": one entry per request that is not yet answered
    "groups",  # stream, group "trainer": one entry per finished group that is not yet in a durable checkpoint
    "seen:requests",  # hash: dedupe key -> id of the entry that was published
    "seen:groups",  # hash: dedupe key -> the lease that committed it
    "policies",  # hash: version -> PolicyVersion
    "policy",  # the latest version
    "dead",  # stream of DeadLetter
    "trainer",  # owner token of the trainer that holds the job, with a time to live
    "epoch",  # random, written once: another one means that Redis came back empty
    "workers",  # sorted set: worker -> when it was last seen, ms, by the server's clock
)
SOCKET_TIMEOUT_S = 5.0
# How long one blocking read may wait; well below the socket's limit, and the pace at which expired leases are noticed.
BLOCK_SLICE_S = 0.5
NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
INCLUDE = re.compile(r"^-- include (\S+)\n", re.MULTILINE)

T = TypeVar("T")

_CAN_PASS = (
    redis.ConnectionError,  # BusyLoadingError included
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)


class GroupMissing(Exception):
    """A stream or its consumer group is missing: nobody joined since Redis came back empty. Caught in this package."""


def checked_name(kind: str, name: str) -> str:
    if not NAME.fullmatch(name):
        raise InvalidInput(f"{kind} {name!r} must be 1 to 200 characters out of A-Z a-z 0-9 . _ -")
    return name


def dedupe_key(group_id: str, policy_version: int) -> str:
    return f"{group_id}@{policy_version}"


def check_key(key: bytes, group_id: str, policy_version: int) -> None:
    """The key beside a body names it in every record; a body that belongs to another one would be booked twice."""
    if key != (named := dedupe_key(group_id, policy_version)).encode():
        raise InvalidInput(f"it is filed under {key.decode(errors='replace')!r} and holds {named!r}")


def script_text(name: str) -> str:
    folder = Path(__file__).parent / "lua"
    return INCLUDE.sub(lambda match: (folder / match[1]).read_text(), (folder / f"{name}.lua").read_text())


class Connection:
    """One job's keys in one Redis. Thread-safe: a lease keeper renews while another thread waits in a blocking read."""

    def __init__(self, *, url: str, job: str, patience_s: float) -> None:
        self.job = checked_name("job", job)
        self.patience_s = patience_s
        try:
            # Without the user and password that a URL may hold: this goes into messages.
            parts = urlsplit(url)
            self.where = f"{parts.hostname}:{parts.port or 6379}"
            self.redis: Any = redis.Redis.from_url(
                url,
                protocol=2,  # one shape of replies, whatever redis-py's default becomes
                socket_timeout=SOCKET_TIMEOUT_S,
                socket_connect_timeout=SOCKET_TIMEOUT_S,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(
                f"the Redis URL can't be used ({error}); write redis://HOST:PORT/0 or rediss://…"
            ) from None
        self.key = {name: f"vaopd:{{{job}}}:{name}" for name in KEY_NAMES}
        self._scripts: dict[str, Any] = {}

    def call(self, operation: Callable[[], T], *, patience_s: float | None = None) -> T:
        """Runs an operation that may be repeated; raises Unavailable when Redis is full, or silent for `patience_s`."""
        patience_s = self.patience_s if patience_s is None else patience_s
        deadline = time.monotonic() + patience_s
        pause_s = 0.05
        while True:
            try:
                return operation()
            except redis.exceptions.OutOfMemoryError:
                raise Unavailable(
                    f"Redis at {self.where} is full (maxmemory); nothing was written. It takes writes again once "
                    "groups are acknowledged, or with a larger maxmemory"
                ) from None
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                raise ConfigError(
                    f"Redis at {self.where} refuses these credentials; check the URL's user and password"
                ) from None
            except _CAN_PASS as error:
                if time.monotonic() + pause_s > deadline:
                    raise Unavailable(
                        f"Redis at {self.where} did not answer for {patience_s:g} s ({type(error).__name__}); "
                        "is it up, and reachable from here?"
                    ) from None
            except redis.ResponseError as error:
                text = str(error)
                if "NOGROUP" in text:
                    raise GroupMissing from None
                if text.startswith("MISCONF"):
                    raise Unavailable(f"Redis at {self.where} can't write to its disk; free some space there") from None
                raise VaopdError(f"Redis at {self.where} refused a command: {text}") from None
            # Jittered, so that many workers don't come back at the same instant.
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, 1.0)

    def run(self, name: str, *args: str | int | bytes) -> Any:
        """Runs NAME.lua on this job's keys."""
        if name not in self._scripts:
            self._scripts[name] = self.redis.register_script(script_text(name))
        script = self._scripts[name]
        return self.call(lambda: script(keys=list(self.key.values()), args=args))

    def join(self) -> str:
        """Checks the server, makes streams and groups, and returns the epoch."""
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
        return self.run("join", uuid.uuid4().hex)[1].decode()

    def entry(self, stream: str, entry_id: str) -> tuple[bytes, bytes] | None:
        """(dedupe key, body) of an entry of "requests" or "groups"; None when it is gone."""
        found = self.call(lambda: self.redis.xrange(self.key[stream], entry_id, entry_id))
        return (found[0][1][b"key"], found[0][1][b"body"]) if found else None

    def policy(self, version: int) -> PolicyVersion | None:
        found = self.call(lambda: self.redis.hget(self.key["policies"], str(version)))
        return policy_version_from_bytes(found) if found else None

    def close(self) -> None:
        self.redis.close()
