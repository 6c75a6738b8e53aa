"""The client of the teacher service; needs no torch. `TeacherClient` is asynchronous, `SyncTeacherClient` its twin.

    async with TeacherClient("127.0.0.1:50051", job="geometry") as teacher:
        head = await teacher.head()
        async for result in teacher.score(groups):
            match result:
                case GroupScore(): ...
                case GroupFailure(group_id=group_id, error=error): ...

Scoring is pure, so whatever was lost with a server or a connection is asked again until `timeout_s` pass without a
result. Errors are those of `vaopd.errors`: raised when they concern a whole call, in a GroupFailure when one group.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc

from vaopd import wire
from vaopd.assembly import GroupAssembly, GroupFailure, TensorAssembly
from vaopd.errors import (
    InvalidInput,
    LimitExceeded,
    Mismatch,
    NotFound,
    Unavailable,
    VaopdError,
)
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.transport import GROUP_ERRORS, Busy, Patience, channel_options, error_of, typed
from vaopd.types import (
    Degradation,
    EncodedImage,
    GroupScore,
    PayloadKind,
    ScoreRequest,
    TeacherDescription,
    TeacherLimits,
    Tensor,
)

__all__ = ["ClientOptions", "GroupFailure", "SyncTeacherClient", "TeacherClient"]

T = TypeVar("T")
_Encoded = tuple[ScoreRequest, pb.PromptGroup]

_ENVELOPE_BYTES = 4096


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of both clients; `TeacherClient` documents them."""

    job: str | None
    api_key: str | None
    tls: grpc.ChannelCredentials | None
    timeout_s: float
    patience_s: float | None
    degradation: Degradation
    payload: PayloadKind
    top_k: int
    tokenizer_fingerprint: str


