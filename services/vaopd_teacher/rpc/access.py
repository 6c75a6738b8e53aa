"""Checks that a caller may call the teacher for a job, and limits each job's groups in a minute."""

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
    """Identifies callers by their API keys. Without keys, every call is allowed, for the job that it names."""

    def __init__(self, store: KeyStore | None = None) -> None:
        self._store = store

    def identify(self, metadata: Iterable[tuple[str, Any]] | None) -> str | None:
        """Returns the job of the call's key, None without keys. Raises Unauthenticated."""
        if self._store is None:
            return None
        header = next((value for name, value in metadata or () if name == "authorization"), None)
        return self._store.find_job(keys.read_bearer(header))

    def check_job(self, caller: str | None, request: Any) -> None:
        """Raises PermissionDenied for a request that names another job; one that names none gets the caller's."""
        if caller is None or not hasattr(request, "job"):
            return
        if request.job not in ("", caller):
            # The message doesn't reveal whether the other job exists.
            raise PermissionDenied(
                f"the API key is not for job {request.job[:64]!r}; use that job's key, or leave the job's name out"
            )
        request.job = caller


class Quotas:
    """Limits each job to its groups, and the bytes of its images, in a minute."""

    def __init__(self, config: QuotasConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._buckets = TokenBuckets(clock=clock)
        self._image_buckets = TokenBuckets(clock=clock)

    def take(self, job: str, groups: int) -> None:
        """Takes groups from the job's quota. Raises Busy if it is used up, LimitExceeded beyond its size."""
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

    def take_image_bytes(self, job: str, nbytes: int) -> None:
        """Takes an upload from the job's quota. Raises as `take`."""
        quota = self._config.image_bytes_per_minute
        if quota is None:
            return
        if nbytes > quota:
            raise LimitExceeded(
                f"an image of {nbytes} bytes is above the job's quota of {quota} in a minute; send a smaller encoding"
            )
        if wait_s := self._image_buckets.take(job, nbytes, per_minute=quota).wait_s:
            raise Busy(
                f"an image of {nbytes} bytes is more than what is left of the job's quota of {quota} in a minute; "
                f"try again in {wait_s:.2g} s",
                wait_s,
            )
