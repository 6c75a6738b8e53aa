"""Bounds what a connection may cost before its request has arrived: bytes of headers, time, connections per address.

uvicorn's h11 protocol is used on purpose: its other parser, httptools, has no limit on headers. Keys, quotas and the
body's limit apply later, once the headers are read (`vaopd_api.middleware`).
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vaopd.config import ConnectionsConfig
from vaopd.net.ports import OWN_FILES, count_open_files
from vaopd.telemetry import logs
from vaopd_api import problems
from vaopd_api.problems import ApiError

HEADER_BYTES = 16 * 1024
"""The request line and all headers together."""
MAX_HEADERS = 100
WINDOW_S = 10.0
MIN_BYTES_PER_S = 16 * 1024
"""A request has to arrive at this rate, counted in each window by itself; in the first one it may end."""
STALLED_S = 60.0
"""A client that takes none of its reply for so long is disconnected."""
FREE_CHUNKS, CHUNK_BYTES = 4096, 256
"""A body may have so many chunks of any size, and one more for so many bytes; to read one takes 9 µs."""


def describe_header_limit() -> str:
    """Returns the detail of a 431."""
    return f"the limits are {MAX_HEADERS} headers and {HEADER_BYTES} bytes of them; send fewer or shorter ones"


class _Connection(h11.Connection):
    """Also refuses a body of very many small chunks: a million of one byte held up the event loop for 9 s."""

    def __init__(self, *, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._chunks = self._size = 0

    @property
    def has_too_many_chunks(self) -> bool:
        """Whether the body's chunks are too small."""
        return self._chunks > FREE_CHUNKS + self._size // CHUNK_BYTES

    def start_next_cycle(self) -> None:
        """Prepares for the next request."""
        super().start_next_cycle()
        self._chunks = self._size = 0

    def next_event(self) -> Any:
        """Returns the next part of a request. Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks, self._size = self._chunks + 1, self._size + len(event.data)
            if self.has_too_many_chunks:
                raise h11.RemoteProtocolError("chunks")
        return event


class BoundedProtocol(H11Protocol):
    """One connection of the server. `limits` is set on the subclass that `bind` makes."""

    limits = ConnectionsConfig()

    @classmethod
    def bind(cls, limits: ConnectionsConfig) -> type[BoundedProtocol]:
        """Returns the class with other limits, since uvicorn makes the instances."""
        return type("BoundedProtocol", (cls,), {"limits": limits})

    def __init__(self, *args: Any, **options: Any) -> None:
        """Raises ConnectionRefusedError, by which asyncio drops the connection, when too many handshakes don't end."""
        super().__init__(*args, **options)
        # Of a handshake that fails asyncio says nothing, so they are counted by what is open: as many as connections.
        if self.config.is_ssl and count_open_files() > 2 * self.limits.total + OWN_FILES:
            raise ConnectionRefusedError(f"{self.limits.total} TLS handshakes are in progress, the limit")
        self.conn: _Connection = _Connection(max_incomplete_event_size=HEADER_BYTES)
        self._received = 0  # bytes of the request in this window
        self._in_headers = True
        self._arriving = False
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts the connection, or answers with 503 beyond the limits."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        others = (getattr(other, "client", None) for other in self.connections)
        same = sum(other is not None and other[0] == address for other in others)
        if len(self.connections) > self.limits.total:
            self._refuse(503, f"the server has {self.limits.total} open connections, its limit; try again later")
        elif same > self.limits.per_address and address not in self.limits.proxies:
            self._refuse(
                503, f"{self.limits.per_address} connections are open from this address, the limit; reuse or close some"
            )
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if not self._arriving and self.conn.their_state is h11.IDLE:
            self._expect_request()
        self._received += len(data)
        self._in_headers = self.conn.their_state is h11.IDLE
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops the timers."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for the client to read, but not for ever."""
        super().pause_writing()
        self._stall = self._stall or self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Notes that the client reads."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers a malformed request, or one with too many headers, in the API's one form of errors."""
        if self.conn.has_too_many_chunks:
            self._refuse(
                400, f"the body has over {FREE_CHUNKS} chunks, of less than {CHUNK_BYTES} bytes each; send larger ones"
            )
        elif self._in_headers and self._received > HEADER_BYTES:
            self._refuse(431, describe_header_limit())
        else:
            self._refuse(400, "the request is not valid HTTP/1.1")

    def _expect_request(self) -> None:
        self._stop_waiting()
        self._arriving, self._received = True, 0
        self._arrival = self.loop.call_later(WINDOW_S, self._check_arrival)

    def _stop_waiting(self) -> None:
        self._arriving = False
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _check_arrival(self) -> None:
        """Ends a connection whose request arrives too slowly. Time in which we don't read isn't the client's."""
        if self.flow.read_paused or self._received >= WINDOW_S * MIN_BYTES_PER_S:
            self._expect_request()
        else:
            self._refuse(408, f"the request did not arrive at {MIN_BYTES_PER_S} bytes/s; send it faster")

    def _refuse(self, status: int, detail: str) -> None:
        """Answers with a problem, if no answer has begun, and closes the connection."""
        self._stop_waiting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            name = uuid.uuid4().hex
            token = logs.request_id.set(name)
            response = problems.make_error_response(ApiError(status, detail))
            logs.request_id.reset(token)
            headers = [*response.raw_headers, (b"x-request-id", name.encode()), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the application must not answer too
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
