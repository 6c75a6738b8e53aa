"""The teacher's client for code without an event loop.

with SyncTeacherClient("127.0.0.1:50051", job="geometry") as teacher:
    for result in teacher.score(groups):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self, Unpack

from vaopd.client.teacher import ClientOptions, TeacherClient
from vaopd.net.loop import LoopThread
from vaopd.types import GroupFailure, GroupScore, ScoreRequest, TeacherDescription, Tensor


class SyncTeacherClient:
    """`TeacherClient` for code without an event loop: the same methods, run on a thread of its own."""

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        """See `TeacherClient`."""
        self._client = TeacherClient(target, **options)
        self._loop = LoopThread("this client of the teacher")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; calls in progress on other threads raise Unavailable."""
        self._loop.close(self._client.close())

    def describe(self) -> TeacherDescription:
        """Returns the teacher's description. See `TeacherClient.describe`."""
        return self._loop.run(self._client.describe())

    def head(self) -> Tensor:
        """Returns the LM head, (V, D). See `TeacherClient.head`."""
        return self._loop.run(self._client.head())

    def score(
        self, groups: Sequence[ScoreRequest], *, with_token_texts: bool = False, columns: Sequence[str] = ()
    ) -> Iterator[GroupScore | GroupFailure]:
        """Yields one result per group, as soon as it has arrived. See `TeacherClient.score`."""
        return self._loop.iterate(self._client.score(groups, with_token_texts=with_token_texts, columns=columns))
