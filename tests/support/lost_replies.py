"""A TCP relay before a server that can lose one reply: the request gets through, the answer does not."""

from __future__ import annotations

import socket
import socketserver
import threading


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as upstream:
            while request := self.request.recv(1 << 20):
                upstream.sendall(request)
                reply = upstream.recv(1 << 20)
                marker = self.server.marker
                if marker is not None and marker in request:
                    self.server.marker = None
                    return
                self.request.sendall(reply)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    target: tuple[str, int]
    marker: bytes | None = None


class LossyRelay:
    """Relays request-reply exchanges to `port`; `lose_reply_to(b"…")` loses the reply to the next such request."""

    def __init__(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.target = ("127.0.0.1", port)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.server_address[1]}/0"

    def lose_reply_to(self, marker: bytes) -> None:
        self._server.marker = marker

    @property
    def lost(self) -> bool:
        return self._server.marker is None

    def __enter__(self) -> LossyRelay:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
