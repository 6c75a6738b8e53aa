"""The client of the teacher service; needs no torch. `TeacherClient` is asynchronous, `SyncTeacherClient` its twin.

    async with TeacherClient("127.0.0.1:50051", job="geometry") as teacher:
        head = await teacher.head()
        async for result in teacher.score(groups):
            match result:
                case GroupScore(): ...
                case GroupFailure(group_id=group_id, error=error): ...

Scoring is pure, so whatever was lost with a server or a connection is asked again, of another replica if there is one,
until `timeout_s` pass without a result. Errors are those of `vaopd.errors`: raised when they concern a whole call, in a
GroupFailure when one group.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc

from vaopd.client.answers import GroupAssembly, GroupFailure, TensorAssembly
from vaopd.client.channel import Patience, carried
from vaopd.client.replicas import Failures, Replica, Replicas
from vaopd.errors import (
    Busy,
    InvalidInput,
    LimitExceeded,
    NotFound,
    TeacherFault,
    Unavailable,
    VaopdError,
)
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import (
    Degradation,
    GroupScore,
    PayloadKind,
    ScoreRequest,
    TeacherDescription,
    TeacherLimits,
    Tensor,
)
from vaopd.wire.errors import error_of, group_error_of
from vaopd.wire.teacher import score_request_to_pb, tokens_of

__all__ = ["ClientOptions", "GroupFailure", "SyncTeacherClient", "TeacherClient"]

T = TypeVar("T")
_Encoded = tuple[ScoreRequest, pb.PromptGroup]

_ENVELOPE_BYTES = 4096
_OTHERS_S = 1.0
"""How long `describe` waits for the replicas beyond the first."""


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
        """`target`: host:port, or several with commas between them: replicas, among which calls are balanced.

        `timeout_s`: the longest time without any result before it gives up.
        `patience_s`: how long it asks a teacher again that is busy or away, `timeout_s` unless it is given.
        `job`: whose work it is; None: the API key's own job, or "default" without a key. `api_key` and `tls`: see
        `vaopd.client.credentials.from_environment`; without `tls` all of it, the key too, travels in plain text.
        `tokenizer_fingerprint`: the student's; a teacher with another vocabulary refuses. `top_k`: for payload "top_k".
        """
        self._job = job if job is not None else "" if api_key is not None else "default"
        self._timeout_s = timeout_s
        self._patience_s = timeout_s if patience_s is None else patience_s
        self._degradation = degradation
        self._payload = payload
        self._top_k = top_k
        self._fingerprint = tokenizer_fingerprint
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._replicas = Replicas(target, tls=tls, metadata=self._metadata, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._replicas.close()

    async def describe(self) -> TeacherDescription:
        """Asks the teacher who it is. From then on another revision is refused, until the next describe.

        Replicas that are up have to be alike; the others are compared when their turn comes.
        """
        self._replicas.forget()
        description = await self._until_answered(self._replicas.introduce)
        await self._replicas.introduce_others(timeout_s=min(_OTHERS_S, self._timeout_s))
        return description

    async def head(self) -> Tensor:
        """The LM head over the logical vocabulary, (V, D), in the teacher's dtype; what the hidden payload needs."""

        async def fetch(replica: Replica) -> Tensor:
            description = await self._replicas.introduce(replica)
            request = pb.GetHeadRequest(revision=description.revision)
            head: TensorAssembly | None = None
            async for chunk in self._messages(replica.stub.GetHead(request, metadata=self._metadata), replica.target):
                head = head or TensorAssembly(chunk.tensor)
                head.add(chunk)
            if head is None or not head.complete:
                raise TeacherFault(
                    f"the teacher at {replica.target} ended its head too early; are its versions the same?"
                )
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
        uploaded_again: set[tuple[Replica, str]] = set()
        patience, failures = Patience(self._patience_s), Failures()
        while waiting:
            replica = await self._replicas.pick(failures)
            try:
                async with aclosing(self._attempt(replica, tuple(waiting.values()), with_token_texts)) as results:
                    async for result in results:
                        failure = result.error if isinstance(result, GroupFailure) else None
                        if isinstance(failure, Unavailable):
                            raise failure
                        again = (replica, result.group_id)
                        if isinstance(failure, NotFound) and again not in uploaded_again:
                            # It restarted, or dropped the image to make room: once more, with its images.
                            uploaded_again.add(again)
                            replica.stored.difference_update(i.sha256 for i in waiting[result.group_id].images)
                            continue
                        del waiting[result.group_id]
                        yield result
                        patience.renew()
            except (Unavailable, Busy) as error:
                await self._after(replica, error, failures, patience)

    async def _attempt(
        self, replica: Replica, groups: Sequence[ScoreRequest], with_token_texts: bool
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Sends each group once."""
        replica.groups += len(groups)
        try:
            limits = (await self._replicas.introduce(replica)).limits
            encoded: list[_Encoded] = []
            for group in groups:
                try:
                    encoded.append((group, self._request([group], with_token_texts).groups[0]))
                except InvalidInput as error:
                    yield GroupFailure(group_id=group.group_id, error=error)
            for part in _split(encoded, limits):
                async with aclosing(self._send(replica, part, limits, with_token_texts)) as results:
                    async for result in results:
                        yield result
        finally:
            replica.groups -= len(groups)

    async def _send(
        self, replica: Replica, part: Sequence[_Encoded], limits: TeacherLimits, with_token_texts: bool
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Groups that fit into one call, and their images before them."""
        refused = await replica.upload({i.sha256: i for group, _ in part for i in group.images}, limits)
        request = self._request([], with_token_texts)
        for group, message in part:
            refusal = next((refused[i.sha256] for i in group.images if i.sha256 in refused), None)
            refusal = refusal or _too_large(message, limits)
            if refusal is None:
                request.groups.append(message)
            else:
                yield GroupFailure(group_id=group.group_id, error=refusal)
        if request.groups:
            called = self._call(replica, request, {group.group_id: group for group, _ in part})
            async with aclosing(called) as results:
                async for result in results:
                    yield result

    async def _call(
        self, replica: Replica, request: pb.ScoreGroupsRequest, groups: dict[str, ScoreRequest]
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """One ScoreGroups call."""
        unanswered = {group.group_id for group in request.groups}
        open_groups: dict[str, GroupAssembly] = {}
        call = replica.stub.ScoreGroups(request, metadata=(*self._metadata, *carried()))
        async for message in self._messages(call, replica.target):
            part = getattr(message, message.WhichOneof("item"))
            if part.group_id not in unanswered:
                raise TeacherFault(
                    f"the teacher at {replica.target} answered group {part.group_id!r}, which wasn't asked"
                )
            if isinstance(part, pb.GroupError):
                unanswered.discard(part.group_id)
                yield GroupFailure(group_id=part.group_id, error=group_error_of(part))
                continue
            if isinstance(part, pb.GroupScore):
                open_groups[part.group_id] = GroupAssembly(part, groups[part.group_id], self._payload)
            elif part.group_id in open_groups:
                open_groups[part.group_id].add(part)
            else:
                raise TeacherFault(f"the teacher sent a payload for group {part.group_id!r} before its score")
            if open_groups[part.group_id].complete:
                unanswered.discard(part.group_id)
                yield open_groups.pop(part.group_id).result()
        if unanswered:
            missing = sorted(unanswered)[:5]
            raise TeacherFault(f"the teacher at {replica.target} ended a call without an answer for {missing}")

    def _request(self, groups: Sequence[ScoreRequest], with_token_texts: bool) -> pb.ScoreGroupsRequest:
        return score_request_to_pb(
            groups,
            job=self._job,
            payload=self._payload,
            top_k=self._top_k,
            degradation=self._degradation,
            tokenizer_fingerprint=self._fingerprint,
            revision=known.revision if (known := self._replicas.description) else "",
            with_token_texts=with_token_texts,
        )

    async def _until_answered(self, ask: Callable[[Replica], Awaitable[T]]) -> T:
        patience, failures = Patience(self._patience_s), Failures()
        while True:
            replica = await self._replicas.pick(failures)
            try:
                return await ask(replica)
            except (Unavailable, Busy) as error:
                await self._after(replica, error, failures, patience)

    async def _after(self, replica: Replica, error: VaopdError, failures: Failures, patience: Patience) -> None:
        """What a failed attempt leaves: returns when it makes sense to try the next one."""
        if isinstance(error, Unavailable):
            replica.was_lost(error)
        failures[replica] = error
        await self._replicas.after(failures, patience)

    async def _messages(self, call: Any, target: str) -> AsyncIterator[Any]:
        """The messages of a streaming call, whose end the caller may not wait for; errors as the tree's."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        message = await call.read()
                except TimeoutError:
                    raise Unavailable(f"the teacher at {target} was silent for {self._timeout_s:g} s") from None
                except grpc.aio.AioRpcError as error:
                    raise error_of(error, target) from None
                if message is grpc.aio.EOF:
                    return
                yield message
        finally:
            call.cancel()


class SyncTeacherClient:
    """`TeacherClient` for code without an event loop: the same methods, run on a thread of its own."""

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
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
        """Whoever still waits for an answer, on another thread, gets Unavailable now."""
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


def _split(groups: Sequence[_Encoded], limits: TeacherLimits) -> Iterator[list[_Encoded]]:
    """Consecutive groups that fit into one call together; a group that doesn't fit goes alone and is refused later."""
    part: list[_Encoded] = []
    size, tokens = _ENVELOPE_BYTES, 0
    for group in groups:
        # Ten bytes bound what protobuf adds to each nested message.
        added, more = group[1].ByteSize() + 10, tokens_of(group[1])
        fits = size + added <= limits.max_message_bytes and tokens + more <= limits.max_tokens_per_request
        if part and (not fits or len(part) == limits.max_groups_per_request):
            yield part
            part, size, tokens = [], _ENVELOPE_BYTES, 0
        part.append(group)
        size, tokens = size + added, tokens + more
    if part:
        yield part


def _too_large(group: pb.PromptGroup, limits: TeacherLimits) -> LimitExceeded | None:
    """Why a group fits into no call at all, if so."""
    if (size := group.ByteSize() + _ENVELOPE_BYTES) > limits.max_message_bytes:
        return LimitExceeded(
            f"group {group.group_id!r} takes {size} bytes, the limit of a message is {limits.max_message_bytes}; "
            "send fewer rollouts in a group"
        )
    if (tokens := tokens_of(group)) > limits.max_tokens_per_request:
        return LimitExceeded(
            f"group {group.group_id!r} holds {tokens} tokens, the limit of a call is {limits.max_tokens_per_request}; "
            "send fewer rollouts in a group"
        )
    return None
