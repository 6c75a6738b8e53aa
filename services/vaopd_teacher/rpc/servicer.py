"""The Teacher service's RPCs: calls are checked, prepared on threads, queued for the device, and answered in a stream.

In: images by content, and ScoreGroups calls, which are cut into units of about one forward each. Out: one answer per
group. At most two units of a call are prepared ahead of the device or of a slow reader, and little more than one of all
calls of a job together (`Ahead`). Errors are raised as they are; the interceptor maps them to statuses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import grpc
import numpy as np
import torch

from vaopd import payloads
from vaopd.errors import LimitExceeded, Mismatch, VaopdError
from vaopd.pb import common_pb2, teacher_pb2_grpc
from vaopd.pb import teacher_pb2 as pb
from vaopd.telemetry import logs
from vaopd.types import TeacherDescription
from vaopd.wire import errors as wire_errors
from vaopd.wire.common import image_from_pb
from vaopd.wire.errors import choose_status
from vaopd.wire.teacher import columns_to_pb, description_to_pb
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.intake.image_stores import ImageStore, Pins
from vaopd_teacher.intake.prepare import (
    CallSettings,
    Preparer,
    check_count,
    check_revision,
    cut,
    list_images,
    read_call_settings,
)
from vaopd_teacher.line.admission import Admission
from vaopd_teacher.line.prepare_ahead import Ahead
from vaopd_teacher.line.scheduler import Scheduler
from vaopd_teacher.metrics import TeacherMetrics
from vaopd_teacher.rpc.call import Call

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
MESSAGE_OVERHEAD_BYTES = 1024
_ADMITTED_AHEAD = 4
"""The most images of one upload that are decoded at the same time."""

T = TypeVar("T")


class TeacherServicer(teacher_pb2_grpc.TeacherServicer):
    """Answers the RPCs of proto/vaopd/pb/teacher.proto, which documents them. Runs on the event loop."""

    def __init__(
        self,
        *,
        description: TeacherDescription,
        head: torch.Tensor | None,
        preparer: Preparer,
        store: ImageStore,
        scheduler: Scheduler,
        admission: Admission,
        ahead: Ahead,
        threads: ThreadPoolExecutor,
        batch_tokens: int,
        chunk_bytes: int,
        metrics: TeacherMetrics,
    ) -> None:
        self._description = description
        self._head = head
        self._preparer = preparer
        self._store = store
        self._scheduler = scheduler
        self._admission = admission
        self._ahead = ahead
        self._threads = threads
        self._batch_tokens = batch_tokens
        self._chunk_bytes = chunk_bytes
        self._metrics = metrics

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.TeacherDescription:
        """Returns the teacher's description."""
        return description_to_pb(self._description)

    async def PutImages(
        self, request_iterator: AsyncIterator, context: grpc.aio.ServicerContext
    ) -> pb.PutImagesResponse:
        """Decodes and stores images. Raises InvalidInput or LimitExceeded for the first one that is refused."""
        received: list[str] = []
        admitting: deque[asyncio.Task[str]] = deque()
        try:
            async for message in request_iterator:
                check_count("images", len(received) + len(admitting) + 1)
                admitting.append(asyncio.create_task(self._admit_image(message)))
                if len(admitting) > _ADMITTED_AHEAD:
                    received.append(await admitting.popleft())
            while admitting:
                received.append(await admitting.popleft())
        finally:
            for task in admitting:
                task.cancel()
        return pb.PutImagesResponse(sha256=received)

    async def _admit_image(self, message: common_pb2.EncodedImage) -> str:
        image = await self._run_on_thread(image_from_pb, message)
        if self._store.find_missing([image.sha256], job=message.job):
            self._admission.charge_upload(message.job, len(image.data))
            await self._run_on_thread(partial(self._preparer.admit_image, image, job=message.job))
            log.info("image %s stored, %d bytes", image.sha256[:12], len(image.data))
        return image.sha256

    async def MissingImages(
        self, request: pb.MissingImagesRequest, context: grpc.aio.ServicerContext
    ) -> pb.MissingImagesResponse:
        """Returns those of the images that are not stored. Raises LimitExceeded for too many."""
        check_count("images", len(request.sha256))
        return pb.MissingImagesResponse(sha256=self._store.find_missing(request.sha256, job=request.job))

    async def GetHead(
        self, request: pb.GetHeadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.TensorChunk]:
        """Sends the LM head, (V, D), in chunks of rows. Raises Mismatch when the backend has none to give."""
        check_revision(request.revision, self._description)
        head = self._head
        if head is None:
            kinds = ", ".join(self._description.payloads)
            raise Mismatch(f"this teacher can't send its head; its payloads ({kinds}) don't need it")
        rows, width = head.shape
        dtype = str(head.dtype).removeprefix("torch.")
        described: pb.PayloadTensor | None = pb.PayloadTensor(name="head", dtype=dtype, shape=(rows, width))
        row_bytes = width * head.element_size()
        step = max(1, self._chunk_bytes // row_bytes)
        for start in range(0, rows, step):
            part = await self._run_on_thread(payloads.from_torch, head[start : start + step])
            yield pb.TensorChunk(name="head", offset_bytes=start * row_bytes, data=bytes(part.data), tensor=described)
            described = None

    async def ScoreGroups(
        self, request: pb.ScoreGroupsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ScoreGroupsResponse]:
        """Scores groups and answers each when it is done. Raises the error that concerns the whole call."""
        settings = read_call_settings(request, self._description)
        job, unanswered = request.job, len(request.groups)
        self._admission.admit(job, unanswered)
        remaining_s = context.time_remaining()
        call = Call(self._scheduler, job=job, expires=None if remaining_s is None else time.monotonic() + remaining_s)
        pins = Pins(self._store, {group.group_id: list_images(group) for group in request.groups}, job=job)
        # Not at the generator's end only: when the reader goes away, the generator may stay suspended for a while.
        context.add_done_callback(lambda _: self._give_up(call, pins))
        call.feeder = asyncio.create_task(self._feed(request, settings, call, pins))
        started, failed, name = time.monotonic(), 0, logs.request_id.get()
        try:
            while unanswered:
                answer = await call.next()
                if isinstance(answer, EngineResult):
                    self._metrics.count_scored(job, answer, latency_s=time.monotonic() - started)
                    for message in await self._answer(answer, with_token_texts=request.with_token_texts):
                        yield message
                else:
                    failed += 1
                    self._metrics.count_failed(job)
                    yield _group_error(answer.group_id, answer.error)
                unanswered -= 1
                self._admission.release(job)
        finally:
            self._give_up(call, pins)
            self._admission.release(job, unanswered)
            elapsed_s, groups = time.monotonic() - started, len(request.groups)
            log.info(
                "request %s, job %r: %d groups, %d refused, %d given up, %.3f s",
                name,
                job[:64],
                groups,
                failed,
                unanswered,
                elapsed_s,
                extra=logs.make_fields(job=job[:64], groups=[group.group_id[:64] for group in request.groups]),
            )

    def _give_up(self, call: Call, pins: Pins) -> None:
        call.cancel()
        pins.release_all()
        self._ahead.look()

    async def _feed(self, request: pb.ScoreGroupsRequest, settings: CallSettings, call: Call, pins: Pins) -> None:
        """Prepares the groups and submits them in units of about one forward, as far ahead as `Ahead` allows.

        The cut depends on the request alone, so an idle teacher gives a request the same answer bit for bit every time.
        """
        try:
            for unit, room in cut(request.groups, self._batch_tokens):
                await call.wait_for_room()
                async with self._ahead.turn(call.job):
                    outcomes = await asyncio.gather(*(self._prepare_or_refuse(group, settings) for group in unit))
                    for group, outcome in zip(unit, outcomes, strict=True):
                        pins.release(group.group_id)
                        if isinstance(outcome, VaopdError):
                            call.refuse(group.group_id, outcome)
                    if ready := [outcome for outcome in outcomes if isinstance(outcome, PreparedGroup)]:
                        call.submit(ready, room=room)
        except Exception as error:  # raised where the results are awaited
            call.fail(error)

    async def _prepare_or_refuse(self, group: pb.PromptGroup, settings: CallSettings) -> PreparedGroup | VaopdError:
        try:
            return await self._run_on_thread(self._preparer.prepare, group, settings)
        except VaopdError as error:
            return error

    async def _answer(self, scored: EngineResult, *, with_token_texts: bool) -> Iterator[pb.ScoreGroupsResponse]:
        """Returns the group's score and its payload in chunks, or an error when the score exceeds one message."""
        group = scored.group
        score = pb.GroupScore(
            group_id=group.group_id,
            lengths=[len(ids) for ids in group.responses],
            prompt_tokens=len(group.original.token_ids),
            payload=[
                pb.PayloadTensor(name=name, dtype=tensor.dtype, shape=tensor.shape)
                for name, tensor in scored.payload.tensors.items()
            ],
        )
        columns_to_pb(scored.columns, score)
        if with_token_texts:
            ids = np.concatenate(group.responses)
            score.response_ids.extend(ids.tolist())
            score.token_texts.extend(await self._run_on_thread(self._preparer.decode_tokens, ids))
            if group.payload == "top_k":
                alternatives = np.unique(scored.payload.tensors["token_ids"].numpy())
                texts = await self._run_on_thread(self._preparer.decode_tokens, alternatives)
                score.payload_texts.update(zip(alternatives.tolist(), texts, strict=True))
        size, limit = score.ByteSize() + MESSAGE_OVERHEAD_BYTES, self._description.limits.max_message_bytes
        if size > limit:
            error = LimitExceeded(
                f"the score of group {group.group_id!r} takes {size} bytes, the limit of a message is {limit}; "
                "send fewer rollouts in a group"
            )
            return iter([_group_error(group.group_id, error)])
        return self._make_messages(score, scored)

    def _make_messages(self, score: pb.GroupScore, scored: EngineResult) -> Iterator[pb.ScoreGroupsResponse]:
        yield pb.ScoreGroupsResponse(score=score)
        for name, tensor in scored.payload.tensors.items():
            for offset in range(0, len(tensor.data), self._chunk_bytes):
                chunk = pb.TensorChunk(
                    group_id=score.group_id,
                    name=name,
                    offset_bytes=offset,
                    data=bytes(tensor.data[offset : offset + self._chunk_bytes]),
                )
                yield pb.ScoreGroupsResponse(payload=chunk)

    async def _run_on_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _group_error(group_id: str, error: VaopdError) -> pb.ScoreGroupsResponse:
    code = choose_status(error).value[0]
    details = wire_errors.pack(code, error)
    return pb.ScoreGroupsResponse(
        error=pb.GroupError(group_id=group_id, code=code, message=str(error), status_details=details)
    )
