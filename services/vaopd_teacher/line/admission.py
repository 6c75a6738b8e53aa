"""Limits the waiting groups, of all jobs and of each; a refusal has a retry hint.

A refusal's retry hint is the time in which enough of the backlog will have been scored: of the whole backlog at the
device's measured pace, of one job's part at that job's share of the pace. Runs on the event loop.
"""

from __future__ import annotations

from collections import Counter

from vaopd.config import SharingConfig
from vaopd.errors import QueueFull
from vaopd_teacher.line.scheduler import Scheduler
from vaopd_teacher.rpc.access import Quotas

_UNMEASURED_S = 1.0
_SHORTEST_S, _LONGEST_S = 0.05, 60.0


class Admission:
    """Counts accepted and unanswered groups: `admit` a call's groups, then `release` each when it is answered."""

    def __init__(self, sharing: SharingConfig, scheduler: Scheduler, quotas: Quotas) -> None:
        self._sharing = sharing
        self._scheduler = scheduler
        self._quotas = quotas
        self._waiting: Counter[str] = Counter()
        self.refused = 0
        """Calls that found no room."""

    @property
    def waiting(self) -> int:
        """Accepted and unanswered groups of all jobs."""
        return self._waiting.total()

    @property
    def limit(self) -> int:
        """The most groups of all jobs that may wait."""
        return self._sharing.max_waiting_groups

    def count_waiting_by_job(self) -> dict[str, int]:
        """Returns the accepted and unanswered groups of each job that has some. Thread-safe."""
        return dict(self._waiting)

    def check_any_room(self) -> None:
        """Raises QueueFull when no group of any job fits, before a call is read."""
        self._check(self.waiting, 1, self._sharing.max_waiting_groups, "", of_job=False)

    def admit(self, job: str, groups: int) -> None:
        """Accepts a call's groups. Raises QueueFull or Busy, with a retry hint, when there is no room or quota now.

        A call with more groups than ever fit has been refused before (`max_groups_per_request`).
        """
        self._check(self.waiting, groups, self._sharing.max_waiting_groups, job, of_job=False)
        self._check(self._waiting[job], groups, self._sharing.max_waiting_groups_per_job, job, of_job=True)
        self._quotas.take(job, groups)  # last, since it counts accepted groups only
        self._waiting[job] += groups

    def charge_upload(self, job: str, nbytes: int) -> None:
        """Takes an upload from the job's quota of bytes. Raises Busy, or LimitExceeded for one above the quota."""
        self._quotas.take_image_bytes(job, nbytes)

    def release(self, job: str, groups: int = 1) -> None:
        """Frees the room of groups that are answered or given up."""
        self._waiting[job] -= groups
        if not self._waiting[job]:
            del self._waiting[job]

    def _check(self, waiting: int, groups: int, limit: int, job: str, *, of_job: bool) -> None:
        if (over := waiting + groups - limit) <= 0:
            return
        self.refused += 1
        retry_after_s = min(max(self._estimate_seconds(over, job, of_job=of_job), _SHORTEST_S), _LONGEST_S)
        owner = f" of job {job[:64]!r}" if of_job else ""
        raise QueueFull(
            f"{waiting} groups{owner} wait already, with {groups} more they are over the limit of {limit}; "
            f"try again in {retry_after_s:.2g} s",
            retry_after_s=retry_after_s,
        )

    def _estimate_seconds(self, groups: int, job: str, *, of_job: bool) -> float:
        """Estimates the time until this many groups of the backlog are scored."""
        pace = self._scheduler.seconds_per_token
        history = [self._scheduler.served(job)] if of_job else list(self._scheduler.served_by_job().values())
        served = sum(part.groups for part in history)
        if pace is None or not served:
            return _UNMEASURED_S
        seconds = groups * pace * sum(part.tokens for part in history) / served
        if of_job:
            weights = sum(self._scheduler.weight(other) for other in self._waiting)
            seconds *= weights / self._scheduler.weight(job)
        return seconds
