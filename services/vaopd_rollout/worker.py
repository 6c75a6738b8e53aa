"""The rollout worker's loop.

    in            requests from the queue, under leases that a keeper thread renews
    out           one finished group per request; a request that can't be answered becomes a dead letter
    waits for     a request; then for the snapshot that the request names, if it isn't announced yet
    unblocked by  the trainer, which enqueues requests and announces policy versions

After SIGTERM the batch in progress has `drain_s`; requests that aren't finished then are handed back.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from vaopd.errors import LeaseLost, Unavailable, VaopdError
from vaopd.process import hang_timer
from vaopd.queue import Lease, WorkerEnd
from vaopd.sampling.engine import RolloutEngine
from vaopd.telemetry import logs, tracing
from vaopd.types import PolicyVersion, RolloutGroup
from vaopd_rollout.metrics import WorkerMetrics

log = logging.getLogger(__name__)

TAKE_BLOCK_S = 1.0
# A trainer enqueues a step's requests one by one: a batch of the first alone would keep the others waiting.
LINGER_S = 0.05
RETRY_S = 1.0
POLICY_POLL_S = 0.1
STUCK_AFTER_S = 1800.0


class HandBack(BaseException):
    """Stops in the middle of a batch. Not an Exception, so that no `except Exception` swallows it."""


class Stop:
    """Asks the worker to stop on SIGTERM or SIGINT, and forces it `drain_s` later or at a second signal."""

    def __init__(self, *, drain_s: float) -> None:
        """drain_s: how long the batch in progress may take after the first signal."""
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
            log.info("asked to stop: the batch in progress has %g s, a second signal ends it at once", self._drain_s)
            self.request()
            signal.setitimer(signal.ITIMER_REAL, self._drain_s)

    def _on_deadline(self, number: int, frame: FrameType | None) -> None:
        if not self._disarmed:
            raise HandBack


class RolloutWorker:
    """Serves one job's queue with one engine until `stop` is requested."""

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        queue: WorkerEnd,
        requests_per_batch: int,
        stop: Stop,
        metrics: WorkerMetrics | None = None,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        """stuck_after_s: an engine that takes longer for a batch hangs; the process ends, and its leases run out."""
        self._engine = engine
        self._queue = queue
        self._requests_per_batch = requests_per_batch
        self._stop = stop
        self._metrics = metrics or WorkerMetrics(job="")
        self._stuck_after_s = stuck_after_s
        self._generating: list[Lease] = []

    def run(self) -> None:
        """Serves the queue until a stop is requested. Raises the engine's errors: restart the process then."""
        log.info("rollout worker %s ready", self._queue.worker)
        try:
            with self._queue.keeper() as keeper:
                while not self._stop.requested:
                    keeper.check()
                    self._serve(self._take())
        except HandBack:
            log.info("the time to finish is over: unfinished requests are handed back")
            self._generating = []
        finally:
            self._hand_back()

    def _take(self) -> list[Lease]:
        try:
            leases = self._queue.take(block_s=TAKE_BLOCK_S, max_requests=self._requests_per_batch)
            while leases and (room := self._requests_per_batch - len(leases)):
                more = self._queue.take(block_s=LINGER_S, max_requests=room)
                if not more:
                    break
                leases += more
            return leases
        except Unavailable as error:
            self._metrics.count_error("redis_unavailable")
            log.warning("%s", error)
            self._stop.wait(RETRY_S)
            return []

    def _serve(self, leases: Sequence[Lease]) -> None:
        by_version: dict[int, list[Lease]] = {}
        for lease in leases:
            by_version.setdefault(lease.request.policy_version, []).append(lease)
        waiting = 0
        for version, batch in sorted(by_version.items()):
            if self._stop.requested or not self._load(version):
                waiting += len(batch)
                for lease in batch:
                    self._commit(lease, lambda lease=lease: self._queue.release(lease))  # type: ignore[misc]
            else:
                self._answer(batch)
        if waiting and not self._stop.requested:
            log.info("%d requests wait for a policy version that is not announced", waiting)
            self._stop.wait(POLICY_POLL_S)

    def _load(self, version: int) -> bool:
        """Loads the weights of `version` where needed; False when that version isn't announced."""
        policy = self._find_policy(version)
        if policy is None:
            return False
        loaded = self._engine.policy
        if loaded is not None and (loaded.version, loaded.sha256) == (policy.version, policy.sha256):
            return True
        try:
            with self._metrics.time_load(version):
                self._engine.load_policy(policy)
        except VaopdError:
            # A trainer withdraws a version before it deletes the snapshot: that is no error of this worker.
            if self._find_policy(version) != policy:
                return False
            raise
        log.info(
            "policy version %d (%s…) is loaded",
            policy.version,
            policy.sha256[:12],
            extra=logs.make_fields(policy_version=policy.version),
        )
        return True

    def _find_policy(self, version: int) -> PolicyVersion | None:
        try:
            return self._queue.policy(version)
        except Unavailable as error:
            log.warning("%s", error)
            return None

    def _answer(self, batch: list[Lease]) -> None:
        self._generating = batch
        ids = [lease.request.group_id for lease in batch]
        version = batch[0].request.policy_version
        with (
            tracing.span("generate", groups=ids, policy_version=version),
            self._metrics.time_batch(),
            # The keeper renews the leases even while the engine hangs, so no other worker would take them over.
            hang_timer.limit_time(self._stuck_after_s),
        ):
            outcomes = self._engine.generate([lease.request for lease in batch])
        self._generating = []
        self._metrics.count_outcomes(outcomes)
        for lease, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, RolloutGroup):
                self._commit(lease, lambda lease=lease, group=outcome: self._queue.complete(lease, group))  # type: ignore[misc]
            else:
                group_id = lease.request.group_id
                log.warning(
                    "group %s goes to the dead letters: %s", group_id, outcome, extra=logs.make_fields(group=group_id)
                )
                self._commit(lease, lambda lease=lease, reason=str(outcome): self._queue.fail(lease, reason))  # type: ignore[misc]
        groups = [outcome for outcome in outcomes if isinstance(outcome, RolloutGroup)]
        tokens = sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
        log.info(
            "%d of %d groups sampled, %d tokens",
            len(groups),
            len(batch),
            tokens,
            extra=logs.make_fields(groups=ids, policy_version=version),
        )

    def _commit(self, lease: Lease, commit: Callable[[], object]) -> None:
        """Commits, and retries while Redis is full or away, until the lease is lost; the keeper renews meanwhile."""
        while True:
            try:
                commit()
                return
            except LeaseLost as error:
                self._metrics.count_error("lease_lost")
                log.warning("%s", error, extra=logs.make_fields(group=lease.request.group_id))
                return
            except Unavailable as error:
                if self._stop.requested:
                    raise
                self._metrics.count_error("redis_unavailable")
                group_id = lease.request.group_id
                log.warning(
                    "group %s is kept until it can be published: %s",
                    group_id,
                    error,
                    extra=logs.make_fields(group=group_id),
                )
                self._stop.wait(RETRY_S)

    def _hand_back(self) -> None:
        """Releases all leases but those of the batch that the engine may have died of.

        Those run out by themselves, so that the delivery counts and a request that kills every engine ends in the dead
        letters.
        """
        self._stop.disarm()
        suspects = {lease.entry_id for lease in self._generating}
        try:
            for lease in self._queue.held():
                if lease.entry_id not in suspects:
                    self._queue.release(lease)
            self._queue.close()
        except Unavailable as error:
            log.warning("leases could not be handed back and will run out by themselves: %s", error)