class TeacherClient:
    """Belongs to the event loop on which it is first used."""

    def __init__(
        self,
        target: str,
        *,
        job: str | None = None,
        api_key: str | None = None,
        tls: grpc.ChannelCredentials | None = None,
        timeout_s: float = 300.0,
        patience_s: float | None = None,
        degradation: Degradation = Degradation(),
        payload: PayloadKind = "hidden",
        top_k: int = 64,
        tokenizer_fingerprint: str = "",
    ) -> None:
        """`target`: host:port or any gRPC name. `timeout_s`: the longest time without any result before it gives up.

        `patience_s`: how long it asks a teacher again that is busy or away, `timeout_s` unless it is given.
        `job`: whose work it is; None: the API key's own job, or "default" without a key. `api_key` and `tls`: see
        `vaopd.credentials.from_environment`; without `tls` all of it, the key too, travels in plain text.
        `tokenizer_fingerprint`: the student's; a teacher with another vocabulary refuses. `top_k`: for payload "top_k".
        """
        self._target = target
        self._job = job if job is not None else "" if api_key is not None else "default"
        self._tls = tls
        self._timeout_s = timeout_s
        self._patience_s = timeout_s if patience_s is None else patience_s
        self._degradation = degradation
        self._payload = payload
        self._top_k = top_k
        self._fingerprint = tokenizer_fingerprint
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel: grpc.aio.Channel | None = None
        self._description: TeacherDescription | None = None
        self._stored: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def describe(self) -> TeacherDescription:
        """Asks the teacher who it is. From then on another revision is refused, until the next describe."""

        async def ask() -> TeacherDescription:
            answer = await self._stub().Describe(pb.DescribeRequest(), metadata=self._metadata, timeout=self._timeout_s)
            return wire.description_from_pb(answer)

        self._description = await self._until_answered(ask)
        return self._description

    async def head(self) -> Tensor:
        """The LM head over the logical vocabulary, (V, D), in the teacher's dtype; what the hidden payload needs."""
        description = await self._described()

        async def fetch() -> Tensor:
            call = self._stub().GetHead(pb.GetHeadRequest(revision=description.revision), metadata=self._metadata)
            head: TensorAssembly | None = None
            async for chunk in self._messages(call):
                head = head or TensorAssembly(chunk.tensor)
                head.add(chunk)
            if head is None or not head.complete:
                raise Mismatch(f"the teacher at {self._target} ended its head too early; are its versions the same?")
            return head.tensor()

        return await self._until_answered(fetch)

    async def score(
        self, groups: Sequence[ScoreRequest], *, with_token_texts: bool = False
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """One result per group, as soon as it is there. Raises what concerns all groups.

        Images that the teacher lacks are uploaded first. What doesn't fit into one call is sent in several.
        """
        waiting = {group.group_id: group for group in groups}
        if len(waiting) < len(groups):
            raise InvalidInput("two groups have the same group_id; ids must be unique among the groups scored together")
        uploaded_again: set[str] = set()
        patience = Patience(self._patience_s)
        while waiting:
            try:
                async with aclosing(self._attempt(tuple(waiting.values()), with_token_texts)) as results:
                    async for result in results:
                        failure = result.error if isinstance(result, GroupFailure) else None
                        if isinstance(failure, Unavailable):
                            raise failure
                        if isinstance(failure, NotFound) and result.group_id not in uploaded_again:
                            # The teacher restarted, or dropped the image to make room: once more, with its images.
                            uploaded_again.add(result.group_id)
                            self._stored.difference_update(i.sha256 for i in waiting[result.group_id].images)
                            continue
                        del waiting[result.group_id]
                        yield result
                        patience.renew()
            except (Unavailable, Busy) as error:
                await patience.wait(error)

    async def _attempt(
        self, groups: Sequence[ScoreRequest], with_token_texts: bool
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Sends each group once."""
        limits = (await self._described()).limits
        encoded: list[_Encoded] = []
        for group in groups:
            try:
                encoded.append((group, self._request([group], with_token_texts).groups[0]))
            except InvalidInput as error:
                yield GroupFailure(group_id=group.group_id, error=error)
        for part in _split(encoded, limits):
            refused = await self._upload({i.sha256: i for group, _ in part for i in group.images}, limits)
            request = self._request([], with_token_texts)
            for group, message in part:
                refusal = next((refused[i.sha256] for i in group.images if i.sha256 in refused), None)
                if refusal is None and (size := message.ByteSize() + _ENVELOPE_BYTES) > limits.max_message_bytes:
                    refusal = LimitExceeded(
                        f"group {group.group_id!r} takes {size} bytes, the limit of a message is "
                        f"{limits.max_message_bytes}; send fewer rollouts in a group"
                    )
                if refusal is None:
                    request.groups.append(message)
                else:
                    yield GroupFailure(group_id=group.group_id, error=refusal)
            if request.groups:
                async with aclosing(self._call(request, {group.group_id: group for group, _ in part})) as results:
                    async for result in results:
                        yield result

    async def _call(
        self, request: pb.ScoreGroupsRequest, groups: dict[str, ScoreRequest]
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """One ScoreGroups call."""
        unanswered = {group.group_id for group in request.groups}
        open_groups: dict[str, GroupAssembly] = {}
        call = self._stub().ScoreGroups(request, metadata=self._metadata)
        async for message in self._messages(call):
            part = getattr(message, message.WhichOneof("item"))
            if part.group_id not in unanswered:
                raise Mismatch(f"the teacher at {self._target} answered group {part.group_id!r}, which wasn't asked")
            if isinstance(part, pb.GroupError):
                unanswered.discard(part.group_id)
                error = GROUP_ERRORS.get(part.code, VaopdError)(part.message)
                yield GroupFailure(group_id=part.group_id, error=error)
                continue
            if isinstance(part, pb.GroupScore):
                open_groups[part.group_id] = GroupAssembly(part, groups[part.group_id], self._payload)
            elif part.group_id in open_groups:
                open_groups[part.group_id].add(part)
            else:
                raise Mismatch(f"the teacher sent a payload for group {part.group_id!r} before its score")
            if open_groups[part.group_id].complete:
                unanswered.discard(part.group_id)
                yield open_groups.pop(part.group_id).result()
        if unanswered:
            raise Mismatch(f"the teacher at {self._target} ended a call without an answer for {sorted(unanswered)[:5]}")

    async def _upload(self, images: dict[str, EncodedImage], limits: TeacherLimits) -> dict[str, VaopdError]:
        """Makes sure that the teacher has these images. Returns why it refuses those that it refuses, by SHA-256."""
        refused: dict[str, VaopdError] = {}
        unknown = [sha256 for sha256 in images if sha256 not in self._stored]
        if not unknown:
            return refused
        asked = pb.MissingImagesRequest(sha256=unknown)
        answer = await typed(
            self._stub().MissingImages(asked, metadata=self._metadata, timeout=self._timeout_s), self._target
        )
        self._stored.update(set(unknown) - set(answer.sha256))
        sendable = []
        for sha256 in answer.sha256:
            if (size := len(images[sha256].data)) > limits.max_image_bytes:
                refused[sha256] = LimitExceeded(
                    f"image {sha256[:12]}… has {size} bytes, the limit is {limits.max_image_bytes}; "
                    "send a smaller encoding"
                )
            else:
                sendable.append(images[sha256])
        try:
            await self._put(sendable)
        except (InvalidInput, LimitExceeded):
            for image in sendable:  # one of them is refused: find out which
                try:
                    await self._put([image])
                except (InvalidInput, LimitExceeded) as error:
                    refused[image.sha256] = error
        return refused

    async def _put(self, images: Sequence[EncodedImage]) -> None:
        if images:
            call = self._stub().PutImages(
                iter([wire.image_to_pb(image) for image in images]),
                metadata=self._metadata,
                timeout=self._timeout_s,
            )
            answer = await typed(call, self._target)
            self._stored.update(answer.sha256)

    def _request(self, groups: Sequence[ScoreRequest], with_token_texts: bool) -> pb.ScoreGroupsRequest:
        return wire.score_request_to_pb(
            groups,
            job=self._job,
            payload=self._payload,
            top_k=self._top_k,
            degradation=self._degradation,
            tokenizer_fingerprint=self._fingerprint,
            revision=self._description.revision if self._description else "",
            with_token_texts=with_token_texts,
        )

    async def _described(self) -> TeacherDescription:
        return self._description or await self.describe()

    async def _until_answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        patience = Patience(self._patience_s)
        while True:
            try:
                return await typed(ask(), self._target)
            except (Unavailable, Busy) as error:
                await patience.wait(error)

    async def _messages(self, call: Any) -> AsyncIterator[Any]:
        """The messages of a streaming call, whose end the caller may not wait for; errors as the tree's."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        message = await call.read()
                except TimeoutError:
                    raise Unavailable(f"the teacher at {self._target} was silent for {self._timeout_s:g} s") from None
                except grpc.aio.AioRpcError as error:
                    raise error_of(error, self._target) from None
                if message is grpc.aio.EOF:
                    return
                yield message
        finally:
            call.cancel()

    def _stub(self) -> Any:
        if self._channel is None:
            options = channel_options()
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self._target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._tls, options=options)
        return teacher_pb2_grpc.TeacherStub(self._channel)


class SyncTeacherClient:
    """`TeacherClient` for code without an event loop: the same methods, run on a thread of its own."""

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()
        self._client = TeacherClient(target, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def describe(self) -> TeacherDescription:
        return self._run(self._client.describe())

    def head(self) -> Tensor:
        return self._run(self._client.head())

    def score(
        self, groups: Sequence[ScoreRequest], *, with_token_texts: bool = False
    ) -> Iterator[GroupScore | GroupFailure]:
        results = self._client.score(groups, with_token_texts=with_token_texts)

        async def following() -> GroupScore | GroupFailure | None:
            return await anext(results, None)

        try:
            while (result := self._run(following())) is not None:
                yield result
        finally:
            self._run(results.aclose())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _split(groups: Sequence[_Encoded], limits: TeacherLimits) -> Iterator[list[_Encoded]]:
    """Consecutive groups that fit into one call together; a group that doesn't fit goes alone and is refused later."""
    part: list[_Encoded] = []
    size = _ENVELOPE_BYTES
    for group in groups:
        # Ten bytes bound what protobuf adds to each nested message.
        added = group[1].ByteSize() + 10
        if part and (len(part) == limits.max_groups_per_request or size + added > limits.max_message_bytes):
            yield part
            part, size = [], _ENVELOPE_BYTES
        part.append(group)
        size += added
    if part:
        yield part
