"""Bounds the memory of replies: counts the numbers that a request asks for before the teacher is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vaopd.errors import LimitExceeded
from vaopd.http_types import ScoreBody

MAX_VALUES = 2**20
"""Of one reply: up to 30 MB of JSON, which takes twice that while it is written."""
MAX_VALUES_AT_ONCE = 2 * MAX_VALUES
"""Of all replies that are being made; a further request waits for its turn."""
VALUES_OF_TOKEN, VALUES_OF_ALTERNATIVE = 6, 3


def list_responses(body: ScoreBody) -> list[str | list[int]]:
    """Returns the responses of a request, however they were given."""
    one = [response for response in (body.response, body.response_token_ids) if response is not None]
    return [*(body.responses or ()), *one]


def count_values(body: ScoreBody) -> int:
    """Returns a bound of the values in a request's reply. A text has at most a token per byte, and the EOS."""
    tokens = sum(len(item.encode()) + 1 if isinstance(item, str) else len(item) for item in list_responses(body))
    return tokens * (VALUES_OF_TOKEN + len(body.columns) + VALUES_OF_ALTERNATIVE * body.top_k)


class ReplyBudget:
    """Room for the replies that are being made, shared by all requests in the order of their arrival."""

    def __init__(self, limit: int = MAX_VALUES_AT_ONCE) -> None:
        self._free = limit
        self._turn = asyncio.Lock()
        self._returned = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, body: ScoreBody) -> AsyncIterator[None]:
        """Holds the room for a request's reply. Raises LimitExceeded for a reply that is too large for any turn."""
        values = count_values(body)
        if values > MAX_VALUES:
            raise LimitExceeded(
                f"the reply could have {values} values, the limit is {MAX_VALUES}; ask for fewer or shorter responses, "
                "for a smaller top_k, or give token ids in place of texts"
            )
        async with self._turn, self._returned:  # the lock keeps a large request from waiting behind small ones for ever
            await self._returned.wait_for(lambda: values <= self._free)
            self._free -= values
        try:
            yield
        finally:
            async with self._returned:
                self._free += values
                self._returned.notify_all()
