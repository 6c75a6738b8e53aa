"""Who may ask, and how often: API keys and a quota of requests per minute. State in memory, of this process only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Scope

from vaopd.access.keys import bearer
from vaopd.access.quota import WINDOW_S, TokenBuckets
from vaopd_api.problems import ApiError

# Load balancers ask for health, and the page has to be there before its user can type a key into it.
OPEN = ("/", "/docs", "/runs", "/healthz", "/readyz")
OPEN_FOLDER = "/page/"
# Routes that cost the teacher, the student or this process work; a batch costs one request per item.
COUNTED = ("/v1/score", "/v1/score/batch", "/v1/sample", "/v1/degrade")

JobOfKey = Callable[[str], str]
"""The job that a key belongs to; raises Unauthenticated (`vaopd.access.keys.KeyStore.job_of`)."""


class Quota:
    """Limits each client to `per_minute` requests, and tells in headers what is left."""

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
    """Without `job_of_key` everybody may ask, and a client is an address; with it, a client is a job."""

    def __init__(self, *, job_of_key: JobOfKey | None = None, quota: Quota | None = None) -> None:
        self._job_of_key = job_of_key
        self._quota = quota

    def admit(self, scope: Scope) -> None:
        """Notes the job and what is left of its quota in the scope. Raises what refuses the request."""
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return
        if self._job_of_key is not None:
            scope["job"] = self._job_of_key(bearer(Headers(scope=scope).get("authorization")))
        if path in COUNTED:
            self.charge(scope)

    def charge(self, scope: Scope, requests: int = 1) -> None:
        if self._quota is not None and requests:
            client = scope.get("job") or (scope.get("client") or ("",))[0]
            scope["rate_limit"] = self._quota.take(client, requests)
