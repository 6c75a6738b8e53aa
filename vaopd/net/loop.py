"""An event loop on a thread of its own, by which clients for code without one use the asynchronous clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from vaopd.errors import Unavailable

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for any thread. owner: names the client in errors."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a client which is never closed doesn't keep its process.
        self._thread = threading.Thread(target=_run, args=(self._loop,), name=owner, daemon=True)
        self._thread.start()
        self._process = os.getpid()
        self._stop = weakref.finalize(self, _stop, self._loop, self._process)  # of a client that is never closed
        self._stop.atexit = False
        self._lock = threading.Lock()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns a coroutine's result.

        Raises Unavailable when the loop is closed, before or meanwhile, and in a forked child, which lacks its thread.
        """
        if os.getpid() != self._process:  # before the lock, which a thread of the parent may have held
            coroutine.close()
            raise Unavailable(f"{self._owner} belongs to process {self._process}, which forked; make one in each")
        with self._lock:
            if self._closed:
                coroutine.close()
                raise Unavailable(f"{self._owner} is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable(f"{self._owner} was closed while it waited for an answer") from None

    def iterate(self, results: AsyncGenerator[T]) -> Iterator[T]:
        """Yields an asynchronous generator's results, and closes it at the end."""

        async def read_next() -> tuple[T] | None:
            async for result in results:
                return (result,)
            return None

        try:
            while found := self.run(read_next()):
                yield found[0]
        finally:
            with contextlib.suppress(Unavailable):  # closed meanwhile, and the results with it
                self.run(results.aclose())

    def close(self, client: Coroutine[Any, Any, None]) -> None:
        """Cancels what runs, then runs `client`, which closes the client, and ends the thread; may be repeated."""
        if os.getpid() != self._process:
            client.close()
            return
        with self._lock:
            if self._closed:
                client.close()
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_end(client), self._loop).result()
        self._stop()
        self._thread.join()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, process: int) -> None:
    if os.getpid() == process:
        loop.call_soon_threadsafe(loop.stop)


async def _end(client: Coroutine[Any, Any, None]) -> None:
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await client
