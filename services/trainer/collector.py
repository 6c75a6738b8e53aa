"""The coordinator's dealings with the queue: enqueue what a step needs, collect what comes back, keep the books.

In: requests. Out: groups, in order of completion, each wanted group once. Waits for: rollout workers. Unblocked by: a
group, or a dead letter that says that a group will not come. Groups stay unacknowledged until `acknowledge`, which the
trainer calls once the checkpoint that contains them is durable.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from vaopd.errors import Mismatch, Unavailable
from vaopd.queue import TrainerQueue
from vaopd.queue.trainer import Delivered
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest

log = logging.getLogger(__name__)

_POLL_S = 2.0
_REMIND_EVERY_S = 30.0


class Collector:
    """One per job. Not thread-safe: the coordinator's main thread owns it."""

    def __init__(self, *, queue: TrainerQueue) -> None:
        self._queue = queue
        self._policy: PolicyVersion | None = None
        self._wanted: dict[str, RolloutRequest] = {}
        self._oldest_version: dict[str, int] = {}
        self._arrived: dict[str, Delivered] = {}
        self._unacknowledged: dict[str, str] = {}  # group_id -> entry_id, handed out
        self._finished: set[str] = set()  # handed out, trained before a resume, or dead: never wanted again
        # What a trainer that was killed had asked for and this one has not yet, groups and letters. Asking again adds
        # nothing to the queue, so neither may be lost.
        self._early: list[Delivered] = []
        self._letters: dict[tuple[str, int], str] = {}  # (group_id, policy_version) -> reason
        self._dead: set[str] = set()
        self._last_letter = ""
        self.counts: Counter[str] = Counter()
        """Groups that were not used: stale, duplicate; and dead, which will never come."""

    def publish(self, policy: PolicyVersion) -> None:
        self._policy = policy
        self._with_recovery(lambda: self._queue.publish_policy(policy))

    def enqueue(self, requests: Sequence[RolloutRequest], *, oldest_version: int) -> None:
        """`oldest_version`: a group sampled by an older policy is stale, and its prompt is enqueued again."""
        for request in requests:
            self._wanted[request.group_id] = request
            self._oldest_version[request.group_id] = oldest_version
            self._with_recovery(lambda request=request: self._enqueue(request))  # type: ignore[misc]
        early, self._early = self._early, []
        self._with_recovery(lambda: self._sort(early))

    def skip(self, group_ids: Iterable[str]) -> None:
        """These were trained before a resume; should they be delivered again, they are dropped."""
        self._finished.update(group_ids)

    def groups(self, group_ids: Sequence[str], *, check: Callable[[], None]) -> Iterator[list[RolloutGroup]]:
        """The groups of these ids as they arrive, several at a time; ends when each has come or is dead.

        `check` is called while it waits and may raise to end the wait.
        """
        open_ids = set(group_ids) - self._dead
        last_news = time.monotonic()
        while open_ids:
            check()
            ready = [group_id for group_id in group_ids if group_id in open_ids and group_id in self._arrived]
            if ready:
                last_news = time.monotonic()
                open_ids.difference_update(ready)
                yield [self._hand_out(group_id) for group_id in ready]
                continue
            self._with_recovery(self._collect)
            self._with_recovery(self._read_dead_letters)
            open_ids -= self._dead
            if time.monotonic() - last_news > _REMIND_EVERY_S:
                last_news = time.monotonic()
                self._remind(len(open_ids))

    def acknowledge(self, group_ids: Sequence[str]) -> None:
        """These groups' effect is durable: they leave Redis for good."""
        entries = [self._unacknowledged.pop(group_id) for group_id in group_ids if group_id in self._unacknowledged]
        self._with_recovery(lambda: self._queue.acknowledge(entries))

    def dead_letter(self, group_id: str, reason: str) -> None:
        """Gives up a group that was handed out and can't be trained on."""
        log.error("group %s is given up: %s", group_id, reason)
        self.counts["dead"] += 1
        entry_id = self._unacknowledged.pop(group_id, None)
        if entry_id is not None:  # else it went with a Redis that came back empty
            self._with_recovery(lambda: self._queue.dead_letter(entry_id, reason))

    def forget(self, before_version: int) -> None:
        """No group of a version before this one will be asked for."""
        self._with_recovery(lambda: self._queue.forget(before_version))
        old = [early.entry_id for early in self._early if early.group.policy_version < before_version]
        self._early = [early for early in self._early if early.group.policy_version >= before_version]
        self._with_recovery(lambda: self._queue.acknowledge(old))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _enqueue(self, request: RolloutRequest) -> None:
        while True:
            try:
                self._queue.enqueue(request)
                return
            except Unavailable as error:
                # Redis is full or away: nothing is lost by waiting, and acknowledging still works when it is full.
                log.warning("enqueueing pauses: %s", error)
                time.sleep(_POLL_S)

    def _collect(self) -> None:
        self._sort(self._queue.collect(block_s=_POLL_S))

    def _sort(self, deliveries: Iterable[Delivered]) -> None:
        for delivered in deliveries:
            group = delivered.group
            request = self._wanted.get(group.group_id)
            if group.group_id in self._finished or group.group_id in self._arrived:
                self._drop(delivered, "duplicate")
            elif request is None:
                self._early.append(delivered)
            elif not self._oldest_version[group.group_id] <= group.policy_version <= request.policy_version:
                self._drop(delivered, "stale")
                # No-op when the wanted version is in flight already, as after a resume.
                self._enqueue(request)
            else:
                self._arrived[group.group_id] = delivered

    def _drop(self, delivered: Delivered, reason: str) -> None:
        if self._unacknowledged.get(delivered.group.group_id) == delivered.entry_id:
            return  # the very entry that was handed out, seen again after a lost reply
        self.counts[reason] += 1
        self._queue.acknowledge([delivered.entry_id])

    def _hand_out(self, group_id: str) -> RolloutGroup:
        delivered = self._arrived.pop(group_id)
        del self._wanted[group_id], self._oldest_version[group_id]
        self._unacknowledged[group_id] = delivered.entry_id
        self._finished.add(group_id)
        return delivered.group

    def _read_dead_letters(self) -> None:
        for letter in self._queue.dead_letters(after=self._last_letter):
            self._last_letter = letter.entry_id
            self._letters[letter.group_id, letter.policy_version] = letter.reason
        for group_id, request in list(self._wanted.items()):
            reason = self._letters.get((group_id, request.policy_version))
            if reason is not None:
                log.error("group %s will not come: %s", group_id, reason)
                self.counts["dead"] += 1
                self._dead.add(group_id)
                self._finished.add(group_id)
                del self._wanted[group_id], self._oldest_version[group_id]

    def _with_recovery(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except Mismatch as error:
            log.warning("republishing from this trainer's own record: %s", error)
            self._queue.acquire(wait_s=self._queue.lease_s)
            self._unacknowledged.clear()  # the entries are gone with that Redis; their groups are in our hands
            self._last_letter = ""
            self._letters.clear()
            if self._policy is not None:
                self._queue.publish_policy(self._policy)
            for group_id, request in self._wanted.items():
                if group_id not in self._arrived:
                    self._enqueue(request)

    def _remind(self, missing: int) -> None:
        workers = self._queue.workers_alive()
        log.warning(
            "waiting for %d groups; rollout workers alive: %s", missing, ", ".join(workers) or "none (start one)"
        )
