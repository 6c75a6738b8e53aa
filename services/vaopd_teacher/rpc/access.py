"""Who may call the teacher, for which job, and how much of it in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from vaopd.access import keys
from vaopd.access.keys import KeyStore
from vaopd.access.quota import TokenBuckets
from vaopd.config import QuotasConfig
from vaopd.errors import Busy, LimitExceeded, PermissionDenied


class Access:
    """Without keys everybody may call, and a job's name is whatever the request says."""

    def __init__(self, store: KeyStore | None = None) -> None:
        self._store = store

    def caller(self, metadata: Iterable[tuple[str, Any]] | None) -> str | None:
        """The job that the call's key belongs to, None without keys. Raises Unauthenticated."""
        if self._store is None:
            return None
        header = next((value for name, value in metadata or () if name == "authorization"), None)
        return self._store.job_of(keys.bearer(header))

    def check_job(self, caller: str | None, request: Any) -> None:
        """Raises PermissionDenied for a request in another job's name; one that names none gets the caller's."""
        if caller is None or not hasattr(request, "job"):
            return
        if request.job not in ("", caller):
            # Whether there is such a job is not told.
            raise PermissionDenied(
                f"the API key is not for job {request.job[:64]!r}; use that job's key, or leave the job's name out"
            )
        request.job = caller


class Quotas:
    """Limits each job to its groups in a minute."""

    def __init__(self, config: QuotasConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._buckets = TokenBuckets(clock=clock)

    def take(self, job: str, groups: int) -> None:
        """Raises Busy when the job has used up its quota, LimitExceeded for more groups than it ever holds."""
        quota = self._config.jobs.get(job, self._config.groups_per_minute)
        if quota is None:
            return
        if groups > quota:
            raise LimitExceeded(f"{groups} groups in one call, the job's quota is {quota} in a minute; split the call")
        if wait_s := self._buckets.take(job, groups, per_minute=quota).wait_s:
            raise Busy(
                f"{groups} groups are more than what is left of the job's quota of {quota} in a minute; "
                f"try again in {wait_s:.2g} s",
                wait_s,
            )
