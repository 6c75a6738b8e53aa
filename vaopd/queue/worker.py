"""The rollout worker's end of the queue.

In: requests, each under a lease. Out: finished groups, one commit each. Waits for: a request, or for another worker's
lease to run out. A worker that dies leaves its leases to the others; one that was taken for dead and comes back is
refused (LeaseLost).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from vaopd.errors import InvalidInput, LeaseLost, Mismatch, Unavailable
from vaopd.queue.connection import BLOCK_SLICE_S, Connection, GroupMissing, check_key, checked_name, dedupe_key
from vaopd.queue.dead_letters import letter_bytes
from vaopd.queue.keeper import LeaseKeeper
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.wire.queue import rollout_group_to_bytes, rollout_request_from_bytes

SUSPECT_AFTER = 2
"""Deliveries without a commit after which a request is suspected to kill whoever works on it."""
SUSPECT_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A request that this worker has until its lease runs out; `deliveries` counts this delivery too."""

    entry_id: str
    deliveries: int
    request: RolloutRequest


class WorkerQueue:
    """`worker` names the process; give each process a name of its own (host and process id, say)."""

    def __init__(
        self,
        *,
        url: str,
        job: str,
        worker: str,
        lease_s: float = 30.0,
        max_deliveries: int = 5,
        patience_s: float = 30.0,
    ) -> None:
        self.worker = checked_name("worker", worker)
        if not 0 < lease_s <= 3600:
            raise InvalidInput(f"lease_s is {lease_s:g}; it must be above 0 and at most 3600")
        self.lease_s = lease_s
        self.max_deliveries = max_deliveries
        self._connection = Connection(url=url, job=job, patience_s=patience_s)
        self._joined = False
        self._held: dict[str, Lease] = {}
        self._runs_out: dict[str, float] = {}  # entry_id -> when the lease does, unless renewed; time.monotonic
        self._lock = threading.Lock()

    def take(self, *, block_s: float, max_requests: int = 1) -> list[Lease]:
        """Up to `max_requests` requests: first those whose lease ran out, then new ones; waits up to `block_s` for one.

        An entry delivered `max_deliveries` times without a commit, or one that can't be read, goes to the dead letters.
        One of whom two workers died already is taken alone, so that it can't draw its neighbours with it.
        """
        deadline = time.monotonic() + block_s
        while True:
            at_work = self._at_work()
            remaining_s = deadline - time.monotonic()
            try:
                self._join_once()
                if any(lease.deliveries > SUSPECT_AFTER for lease in at_work):
                    leases = []
                    time.sleep(max(0.0, min(SUSPECT_POLL_S, remaining_s)))
                else:
                    leases = self._leases(self._take_over(max_requests, alone=not at_work))
                    if not leases:
                        # Redis reads "block 0" as "for ever", hence at least a millisecond.
                        wait_ms = max(1, int(1000 * min(BLOCK_SLICE_S, self.lease_s, remaining_s)))
                        leases = self._leases(self._read_new(max_requests, wait_ms))
            except GroupMissing:
                self._joined = False
                leases = []
            if leases or time.monotonic() >= deadline:
                return leases

    def renew(self, leases: Iterable[Lease] | None = None) -> list[Lease]:
        """Starts the time of these leases (default: all that this worker holds) anew; returns those that are lost.

        Also says that the worker is alive, so call it even when nothing is held; `keeper()` does.
        """
        with self._lock:
            wanted = list(self._held.values()) if leases is None else list(leases)
        pairs = [part for lease in wanted for part in (lease.entry_id, lease.deliveries)]
        began = time.monotonic()
        lost_ids = {entry_id.decode() for entry_id in self._connection.run("renew_leases", self.worker, *pairs)}
        lost = [lease for lease in wanted if lease.entry_id in lost_ids]
        for lease in lost:
            self._drop(lease)
        with self._lock:
            self._runs_out |= {lease.entry_id: began + self.lease_s for lease in wanted if lease.entry_id in self._held}
        return lost

    def keeper(self) -> LeaseKeeper:
        """Renews all held leases while its `with` block runs."""
        return LeaseKeeper(renew=self.renew, every_s=self.lease_s / 3)

    def complete(self, lease: Lease, group: RolloutGroup) -> bool:
        """The commit: publishes the group and removes the request, both or neither.

        False: this group had been published before, the request is removed all the same. Raises LeaseLost when another
        delivery of this request has begun. Goes on when Redis is full, since it makes room.
        """
        key = dedupe_key(lease.request.group_id, lease.request.policy_version)
        if dedupe_key(group.group_id, group.policy_version) != key:
            raise Mismatch(
                f"group {group.group_id!r} of policy version {group.policy_version} answers another request than "
                f"{lease.request.group_id!r} of policy version {lease.request.policy_version}"
            )
        reply = self._connection.run(
            "complete", self.worker, lease.entry_id, lease.deliveries, key, rollout_group_to_bytes(group)
        )
        self._committed(lease, reply)
        return bool(reply[1])

    def fail(self, lease: Lease, reason: str) -> None:
        """Sends the request to the dead letters now: it can't be answered, by anybody."""
        found = self._connection.entry("requests", lease.entry_id)
        if found is None:
            self._drop(lease)
            raise self._lost(lease)
        self._bury(lease, reason, key=found[0], body=found[1])

    def release(self, lease: Lease) -> None:
        """Hands a lease back: another worker can take the request at once, and the delivery does not count."""
        # That it is not ours any more is what was wanted, so a lost lease is no error here.
        self._connection.run("release_lease", self.worker, lease.entry_id, lease.deliveries)
        self._drop(lease)

    def release_all(self) -> None:
        """On SIGTERM, once the work in progress has been stopped."""
        for lease in self.held():
            self.release(lease)

    def held(self) -> list[Lease]:
        with self._lock:
            return list(self._held.values())

    def _at_work(self) -> list[Lease]:
        """What is held and has not run out, as far as this side can tell."""
        now = time.monotonic()
        with self._lock:
            return [lease for lease in self._held.values() if self._runs_out[lease.entry_id] > now]

    def policy(self, version: int) -> PolicyVersion | None:
        """The snapshot of this version; None when it isn't published, or was withdrawn or forgotten."""
        return self._connection.policy(version)

    def latest_policy(self) -> PolicyVersion | None:
        connection = self._connection
        version = connection.call(lambda: connection.redis.get(connection.key["policy"]))
        return self.policy(int(version)) if version else None

    def close(self) -> None:
        """Takes the worker off the list of those alive. Leases that it still holds run out by themselves."""
        connection = self._connection
        try:
            connection.call(lambda: connection.redis.zrem(connection.key["workers"], self.worker), patience_s=0)
        except Unavailable:
            pass  # a process that ends does not wait for Redis; its name ages out of the list
        finally:
            connection.close()

    def _join_once(self) -> None:
        if not self._joined:
            self._connection.join()
            self._joined = True
            self.renew(())

    def _take_over(self, count: int, *, alone: bool) -> list[tuple[bytes, int, bytes, bytes]]:
        return self._connection.run(
            "take_over", self.worker, int(1000 * self.lease_s), count, SUSPECT_AFTER, "1" if alone else "0"
        )

    def _read_new(self, count: int, wait_ms: int) -> list[tuple[bytes, int, bytes, bytes]]:
        connection = self._connection
        streams = {connection.key["requests"]: ">"}
        reply = connection.call(
            lambda: connection.redis.xreadgroup("rollout", self.worker, streams, count=count, block=wait_ms)
        )
        entries = reply[0][1] if reply else []
        return [(entry_id, 1, fields.get(b"key", b""), fields.get(b"body", b"")) for entry_id, fields in entries]

    def _leases(self, entries: Iterable[tuple[bytes, int, bytes, bytes]]) -> list[Lease]:
        leases: list[Lease] = []
        try:
            self._sort(entries, leases)
        except Exception:
            # Whoever asked never hears of these: were they renewed, nobody would ever get them.
            for lease in leases:
                self._drop(lease)
            raise
        return leases

    def _sort(self, entries: Iterable[tuple[bytes, int, bytes, bytes]], leases: list[Lease]) -> None:
        for entry_id, deliveries, key, body in entries:
            try:
                request = rollout_request_from_bytes(body)
                check_key(key, request.group_id, request.policy_version)
            except InvalidInput as error:
                self._bury_raw(entry_id.decode(), deliveries, str(error), key=key, body=body)
                continue
            lease = Lease(entry_id=entry_id.decode(), deliveries=deliveries, request=request)
            if deliveries > self.max_deliveries:
                # Taking it over counted as a delivery, though nobody works on it now.
                reason = f"{deliveries - 1} deliveries without a commit: whoever works on it dies or hangs"
                self._bury_raw(lease.entry_id, deliveries, reason, key=key, body=body)
                continue
            with self._lock:
                self._held[lease.entry_id] = lease
                self._runs_out[lease.entry_id] = time.monotonic() + self.lease_s
            leases.append(lease)

    def _bury(self, lease: Lease, reason: str, *, key: bytes, body: bytes) -> None:
        reply = self._bury_raw(lease.entry_id, lease.deliveries, reason, key=key, body=body)
        self._committed(lease, reply)

    def _bury_raw(self, entry_id: str, deliveries: int, reason: str, *, key: bytes, body: bytes) -> list[bytes]:
        letter = letter_bytes(
            stream="requests", reason=reason, deliveries=min(deliveries, self.max_deliveries), body=body
        )
        return self._connection.run("bury_request", self.worker, entry_id, deliveries, key, letter)

    def _committed(self, lease: Lease, reply: list[bytes]) -> None:
        self._drop(lease)
        if reply[0] == b"lost":
            raise self._lost(lease)

    def _lost(self, lease: Lease) -> LeaseLost:
        return LeaseLost(
            f"worker {self.worker!r} lost its lease on group {lease.request.group_id!r} (delivery {lease.deliveries}): "
            f"it was not renewed for {self.lease_s:g} s and another delivery began; nothing was committed"
        )

    def _drop(self, lease: Lease) -> None:
        with self._lock:
            # A newer delivery of the same entry may be held by now: that one stays.
            if self._held.get(lease.entry_id) == lease:
                del self._held[lease.entry_id], self._runs_out[lease.entry_id]
