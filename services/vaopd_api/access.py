"""Who may ask, and how often: API keys and a quota of requests per minute. State in memory, of this process only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Scope

from vaopd.access.keys import bearer
from vaopd_api.problems import ApiError

# Load balancers ask for health, and the page has to be there before its user can type a key into it.
OPEN = ("/", "/docs", "/runs", "/healthz", "/readyz")
OPEN_FOLDER = "/page/"
# Routes that cost the teacher, the student or this process work; a batch costs one request per item.
COUNTED = ("/v1/score", "/v1/score/batch", "/v1/sample", "/v1/degrade")
WINDOW_S = 60.0
MAX_CLIENTS = 10_000

JobOfKey = Callable[[str], str]
"""The job that a key belongs to; raises Unauthenticated (`vaopd.access.keys.KeyStore.job_of`)."""


class Quota:
    """A token bucket per client: `per_minute` requests at once, refilled evenly over a minute."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> (requests left, when that was so)

    def take(self, client: str, requests: int = 1) -> dict[str, str]:
        """The headers that tell what is left; raises 429 with Retry-After where there is too little."""
        now = self._clock()
        left, since = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / WINDOW_S)
        enough = left >= requests
        self._buckets[client] = (left - requests if enough else left, now)
        while len(self._buckets) > MAX_CLIENTS:
            del self._buckets[next(iter(self._buckets))]  # the one that has been silent for longest
        headers = self._headers(self._buckets[client][0])
        if enough:
            return headers
        if requests > self.per_minute:
            raise ApiError(
                413, f"{requests} requests at once, the quota is {self.per_minute} a minute; send a smaller batch"
            )
        wait_s = math.ceil((requests - left) * WINDOW_S / self.per_minute)
        raise ApiError(
            429,
            f"the quota of {self.per_minute} requests a minute is used up; try again in {wait_s} s",
            headers={**headers, "Retry-After": str(wait_s)},
        )

    def _headers(self, left: float) -> dict[str, str]:
        return {
            "RateLimit-Limit": str(self.per_minute),
            "RateLimit-Remaining": str(math.floor(left)),
            "RateLimit-Reset": str(math.ceil((self.per_minute - left) * WINDOW_S / self.per_minute)),
        }


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
