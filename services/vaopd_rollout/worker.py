"""The rollout worker's loop.

    in            requests from the queue, under leases that a keeper thread renews
    out           one finished group per request, when its last sibling ends; a request that can't be answered becomes a
                  dead letter
    waits for     a request; then for the snapshot that the request names, if it isn't announced yet
    unblocked by  the trainer, which enqueues requests and announces policy versions

    queue ── take ──► waiting ── admit ──► running ── step ──► ended ── commit ──► queue
                      leased, not yet      in the engine, all of
                      in the engine        the loaded version

Requests are admitted beside those that run, up to a budget of tokens: a long response holds up no other group. Groups
end with the weights that they began with: a request of another version waits until nothing runs. Training goes before
evaluation, which gets a share of the budget beside it, and lower versions first. A request on which two workers died is
taken by an idle worker only (`WorkerEnd`); the trainer waits for it too, so workers do become idle.

After SIGTERM what runs has `drain_s`; what waits is handed back at once, and the rest when the time is over.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

from vaopd.errors import InvalidInput, LeaseLost, Unavailable, VaopdError
from vaopd.process import hang_timer
from vaopd.queue import Lease, WorkerEnd
from vaopd.sampling.engine import Outcome, RolloutEngine, count_tokens, open_stream
from vaopd.telemetry import logs, tracing
from vaopd.types import GroupId, PolicyVersion, RolloutGroup
from vaopd_rollout.metrics import WorkerMetrics

log = logging.getLogger(__name__)
T = TypeVar("T")

TAKE_BLOCK_S = 1.0
# A trainer enqueues a step's requests one by one: an engine that answers one by one would know of the first alone.
LINGER_S = 0.05
POLL_S = 0.05
"""How often the queue is asked while groups run. Asking takes about 1 ms of the engine's time."""
RETRY_S = 1.0
AWAY_S = 30.0
"""While groups run, a queue that was away is asked again after so long: asking waits for it, and sampling with it."""
TOKENS_IN_FLIGHT = 524_288
EVALUATION_SHARE = 0.25
"""Beside training, evaluations are admitted up to this share of the budget only: each one slows all that runs."""
POLICY_POLL_S = 0.1
STUCK_AFTER_S = 1800.0


class HandBack(BaseException):
    """Stops in the middle of a step. Not an Exception, so that no `except Exception` swallows it."""


