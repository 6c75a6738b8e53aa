"""The queue in memory, for unit tests: it passes the contract that the one in Redis does, and waits in no time.

Time is a `ManualClock` that waiting moves: `take(block_s=10)` returns at once, and the clock shows ten seconds more
unless a lease ran out before. The queue is never full and never away; tests of that run on Redis.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vaopd.errors import InvalidInput, LeaseLost, Mismatch
from vaopd.queue import DeadLetter, Delivered, Lease, LeaseKeeper, TrainerEnd, WorkerEnd
from vaopd.queue.connection import check_key, make_dedupe_key
from vaopd.queue.worker import SUSPECT_AFTER
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.wire.queue import (
    rollout_group_from_bytes,
    rollout_group_to_bytes,
    rollout_request_from_bytes,
    rollout_request_to_bytes,
)

STEP_S = 0.01
MAX_DELIVERIES = 5


class ManualClock:
    """Seconds that pass only while a queue waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(kw_only=True)
class _Entry:
    key: bytes
    body: bytes
    deliveries: int = 0
    is_pending: bool = False
    """Delivered, and neither settled nor acknowledged."""
    worker: str = ""
    since_s: float = 0.0
    """When it was delivered or renewed."""


@dataclass
class MemoryBroker:
    """What Redis holds of one job."""

    clock: ManualClock = field(default_factory=ManualClock)
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As a Redis that comes back empty; the next entry ids still are new ones."""
        self.epoch = f"epoch-{next(self.numbers)}"
        self.streams: dict[str, dict[str, _Entry]] = {"requests": {}, "groups": {}}
        self.published: set[str] = set()
        self.committed: dict[str, tuple[str, str, int]] = {}  # dedupe key -> (worker, entry id, deliveries)
        self.policies: dict[int, PolicyVersion] = {}
        self.latest: int | None = None
        self.letters: list[DeadLetter] = []
        self.owner, self.owned_until_s = "", 0.0  # `owner` took the job last, and may have lost it
        self.seen_s: dict[str, float] = {}  # worker -> when it was last seen

    def holder(self) -> str:
        """Owner token of the trainer that holds the job; empty when none does."""
        return self.owner if self.clock() < self.owned_until_s else ""

    def add(self, stream: str, key: bytes, body: bytes) -> None:
        self.streams[stream][f"{next(self.numbers)}-0"] = _Entry(key=key, body=body)

    def bury(self, stream: str, entry_id: str, reason: str, *, deliveries: int) -> None:
        entry = self.streams[stream].pop(entry_id)
        self.letters.append(
            DeadLetter(
                entry_id=f"{next(self.numbers)}-0",
                key=entry.key.decode(errors="replace"),
                stream=stream,
                reason=reason,
                deliveries=deliveries,
                body=entry.body,
            )
        )


def _number(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


class MemoryTrainer(TrainerEnd):
    def __init__(self, broker: MemoryBroker, *, owner: str, lease_s: float = 30.0) -> None:
        self.owner = owner
        self.lease_s = lease_s
        self._broker = broker
        self._epoch = ""
        self._last_number = 0

    def acquire(self, *, wait_s: float = 0.0) -> None:
        broker = self._broker
        deadline = broker.clock() + wait_s
        while (holder := broker.holder()) not in ("", self.owner):
            if broker.clock() >= deadline:
                raise LeaseLost(f"the job is held by trainer {holder!r}")
            broker.clock.wait(STEP_S)
        with broker.lock:
            broker.owner, broker.owned_until_s = self.owner, broker.clock() + self.lease_s
            if broker.epoch != self._epoch:
                self._epoch, self._last_number = broker.epoch, 0

    def _fence(self) -> MemoryBroker:
        broker = self._broker
        if broker.epoch != self._epoch:
            raise Mismatch("the queue came back empty")
        if broker.owner == self.owner and not broker.holder():
            broker.owned_until_s = broker.clock() + self.lease_s
        if broker.holder() != self.owner:
            raise LeaseLost(f"trainer {self.owner!r} lost the job: {broker.holder()!r} holds it; nothing was committed")
        return broker

    def renew(self) -> None:
        with self._broker.lock:
            self._fence().owned_until_s = self._broker.clock() + self.lease_s

    def keeper(self) -> LeaseKeeper:
        return LeaseKeeper(renew=self.renew, every_s=self.lease_s / 3)

    def release(self) -> None:
        with self._broker.lock:
            broker = self._fence()
            for entry_id, entry in broker.streams["groups"].items():
                if entry.is_pending and _number(entry_id) <= self._last_number:
                    entry.deliveries -= 1
            broker.owner = ""

    def purge(self) -> None:
        with self._broker.lock:
            self._fence().clear()

    def close(self) -> None: ...

    def enqueue(self, request: RolloutRequest) -> bool:
        with self._broker.lock:
            broker = self._fence()
            key = make_dedupe_key(request.group_id, request.policy_version)
            if key in broker.published:
                return False
            broker.published.add(key)
            broker.add("requests", key.encode(), rollout_request_to_bytes(request))
            return True

    def unpublished(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        published = self._broker.published
        return [r for r in requests if make_dedupe_key(r.group_id, r.policy_version) not in published]

    def requests_in_flight(self) -> int:
        return len(self._broker.streams["requests"])

    def collect(self, *, block_s: float, max_groups: int = 64) -> list[Delivered]:
        clock = self._broker.clock
        deadline = clock() + block_s
        while True:
            with self._broker.lock:
                delivered = self._collect_now(max_groups)
            if delivered or clock() >= deadline:
                return delivered
            clock.wait(STEP_S)

    def _collect_now(self, max_groups: int) -> list[Delivered]:
        broker = self._fence()
        groups = broker.streams["groups"]
        again = [i for i, entry in groups.items() if entry.is_pending and _number(i) > self._last_number]
        new = [i for i, entry in groups.items() if not entry.is_pending]
        delivered = []
        for entry_id in (again or new)[:max_groups]:
            entry = groups[entry_id]
            entry.is_pending = True
            entry.deliveries += 1
            self._last_number = _number(entry_id)
            if entry.deliveries > MAX_DELIVERIES:
                reason = f"{MAX_DELIVERIES} deliveries without acknowledgement"
                broker.bury("groups", entry_id, reason, deliveries=MAX_DELIVERIES)
                continue
            try:
                group = rollout_group_from_bytes(entry.body)
                check_key(entry.key, group.group_id, group.policy_version)
            except InvalidInput as error:
                broker.bury("groups", entry_id, str(error), deliveries=entry.deliveries)
            else:
                delivered.append(Delivered(entry_id=entry_id, deliveries=entry.deliveries, group=group))
        return delivered

    def acknowledge(self, entry_ids: Iterable[str]) -> int:
        with self._broker.lock:
            groups = self._fence().streams["groups"]
            return sum(groups.pop(entry_id, None) is not None for entry_id in entry_ids)

    def dead_letter(self, entry_id: str, reason: str) -> None:
        with self._broker.lock:
            if entry_id in self._fence().streams["groups"]:
                self._broker.bury("groups", entry_id, reason, deliveries=1)

    def ask_again(self, entry_id: str, group: RolloutGroup, request: RolloutRequest) -> None:
        with self._broker.lock:
            broker = self._fence()
            if broker.streams["groups"].pop(entry_id, None) is None:
                return
            group_key, key = (make_dedupe_key(item.group_id, item.policy_version) for item in (group, request))
            broker.committed.pop(group_key, None)
            if group_key == key:
                broker.published.discard(key)
            self.enqueue(request)

    def dead_letters(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        beyond = _number(after) if after else 0
        return [letter for letter in self._broker.letters if _number(letter.entry_id) > beyond][:limit]

    def publish_policy(self, policy: PolicyVersion) -> None:
        with self._broker.lock:
            broker = self._fence()
            broker.policies = {v: known for v, known in broker.policies.items() if v < policy.version}
            broker.policies[policy.version] = policy
            broker.latest = policy.version

    def policy(self, version: int) -> PolicyVersion | None:
        return self._broker.policies.get(version)

    def forget(self, before_version: int) -> int:
        def is_old(key: str) -> bool:
            return int(key.rpartition("@")[2]) < before_version

        with self._broker.lock:
            broker = self._fence()
            count = sum(map(is_old, [*broker.published, *broker.committed]))
            broker.published = {key for key in broker.published if not is_old(key)}
            broker.committed = {key: commit for key, commit in broker.committed.items() if not is_old(key)}
            broker.policies = {
                version: policy
                for version, policy in broker.policies.items()
                if version >= before_version or version == broker.latest
            }
            return count

    def workers_alive(self) -> list[str]:
        now_s = self._broker.clock()
        return sorted(worker for worker, seen_s in self._broker.seen_s.items() if now_s - seen_s <= 30)


class MemoryWorker(WorkerEnd):
    def __init__(self, broker: MemoryBroker, worker: str, *, lease_s: float = 30.0) -> None:
        self.worker = worker
        self.lease_s = lease_s
        self._broker = broker
        self._held: dict[str, Lease] = {}
        self._runs_out_s: dict[str, float] = {}

    def take(self, *, block_s: float, max_requests: int = 1) -> list[Lease]:
        clock = self._broker.clock
        deadline = clock() + block_s
        with self._broker.lock:
            self._broker.seen_s.setdefault(self.worker, clock())
        while True:
            with self._broker.lock:
                leases = self._take_now(max_requests)
            if leases or clock() >= deadline:
                return leases
            clock.wait(STEP_S)

    def _take_now(self, max_requests: int) -> list[Lease]:
        now_s = self._broker.clock()
        active = [lease for entry_id, lease in self._held.items() if self._runs_out_s[entry_id] > now_s]
        if any(lease.deliveries > SUSPECT_AFTER for lease in active):
            return []
        requests = self._broker.streams["requests"]
        expired = [i for i, entry in requests.items() if entry.is_pending and now_s - entry.since_s >= self.lease_s]
        chosen: list[str] = []
        for entry_id in expired[:max_requests]:
            is_suspect = requests[entry_id].deliveries >= SUSPECT_AFTER
            if is_suspect and (active or chosen):
                continue
            chosen.append(entry_id)
            if is_suspect:
                break
        leases = [lease for entry_id in chosen if (lease := self._deliver(entry_id))]
        if not leases:
            new = [entry_id for entry_id, entry in requests.items() if not entry.is_pending][:max_requests]
            leases = [lease for entry_id in new if (lease := self._deliver(entry_id))]
        return leases

    def _deliver(self, entry_id: str) -> Lease | None:
        """A lease on the request; None when it went to the dead letters."""
        entry = self._broker.streams["requests"][entry_id]
        entry.is_pending, entry.worker, entry.since_s = True, self.worker, self._broker.clock()
        entry.deliveries += 1
        try:
            request = rollout_request_from_bytes(entry.body)
            check_key(entry.key, request.group_id, request.policy_version)
        except InvalidInput as error:
            self._broker.bury("requests", entry_id, str(error), deliveries=entry.deliveries)
            return None
        if entry.deliveries > MAX_DELIVERIES:
            reason = f"{MAX_DELIVERIES} deliveries without a commit"
            self._broker.bury("requests", entry_id, reason, deliveries=MAX_DELIVERIES)
            return None
        lease = Lease(entry_id=entry_id, deliveries=entry.deliveries, request=request)
        self._held[entry_id] = lease
        self._runs_out_s[entry_id] = self._broker.clock() + self.lease_s
        return lease

    def _owns(self, lease: Lease) -> bool:
        entry = self._broker.streams["requests"].get(lease.entry_id)
        return entry is not None and (entry.worker, entry.deliveries) == (self.worker, lease.deliveries)

    def _drop(self, lease: Lease) -> None:
        if self._held.get(lease.entry_id) == lease:
            del self._held[lease.entry_id]

    def _lost(self, lease: Lease) -> LeaseLost:
        return LeaseLost(f"worker {self.worker!r} lost its lease on group {lease.request.group_id!r}")

    def renew(self, leases: Iterable[Lease] | None = None) -> list[Lease]:
        with self._broker.lock:
            now_s = self._broker.clock()
            self._broker.seen_s[self.worker] = now_s
            wanted = list(self._held.values()) if leases is None else list(leases)
            lost = [lease for lease in wanted if not self._owns(lease)]
            for lease in wanted:
                if lease in lost:
                    self._drop(lease)
                else:
                    self._broker.streams["requests"][lease.entry_id].since_s = now_s
                    self._runs_out_s[lease.entry_id] = now_s + self.lease_s
            return lost

    def keeper(self) -> LeaseKeeper:
        return LeaseKeeper(renew=self.renew, every_s=self.lease_s / 3)

    def complete(self, lease: Lease, group: RolloutGroup) -> bool:
        key = make_dedupe_key(lease.request.group_id, lease.request.policy_version)
        if make_dedupe_key(group.group_id, group.policy_version) != key:
            raise Mismatch(f"the group answers another request than {key!r}")
        with self._broker.lock:
            broker = self._broker
            owns = self._owns(lease)
            self._drop(lease)
            commit = (self.worker, lease.entry_id, lease.deliveries)
            if not owns:
                if broker.committed.get(key) == commit:
                    return True  # this call is repeated
                raise self._lost(lease)
            del broker.streams["requests"][lease.entry_id]
            if key in broker.committed:
                return False
            broker.committed[key] = commit
            broker.add("groups", key.encode(), rollout_group_to_bytes(group))
            return True

    def fail(self, lease: Lease, reason: str) -> None:
        with self._broker.lock:
            owns = self._owns(lease)
            self._drop(lease)
            if not owns:
                raise self._lost(lease)
            self._broker.bury("requests", lease.entry_id, reason, deliveries=lease.deliveries)

    def release(self, lease: Lease) -> None:
        with self._broker.lock:
            if self._owns(lease):
                entry = self._broker.streams["requests"][lease.entry_id]
                entry.worker, entry.since_s = "", float("-inf")
                entry.deliveries -= 1
            self._drop(lease)

    def held(self) -> list[Lease]:
        return list(self._held.values())

    def policy(self, version: int) -> PolicyVersion | None:
        return self._broker.policies.get(version)

    def close(self) -> None:
        self._broker.seen_s.pop(self.worker, None)
