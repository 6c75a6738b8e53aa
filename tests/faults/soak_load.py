"""What the soak sends to a teacher: sound groups, and each way of being wrong, late, rude or gone, in random order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc

from tests.support.models import tiny_vlm
from tests.support.teacher import drawing, token_request
from vaopd.client import TeacherClient
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import EncodedImage, GroupScore, ScoreRequest
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import score_request_to_pb

CODE = grpc.StatusCode
PICTURES = 64
CALLERS = 6
_PAUSE_S = 0.01
_KNOWN = 7


class Load:
    def __init__(self, target: str) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        """By what was sent and how it was answered."""
        self.problems: list[str] = []
        self._target = target
        self._dice = random.Random(1)
        self._groups = [token_request(tiny_vlm(), f"g{n}", pictures=[drawing(n)]) for n in range(PICTURES)]
        self._without_image = token_request(tiny_vlm(), "text")
        # Each with the answers that it may get, and how often it is sent.
        self._kinds: dict[str, tuple[Callable[[grpc.aio.Channel], Awaitable[str]], set[str], int]] = {
            "groups": (self._groups_of_a_job, {"scored"}, 12),
            "a job never seen before": (self._new_job, {"scored"}, 2),
            "an image that is none": (self._bad_image, {"INVALID_ARGUMENT"}, 2),
            "bytes that are no message": (self._malformed, {"INVALID_ARGUMENT"}, 2),
            "token −1": (self._bad_token, {"group INVALID_ARGUMENT"}, 2),
            "an image that nobody sent": (self._unknown_image, {"group NOT_FOUND"}, 2),
            "another revision": (self._wrong_revision, {"FAILED_PRECONDITION"}, 2),
            "a call that is cancelled": (self._cancelled, {"cancelled"}, 2),
            "a deadline of 10 ms": (self._too_late, {"DEADLINE_EXCEEDED", "CANCELLED", "scored"}, 2),
            "a head read by half": (self._half_a_head, {"cancelled"}, 1),
            "a connection that is new": (self._new_connection, {"described"}, 1),
            "noise on the port": (self._noise, {"closed"}, 1),
        }

    async def known_answer(self) -> bytes:
        """The scores of one request, alone on an idle teacher: bit for bit the same every time."""
        async with TeacherClient(self._target, timeout_s=60) as client:
            async for result in client.score([self._groups[_KNOWN]]):
                assert isinstance(result, GroupScore), result
                scores = [*result.teacher_logprobs, *result.degraded_logprobs]
                return b"".join(values.tobytes() for values in scores)
        raise AssertionError("no answer")

    async def run(self, ends: float) -> None:
        """Until the time `ends` of the monotonic clock."""
        async with grpc.aio.insecure_channel(self._target) as channel:
            await asyncio.gather(*(self._caller(channel, ends) for _ in range(CALLERS)))

    async def _caller(self, channel: grpc.aio.Channel, ends: float) -> None:
        names, weights = list(self._kinds), [often for _, _, often in self._kinds.values()]
        while time.monotonic() < ends:
            (name,) = self._dice.choices(names, weights)
            send, answers, _ = self._kinds[name]
            try:
                answer = await send(channel)
            except grpc.aio.AioRpcError as error:
                answer = error.code().name
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            self.calls[name, answer] += 1
            if answer not in answers and len(self.problems) < 20:
                self.problems.append(f"{name} was answered with {answer}, not {' or '.join(sorted(answers))}")
            await asyncio.sleep(self._dice.uniform(0, 2 * _PAUSE_S))

    # -- what is sent -------------------------------------------------------------------------------------------------

    async def _groups_of_a_job(self, channel: grpc.aio.Channel) -> str:
        return await self._scored(f"job{self._dice.randrange(4)}", self._dice.sample(self._groups, 3))

    async def _new_job(self, channel: grpc.aio.Channel) -> str:
        return await self._scored(uuid.UUID(int=self._dice.getrandbits(128)).hex, [self._without_image])

    async def _scored(self, job: str, groups: list[ScoreRequest]) -> str:
        payload = self._dice.choice(("hidden", "top_k", "none"))
        async with TeacherClient(self._target, job=job, payload=payload, timeout_s=60) as client:
            async for result in client.score(groups):
                if not isinstance(result, GroupScore):
                    raise result.error
        return "scored"

    async def _bad_image(self, channel: grpc.aio.Channel) -> str:
        sound = self._dice.choice(self._groups).images[0].data
        place = self._dice.randrange(60, len(sound) // 2)
        bad = self._dice.choice((b"", b"x", self._dice.randbytes(1000), sound[:place]))
        message = image_to_pb(EncodedImage(data=bad))
        await teacher_pb2_grpc.TeacherStub(channel).PutImages(iter([message]))
        return "stored"

    async def _malformed(self, channel: grpc.aio.Channel) -> str:
        ask: Any = channel.unary_stream("/vaopd.v1.Teacher/ScoreGroups")
        async for _ in ask(b"\x12\xff" + self._dice.randbytes(200)):
            pass
        return "read"

    async def _bad_token(self, channel: grpc.aio.Channel) -> str:
        message = _message(self._without_image)
        message.groups[0].rollouts[0].response_ids[0] = -1
        return await self._first_answer(channel, message)

    async def _unknown_image(self, channel: grpc.aio.Channel) -> str:
        message = _message(self._groups[0])
        message.groups[0].tokens.image_sha256[0] = self._dice.randbytes(32).hex()
        return await self._first_answer(channel, message)

    async def _wrong_revision(self, channel: grpc.aio.Channel) -> str:
        message = _message(self._without_image)
        message.revision = "0" * 64
        return await self._first_answer(channel, message)

    async def _first_answer(self, channel: grpc.aio.Channel, message: pb.ScoreGroupsRequest) -> str:
        async for answer in teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(message):
            if answer.WhichOneof("item") == "error":
                return "group " + next(code.name for code in CODE if code.value[0] == answer.error.code)
        return "scored"

    async def _cancelled(self, channel: grpc.aio.Channel) -> str:
        call = teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(_message(self._without_image))
        await asyncio.sleep(self._dice.uniform(0, 2 * _PAUSE_S))
        call.cancel()
        return "cancelled"

    async def _too_late(self, channel: grpc.aio.Channel) -> str:
        names = [replace(self._without_image, group_id=f"late{n}") for n in range(8)]
        async for _ in teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(_message(*names), timeout=0.01):
            pass
        return "scored"

    async def _half_a_head(self, channel: grpc.aio.Channel) -> str:
        call = teacher_pb2_grpc.TeacherStub(channel).GetHead(pb.GetHeadRequest())
        await call.read()
        call.cancel()
        return "cancelled"

    async def _new_connection(self, channel: grpc.aio.Channel) -> str:
        async with grpc.aio.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
            await teacher_pb2_grpc.TeacherStub(own).Describe(pb.DescribeRequest())
        return "described"

    async def _noise(self, channel: grpc.aio.Channel) -> str:
        host, _, port = self._target.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            writer.write(self._dice.randbytes(self._dice.randrange(1, 2000)))
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return "closed"


def _message(*groups: ScoreRequest) -> pb.ScoreGroupsRequest:
    return score_request_to_pb(groups, job="soak", payload="none")
