"""Scores the requests of a batch, a few at a time; sends each result when it is done.

A result is turned into text at once, and the next request waits until it is sent: a client that reads slowly slows its
batch, and neither fills the memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Any

from vaopd.http_types import BatchResult, ScoreBody
from vaopd_api import problems
from vaopd_api.scorer import AdHocScorer, decode_images

IN_FLIGHT = 8
EVENT_STREAM = "text/event-stream"
SILENCE_S = 15.0  # after this time without an event a comment is sent, so that proxies keep the connection


async def stream_json(scorer: AdHocScorer, items: Sequence[Any]) -> AsyncIterator[str]:
    """Yields a `BatchReply` as JSON, piece by piece, its results in the order of the requests."""
    waiting = enumerate(items)
    running: deque[asyncio.Task[tuple[BatchResult, str]]] = deque()
    failed, separator = 0, '{"results":['
    try:
        while True:
            running.extend(_start(scorer, waiting, IN_FLIGHT - len(running)))
            if not running:
                break
            result, text = await running[0]
            running.popleft()
            failed += result.problem is not None
            yield separator + text
            separator = ","
        yield f'],"failed":{failed}}}'
    finally:
        for task in running:
            task.cancel()


async def stream_events(scorer: AdHocScorer, items: Sequence[Any]) -> AsyncIterator[str]:
    """Yields the results as server-sent events, as they are done: `result` for each, then `done`."""
    waiting = enumerate(items)
    running: set[asyncio.Task[tuple[BatchResult, str]]] = set()
    failed = 0
    try:
        while True:
            running |= set(_start(scorer, waiting, IN_FLIGHT - len(running)))
            if not running:
                break
            done, running = await asyncio.wait(running, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield ": still at work\n\n"
            for task in done:
                result, text = task.result()
                failed += result.problem is not None
                yield f"event: result\nid: {result.index}\ndata: {text}\n\n"
        yield f'event: done\ndata: {{"results": {len(items)}, "failed": {failed}}}\n\n'
    finally:
        for task in running:
            task.cancel()


def _start(scorer: AdHocScorer, waiting: enumerate[Any], count: int) -> list[asyncio.Task[tuple[BatchResult, str]]]:
    return [asyncio.create_task(_score(scorer, index, item)) for index, item in islice(waiting, count)]


async def _score(scorer: AdHocScorer, index: int, item: Any) -> tuple[BatchResult, str]:
    """Returns a request's result, without its score, and its JSON."""
    try:
        body = problems.parse(ScoreBody, item)
        images = await asyncio.to_thread(decode_images, body.image, body.images)
        score = await scorer.score(body, images, suffix=f"/{index}")
        scored = BatchResult(index=index)
        return scored, scored.model_dump_json().replace('"score":null', f'"score":{score}')
    except Exception as error:  # any error concerns this item only
        refused = BatchResult(index=index, problem=problems.describe(error)[0])
        return refused, refused.model_dump_json()
