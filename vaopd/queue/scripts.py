"""The signatures of the Lua scripts: one function for each file in `lua/` that Redis runs, with its name.

Each takes `run`, which runs a script on a job's keys, then the script's arguments in the order of ARGV, and returns the
reply as Python values. Scripts of the trainer begin with a `Fence`, and refuse (EpochGone, JobLost) unless it holds.
Scripts of a worker begin with its name; those that settle a request do so only while the `Claim` on it holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vaopd.errors import InvalidInput

FOLDER = Path(__file__).parent / "lua"
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
    "last_trainer",  # owner token of the trainer that took the job last, without a time to live
)
"""The keys of a job, in the order in which keys.lua names them. Every script gets all of them."""
Run = Callable[..., Any]
"""Runs NAME.lua on the keys of one job: (name, *arguments) -> bytes for strings, int for numbers, lists for tables.

`Connection.run` is the one in use.
"""
FOREIGN = "another program has written to the job's keys; use a Redis, or a number of a database, of vaopd's own"
_INCLUDE = re.compile(r"^-- include (\S+)\n", re.MULTILINE)


class EpochGone(Exception):
    """Redis has another epoch than the trainer's fence: it came back empty. Caught in this package."""


class JobLost(Exception):
    """The trainer's lease ran out. Caught in this package."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder
        """Owner token of the trainer that holds the job now; empty when none does."""


@dataclass(frozen=True, slots=True)
class Fence:
    """The epoch that a trainer saw when it took the job, and its owner token."""

    epoch: str
    owner: str


@dataclass(frozen=True, slots=True)
class Claim:
    """One delivery of a request to a worker; void once another delivery has begun."""

    worker: str
    entry_id: str
    deliveries: int


class Entry(NamedTuple):
    """An entry of a stream as it was delivered; `deliveries` counts this delivery too."""

    entry_id: str
    deliveries: int
    key: bytes
    body: bytes


def read_script(name: str) -> str:
    """Returns NAME.lua with the files that it includes."""
    return _INCLUDE.sub(lambda match: (FOLDER / match[1]).read_text(), (FOLDER / f"{name}.lua").read_text())


# -- the job -----------------------------------------------------------------------------------------------------------


def join(run: Run, new_epoch: str) -> str:
    """Creates streams and groups where they are missing; returns the epoch, `new_epoch` where there was none."""
    return _name(run("join", new_epoch)[1])


def acquire(run: Run, owner: str, lease_ms: int) -> tuple[str, int] | None:
    """Takes the job. Returns None, or its present holder and for how many ms at least it holds the job."""
    reply = run("acquire", owner, lease_ms)
    return None if reply[0] == b"ok" else (_name(reply[1]), reply[2])


def retry_dead(run: Run, entry_id: str, stream: str, body: bytes) -> None:
    """Publishes a dead letter again; does nothing when it is gone."""
    run("retry_dead", entry_id, stream, body)


def workers_alive(run: Run) -> list[str]:
    """Returns the workers seen in the last half minute."""
    return [_name(name) for name in run("workers_alive", 30_000)]


# -- the trainer -------------------------------------------------------------------------------------------------------


def renew_job(run: Run, fence: Fence, lease_ms: int) -> None:
    """Lets the job's lease run for another `lease_ms`."""
    _run_fenced(run, "renew_job", fence, lease_ms)


def retake_job(run: Run, fence: Fence, lease_ms: int) -> None:
    """Takes the job again after its lease ran out, unless another trainer has taken it since."""
    _run_fenced(run, "retake_job", fence, lease_ms)


def release_job(run: Run, fence: Fence, last_id: str) -> None:
    """Gives the job up; deliveries up to entry `last_id` that were not acknowledged do not count."""
    _run_fenced(run, "release_job", fence, last_id)


def enqueue(run: Run, fence: Fence, key: str, body: bytes) -> bool:
    """Publishes a request. False: this key was published before."""
    return bool(_run_fenced(run, "enqueue", fence, key, body)[1])


