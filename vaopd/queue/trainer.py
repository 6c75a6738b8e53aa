"""The trainer's end of the queue, in Redis: one process per job, which holds the job's lease.

In: finished groups. Out: requests and policy versions. Waits for: a group. A group stays in Redis until `acknowledge`,
which is called only once a checkpoint that contains its effect is durable; until then a resumed trainer gets it again.
Each write is fenced: once another trainer has taken the job, this one is refused (LeaseLost), even when it still runs.
A lease that ran out because Redis or the process stood still is taken again if no other trainer had the job meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from vaopd.errors import InvalidInput, LeaseLost, Mismatch
from vaopd.queue import scripts
from vaopd.queue.connection import BLOCK_SLICE_S, Connection, GroupMissing, check_key, check_name, make_dedupe_key
from vaopd.queue.dead_letters import encode_letter, read_letters
from vaopd.queue.keeper import LeaseKeeper
from vaopd.queue.protocol import DeadLetter, Delivered, TrainerEnd
from vaopd.types import PolicyVersion, RolloutGroup, RolloutRequest
from vaopd.wire.queue import policy_version_to_bytes, rollout_group_from_bytes, rollout_request_to_bytes

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def make_owner() -> str:
    """Returns a token that no other process has."""
    return f"{check_name('host name', socket.gethostname())}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class TrainerQueue(TrainerEnd):
    """Keeps the promises of `TrainerEnd` with Redis. Call `acquire` first.

    While Redis does not answer, every method retries for `patience_s` and then raises Unavailable.
    """

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
        """owner: unique to the process; made so by default. max_deliveries: of a group, before it is a dead letter."""
        self.owner = check_name("owner", owner) if owner else make_owner()
        if not 0 < lease_s <= 3600:
            raise InvalidInput(f"lease_s is {lease_s:g}; it must be above 0 and at most 3600")
        self.lease_s = lease_s
        self.max_deliveries = max_deliveries
        self._connection = Connection(url=url, job=job, patience_s=patience_s)
        self._epoch = ""
        self._last_id = "0"  # of the last group that was delivered to this object

    # -- the job's lease ----------------------------------------------------------------------------------------------

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Takes the job, and creates its streams where Redis has none."""
        deadline = time.monotonic() + wait_s
        while True:
            epoch = self._connection.join()
            held = scripts.acquire(self._connection.run, self.owner, self._lease_ms)
            if held is None:
                break
            holder, ms = held
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise LeaseLost(
                    f"job {self._connection.job!r} is held by trainer {holder!r} for another {ms / 1000:.1f} s at "
                    "least; stop that trainer, wait until its lease has run out, or choose another job name"
                )
            time.sleep(min(0.1, remaining_s))
        if epoch != self._epoch:
            self._epoch, self._last_id = epoch, "0"

    def renew(self) -> None:
        """Extends the job's lease; while Redis is away, waits for a third of the lease at most."""
        patience_s = min(self._connection.patience_s, self.lease_s / 3)
        self._run_with(partial(self._connection.run, patience_s=patience_s), scripts.renew_job, self._lease_ms)

    def keeper(self) -> LeaseKeeper:
        """Renews the job's lease while its `with` block runs."""
        return LeaseKeeper(renew=self.renew, every_s=self.lease_s / 3)

    def release(self) -> None:
        """Gives the job up, and takes back the deliveries of groups that were not acknowledged."""
        self._run(scripts.release_job, self._last_id)

    # -- requests, groups, policies -----------------------------------------------------------------------------------

    def enqueue(self, request: RolloutRequest) -> bool:
        """Publishes a request, unless its dedupe key has a record."""
        key = make_dedupe_key(request.group_id, request.policy_version)
        return self._run(scripts.enqueue, key, rollout_request_to_bytes(request))

    def unpublished(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """Returns the requests without a record of their dedupe key."""
        if not requests:
            return []
        connection = self._connection
        keys = [make_dedupe_key(request.group_id, request.policy_version) for request in requests]
        found = connection.call(lambda: connection.redis.hmget(connection.key["seen:requests"], keys))
        return [request for request, record in zip(requests, found, strict=True) if record is None]

    def requests_in_flight(self) -> int:
        """Returns the length of the stream of requests: those that wait and those that are worked on."""
        connection = self._connection
        return connection.call(lambda: connection.redis.xlen(connection.key["requests"]))

    def collect(self, *, block_s: float, max_groups: int = 64) -> list[Delivered]:
        """Delivers groups beyond the last one; after a restart, from the first that was not acknowledged."""
        deadline = time.monotonic() + block_s
        while True:
            entries, last_delivered = self._run(scripts.collect, self._last_id, max_groups)
            delivered = self._parse(entries)
            remaining_s = deadline - time.monotonic()
            if delivered or remaining_s <= 0:
                return delivered
            if not entries:
                self._wait_for_group(last_delivered, min(BLOCK_SLICE_S, remaining_s))

    def acknowledge(self, entry_ids: Iterable[str]) -> int:
        """Removes groups from the stream; their records stay until `forget`, so that a late duplicate is refused."""
        ids = list(entry_ids)
        return self._run(scripts.acknowledge, *ids) if ids else 0

    def dead_letter(self, entry_id: str, reason: str) -> None:
        """Moves a collected group to the dead letters."""
        found = self._connection.read_entry("groups", entry_id)
        if found is not None:
            self._bury(entry_id, reason, deliveries=1, key=found[0], body=found[1])

    def ask_again(self, entry_id: str, group: RolloutGroup, request: RolloutRequest) -> None:
        """Trades a group for its request, in one commit."""
        group_key, request_key = (make_dedupe_key(item.group_id, item.policy_version) for item in (group, request))
        self._run(scripts.ask_again, entry_id, group_key, request_key, rollout_request_to_bytes(request))

    def dead_letters(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Returns up to `limit` letters beyond the letter `after`, the oldest first."""
        return read_letters(self._connection, after=after, limit=limit)

    def publish_policy(self, policy: PolicyVersion) -> None:
        """Announces a snapshot as the latest."""
        self._run(scripts.publish_policy, policy.version, policy_version_to_bytes(policy))

    def policy(self, version: int) -> PolicyVersion | None:
        """Returns a published snapshot."""
        return self._connection.policy(version)

    def forget(self, before_version: int) -> int:
        """Drops records of requests and groups, and policies, of earlier versions."""
        return self._run(scripts.forget, before_version)

    def workers_alive(self) -> list[str]:
        """Returns the workers that renewed in the last half minute, by Redis's clock."""
        return scripts.workers_alive(self._connection.run)

    def purge(self) -> None:
        """Removes every key of the job, its lease too; `acquire` begins a new one."""
        self._run(scripts.purge)

    def close(self) -> None:
        """Closes the connections; the job's lease runs out by itself."""
        self._connection.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _lease_ms(self) -> int:
        return int(1000 * self.lease_s)

    def _run(
        self, script: Callable[Concatenate[scripts.Run, scripts.Fence, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a fenced script; raises Mismatch or LeaseLost when it refuses."""
        return self._run_with(self._connection.run, script, *args, **kwargs)

    def _run_with(
        self,
        run: scripts.Run,
        script: Callable[Concatenate[scripts.Run, scripts.Fence, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        fence = scripts.Fence(self._epoch, self.owner)
        try:
            try:
                return script(run, fence, *args, **kwargs)
            except scripts.JobLost:  # nothing was done
                scripts.retake_job(run, fence, self._lease_ms)
                log.warning(
                    "job %r is taken again: its lease of %g s ran out, and no other trainer had it meanwhile",
                    self._connection.job,
                    self.lease_s,
                )
                return script(run, fence, *args, **kwargs)
        except (scripts.EpochGone, GroupMissing):
            raise self._make_empty_error() from None
        except scripts.JobLost as lost:
            now = f"trainer {lost.holder!r} holds it" if lost.holder else "another one had it since"
            raise LeaseLost(
                f"trainer {self.owner!r} lost job {self._connection.job!r}: its lease was not renewed for "
                f"{self.lease_s:g} s and {now}; nothing was committed. Resume from the last checkpoint"
            ) from None

    def _make_empty_error(self) -> Mismatch:
        return Mismatch(
            f"Redis at {self._connection.where} is not the one that job {self._connection.job!r} began with (epoch "
            f"{self._epoch or 'none'} or a stream is gone: it came back empty, keys were removed, or acquire() was not "
            "called); acquire() again and enqueue what is in flight again"
        )

    def _parse(self, entries: Iterable[scripts.Entry]) -> list[Delivered]:
        """Returns the groups in the entries; moves those that can't be used to the dead letters."""
        delivered = []
        last_id = self._last_id
        for entry_id, deliveries, key, body in entries:
            last_id = entry_id
            if deliveries > self.max_deliveries:
                # This reading counted as a delivery, though no trainer worked on it.
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
        letter = encode_letter(stream="groups", reason=reason, deliveries=deliveries, body=body)
        self._run(scripts.bury_group, entry_id, key, letter)

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
            raise self._make_empty_error() from None
