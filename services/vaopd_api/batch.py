"""Scores the requests of a batch, each by itself and a few at a time, and yields the results as they are done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vaopd.http_types import BatchResult, ScoreBody
from vaopd_api import problems
from vaopd_api.scorer import AdHocScorer, decode_images

IN_FLIGHT = 8
EVENT_STREAM = "text/event-stream"
SILENCE_S = 15.0  # after this time without an event a comment is sent, so that proxies keep the connection


async def score_items(scorer: AdHocScorer, items: Sequence[Any]) -> AsyncIterator[BatchResult]:
    """Yields one result per item, as they are done. Closing it early cancels the rest."""
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def score_one(index: int, item: Any) -> BatchResult:
        async with slots:
            try:
                body = problems.parse(ScoreBody, item)
                score = await scorer.score(body, decode_images(body.image, body.images), suffix=f"/{index}")
                return BatchResult(index=index, score=score)
            except Exception as error:  # any error concerns this item only
                return BatchResult(index=index, problem=problems.describe(error)[0])

    tasks = [asyncio.create_task(score_one(index, item)) for index, item in enumerate(items)]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()


async def stream_events(scorer: AdHocScorer, items: Sequence[Any]) -> AsyncIterator[str]:
    """Yields the results as server-sent events: `result` for each, then `done`."""
    arrived: asyncio.Queue[BatchResult | None] = asyncio.Queue()

    async def follow() -> None:
        async for result in score_items(scorer, items):
            arrived.put_nowait(result)
        arrived.put_nowait(None)

    following = asyncio.create_task(follow())
    failed = 0
    try:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    result = await arrived.get()
            except TimeoutError:
                yield ": still at work\n\n"
                continue
            if result is None:
                break
            failed += result.problem is not None
            yield f"event: result\nid: {result.index}\ndata: {result.model_dump_json()}\n\n"
        yield f'event: done\ndata: {{"results": {len(items)}, "failed": {failed}}}\n\n'
    finally:
        following.cancel()
