"""Checks API keys, and limits requests per minute. State in this process's memory only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Scope

from vaopd.access.keys import read_bearer
from vaopd.access.quota import WINDOW_S, TokenBuckets
from vaopd_api.problems import ApiError

# Open to all: health for load balancers, and the page, into which its user types the key.
OPEN = ("/", "/docs", "/runs", "/healthz", "/readyz")
OPEN_FOLDER = "/page/"
# Routes that count towards the quota, since they take work; a batch counts one request per item.
COUNTED = ("/v1/score", "/v1/score/batch", "/v1/sample", "/v1/degrade")

JobOfKey = Callable[[str], str]
"""Returns the job that a key belongs to, or raises Unauthenticated (`vaopd.access.keys.KeyStore.find_job`)."""


class Quota:
    """Limits each client to `per_minute` requests, and reports in headers how many are left."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._buckets = TokenBuckets(clock=clock)

    def take(self, client: str, requests: int = 1) -> dict[str, str]:
        """Returns the `RateLimit-*` headers. Raises ApiError: 429 with Retry-After, or 413 for more than fits ever."""
        if requests > self.per_minute:
            raise ApiError(
                413, f"{requests} requests at once, the quota is {self.per_minute} a minute; send a smaller batch"
            )
        balance = self._buckets.take(client, requests, per_minute=self.per_minute)
        headers = {
            "RateLimit-Limit": str(self.per_minute),
            "RateLimit-Remaining": str(math.floor(balance.left)),
            "RateLimit-Reset": str(math.ceil((self.per_minute - balance.left) * WINDOW_S / self.per_minute)),
        }
        if balance.wait_s:
            wait_s = math.ceil(balance.wait_s)
            raise ApiError(
                429,
                f"the quota of {self.per_minute} requests a minute is used up; try again in {wait_s} s",
                headers={**headers, "Retry-After": str(wait_s)},
            )
        return headers


class Access:
    """Admits requests. Clients are jobs where `job_of_key` checks keys, else network addresses, without keys."""

    def __init__(self, *, job_of_key: JobOfKey | None = None, quota: Quota | None = None) -> None:
        self._job_of_key = job_of_key
        self._quota = quota

    def admit(self, scope: Scope) -> None:
        """Notes the request's job and quota in the scope.

        Raises Unauthenticated or Unavailable for the key, and ApiError (413, 429) for the quota.
        """
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return
        if self._job_of_key is not None:
            scope["job"] = self._job_of_key(read_bearer(Headers(scope=scope).get("authorization")))
        if path in COUNTED:
            self.charge(scope)

    def charge(self, scope: Scope, requests: int = 1) -> None:
        """Takes `requests` from the client's quota. Raises ApiError: 413 or 429."""
        if self._quota is not None and requests:
            client = scope.get("job") or (scope.get("client") or ("",))[0]
            scope["rate_limit"] = self._quota.take(client, requests)
