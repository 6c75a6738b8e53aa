"""The trainer's end of the queue: one process per job, the one that holds the job's lease.

In: finished groups. Out: requests and policy versions. Waits for: a group. A group stays in Redis until `acknowledge`,
which is called only once a checkpoint that contains its effect is durable; until then whoever resumes gets it again.
Each write is fenced: a trainer that was taken for dead and comes back is refused (LeaseLost).
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.errors import InvalidInput, LeaseLost, Mismatch
from vaopd.queue.connection import BLOCK_SLICE_S, Connection, GroupMissing, check_key, checked_name, dedupe_key
from vaopd.queue.dead_letters import DeadLetter, letter_bytes, read_letters
from vaopd.queue.keeper import LeaseKeeper
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.wire.queue import policy_version_to_bytes, rollout_group_from_bytes, rollout_request_to_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """A group as it was handed to the trainer; `deliveries` counts this delivery too (above 1: after a restart)."""

    entry_id: str
    deliveries: int
    group: RolloutGroup


def new_owner() -> str:
    """A token that no other process has."""
    return f"{checked_name('host name', socket.gethostname())}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class TrainerQueue:
    """`acquire()` first. `owner` must be unique to the process; by default it is made so."""

    def __init__(
        self,
        *,
        url: str,
        job: str,
        owner: str | None = None,
        lease_s: float = 30.0,
        max_deliveries: int = 5,
        patience_s: float = 30.0,
    ) -> None:
        self.owner = checked_name("owner", owner) if owner else new_owner()
        if not 0 < lease_s <= 3600:
            raise InvalidInput(f"lease_s is {lease_s:g}; it must be above 0 and at most 3600")
        self.lease_s = lease_s
        self.max_deliveries = max_deliveries
        self._connection = Connection(url=url, job=job, patience_s=patience_s)
        self._epoch = ""
        self._last_id = "0"  # of the last group that this object was handed

    # -- the job's lease ----------------------------------------------------------------------------------------------

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Takes the job. A dead trainer's lease must run out first: to resume, wait a little longer than `lease_s`.

        Also the way on after a Mismatch (Redis came back empty): makes streams and groups anew; then enqueue all again.
        """
        deadline = time.monotonic() + wait_s
        while True:
            epoch = self._connection.join()
            reply = self._connection.run("acquire", self.owner, self._lease_ms)
            if reply[0] == b"ok":
                break
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise LeaseLost(
                    f"job {self._connection.job!r} is held by trainer {reply[1].decode()!r} for another "
                    f"{reply[2] / 1000:.1f} s at least; stop that trainer, wait until its lease has run out, or choose "
                    "another job name"
                )
            time.sleep(min(0.1, remaining_s))
        if epoch != self._epoch:
            self._epoch, self._last_id = epoch, "0"

    def renew(self) -> None:
        self._run("renew_job", self._lease_ms)

    def keeper(self) -> LeaseKeeper:
        """Renews the job's lease while its `with` block runs."""
        return LeaseKeeper(renew=self.renew, every_s=self.lease_s / 3)

    def release(self) -> None:
        """Lets the job go. What was collected and not acknowledged is delivered again; this delivery does not count."""
        self._run("release_job", self._last_id)

    def check_epoch(self) -> None:
        """Raises Mismatch when Redis came back empty since `acquire` (every other call here does so too)."""
        connection = self._connection
        found = connection.call(lambda: connection.redis.get(connection.key["epoch"]))
        if found is None or found.decode() != self._epoch:
            raise self._came_back_empty()

    # -- requests, groups, policies -----------------------------------------------------------------------------------

    def enqueue(self, request: RolloutRequest) -> bool:
        """False: a request with this group_id and policy_version was published before; nothing was added.

        Raises Unavailable when Redis is full: acknowledge what is durable, and try again.
        """
        key = dedupe_key(request.group_id, request.policy_version)
        return bool(self._run("enqueue", key, rollout_request_to_bytes(request))[1])

    def unpublished(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """Those that Redis has no record of, though they were enqueued: it lost its last writes."""
        if not requests:
            return []
        connection = self._connection
        keys = [dedupe_key(request.group_id, request.policy_version) for request in requests]
        found = connection.call(lambda: connection.redis.hmget(connection.key["seen:requests"], keys))
        return [request for request, record in zip(requests, found, strict=True) if record is None]

    def requests_in_flight(self) -> int:
        """Requests that no worker has answered yet, waiting or being worked on. The bound on it is the trainer's."""
        connection = self._connection
        return connection.call(lambda: connection.redis.xlen(connection.key["requests"]))

    def collect(self, *, block_s: float, max_groups: int = 64) -> list[Delivered]:
        """Up to `max_groups` groups in order of completion; waits up to `block_s` for the first.

        After a restart, first those that were delivered before and not acknowledged. A group that can't be read, or was
        delivered `max_deliveries` times before (it kills the trainer), goes to the dead letters.
        """
        deadline = time.monotonic() + block_s
        while True:
            _, entries, last_delivered = self._run("collect", self._last_id, max_groups)
            delivered = self._delivered(entries)
            remaining_s = deadline - time.monotonic()
            if delivered or remaining_s <= 0:
                return delivered
            if not entries:
                self._wait_for_group(last_delivered.decode(), min(BLOCK_SLICE_S, remaining_s))

    def acknowledge(self, entry_ids: Iterable[str]) -> int:
        """Removes groups whose effect is in a durable checkpoint; returns how many. Works when Redis is full."""
        ids = list(entry_ids)
        return self._run("acknowledge", *ids)[1] if ids else 0

    def dead_letter(self, entry_id: str, reason: str) -> None:
        """Gives a collected group up."""
        found = self._connection.entry("groups", entry_id)
        if found is not None:
            self._bury(entry_id, reason, deliveries=1, key=found[0], body=found[1])

    def ask_again(self, entry_id: str, group: RolloutGroup, request: RolloutRequest) -> None:
        """Trades a collected group that can't be used for its request, which is published a second time.

        Raises Unavailable when Redis is full; the group is still there then.
        """
        keys = [dedupe_key(item.group_id, item.policy_version) for item in (group, request)]
        self._run("ask_again", entry_id, *keys, rollout_request_to_bytes(request))

    def dead_letters(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Requests and groups that were given up since the letter `after`: nothing will come of them."""
        return read_letters(self._connection, after=after, limit=limit)

    def publish_policy(self, policy: PolicyVersion) -> None:
        """Announces a snapshot as the latest; higher versions, left by a run resumed earlier, are withdrawn."""
        self._run("publish_policy", policy.version, policy_version_to_bytes(policy))

    def policy(self, version: int) -> PolicyVersion | None:
        """The snapshot of this version; None when it isn't published, or was withdrawn or forgotten."""
        return self._connection.policy(version)

    def forget(self, before_version: int) -> int:
        """Drops dedupe records and policies of versions before this one; returns how many records.

        Choose it so that no such group is accepted any more: below the oldest version in flight and the checkpoint's.
        """
        return self._run("forget", before_version)[1]

    def workers_alive(self, *, within_s: float = 30.0) -> list[str]:
        """Names of the workers seen in the last `within_s` seconds."""
        return [name.decode() for name in self._connection.run("workers_alive", int(1000 * within_s))]

    def purge(self) -> None:
        """Removes every key of the job, its lease too; `acquire` begins anew."""
        self._run("purge")

    def close(self) -> None:
        self._connection.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _lease_ms(self) -> int:
        return int(1000 * self.lease_s)

    def _run(self, script: str, *args: str | int | bytes) -> list[Any]:
        reply = self._connection.run(script, self._epoch, self.owner, *args)
        if reply[0] == b"epoch":
            raise self._came_back_empty()
        if reply[0] == b"lost":
            now = f"trainer {reply[1].decode()!r} holds it" if reply[1] else "nobody holds it now"
            raise LeaseLost(
                f"trainer {self.owner!r} lost job {self._connection.job!r}: its lease was not renewed for "
                f"{self.lease_s:g} s and {now}; nothing was committed. Resume from the last checkpoint"
            )
        return reply

    def _came_back_empty(self) -> Mismatch:
        return Mismatch(
            f"Redis at {self._connection.where} is not the one that job {self._connection.job!r} began with (epoch "
            f"{self._epoch or 'none'} is gone: it came back empty, or acquire() was not called); acquire() again and "
            "enqueue what is in flight again"
        )

    def _delivered(self, entries: Iterable[tuple[bytes, int, bytes, bytes]]) -> list[Delivered]:
        delivered = []
        last_id = self._last_id
        for raw_id, deliveries, key, body in entries:
            entry_id = last_id = raw_id.decode()
            if deliveries > self.max_deliveries:
                # This reading counted as a delivery, though nobody trains on it now.
                reason = f"{deliveries - 1} deliveries without acknowledgement: the trainer dies before its checkpoint"
                self._bury(entry_id, reason, deliveries=deliveries - 1, key=key, body=body)
            else:
                try:
                    group = rollout_group_from_bytes(body)
                    check_key(key, group.group_id, group.policy_version)
                except InvalidInput as error:
                    self._bury(entry_id, str(error), deliveries=deliveries, key=key, body=body)
                else:
                    delivered.append(Delivered(entry_id=entry_id, deliveries=deliveries, group=group))
        # Only now: had burying failed half way, all would have to be read again.
        self._last_id = last_id
        return delivered

    def _bury(self, entry_id: str, reason: str, *, deliveries: int, key: bytes, body: bytes) -> None:
        letter = letter_bytes(stream="groups", reason=reason, deliveries=deliveries, body=body)
        self._run("bury_group", entry_id, key, letter)

    def _wait_for_group(self, last_delivered: str, wait_s: float) -> None:
        """Returns once there is a group beyond `last_delivered`, or after `wait_s`.

        A plain XREAD: it wakes at once yet delivers nothing, so that delivering can be left to the fenced script. With
        a blocking XREADGROUP, a trainer that lost the job could still take groups away from the one that holds it.
        """
        connection = self._connection
        streams = {connection.key["groups"]: last_delivered}
        try:
            connection.call(lambda: connection.redis.xread(streams, count=1, block=max(1, int(1000 * wait_s))))
        except GroupMissing:
            raise self._came_back_empty() from None
