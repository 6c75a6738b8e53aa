"""The two ends of the queue, by what they promise: at least once on the wire, exactly once in effect.

    trainer ── enqueue ──►  requests  ── take ──►  worker    (a lease; renewed, taken over when it runs out)
    trainer ◄── collect ──  groups  ◄── complete ──  worker  (one commit; fenced by the lease)
    trainer ── acknowledge ──►  groups                       (after a durable checkpoint; fenced by the job's lease)

Every promise below holds when replies are lost and when calls are repeated. `TrainerQueue` and `WorkerQueue` keep them
with Redis; trainer and rollout worker know these protocols only. `tests/support/queue_contract.py` checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vaopd.queue.keeper import LeaseKeeper
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """A group that was handed to the trainer; `deliveries` counts this delivery too (above 1: after a restart)."""

    entry_id: str
    deliveries: int
    group: RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A request that a worker has until its lease runs out; `deliveries` counts this delivery too."""

    entry_id: str
    deliveries: int
    request: RolloutRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """An entry that was given up; `stream` is "requests" or "groups".

    `key` is "GROUP_ID@POLICY_VERSION", known even when the body is corrupt. An entry that no trainer or worker wrote
    may have any key; its policy_version is None then.
    """

    entry_id: str
    key: str
    stream: str
    reason: str
    deliveries: int
    body: bytes

    @property
    def group_id(self) -> str:
        """The group's id, or the whole key where it has no version."""
        return self.key.rpartition("@")[0] if self.policy_version is not None else self.key

    @property
    def policy_version(self) -> int | None:
        """The version in the key."""
        version = self.key.rpartition("@")[2]
        return int(version) if version.isdecimal() else None


class TrainerEnd(Protocol):
    """The end of the trainer that holds the job. A job has one such trainer at a time.

    The job is held under a lease. Every method that writes or delivers raises LeaseLost once another trainer has taken
    the job, even if that one has ended, and Mismatch when the queue came back empty since `acquire`; either way nothing
    was done. A lease that ran out, since the queue or this process stood still, is taken again if no other trainer had
    the job meanwhile. All raise Unavailable while the queue can't be reached.
    """

    owner: str
    """Names this trainer; no two processes share it."""
    lease_s: float

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Takes the job; raises LeaseLost when another trainer holds it for longer than `wait_s`.

        A dead trainer's lease must run out first: to resume, wait a little longer than `lease_s`. Also the way to
        continue after a Mismatch; then enqueue all that is in flight again.
        """

    def renew(self) -> None:
        """Extends the job's lease by `lease_s`."""

    def keeper(self) -> LeaseKeeper:
        """Renews the job's lease while its `with` block runs."""

    def release(self) -> None:
        """Gives the job up. Groups that were collected and not acknowledged are delivered again; these don't count."""

    def enqueue(self, request: RolloutRequest) -> bool:
        """Publishes a request once. False: its group_id and policy_version were published before; nothing was added.

        Raises Unavailable when the queue is full: acknowledge what is durable, and try again.
        """

    def unpublished(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """Returns those that the queue has no record of, though they were enqueued: it lost its last writes."""

    def requests_in_flight(self) -> int:
        """Returns how many requests no worker has answered yet. The bound on it is the trainer's."""

    def collect(self, *, block_s: float, max_groups: int = 64) -> list[Delivered]:
        """Delivers up to `max_groups` groups in order of completion; waits up to `block_s` for the first.

        After a restart, first those that were delivered before and not acknowledged. A group that can't be read, or was
        delivered too often without being acknowledged (it kills the trainer), goes to the dead letters instead.
        """

    def acknowledge(self, entry_ids: Iterable[str]) -> int:
        """Removes groups that a durable checkpoint has trained; returns how many. Works when the queue is full."""

    def dead_letter(self, entry_id: str, reason: str) -> None:
        """Moves a collected group to the dead letters; one that is gone is no error."""

    def ask_again(self, entry_id: str, group: RolloutGroup, request: RolloutRequest) -> None:
        """Trades a collected group that can't be used for its request, which is published a second time.

        Both or neither. Raises Unavailable when the queue is full; the group is still there then.
        """

    def dead_letters(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Returns requests and groups that were given up since the letter `after`: no group will come of them."""

    def publish_policy(self, policy: PolicyVersion) -> None:
        """Announces a snapshot as the latest; higher versions, left by a run resumed earlier, are withdrawn."""

    def policy(self, version: int) -> PolicyVersion | None:
        """Returns the snapshot of this version; None when it isn't published, or was withdrawn or forgotten."""

    def forget(self, before_version: int) -> int:
        """Drops records and policies of versions before this one, the latest policy excepted; returns how many records.

        Choose it so that no such group is accepted any more: below the oldest version in flight and the checkpoint's.
        """

    def workers_alive(self) -> list[str]:
        """Returns the names of the workers seen in the last half minute."""

    def purge(self) -> None:
        """Removes all that the queue has of the job, its lease too; `acquire` begins a new one."""

    def close(self) -> None:
        """Lets go of connections; the job's lease runs out by itself."""


class WorkerEnd(Protocol):
    """The end of a rollout worker, which takes requests under leases.

    A lease is (worker, delivery count). It runs out when it was not renewed for `lease_s`; then another worker may take
    the request, and a late commit is refused with LeaseLost, even one by a worker of the same name.
    """

    worker: str
    """Names the process; no two processes of a job share it."""

    def take(self, *, block_s: float, max_requests: int = 1) -> list[Lease]:
        """Leases up to `max_requests` requests, first those with a lease that ran out; waits up to `block_s` for one.

        A request that was delivered too often without a commit, or that can't be read, goes to the dead letters. One
        that two workers already died of is taken alone, so that it doesn't take its neighbours with it.
        """

    def renew(self, leases: Iterable[Lease] | None = None) -> list[Lease]:
        """Extends leases (default: all that are held) by `lease_s`; returns those that are lost.

        It also reports the worker as alive, so call it even when nothing is held; `keeper()` does.
        """

    def keeper(self) -> LeaseKeeper:
        """Renews all held leases while its `with` block runs."""

    def complete(self, lease: Lease, group: RolloutGroup) -> bool:
        """Publishes the group and removes the request, both or neither; works when the queue is full.

        False: this group had been published before; the request is removed all the same. Raises LeaseLost when another
        delivery of the request has begun, Mismatch when the group answers another request.
        """

    def fail(self, lease: Lease, reason: str) -> None:
        """Moves the request to the dead letters now, since no worker can answer it."""

    def release(self, lease: Lease) -> None:
        """Hands a lease back: any worker can take the request at once, and the delivery does not count.

        A lease that is lost already is no error.
        """

    def held(self) -> list[Lease]:
        """Returns the leases that were taken and neither settled, handed back nor found lost."""

    def policy(self, version: int) -> PolicyVersion | None:
        """Returns the snapshot of this version; None when it isn't published, or was withdrawn or forgotten."""

    def close(self) -> None:
        """Takes the worker off the list of those alive. Leases that it still holds run out by themselves."""
