"""What the soak sends beside its mixed load: the dearest requests of SECURITY.md's table, and a light job that waits.

The API sees the worst ones from another address of the loopback than the light job's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import numpy as np

from tests.support.api import BODY
from tests.support.models import tiny_vlm
from tests.support.teacher import drawing, token_request
from vaopd.client import GroupFailure, TeacherClient
from vaopd.http_types import MAX_BATCH_ITEMS, ScoreBody
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import GroupScore, ScoreRequest, TeacherLimits, user_turn
from vaopd_api.app import MAX_BODY_BYTES
from vaopd_api.connections import HEADER_BYTES
from vaopd_api.middleware import MAX_JSON_KEYS, MAX_JSON_VALUES
from vaopd_api.reply_cost import MAX_VALUES, count_values

ADDRESS = "127.0.0.2"
PER_ADDRESS = 64
LIGHT_EVERY_S = 0.25
SLOW_SENDERS = 16
TEACHER_CONNECTIONS = 256
LONGEST_S = 100.0
LONGEST_PATIENCE_S = 70.0  # the API ends a client that reads nothing for 60 s
MAX_ROLLOUTS = TeacherLimits().max_rollouts_per_group

Kind = tuple[Callable[[], Awaitable[str]], set[str]]
"""What sends it, and the answers that it may get."""


class Worst:
    """Sends the kinds in turn, those that only wait beside the others; `calls` counts answers, `problems` odd ones."""

    def __init__(self, *, api: str, teacher: str, share: float = 1.0) -> None:
        """share: of the largest batch, reply and patience, for a short run."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.longest_s: dict[str, float] = {}
        host, _, port = api.rpartition(":")
        self._api, self._teacher = (host, int(port)), teacher
        self._patience_s = share * LONGEST_PATIENCE_S
        self._items = [ITEM] * max(1, round(share * MAX_BATCH_ITEMS))
        self._largest = LARGEST | {"responses": LARGEST["responses"][: max(1, round(share * MAX_ROLLOUTS))]}
        self._url = f"http://{api}"
        self._waiting: dict[str, Kind] = {
            f"{SLOW_SENDERS} requests that stop half-way": (self._slow_senders, {"408"}),
            "a batch that nobody reads": (self._unread, {"closed"}),
        }
        self._busy: dict[str, Kind] = {
            "an endless header": (self._endless_header, {"431", "closed"}),
            f"{PER_ADDRESS + 32} connections": (self._crowd, {"refused"}),
            "an endless body": (self._endless_body, {"413", "closed"}),
            "the largest body": (self._largest_body, {"413", "422"}),
            "the most keys": (self._keys, {"422"}),
            "the most token ids": (self._token_ids, {"413"}),
            "more values than are read": (self._too_many_values, {"413"}),
            "the largest reply": (self._largest_reply, {"200"}),
            "a reply beyond the limit": (self._too_large_a_reply, {"413"}),
            "a batch of the largest": (self._batch, {"200, 0 failed"}),
            f"{TEACHER_CONNECTIONS} connections to the teacher": (self._teacher_crowd, {"closed"}),
            "too much metadata": (self._metadata, {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"}),
            "a text too long to tokenise": (self._long_text, {"LimitExceeded"}),
        }

    async def run(self, ends: float) -> None:
        """Goes round until the time `ends` of the monotonic clock; each kind is sent once at least."""
        await asyncio.gather(self._rounds(self._busy, ends), self._rounds(self._waiting, ends))

    async def _rounds(self, kinds: dict[str, Kind], ends: float) -> None:
        first = True
        while first or time.monotonic() < ends:
            for name, (send, answers) in kinds.items():
                if not first and time.monotonic() > ends:
                    return
                began = time.monotonic()
                try:
                    answer = await asyncio.wait_for(send(), LONGEST_S + self._patience_s)
                except ConnectionError:
                    answer = "closed"
                except Exception as error:
                    answer = f"{type(error).__name__}: {error}"
                self.longest_s[name] = max(self.longest_s.get(name, 0.0), round(time.monotonic() - began, 2))
                self.calls[name, answer] += 1
                if answer not in answers and len(self.problems) < 20:
                    self.problems.append(f"{name} was answered with {answer}, not {' or '.join(sorted(answers))}")
            first = False

    # -- to the API ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._api, local_addr=(ADDRESS, 0))
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _stream(self, head: str, part: bytes, most: int) -> str:
        async with self._connection() as (reader, writer):
            writer.write(head.encode())
            for _ in range(most // len(part)):
                writer.write(part)
                await writer.drain()
            return _status(await reader.read(64))

    async def _endless_header(self) -> str:
        return await self._stream("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", b"a" * HEADER_BYTES, 64 * 2**20)

    async def _endless_body(self) -> str:
        part = b"10000\r\n" + b" " * 65536 + b"\r\n"
        return await self._stream(_head("/v1/score", "Transfer-Encoding: chunked"), part, 2 * MAX_BODY_BYTES)

    async def _slow_senders(self) -> str:
        async def send() -> str:
            async with self._connection() as (reader, writer):
                writer.write(_head("/v1/score", "Content-Length: 1000").encode() + b"{")
                return _status(await reader.read(64))

        return _the_one(await asyncio.gather(*(send() for _ in range(SLOW_SENDERS))))

    async def _crowd(self) -> str:
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(self._connection()) for _ in range(PER_ADDRESS + 32)]
            return (
                "refused"
                if {_status(await reader.read(64)) for reader, _ in opened[PER_ADDRESS:]} == {"503"}
                else "let in"
            )

    async def _post(self, path: str, content: bytes) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(local_address=ADDRESS)
        async with httpx.AsyncClient(base_url=self._url, transport=transport, timeout=LONGEST_S) as client:
            return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    async def _largest_body(self) -> str:
        start, end = b'{"question":"?","response":"x","image":"', b'"}'
        return str((await self._post("/v1/score", start + b"A" * (MAX_BODY_BYTES - 64) + end)).status_code)

    async def _keys(self) -> str:
        body = dict.fromkeys((f"k{n}" for n in range(MAX_JSON_KEYS - 3)), 1)
        return str((await self._post("/v1/score", _dump({"question": "?", "response": "x", **body}))).status_code)

    async def _token_ids(self) -> str:
        return await self._sent_ids(MAX_JSON_VALUES - 3)

    async def _too_many_values(self) -> str:
        return await self._sent_ids(12 * MAX_JSON_VALUES)

    async def _sent_ids(self, count: int) -> str:
        content = b'{"question":"?","response_token_ids":[1' + b",1" * (count - 1) + b"]}"
        return str((await self._post("/v1/score", content)).status_code)

    async def _largest_reply(self) -> str:
        return str((await self._post("/v1/score", _dump(self._largest))).status_code)

    async def _too_large_a_reply(self) -> str:
        return str((await self._post("/v1/score", _dump({**BODY, "response": "a" * 20_000, "top_k": 20}))).status_code)

    async def _batch(self) -> str:
        answer = await self._post("/v1/score/batch", _dump({"requests": self._items}))
        return f"{answer.status_code}, {answer.json()['failed']} failed"

    async def _unread(self) -> str:
        content = _dump({"requests": self._items})
        async with self._connection() as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(_head("/v1/score/batch", f"Content-Length: {len(content)}").encode() + content)
            await writer.drain()
            await asyncio.sleep(self._patience_s)
        return "closed"

    # -- to the teacher -----------------------------------------------------------------------------------------------

    async def _teacher_crowd(self) -> str:
        host, _, port = self._teacher.rpartition(":")
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(TEACHER_CONNECTIONS):
                _, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.transport.abort)
            await asyncio.sleep(1)
        return "closed"

    async def _metadata(self) -> str:
        async with grpc.aio.insecure_channel(self._teacher, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
            metadata = tuple((f"x-{n}", "a" * 4096) for n in range(32))
            try:
                await teacher_pb2_grpc.TeacherStub(own).Describe(pb.DescribeRequest(), metadata=metadata, timeout=60)
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return "described"

    async def _long_text(self) -> str:
        long = ScoreRequest(group_id="long", responses=("a" * 3_000_000,), messages=user_turn("?", []))
        async with TeacherClient(self._teacher, job="worst", payload="none", timeout_s=60) as client:
            async for result in client.score([long]):
                return type(result.error).__name__ if isinstance(result, GroupFailure) else "scored"
        return "no answer"


class Light:
    """A job of one small group every quarter of a second, and a health check of the API with it."""

    def __init__(self, *, api: str, teacher: str) -> None:
        self.problems: list[str] = []
        self._teacher, self._url = teacher, f"http://{api}"
        self._group = token_request(tiny_vlm(), "light", pictures=[drawing(1)])
        self._waits_s: dict[str, list[float]] = {"score": [], "health": []}

    async def run(self, ends: float) -> None:
        async with (
            TeacherClient(self._teacher, job="light", payload="hidden", timeout_s=60) as client,
            httpx.AsyncClient(base_url=self._url, timeout=60) as http,
        ):
            while time.monotonic() < ends:
                began = time.monotonic()
                async for result in client.score([self._group]):
                    if not isinstance(result, GroupScore):
                        self.problems.append(f"the light job: {result.error}")
                scored = time.monotonic()
                answer = await http.get("/healthz")
                if answer.status_code != 200:
                    self.problems.append(f"the API's health: {answer.status_code}")
                self._waits_s["score"].append(scored - began)
                self._waits_s["health"].append(time.monotonic() - scored)
                await asyncio.sleep(LIGHT_EVERY_S)

    def percentiles_ms(self) -> dict[str, dict[str, float]]:
        """Of each kind of call."""
        return {
            name: {"calls": len(waits)}
            | {f"p{q}": round(1000 * float(np.percentile(waits, q)), 1) for q in (50, 99, 100)}
            for name, waits in self._waits_s.items()
        }


ITEM: dict[str, Any] = {"question": "?", "responses": ["abcdefg"] * 16, "top_k": 20}
_LENGTH = MAX_VALUES // (count_values(ScoreBody(question="?", responses=["a"] * MAX_ROLLOUTS, top_k=20)) // 2) - 1
LARGEST: dict[str, Any] = {"question": "?", "responses": ["a" * _LENGTH] * MAX_ROLLOUTS, "top_k": 20}
"""As many values in its reply as are answered."""


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _head(path: str, length: str) -> str:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"


def _status(answer: bytes) -> str:
    return answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


def _the_one(answers: list[str]) -> str:
    return " and ".join(sorted(set(answers)))
