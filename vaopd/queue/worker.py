"""The rollout worker's end of the queue, in Redis.

In: requests, each under a lease. Out: finished groups, one commit each. Waits for: a request, or for another worker's
lease to run out. A worker that dies leaves its leases to the others; one that hung until its lease ran out is refused
(LeaseLost).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from vaopd.errors import InvalidInput, LeaseLost, Mismatch, VaopdError
from vaopd.queue import scripts
from vaopd.queue.connection import BLOCK_SLICE_S, Connection, GroupMissing, check_key, check_name, make_dedupe_key
from vaopd.queue.dead_letters import encode_letter
from vaopd.queue.keeper import LeaseKeeper
from vaopd.queue.protocol import Lease, WorkerEnd
from vaopd.types import PolicyVersion, RolloutGroup
from vaopd.wire.queue import rollout_group_to_bytes, rollout_request_from_bytes

SUSPECT_AFTER = 2
"""Deliveries without a commit after which a request is suspected to kill its workers."""
SUSPECT_POLL_S = 0.02


class WorkerQueue(WorkerEnd):
    """Keeps the promises of `WorkerEnd` with Redis.

    While Redis does not answer, every method retries for `patience_s` and then raises Unavailable.
    """

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
        """worker: unique to the process. max_deliveries: of a request, before it is a dead letter."""
        self.worker = check_name("worker", worker)
        if not 0 < lease_s <= 3600:
            raise InvalidInput(f"lease_s is {lease_s:g}; it must be above 0 and at most 3600")
        self.lease_s = lease_s
        self.max_deliveries = max_deliveries
        self._connection = Connection(url=url, job=job, patience_s=patience_s)
        self._joined = False
        self._held: dict[str, Lease] = {}
        self._runs_out: dict[str, float] = {}  # entry_id -> when its lease runs out; time.monotonic
        self._lock = threading.Lock()

    def take(self, *, block_s: float, max_requests: int = 1) -> list[Lease]:
        """Leases requests with a lease that ran out, else new ones; waits up to `block_s`.

        After `max_deliveries` deliveries without a commit a request goes to the dead letters instead.
        """
        deadline = time.monotonic() + block_s
        while True:
            active = self._list_active()
            remaining_s = deadline - time.monotonic()
            try:
                self._join_once()
                if any(lease.deliveries > SUSPECT_AFTER for lease in active):
                    leases = []
                    time.sleep(max(0.0, min(SUSPECT_POLL_S, remaining_s)))
                else:
                    leases = self._parse(self._take_over(max_requests, idle=not active))
                    if not leases:
                        # Redis reads "block 0" as "for ever", hence at least a millisecond, or none at all.
                        wait_s = min(BLOCK_SLICE_S, self.lease_s, remaining_s)
                        wait_ms = max(1, int(1000 * wait_s)) if wait_s > 0 else None
                        leases = self._parse(self._read_new(max_requests, wait_ms))
            except GroupMissing:
                self._joined = False
                leases = []
            if leases or time.monotonic() >= deadline:
                return leases

    def renew(self, leases: Iterable[Lease] | None = None) -> list[Lease]:
        """Extends leases (default: all that are held); returns those that are lost."""
        with self._lock:
            wanted = list(self._held.values()) if leases is None else list(leases)
        pairs = [part for lease in wanted for part in (lease.entry_id, lease.deliveries)]
        began = time.monotonic()
        lost_ids = scripts.renew_leases(self._connection.run, self.worker, *pairs)
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
        """Publishes the group and removes the request, in one commit.

        It also works when Redis is full, since a request with its images takes more room than its group.
        """
        key = make_dedupe_key(lease.request.group_id, lease.request.policy_version)
        if make_dedupe_key(group.group_id, group.policy_version) != key:
            raise Mismatch(
                f"group {group.group_id!r} of policy version {group.policy_version} answers another request than "
                f"{lease.request.group_id!r} of policy version {lease.request.policy_version}"
            )
        is_new = scripts.complete(self._connection.run, self._claim(lease), key, rollout_group_to_bytes(group))
        self._drop(lease)
        if is_new is None:
            raise self._make_lost_error(lease)
        return is_new

    def fail(self, lease: Lease, reason: str) -> None:
        """Moves the request to the dead letters now."""
        found = self._connection.read_entry("requests", lease.entry_id)
        is_buried = found is not None and self._bury(self._claim(lease), reason, key=found[0], body=found[1])
        self._drop(lease)
        if not is_buried:
            raise self._make_lost_error(lease)

    def release(self, lease: Lease) -> None:
        """Hands a lease back, and takes its delivery back."""
        scripts.release_lease(self._connection.run, self._claim(lease))
        self._drop(lease)

    def held(self) -> list[Lease]:
        """Returns the leases that this object took and still has."""
        with self._lock:
            return list(self._held.values())

    def _list_active(self) -> list[Lease]:
        """Returns the leases that are held and have not run out by this side's clock."""
        now = time.monotonic()
        with self._lock:
            return [lease for lease in self._held.values() if self._runs_out[lease.entry_id] > now]

    def policy(self, version: int) -> PolicyVersion | None:
        """Returns a published snapshot."""
        return self._connection.policy(version)

    def close(self) -> None:
        """Takes the worker off the list of those alive, and closes the connections."""
        connection = self._connection
        try:
            connection.call(lambda: connection.redis.zrem(connection.key["workers"], self.worker), patience_s=0)
        except VaopdError:
            pass  # a process that ends does not wait for Redis; its name drops off the list after a while
        finally:
            connection.close()

    def _join_once(self) -> None:
        if not self._joined:
            self._connection.join()
            self._joined = True
            self.renew(())

    def _claim(self, lease: Lease) -> scripts.Claim:
        return scripts.Claim(self.worker, lease.entry_id, lease.deliveries)

    def _take_over(self, count: int, *, idle: bool) -> list[scripts.Entry]:
        lease_ms = int(1000 * self.lease_s)
        return scripts.take_over(self._connection.run, self.worker, lease_ms, count, SUSPECT_AFTER, int(idle))

    def _read_new(self, count: int, wait_ms: int | None) -> list[scripts.Entry]:
        connection = self._connection
        streams = {connection.key["requests"]: ">"}
        reply = connection.call(
            lambda: connection.redis.xreadgroup("rollout", self.worker, streams, count=count, block=wait_ms)
        )
        entries = reply[0][1] if reply else []
        return [
            scripts.Entry(entry_id.decode(), 1, fields.get(b"key", b""), fields.get(b"body", b""))
            for entry_id, fields in entries
        ]

    def _parse(self, entries: Iterable[scripts.Entry]) -> list[Lease]:
        """Returns leases on the requests in the entries; moves those that can't be answered to the dead letters."""
        leases: list[Lease] = []
        try:
            self._parse_into(leases, entries)
        except Exception:
            # `take` is about to raise, so its caller won't get these leases: drop them, or the keeper would renew them
            # for ever.
            for lease in leases:
                self._drop(lease)
            raise
        return leases

    def _parse_into(self, leases: list[Lease], entries: Iterable[scripts.Entry]) -> None:
        for entry_id, deliveries, key, body in entries:
            claim = scripts.Claim(self.worker, entry_id, deliveries)
            try:
                request = rollout_request_from_bytes(body)
                check_key(key, request.group_id, request.policy_version)
            except InvalidInput as error:
                self._bury(claim, str(error), key=key, body=body)
                continue
            if deliveries > self.max_deliveries:
                # Taking it over counted as a delivery, though no worker worked on it.
                reason = f"{deliveries - 1} deliveries without a commit: its workers die or hang"
                self._bury(claim, reason, key=key, body=body)
                continue
            lease = Lease(entry_id=entry_id, deliveries=deliveries, request=request)
            with self._lock:
                self._held[lease.entry_id] = lease
                self._runs_out[lease.entry_id] = time.monotonic() + self.lease_s
            leases.append(lease)

    def _bury(self, claim: scripts.Claim, reason: str, *, key: bytes, body: bytes) -> bool:
        """Moves a request to the dead letters; False when the claim is void."""
        deliveries = min(claim.deliveries, self.max_deliveries)
        letter = encode_letter(stream="requests", reason=reason, deliveries=deliveries, body=body)
        return scripts.bury_request(self._connection.run, claim, key, letter)

    def _make_lost_error(self, lease: Lease) -> LeaseLost:
        return LeaseLost(
            f"worker {self.worker!r} lost its lease on group {lease.request.group_id!r} (delivery {lease.deliveries}): "
            f"it was not renewed for {self.lease_s:g} s and another delivery began; nothing was committed"
        )

    def _drop(self, lease: Lease) -> None:
        with self._lock:
            # A newer delivery of the same entry may be held by now: that one stays.
            if self._held.get(lease.entry_id) == lease:
                del self._held[lease.entry_id], self._runs_out[lease.entry_id]