def collect(run: Run, fence: Fence, last_id: str, count: int) -> tuple[list[Entry], str]:
    """Delivers up to `count` groups beyond `last_id`, and returns with them the last id delivered to any trainer."""
    _, entries, last_delivered = _run_fenced(run, "collect", fence, last_id, count)
    return _read_entries(entries), last_delivered.decode()


def acknowledge(run: Run, fence: Fence, *entry_ids: str) -> int:
    """Removes groups; returns how many there were."""
    return _run_fenced(run, "acknowledge", fence, *entry_ids)[1]


def ask_again(run: Run, fence: Fence, entry_id: str, group_key: str, request_key: str, request: bytes) -> None:
    """Removes a group and its record, and publishes the request, though it may have been published before."""
    _run_fenced(run, "ask_again", fence, entry_id, group_key, request_key, request)


def bury_group(run: Run, fence: Fence, entry_id: str, key: bytes, letter: bytes) -> None:
    """Moves a group to the dead letters; does nothing when it is gone."""
    _run_fenced(run, "bury_group", fence, entry_id, key, letter)


def publish_policy(run: Run, fence: Fence, version: int, policy: bytes) -> None:
    """Makes a policy the latest, and withdraws higher versions."""
    _run_fenced(run, "publish_policy", fence, version, policy)


def forget(run: Run, fence: Fence, before_version: int) -> int:
    """Drops records and policies of earlier versions; returns how many records."""
    return _run_fenced(run, "forget", fence, before_version)[1]


def purge(run: Run, fence: Fence) -> None:
    """Removes every key of the job."""
    _run_fenced(run, "purge", fence)


# -- the workers -------------------------------------------------------------------------------------------------------


def take_over(run: Run, worker: str, lease_ms: int, count: int, suspect_after: int, idle: int) -> list[Entry]:
    """Claims up to `count` requests that were not renewed for `lease_ms`.

    One that was delivered `suspect_after` times goes to an idle worker only (`idle` is 1, else 0), and alone.
    """
    return _read_entries(run("take_over", worker, lease_ms, count, suspect_after, idle))


def renew_leases(run: Run, worker: str, *ids_and_deliveries: str | int) -> set[str]:
    """Renews claims, given as entry id and delivery count in turn; returns the ids of those that are void."""
    return {entry_id.decode() for entry_id in run("renew_leases", worker, *ids_and_deliveries)}


def complete(run: Run, claim: Claim, key: str, group: bytes) -> bool | None:
    """Publishes a group and removes its request. False: the key was published before; None: the claim is void."""
    reply = run("complete", claim.worker, claim.entry_id, claim.deliveries, key, group)
    return None if reply[0] == b"lost" else bool(reply[1])


def bury_request(run: Run, claim: Claim, key: bytes, letter: bytes) -> bool:
    """Moves a request to the dead letters. False: the claim is void."""
    return run("bury_request", claim.worker, claim.entry_id, claim.deliveries, key, letter)[0] == b"ok"


def release_lease(run: Run, claim: Claim) -> None:
    """Lets any worker take the request at once, and takes the delivery back; a void claim is left alone."""
    run("release_lease", claim.worker, claim.entry_id, claim.deliveries)


def _run_fenced(run: Run, name: str, fence: Fence, *args: str | int | bytes) -> Any:
    reply = run(name, fence.epoch, fence.owner, *args)
    if reply[0] == b"epoch":
        raise EpochGone
    if reply[0] == b"lost":
        raise JobLost(_name(reply[1]))
    return reply


def _name(value: bytes) -> str:
    """Returns the name that a script found. Raises InvalidInput for what vaopd can't have written."""
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        raise InvalidInput(f"Redis has {value[:40]!r} in place of a name: {FOREIGN}") from None


def _read_entries(reply: Iterable[tuple[bytes, int, bytes, bytes]]) -> list[Entry]:
    return [Entry(entry_id.decode(), deliveries, key, body) for entry_id, deliveries, key, body in reply]