class Stop:
    """Asks the worker to stop on SIGTERM or SIGINT, and forces it `drain_s` later or at a second signal."""

    def __init__(self, *, drain_s: float) -> None:
        """drain_s: how long the groups that run may take after the first signal."""
        self.requested = False
        self._drain_s = drain_s
        self._disarmed = False
        self._wake = threading.Event()

    def install(self) -> None:
        """Handles the signals of this process; call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_deadline)

    def disarm(self) -> None:
        """Lets no further signal interrupt the process."""
        self._disarmed = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def wait(self, timeout_s: float) -> None:
        """Pauses for `timeout_s`, or until a stop is requested."""
        self._wake.wait(timeout_s)

    def request(self) -> None:
        """Requests a stop, as the first signal does."""
        self.requested = True
        self._wake.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._on_deadline(number, frame)
        elif not self._disarmed:
            log.info("asked to stop: groups in progress have %g s, a second signal ends them at once", self._drain_s)
            self.request()
            signal.setitimer(signal.ITIMER_REAL, self._drain_s)

    def _on_deadline(self, number: int, frame: FrameType | None) -> None:
        if not self._disarmed:
            raise HandBack


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """A request in the engine. began_ns: when it was added, since 1970."""

    lease: Lease
    began_ns: int


@dataclass(kw_only=True, eq=False)
class RolloutWorker:
    """Serves one job's queue with one engine until `stop` is requested."""

    engine: RolloutEngine
    queue: WorkerEnd
    requests_per_batch: int
    """Bounds the requests that are held."""
    tokens_in_flight: int = TOKENS_IN_FLIGHT
    """Bounds what they may take in the engine; one request is always admitted."""
    stop: Stop
    metrics: WorkerMetrics = field(default_factory=lambda: WorkerMetrics(job=""))
    stuck_after_s: float = STUCK_AFTER_S
    """An engine that takes longer for a step or for new weights hangs; the process ends, and its leases run out."""
    fetch: Callable[[PolicyVersion], PolicyVersion] = lambda policy: policy
    """See `PolicyFetcher`."""

    def __post_init__(self) -> None:
        self._stream = open_stream(self.engine)
        self._waiting: list[Lease] = []
        self._running: dict[str, _Running] = {}  # by their key in the stream
        self._suspects: set[str] = set()  # entry ids of those in the engine when it failed
        self._ask_at_s = 0.0  # when the queue is asked again; time.monotonic

    def run(self) -> None:
        """Serves the queue until a stop is requested. Raises the engine's errors: restart the process then."""
        log.info("rollout worker %s ready", self.queue.worker)
        try:
            with self.queue.keeper() as keeper:
                while not self.stop.requested:
                    keeper.check()
                    self._take()
                    self._admit()
                    self._advance()
                self._hand_back_waiting()
                while self._running:
                    keeper.check()
                    self._advance()
        except HandBack:
            log.info("the time to finish is over: unfinished requests are handed back")
        finally:
            self._hand_back()

    # -- queue → waiting ----------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Takes requests that there is room for; waits for one only while there is nothing else to do."""
        idle = not self._running and not self._waiting
        if (not idle and time.monotonic() < self._ask_at_s) or self._room() <= 0:
            return
        found = 0
        try:
            taken = self.queue.take(block_s=TAKE_BLOCK_S if idle else 0.0, max_requests=self._room())
            while taken:
                self._waiting += taken
                found += len(taken)
                if not idle or self._room() <= 0:
                    break
                taken = self.queue.take(block_s=LINGER_S, max_requests=self._room())
            if not found:
                self._ask_at_s = time.monotonic() + POLL_S
        except Unavailable as error:
            self.metrics.count_error("redis_unavailable")
            log.warning("waiting for Redis: %s", error)
            self._ask_at_s = time.monotonic() + AWAY_S
            if idle and not found:
                self.stop.wait(RETRY_S)
        self._waiting.sort(key=_rank)

    def _room(self) -> int:
        """Returns how many more requests may be taken, if they are as large as the largest that is held."""
        held = [*self._waiting, *(running.lease for running in self._running.values())]
        room = self.requests_per_batch - len(held)
        if held and room > 0:
            tokens = self._stream.tokens_held + sum(count_tokens(lease.request) for lease in self._waiting)
            largest = max(count_tokens(lease.request) for lease in held)
            room = min(room, (self.tokens_in_flight - tokens) // largest)
        return room

    # -- waiting → running --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives the engine the requests that it has room for; loads their weights once nothing of others runs."""
        while self._waiting and not self.stop.requested and self._fits(self._waiting[0]):
            version = self._waiting[0].request.policy_version
            loaded = self.engine.policy
            if self._running and (loaded is None or loaded.version != version):
                return
            policy = self._find_policy(version)
            if policy is not None and self._running and not self._is_loaded(policy):
                return  # announced again, with other weights
            if policy is not None and self._load(policy):
                self._add_all(version)
            else:
                self._wait_for_policy(version)

    def _fits(self, lease: Lease) -> bool:
        if not self._running:
            return True
        if self._stream.capacity is not None and len(self._running) >= self._stream.capacity:
            return False
        budget: float = self.tokens_in_flight
        if _is_evaluation(lease) and not all(_is_evaluation(running.lease) for running in self._running.values()):
            budget *= EVALUATION_SHARE
        return self._stream.tokens_held + count_tokens(lease.request) <= budget

    def _add_all(self, version: int) -> None:
        while self._waiting and self._waiting[0].request.policy_version == version and self._fits(self._waiting[0]):
            lease = self._waiting.pop(0)
            # Of one entry there may be two: its lease ran out, and this worker took it over from itself.
            key = f"{lease.entry_id}/{lease.deliveries}"
            self._running[key] = _Running(lease=lease, began_ns=time.time_ns())
            self._use_engine(lambda key=key, lease=lease: self._stream.add(key, lease.request))  # type: ignore[misc]

    def _wait_for_policy(self, version: int) -> None:
        early = [lease for lease in self._waiting if lease.request.policy_version == version]
        self._waiting = [lease for lease in self._waiting if lease.request.policy_version != version]
        for lease in early:
            self._release(lease)
        log.info("%d requests wait for policy version %d, which can't be had yet", len(early), version)
        self._ask_at_s = time.monotonic() + POLICY_POLL_S
        if not self._waiting and not self._running:
            self.stop.wait(POLICY_POLL_S)

    def _load(self, policy: PolicyVersion) -> bool:
        """Loads weights where needed; False when the trainer has withdrawn that version or doesn't answer."""
        if self._is_loaded(policy):
            return True
        try:
            # The keeper renews the leases all the while, as in `_use_engine`.
            with self.metrics.time_load(policy.version), hang_timer.limit_time(self.stuck_after_s):
                self.engine.load_policy(self.fetch(policy))
        except Unavailable as error:  # the trainer is away; another one announces its weights again
            log.warning("%s", error)
            self.stop.wait(RETRY_S)
            return False
        except VaopdError:
            # A trainer withdraws a version before it deletes the snapshot: that is no error of this worker.
            if self._find_policy(policy.version) != policy:
                return False
            raise
        log.info(
            "policy version %d (%s…) is loaded",
            policy.version,
            policy.sha256[:12],
            extra=logs.make_fields(policy_version=policy.version),
        )
        return True

    def _is_loaded(self, policy: PolicyVersion) -> bool:
        loaded = self.engine.policy
        return loaded is not None and (loaded.version, loaded.sha256) == (policy.version, policy.sha256)

    def _find_policy(self, version: int) -> PolicyVersion | None:
        try:
            return self.queue.policy(version)
        except Unavailable as error:
            log.warning("%s", error)
            return None

    # -- running → ended → queue --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if not self._running:
            return
        for key, outcome in self._use_engine(self._stream.step):
            self._settle(self._running.pop(key), outcome)

    def _use_engine(self, call: Callable[[], T]) -> T:
        """Calls the engine. If it fails, the requests in it are suspects; it may be one of them that it failed of."""
        # The keeper renews the leases even while the engine hangs, so no other worker would take them over.
        with self.metrics.time_engine(), hang_timer.limit_time(self.stuck_after_s):
            try:
                return call()
            except Exception:
                self._suspects = {running.lease.entry_id for running in self._running.values()}
                raise

    def _settle(self, running: _Running, outcome: Outcome) -> None:
        lease, group_id, version = running.lease, running.lease.request.group_id, running.lease.request.policy_version
        tracing.record("generate", since_ns=running.began_ns, groups=[group_id], policy_version=version)
        self.metrics.count_outcome(outcome)
        if isinstance(outcome, RolloutGroup):
            self._commit(lease, lambda: self.queue.complete(lease, outcome))
            tokens = sum(len(rollout.response_ids) for rollout in outcome.rollouts)
            fields = logs.make_fields(groups=[group_id], policy_version=version)
            log.info("group %s sampled: %d tokens, %.1f s", group_id, tokens, outcome.generation_s, extra=fields)
        else:
            fields = logs.make_fields(group=group_id)
            log.warning("group %s goes to the dead letters: %s", group_id, outcome, extra=fields)
            self._commit(lease, lambda: self.queue.fail(lease, str(outcome)))

    def _commit(self, lease: Lease, commit: Callable[[], object]) -> None:
        """Commits, and retries while Redis is full or away, until the lease is lost; the keeper renews meanwhile."""
        while True:
            try:
                commit()
                return
            except LeaseLost as error:
                self.metrics.count_error("lease_lost")
                log.warning("%s", error, extra=logs.make_fields(group=lease.request.group_id))
                return
            except Unavailable as error:
                if self.stop.requested:
                    raise
                self.metrics.count_error("redis_unavailable")
                group_id = lease.request.group_id
                log.warning(
                    "group %s is kept until it can be published: %s",
                    group_id,
                    error,
                    extra=logs.make_fields(group=group_id),
                )
                self.stop.wait(RETRY_S)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _hand_back_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for lease in waiting:
            self._release(lease)

    def _release(self, lease: Lease) -> None:
        self._commit(lease, lambda: self.queue.release(lease))

    def _hand_back(self) -> None:
        """Releases all leases but those of the requests that the engine may have failed of.

        Those run out by themselves, so that the delivery counts and a request that kills every engine ends in the dead
        letters.
        """
        self.stop.disarm()
        try:
            for lease in self.queue.held():
                if lease.entry_id not in self._suspects:
                    self.queue.release(lease)
            self.queue.close()
        except Unavailable as error:
            log.warning("leases could not be handed back and will run out by themselves: %s", error)


def _rank(lease: Lease) -> tuple[bool, int]:
    """Training first, since the trainer waits for it; then the lower version."""
    return _is_evaluation(lease), lease.request.policy_version


def _is_evaluation(lease: Lease) -> bool:
    try:
        return GroupId.parse(lease.request.group_id).purpose == "eval"
    except InvalidInput:  # another trainer names its groups otherwise
        return False
