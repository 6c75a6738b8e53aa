"""An event loop on a thread of its own, by which clients for code without one use the asynchronous clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
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
        self._thread = threading.Thread(target=self._loop.run_forever, name=owner, daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns a coroutine's result. Raises Unavailable when the loop is closed, before or meanwhile."""
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
        with self._lock:
            if self._closed:
                client.close()
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_end(client), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end(client: Coroutine[Any, Any, None]) -> None:
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await client
