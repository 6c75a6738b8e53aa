"""Checks hosts, origins and API keys, and limits requests per minute. State in this process's memory only."""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import Scope

from vaopd.access.keys import read_bearer
from vaopd.access.quota import WINDOW_S, TokenBuckets
from vaopd_api.connections import HEADER_BYTES, MAX_HEADERS, describe_header_limit
from vaopd_api.problems import ApiError

# Open to all: health for load balancers, and the page, into which its user types the key.
OPEN = ("/", "/docs", "/runs", "/healthz", "/readyz")
OPEN_FOLDER = "/page/"
# Probes and scrapers ask by an address; nothing here is secret or changes anything.
ANY_HOST = ("/healthz", "/readyz", "/metrics")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Routes that count towards the quota, since they take work; a batch counts one request per item.
COUNTED = ("/v1/score", "/v1/score/batch", "/v1/regions", "/v1/sample", "/v1/degrade")

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


class HostNames:
    """Admits requests that name this server, from pages of this server.

    A page of another origin can send requests here from its visitor's browser, and with a name of its own that resolves
    to this address read the answers too (DNS rebinding).
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names`: further hosts, without a port; "*" allows every one."""
        self._names = {*LOOPBACK_NAMES, *map(_spell, names)}

    def check(self, scope: Scope) -> None:
        """Raises ApiError: 421 for another Host, 403 for a page of another origin."""
        if scope["path"] in ANY_HOST:
            return
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        host = _split_host(given[0]) if len(given) == 1 else None
        if host is None or not self._allows(host[0]):
            raise ApiError(
                421,
                f"Host {', '.join(given)[:128]!r} is not this server's name; to allow it, add it to [api] hosts",
            )
        origins = headers.getlist("origin")
        if foreign := [origin for origin in origins if not self._same_origin(origin, host)]:
            raise ApiError(
                403, f"Origin {foreign[0][:128]!r} is another site; requests are taken from this server's pages"
            )
        if not origins and headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            raise ApiError(403, "the request comes from a page of another site")

    def _allows(self, name: str) -> bool:
        return "*" in self._names or name in self._names

    def _same_origin(self, origin: str, host: tuple[str, str]) -> bool:
        scheme, _, rest = origin.partition("://")
        place = _split_host(rest) if scheme in ("http", "https") else None
        if place is None:  # "null", or an extension's
            return False
        # A proxy that adds TLS may drop the port from one of the two, so only names are compared where one has none.
        return place[0] == host[0] and (place[1] == host[1] or "" in (place[1], host[1]))


def _split_host(text: str) -> tuple[str, str] | None:
    """Returns the name in lower case and the port, "" where there is none; None for what is no host.

    >>> _split_host("[::1]:8080"), _split_host("LOCALHOST."), _split_host("a@b")
    (('::1', '8080'), ('localhost', ''), None)
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::(\d{1,5}))?", text)
    return None if match is None else (_spell(match[1] or match[2]), match[3] or "")


def _spell(name: str) -> str:
    """Returns a host's name as all its spellings are compared.

    >>> _spell("Api.Example."), _spell("2001:DB8:0::1")
    ('api.example', '2001:db8::1')
    """
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().removesuffix(".")


class Access:
    """Admits requests. Clients are jobs where `job_of_key` checks keys, else network addresses, without keys."""

    def __init__(
        self, *, hosts: HostNames = HostNames(), job_of_key: JobOfKey | None = None, quota: Quota | None = None
    ) -> None:
        self._hosts = hosts
        self._job_of_key = job_of_key
        self._quota = quota

    def admit(self, scope: Scope) -> None:
        """Notes the request's job and quota in the scope.

        Raises Unauthenticated or Unavailable for the key, ApiError for headers (403, 421, 431) and quota (413, 429).
        """
        path = scope["path"]
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise ApiError(431, describe_header_limit())
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            # Two servers in a row may disagree on where the request ends.
            raise ApiError(
                400, "the request has Content-Length and Transfer-Encoding; send one", headers={"Connection": "close"}
            )
        self._hosts.check(scope)
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
