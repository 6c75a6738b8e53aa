"""Enqueues a step's requests, collects the groups that answer them, and writes both into the ledger.

In: requests. Out: groups, in order of completion, each wanted group once. Waits for rollout workers, and for a Redis
that is full or away. Unblocked by a group, or by a dead letter: its group will not come. Groups stay unacknowledged
until `acknowledge`, which the trainer calls once the checkpoint that contains them is durable.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from vaopd.errors import Mismatch, Unavailable
from vaopd.queue import Delivered, TrainerEnd
from vaopd.run.ledger import Ledger
from vaopd.telemetry import logs
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest

log = logging.getLogger(__name__)

_POLL_S = 2.0
_CHECK_EVERY_S = 0.1

Check = Callable[[], None]
"""Called repeatedly during a wait; may raise to end it."""


class Collector:
    """The trainer's side of one job's queue. Not thread-safe: the coordinator's main thread owns it."""

    def __init__(
        self,
        *,
        queue: TrainerEnd,
        ledger: Ledger,
        remind_every_s: float = 30.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """remind_every_s: after so long without a group, log that, and republish requests that Redis has lost.

        say: prints what is waited for, once.
        """
        self._say = say
        self._remind_every_s = remind_every_s
        self._queue = queue
        self._ledger = ledger
        self._check: Check = lambda: None
        self._policies: dict[int, PolicyVersion] = {}
        self._wanted: dict[str, RolloutRequest] = {}
        self._oldest_version: dict[str, int] = {}
        self._inbox: deque[Delivered] = deque()  # read from Redis, not yet sorted; kept while Redis is away
        self._arrived: dict[str, Delivered] = {}
        self._unacknowledged: dict[str, str] = {}  # group_id -> entry_id, handed out
        self._spares: dict[str, list[str]] = {}  # group_id -> entry_ids of duplicates, kept until the group is durable
        self._durable: list[str] = []  # entries of groups that are in a checkpoint, not yet acknowledged
        self._finished: set[str] = set()  # handed out, trained before a resume, or dead: never wanted again
        # Groups and letters for requests that a killed trainer made and this one has yet to make. Enqueueing those
        # again adds nothing to the queue, so neither may be lost.
        self._early: list[Delivered] = []
        self._letters: dict[tuple[str, int | None], str] = {}  # (group_id, policy_version) -> reason
        self._dead: set[str] = set()
        self._last_letter = ""
        self.counts: Counter[str] = Counter()
        """Unused groups by reason: stale, duplicate, other_weights; dead for those that will never come."""

    def publish(self, policy: PolicyVersion, *, check: Check) -> None:
        """Announces a snapshot; waits while Redis is full."""
        self._check = check
        self._policies = {v: known for v, known in self._policies.items() if v < policy.version}
        self._policies[policy.version] = policy
        self._until_redis_takes_it(lambda: self._queue.publish_policy(policy))

    def enqueue(
        self, requests: Sequence[RolloutRequest], *, oldest_version: int, step: int | None, check: Check
    ) -> None:
        """Enqueues requests; waits while Redis is full.

        step: the step that will train on the groups; None for an evaluation. oldest_version: a group sampled by an
        older policy is stale, and its prompt is enqueued again.
        """
        self._check = check
        for request in requests:
            self._wanted[request.group_id] = request
            self._oldest_version[request.group_id] = oldest_version
            self._ledger.write("published", group=request.group_id, step=step, policy=request.policy_version)
            self._until_redis_takes_it(lambda request=request: self._queue.enqueue(request))  # type: ignore[misc]
        ids = [request.group_id for request in requests]
        log.info("%d groups requested", len(ids), extra=logs.make_fields(step=step, groups=ids))
        self._inbox.extend(self._early)
        self._early = []
        self._until_redis_takes_it(self._sort)

    def resume(self, step: int, group_ids: Iterable[str]) -> None:
        """Drops these groups when they are delivered again: the checkpoint of `step` has trained them."""
        self._ledger.write("resumed", step=step)
        self._finished.update(group_ids)

    def wait_for_groups(self, group_ids: Sequence[str], *, check: Check) -> Iterator[list[RolloutGroup]]:
        """Yields the groups of these ids as they arrive, several at a time; ends when each has come or is dead."""
        self._check = check
        open_ids = set(group_ids) - self._dead
        last_news = time.monotonic()
        while open_ids:
            check()
            ready = [group_id for group_id in group_ids if group_id in open_ids and group_id in self._arrived]
            if ready:
                last_news = time.monotonic()
                open_ids.difference_update(ready)
                yield [self._take_arrived(group_id) for group_id in ready]
                continue
            self._until_redis_takes_it(self._collect)
            self._until_redis_takes_it(self._read_dead_letters)
            open_ids -= self._dead
            if time.monotonic() - last_news > self._remind_every_s:
                last_news = time.monotonic()
                self._until_redis_takes_it(lambda missing=len(open_ids): self._look_for_losses(missing))  # type: ignore[misc]

    def acknowledge(self, group_ids: Iterable[str]) -> None:
        """Removes groups from Redis, now that a durable checkpoint holds their effect.

        While Redis is away, they are kept for the next call.
        """
        for group_id in group_ids:
            self._durable += self._spares.pop(group_id, [])
            if entry_id := self._unacknowledged.pop(group_id, None):
                self._durable.append(entry_id)
        if self._if_redis_is_there(lambda: self._queue.acknowledge(self._durable)):
            self._durable = []

    def confirm(self) -> None:
        """Raises LeaseLost when another trainer has the job: only that one may write a checkpoint."""
        self._ledger.check_owner()  # this holds while Redis is away, too
        self._if_redis_is_there(self._queue.renew)

    def dead_letter(self, group_id: str, reason: str) -> None:
        """Moves a group that was handed out and can't be trained on to the dead letters."""
        self._give_up(group_id, reason, self._unacknowledged.pop(group_id, None))
        self._durable += self._spares.pop(group_id, [])

    def forget(self, before_version: int) -> None:
        """Drops what is kept for policy versions before this one; no request will name them."""
        self._policies = {v: policy for v, policy in self._policies.items() if v >= before_version}
        self._durable += [early.entry_id for early in self._early if early.group.policy_version < before_version]
        self._early = [early for early in self._early if early.group.policy_version >= before_version]
        self._if_redis_is_there(lambda: self._queue.forget(before_version))
        self.acknowledge(())

    def finish(self, group_ids: Iterable[str], *, version: int) -> None:
        """Ends the run with this version: acknowledges these groups, and those that an earlier trainer left."""

        def drain() -> None:
            while found := self._queue.collect(block_s=0):
                self._inbox.extend(found)
                self._sort()

        self._if_redis_is_there(drain)
        self.acknowledge(group_ids)
        self.forget(version + 1)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        if not self._inbox:
            self._inbox.extend(self._queue.collect(block_s=_POLL_S))
        self._sort()

    def _sort(self) -> None:
        """Empties the inbox. An entry leaves it last, so one that an absent Redis interrupts is sorted again."""
        while self._inbox:
            self._sort_one(self._inbox[0])
            self._inbox.popleft()

    def _sort_one(self, delivered: Delivered) -> None:
        group = delivered.group
        request = self._wanted.get(group.group_id)
        if group.group_id in self._finished or group.group_id in self._arrived:
            self._drop(delivered, "duplicate")
        elif request is None:
            self._early.append(delivered)
        elif not self._oldest_version[group.group_id] <= group.policy_version <= request.policy_version:
            # No-op when the wanted version is in flight already, as after a resume.
            self._queue.enqueue(request)
            self._drop(delivered, "stale")
        elif group.policy_sha256 != self._find_sha256(group.policy_version):
            # An earlier trainer made a policy of this number, with other weights.
            self._queue.ask_again(delivered.entry_id, group, request)
            self._drop(delivered, "other_weights")
        elif len(group.rollouts) != request.num_rollouts:
            reason = f"it holds {len(group.rollouts)} rollouts, {request.num_rollouts} were asked for"
            self._give_up(group.group_id, reason, delivered.entry_id)
            self._mark_dead(group.group_id)
        else:
            self._arrived[group.group_id] = delivered
            self._ledger.write(
                "delivered",
                group=group.group_id,
                policy=group.policy_version,
                worker=group.worker,
                deliveries=delivered.deliveries,
            )

    def _find_sha256(self, version: int) -> str | None:
        policy = self._policies.get(version) or self._queue.policy(version)
        if policy is None:
            return None
        self._policies[version] = policy
        return policy.sha256

    def _drop(self, delivered: Delivered, reason: str) -> None:
        group = delivered.group
        arrived = self._arrived.get(group.group_id)
        in_use = arrived.entry_id if arrived else self._unacknowledged.get(group.group_id)
        spares = self._spares.get(group.group_id, [])
        if delivered.entry_id in (in_use, *spares):
            return  # the entry in use, delivered again: Redis lost its last writes, among them that it was read
        if in_use is None:
            self._queue.acknowledge([delivered.entry_id])
        else:
            # The entry in use may be among the writes that Redis lost; then this one alone brings the group back to a
            # trainer that resumes before the next checkpoint.
            self._spares[group.group_id] = [*spares, delivered.entry_id]
        self.counts[reason] += 1
        log.info("dropped group %s: %s", group.group_id, reason, extra=logs.make_fields(group=group.group_id))
        self._ledger.write("dropped", group=group.group_id, policy=group.policy_version, reason=reason)

    def _take_arrived(self, group_id: str) -> RolloutGroup:
        delivered = self._arrived.pop(group_id)
        del self._wanted[group_id], self._oldest_version[group_id]
        self._unacknowledged[group_id] = delivered.entry_id
        self._finished.add(group_id)
        return delivered.group

    def _give_up(self, group_id: str, reason: str, entry_id: str | None) -> None:
        if entry_id is not None:  # None: it was lost with a Redis that came back empty
            self._until_redis_takes_it(lambda: self._queue.dead_letter(entry_id, reason))
        log.error("gave up group %s: %s", group_id, reason, extra=logs.make_fields(group=group_id))
        self.counts["dead"] += 1
        self._ledger.write("dead", group=group_id, reason=reason)

    def _mark_dead(self, group_id: str) -> None:
        self._dead.add(group_id)
        self._finished.add(group_id)
        del self._wanted[group_id], self._oldest_version[group_id]

    def _read_dead_letters(self) -> None:
        for letter in self._queue.dead_letters(after=self._last_letter):
            self._last_letter = letter.entry_id
            self._letters[letter.group_id, letter.policy_version] = letter.reason
        for group_id, request in list(self._wanted.items()):
            reason = self._letters.get((group_id, request.policy_version))
            if reason is not None and group_id not in self._arrived:
                self._give_up(group_id, reason, None)
                self._mark_dead(group_id)

    def _until_redis_takes_it(self, operation: Callable[[], object]) -> None:
        """Waits while Redis is full or away: nothing is lost by waiting. Refills a Redis that came back empty."""
        waited = False
        while True:
            try:
                operation()
                if waited:
                    self._say("Redis answers again; the run continues")
                return
            except Mismatch as error:
                log.warning("republishing from this trainer's own record: %s", error)
                operation = self._republish
            except Unavailable as error:
                log.warning("waiting for Redis: %s", error)
                if not waited:
                    self._say(f"waiting for Redis: {error}")
                waited = True
                until = time.monotonic() + _POLL_S
                while time.monotonic() < until:
                    self._check()
                    time.sleep(_CHECK_EVERY_S)

    def _if_redis_is_there(self, operation: Callable[[], object]) -> bool:
        """Tries an operation that can wait for the next checkpoint; returns whether it was done."""
        try:
            operation()
            return True
        except Mismatch:
            self._until_redis_takes_it(self._republish)
        except Unavailable as error:
            log.warning("%s; this can wait for the next checkpoint", error)
        return False

    def _republish(self) -> None:
        # An empty Redis gives the job to the first trainer that asks, perhaps one that slept while another continued.
        self._ledger.check_owner()
        self._queue.acquire(wait_s=self._queue.lease_s)
        # The entries are gone with that Redis; this trainer holds their groups.
        self._unacknowledged.clear()
        self._spares.clear()
        self._durable = []
        self._last_letter = ""
        self._letters.clear()
        for version in sorted(self._policies):
            self._queue.publish_policy(self._policies[version])
        for group_id, request in self._wanted.items():
            if group_id not in self._arrived:
                self._queue.enqueue(request)

    def _look_for_losses(self, missing: int) -> None:
        workers = self._queue.workers_alive()
        log.warning(
            "waiting for %d groups; rollout workers alive: %s", missing, ", ".join(workers) or "none (start one)"
        )
        # After a power cut, Redis lacks its last second: requests published in it are published again.
        if any(self._queue.policy(version) is None for version in self._policies):
            for version in sorted(self._policies):
                self._queue.publish_policy(self._policies[version])
        waiting = [request for group_id, request in self._wanted.items() if group_id not in self._arrived]
        for request in self._queue.unpublished(waiting):
            group_id = request.group_id
            log.warning(
                "Redis has lost the request for group %s: published again",
                group_id,
                extra=logs.make_fields(group=group_id),
            )
            self._queue.enqueue(request)
