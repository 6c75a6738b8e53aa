"""A TCP proxy before Redis that can be slow, cut connections, and lose replies. A process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from multiprocessing.connection import Connection
from typing import Literal

from vaopd.net.ports import LOOPBACK as HOST

Order = tuple[Literal["latency", "cut", "lose"], float]
"""latency: seconds added each way from now on; cut: no connection for that long; lose: that many replies to come."""


class Proxy:
    def __init__(self, *, target_port: int) -> None:
        self._target_port = target_port
        self._latency_s = 0.0
        self._cut_until = 0.0
        self._replies_to_lose = 0
        self._writers: set[asyncio.StreamWriter] = set()

    def obey(self, order: Order) -> None:
        match order:
            case "latency", seconds:
                self._latency_s = seconds
            case "cut", seconds:
                self._cut_until = time.monotonic() + seconds
                for writer in list(self._writers):
                    writer.transport.abort()
            case "lose", count:
                self._replies_to_lose += int(count)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._cut_until:
            writer.transport.abort()
            return
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, upstream_writer}
        try:
            await asyncio.gather(
                self._pump(reader, upstream_writer, is_reply=False), self._pump(upstream_reader, writer, is_reply=True)
            )
        finally:
            self._writers -= {writer, upstream_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 18):
                if self._latency_s:
                    await asyncio.sleep(self._latency_s)
                if is_reply and self._replies_to_lose:
                    self._replies_to_lose -= 1
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


def run(target_port: int, orders: Connection) -> None:
    """Says its own port, then obeys until the pipe is closed."""

    async def main() -> None:
        proxy = Proxy(target_port=target_port)
        server = await asyncio.start_server(proxy.serve, HOST, 0)
        orders.send(server.sockets[0].getsockname()[1])
        closed = asyncio.Event()

        def on_order() -> None:
            try:
                proxy.obey(orders.recv())
            except EOFError:
                closed.set()

        asyncio.get_running_loop().add_reader(orders.fileno(), on_order)
        await closed.wait()

    asyncio.run(main())
