"""The teacher's client for code without an event loop.

with SyncTeacherClient("127.0.0.1:50051", job="geometry") as teacher:
    for result in teacher.score(groups):
        ...
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from vaopd.client.teacher import ClientOptions, TeacherClient
from vaopd.errors import Unavailable
from vaopd.types import GroupFailure, GroupScore, ScoreRequest, TeacherDescription, Tensor

T = TypeVar("T")


class SyncTeacherClient:
    """`TeacherClient` for code without an event loop: the same methods, run on a thread of its own."""

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        """See `TeacherClient`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()
        self._client = TeacherClient(target, **options)
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; calls in progress on other threads raise Unavailable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._client.close()

    def describe(self) -> TeacherDescription:
        """Returns the teacher's description. See `TeacherClient.describe`."""
        return self._run(self._client.describe())

    def head(self) -> Tensor:
        """Returns the LM head, (V, D). See `TeacherClient.head`."""
        return self._run(self._client.head())

    def score(
        self, groups: Sequence[ScoreRequest], *, with_token_texts: bool = False, columns: Sequence[str] = ()
    ) -> Iterator[GroupScore | GroupFailure]:
        """Yields one result per group, as soon as it has arrived. See `TeacherClient.score`."""
        results = self._client.score(groups, with_token_texts=with_token_texts, columns=columns)

        async def read_next() -> GroupScore | GroupFailure | None:
            return await anext(results, None)

        try:
            while (result := self._run(read_next())) is not None:
                yield result
        finally:
            with contextlib.suppress(Unavailable):  # closed meanwhile, and the results with it
                self._run(results.aclose())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                coroutine.close()
                raise Unavailable("this client of the teacher is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("this client of the teacher was closed while it waited for an answer") from None
