"""Middleware around every request, from the outside in: `Envelope`, `Gate`, `BodyLimit`. Plain ASGI.

`Envelope` sets the request's id and the reply's headers, and writes the log's line; `Gate` checks keys and quotas;
`BodyLimit` refuses large bodies, and JSON of too many values, before they are parsed.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vaopd.telemetry import logs, tracing
from vaopd.telemetry.logs import REQUEST_ID
from vaopd_api import problems
from vaopd_api.access import Access
from vaopd_api.metrics import Metrics
from vaopd_api.problems import ApiError

logger = logging.getLogger("vaopd.api")

# The viewer needs its own files, its own API and the user's images; nothing else may be loaded or run.
NO_FRAMES = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    f"{NO_FRAMES}"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
LARGE_BODIES, SMALL_BYTES = 8, 2**20
"""Bodies of the largest size that there is room for at once; what each request has beyond SMALL_BYTES takes of it."""
MAX_JSON_VALUES, MAX_JSON_KEYS = 2**20, 2**17
"""Of a body, by its commas and colons, those in texts too. Parsing that many holds up all requests for 0.2 s."""
MANY_VALUES = (
    f"the body has more than {MAX_JSON_VALUES} values or {MAX_JSON_KEYS} keys, counted by its commas and colons; "
    "send fewer or shorter responses, or split the batch"
)
QUIET = ("/healthz", "/readyz", "/metrics")  # requested every few seconds; not logged while they succeed


class Envelope:
    """Gives each request an id, a span, metrics and a log line, and each reply its headers."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request, with a problem where the application raises an unexpected error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = logs.request_id.set(name)
        parent = tracing.read_parent(_read_headers(scope))
        traced = tracing.begin(f"HTTP {scope['method']}", parent=parent, path=scope["path"])
        started, status = time.monotonic(), 0

        async def with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["X-Request-Id"] = name
                headers.update(scope.get("rate_limit", {}))
                for key, value in SECURITY_HEADERS.items():
                    headers.setdefault(key, value)
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, with_headers)
        except Exception as error:
            if status:
                raise  # part of the reply is sent, so the connection has to be closed
            await problems.make_error_response(error)(scope, receive, with_headers)
        finally:
            self._record(scope, name, status, time.monotonic() - started)
            traced()
            logs.request_id.reset(token)

    def _record(self, scope: Scope, name: str, status: int, elapsed_s: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.duration.labels(method, route).observe(elapsed_s)
        if status != 200 or route not in QUIET:
            job = scope.get("job") or "-"
            values = (name, method, route, status, job, elapsed_s)
            logger.info("request %s: %s %s %d, job %s, %.3f s", *values, extra=logs.make_fields(job=scope.get("job")))


def _read_headers(scope: Scope) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]


class Gate:
    """Admits a request, or answers with the problem of its key or quota."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request, or refuses it."""
        if scope["type"] == "http":
            try:
                self._access.admit(scope)
            except Exception as error:
                await problems.make_error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body above the limits, by its declared length or while it arrives."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = int(Headers(scope=scope).get("content-length", "0"))  # the HTTP server refuses what isn't a number
        if declared > self._max_bytes:
            error = ApiError(413, self._describe_limit(declared), headers={"Connection": "close"})
            await problems.make_error_response(error)(scope, receive, send)
            return
        received = values = keys = held = 0
        is_json = not Headers(scope=scope).get("content-type", "").strip().lower().startswith("multipart/")

        async def receive_counted() -> Message:
            nonlocal received, values, keys, held
            message = await receive()
            part = message.get("body", b"")
            received += len(part)
            if received > self._max_bytes:
                raise ApiError(413, self._describe_limit(received))
            more = max(received - SMALL_BYTES - held, 0)
            if self._held + more > LARGE_BODIES * self._max_bytes:
                raise ApiError(
                    503, f"the bodies of other requests take {self._held} bytes; try again later, or send a smaller one"
                )
            self._held, held = self._held + more, held + more
            if is_json:
                values, keys = values + part.count(b","), keys + part.count(b":")
                if values > MAX_JSON_VALUES or keys > MAX_JSON_KEYS:
                    raise ApiError(413, MANY_VALUES)
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._held -= held

    def _describe_limit(self, size: int) -> str:
        return f"the body has {size} bytes or more, the limit is {self._max_bytes}; send fewer or smaller images"
