"""The coordinator's dealings with the queue: enqueue what a step needs, collect what comes back, keep the books.

In: requests. Out: groups, in order of completion, each wanted group once. Waits for: rollout workers, and for a Redis
that is full or away. Unblocked by: a group, or a dead letter that says that a group will not come. Groups stay
unacknowledged until `acknowledge`, which the trainer calls once the checkpoint that contains them is durable.
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
"""Called while something is waited for; may raise to end the wait."""


class Collector:
    """One per job. Not thread-safe: the coordinator's main thread owns it."""

    def __init__(self, *, queue: TrainerEnd, ledger: Ledger, remind_every_s: float = 30.0) -> None:
        """`remind_every_s`: how long without any news until it says so, and looks whether Redis lost something."""
        self._remind_every_s = remind_every_s
        self._queue = queue
        self._ledger = ledger
        self._check: Check = lambda: None
        self._policies: dict[int, PolicyVersion] = {}
        self._wanted: dict[str, RolloutRequest] = {}
        self._oldest_version: dict[str, int] = {}
        self._inbox: deque[Delivered] = deque()  # read, and not yet sorted: a Redis that is away then must lose none
        self._arrived: dict[str, Delivered] = {}
        self._unacknowledged: dict[str, str] = {}  # group_id -> entry_id, handed out
        self._durable: list[str] = []  # entries in a checkpoint that Redis has not been told of
        self._finished: set[str] = set()  # handed out, trained before a resume, or dead: never wanted again
        # What a trainer that was killed had asked for and this one has not yet, groups and letters. Asking again adds
        # nothing to the queue, so neither may be lost.
        self._early: list[Delivered] = []
        self._letters: dict[tuple[str, int | None], str] = {}  # (group_id, policy_version) -> reason
        self._dead: set[str] = set()
        self._last_letter = ""
        self.counts: Counter[str] = Counter()
        """Groups that were not used: stale, duplicate, other_weights; and dead, which will never come."""

    def publish(self, policy: PolicyVersion, *, check: Check) -> None:
        """Announces a snapshot; waits while Redis is full."""
        self._check = check
        self._policies = {v: known for v, known in self._policies.items() if v < policy.version}
        self._policies[policy.version] = policy
        self._surely(lambda: self._queue.publish_policy(policy))

    def enqueue(
        self, requests: Sequence[RolloutRequest], *, oldest_version: int, step: int | None, check: Check
    ) -> None:
        """Asks for groups; waits while Redis is full. `step`: the one that trains on them; None: evaluation's.

        `oldest_version`: a group sampled by an older policy is stale, and its prompt is enqueued again.
        """
        self._check = check
        for request in requests:
            self._wanted[request.group_id] = request
            self._oldest_version[request.group_id] = oldest_version
            self._ledger.write("published", group=request.group_id, step=step, policy=request.policy_version)
            self._surely(lambda request=request: self._queue.enqueue(request))  # type: ignore[misc]
        ids = [request.group_id for request in requests]
        log.info("%d groups asked for", len(ids), extra=logs.fields(step=step, groups=ids))
        self._inbox.extend(self._early)
        self._early = []
        self._surely(self._sort)

    def resume(self, step: int, group_ids: Iterable[str]) -> None:
        """A checkpoint of `step` holds these groups; should they be delivered again, they are dropped."""
        self._ledger.write("resumed", step=step)
        self._finished.update(group_ids)

    def groups(self, group_ids: Sequence[str], *, check: Check) -> Iterator[list[RolloutGroup]]:
        """The groups of these ids as they arrive, several at a time; ends when each has come or is dead."""
        self._check = check
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
            self._surely(self._collect)
            self._surely(self._read_dead_letters)
            open_ids -= self._dead
            if time.monotonic() - last_news > self._remind_every_s:
                last_news = time.monotonic()
                self._surely(lambda missing=len(open_ids): self._remind(missing))  # type: ignore[misc]

    def acknowledge(self, group_ids: Iterable[str]) -> None:
        """These groups' effect is durable: they leave Redis for good, when it is there; else the next time."""
        entries = (self._unacknowledged.pop(group_id, None) for group_id in group_ids)
        self._durable += [entry for entry in entries if entry is not None]
        if self._tidy(lambda: self._queue.acknowledge(self._durable)):
            self._durable = []

    def confirm(self) -> None:
        """Raises LeaseLost when somebody else has the job: then a checkpoint is theirs to write."""
        self._ledger.check_owner()  # this holds while Redis is away, too
        self._tidy(self._queue.renew)

    def dead_letter(self, group_id: str, reason: str) -> None:
        """Gives up a group that was handed out and can't be trained on."""
        self._give_up(group_id, reason, self._unacknowledged.pop(group_id, None))

    def forget(self, before_version: int) -> None:
        """No group of a version before this one will be asked for."""
        self._policies = {v: policy for v, policy in self._policies.items() if v >= before_version}
        self._durable += [early.entry_id for early in self._early if early.group.policy_version < before_version]
        self._early = [early for early in self._early if early.group.policy_version >= before_version]
        self._tidy(lambda: self._queue.forget(before_version))
        self.acknowledge(())

    def finish(self, group_ids: Iterable[str], *, version: int) -> None:
        """The run is over with this version: acknowledges these groups, and what a trainer before this one left."""

        def drain() -> None:
            while found := self._queue.collect(block_s=0):
                self._inbox.extend(found)
                self._sort()

        self._tidy(drain)
        self.acknowledge(group_ids)
        self.forget(version + 1)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        if not self._inbox:
            self._inbox.extend(self._queue.collect(block_s=_POLL_S))
        self._sort()

    def _sort(self) -> None:
        """Empties the inbox. An entry leaves it last, so what an absent Redis interrupts is done again."""
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
        elif group.policy_sha256 != self._sha256_of(group.policy_version):
            # The number of a policy that a trainer before this one made, and not its weights.
            self._queue.ask_again(delivered.entry_id, group, request)
            self._drop(delivered, "other_weights")
        elif len(group.rollouts) != request.num_rollouts:
            reason = f"it holds {len(group.rollouts)} rollouts, {request.num_rollouts} were asked for"
            self._give_up(group.group_id, reason, delivered.entry_id)
            self._is_dead(group.group_id)
        else:
            self._arrived[group.group_id] = delivered
            self._ledger.write(
                "delivered",
                group=group.group_id,
                policy=group.policy_version,
                worker=group.worker,
                deliveries=delivered.deliveries,
            )

    def _sha256_of(self, version: int) -> str | None:
        policy = self._policies.get(version) or self._queue.policy(version)
        if policy is None:
            return None
        self._policies[version] = policy
        return policy.sha256

    def _drop(self, delivered: Delivered, reason: str) -> None:
        group = delivered.group
        arrived = self._arrived.get(group.group_id)
        if delivered.entry_id in (self._unacknowledged.get(group.group_id), arrived.entry_id if arrived else None):
            return  # the very entry that is in use, seen again: Redis lost its last writes, that it was read among them
        self._queue.acknowledge([delivered.entry_id])
        self.counts[reason] += 1
        log.info("group %s is dropped: %s", group.group_id, reason, extra=logs.fields(group=group.group_id))
        self._ledger.write("dropped", group=group.group_id, policy=group.policy_version, reason=reason)

    def _hand_out(self, group_id: str) -> RolloutGroup:
        delivered = self._arrived.pop(group_id)
        del self._wanted[group_id], self._oldest_version[group_id]
        self._unacknowledged[group_id] = delivered.entry_id
        self._finished.add(group_id)
        return delivered.group

    def _give_up(self, group_id: str, reason: str, entry_id: str | None) -> None:
        if entry_id is not None:  # else it went with a Redis that came back empty
            self._surely(lambda: self._queue.dead_letter(entry_id, reason))
        log.error("group %s is given up: %s", group_id, reason, extra=logs.fields(group=group_id))
        self.counts["dead"] += 1
        self._ledger.write("dead", group=group_id, reason=reason)

    def _is_dead(self, group_id: str) -> None:
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
                self._is_dead(group_id)

    def _surely(self, operation: Callable[[], object]) -> None:
        """Waits while Redis is full or away, since nothing is lost by waiting; fills a Redis that came back empty."""
        while True:
            try:
                operation()
                return
            except Mismatch as error:
                log.warning("republishing from this trainer's own record: %s", error)
                operation = self._republish
            except Unavailable as error:
                log.warning("waiting for Redis: %s", error)
                until = time.monotonic() + _POLL_S
                while time.monotonic() < until:
                    self._check()
                    time.sleep(_CHECK_EVERY_S)

    def _tidy(self, operation: Callable[[], object]) -> bool:
        """What can wait for the next checkpoint; says whether it was done."""
        try:
            operation()
            return True
        except Mismatch:
            self._surely(self._republish)
        except Unavailable as error:
            log.warning("%s; this can wait for the next checkpoint", error)
        return False

    def _republish(self) -> None:
        # An empty Redis gives the job to whoever comes first, which may be a trainer that slept while another went on.
        self._ledger.check_owner()
        self._queue.acquire(wait_s=self._queue.lease_s)
        # The entries are gone with that Redis; their groups are in our hands.
        self._unacknowledged.clear()
        self._durable = []
        self._last_letter = ""
        self._letters.clear()
        for version in sorted(self._policies):
            self._queue.publish_policy(self._policies[version])
        for group_id, request in self._wanted.items():
            if group_id not in self._arrived:
                self._queue.enqueue(request)

    def _remind(self, missing: int) -> None:
        workers = self._queue.workers_alive()
        log.warning(
            "waiting for %d groups; rollout workers alive: %s", missing, ", ".join(workers) or "none (start one)"
        )
        # A Redis whose host lost power comes back without its last second: what was published then is published again.
        if any(self._queue.policy(version) is None for version in self._policies):
            for version in sorted(self._policies):
                self._queue.publish_policy(self._policies[version])
        waiting = [request for group_id, request in self._wanted.items() if group_id not in self._arrived]
        for request in self._queue.unpublished(waiting):
            group_id = request.group_id
            log.warning(
                "Redis has lost the request for group %s: published again", group_id, extra=logs.fields(group=group_id)
            )
            self._queue.enqueue(request)
