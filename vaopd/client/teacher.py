"""The asynchronous client of the teacher service; needs no torch. `SyncTeacherClient` is its twin.

    async with TeacherClient("127.0.0.1:50051", job="geometry") as teacher:
        head = await teacher.head()
        async for result in teacher.score(groups):
            match result:
                case GroupScore(): ...
                case GroupFailure(group_id=group_id, error=error): ...

Scoring is pure: requests lost with a server or a connection are sent again, to another replica if there is one, until
`patience_s` pass without a result. Errors are those of `vaopd.errors`: raised when they concern a whole call, in a
GroupFailure when they concern one group.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self, TypedDict, TypeVar

import grpc

from vaopd.client.answers import GroupAssembly, TensorAssembly
from vaopd.client.channel import read_error
from vaopd.client.replicas import Failures, Replica, Replicas
from vaopd.columns import columns_on_request
from vaopd.errors import (
    Busy,
    InvalidInput,
    LimitExceeded,
    NotFound,
    TeacherFault,
    Unavailable,
    VaopdError,
)
from vaopd.files.secret import parse_api_key
from vaopd.net.backoff import Backoff, check_timeout
from vaopd.pb import teacher_pb2 as pb
from vaopd.telemetry.logs import REQUEST_ID_KEY
from vaopd.types import (
    Degradation,
    GroupFailure,
    GroupScore,
    PayloadKind,
    ScoreRequest,
    TeacherDescription,
    TeacherLimits,
    Tensor,
)
from vaopd.wire.errors import group_error_of
from vaopd.wire.teacher import count_tokens, prompt_group_to_pb, score_request_to_pb

T = TypeVar("T")

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

        `timeout_s`: the longest time without a message of a call before it counts as lost.
        `patience_s`: how long calls to a busy or unreachable teacher are repeated; `timeout_s` unless it is given.
        `job`: the job's name; None means the API key's own job, or "default" without a key. `api_key` and `tls`: see
        `vaopd.client.from_environment`; without `tls` everything, the key too, travels in plain text.
        `tokenizer_fingerprint`: the student's; a teacher with another vocabulary refuses. `top_k`: for payload "top_k".
        """
        self._job = job if job is not None else "" if api_key is not None else "default"
        self._timeout_s = check_timeout("timeout_s", timeout_s)
        self._patience_s = timeout_s if patience_s is None else patience_s and check_timeout("patience_s", patience_s)
        self._degradation = degradation
        self._payload = payload
        self._top_k = top_k
        self._fingerprint = tokenizer_fingerprint
        key = api_key if api_key is None else parse_api_key(api_key, origin="api_key")
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        self._replicas = Replicas(target, tls=tls, metadata=metadata, timeout_s=timeout_s, job=self._job)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._replicas.close()

    async def describe(self) -> TeacherDescription:
        """Returns the teacher's description. From then on another revision is refused, until the next `describe`.

        Replicas that are up have to match; the others are compared when their turn comes. Raises TeacherFault for one
        that differs, and Unavailable or Busy when no replica answers.
        """
        self._replicas.forget()
        description = await self._ask_until_answered(self._replicas.introduce)
        await self._replicas.introduce_others(timeout_s=min(_OTHERS_S, self._timeout_s))
        return description

    async def head(self) -> Tensor:
        """Returns the LM head over the logical vocabulary, (V, D), in the teacher's dtype; hidden payloads need it.

        Raises Mismatch where the backend has none to give, TeacherFault for an incomplete one.
        """

        async def fetch(replica: Replica) -> Tensor:
            description = await self._replicas.introduce(replica)
            request = pb.GetHeadRequest(revision=description.revision)
            head: TensorAssembly | None = None
            async for chunk in self._read_messages(
                replica.stub.GetHead(request, metadata=replica.metadata()), replica.target
            ):
                head = head or TensorAssembly(chunk.tensor, rows=description.vocab_size)
                head.add(chunk)
            if head is None or not head.complete:
                raise TeacherFault(
                    f"the teacher at {replica.target} ended its head too early; are its versions the same?"
                )
            return head.make_tensor()

        return await self._ask_until_answered(fetch)

    async def score(
        self, groups: Sequence[ScoreRequest], *, with_token_texts: bool = False, columns: Sequence[str] = ()
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Yields one result per group, as soon as it has arrived. Raises an error that concerns all groups.

        Images that the teacher lacks are uploaded first, and again when it dropped them before they were read, for as
        long as `patience_s` allows. What doesn't fit into one call is sent in several.
        `columns`: names of further columns to compute, see `vaopd.columns.COLUMNS`. Raises Mismatch when the teacher
        can't compute one of them.
        """
        for name in columns:
            if name not in columns_on_request():
                known = ", ".join(columns_on_request()) or "none"
                raise InvalidInput(f"column {name!r} can't be asked for; on request there is {known}", field="columns")
        waiting = {group.group_id: group for group in groups}
        if len(waiting) < len(groups):
            raise InvalidInput("two groups have the same group_id; ids must be unique among the groups scored together")
        uploads: Counter[tuple[Replica, str]] = Counter()
        backoff, failures = Backoff(self._patience_s), Failures()
        while waiting:
            replica = await self._replicas.pick(failures)
            dropped: dict[str, NotFound] = {}
            try:
                attempt = self._attempt(replica, dict(waiting), with_token_texts=with_token_texts, columns=columns)
                async with aclosing(attempt) as results:
                    async for result in results:
                        failure = result.error if isinstance(result, GroupFailure) else None
                        if isinstance(failure, Unavailable):
                            raise failure
                        if isinstance(failure, NotFound) and (images := waiting[result.group_id].images):
                            # It restarted, or dropped the image to make room: upload the images again.
                            dropped[result.group_id] = failure
                            replica.stored.difference_update(image.sha256 for image in images)
                            continue
                        del waiting[result.group_id]
                        yield result
                        backoff.renew()
            except (Unavailable, Busy) as error:
                await self._recover(replica, error, failures, backoff)
                continue
            uploads.update((replica, group_id) for group_id in dropped)
            try:
                if any(uploads[replica, group_id] > 1 for group_id in dropped):
                    await asyncio.sleep(backoff.delay_s(NotFound("")))
            except NotFound:
                for group_id, missing in dropped.items():
                    del waiting[group_id]
                    times = f"it was uploaded {uploads[replica, group_id]} times and dropped before it was read"
                    room = "the teacher needs more room for images ([teacher.images] encoded_bytes)"
                    yield GroupFailure(group_id=group_id, error=NotFound(f"{missing}; {times}: {room}"))

    async def _attempt(
        self, replica: Replica, groups: Mapping[str, ScoreRequest], *, with_token_texts: bool, columns: Sequence[str]
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Sends each group once; `groups` by their ids."""
        replica.groups += len(groups)
        try:
            description = await self._replicas.introduce(replica)
            settings = score_request_to_pb(
                (),
                job=self._job,
                payload=self._payload,
                top_k=self._top_k,
                degradation=self._degradation,
                tokenizer_fingerprint=self._fingerprint,
                revision=description.revision,
                with_token_texts=with_token_texts,
                columns=columns,
            )
            messages: list[pb.PromptGroup] = []
            for group in groups.values():
                try:
                    messages.append(prompt_group_to_pb(group))
                except InvalidInput as error:
                    yield GroupFailure(group_id=group.group_id, error=error)
            for part in _split(messages, description.limits):
                async with aclosing(self._send(replica, part, groups, description.limits, settings)) as results:
                    async for result in results:
                        yield result
        finally:
            replica.groups -= len(groups)

    async def _send(
        self,
        replica: Replica,
        part: Sequence[pb.PromptGroup],
        groups: Mapping[str, ScoreRequest],
        limits: TeacherLimits,
        settings: pb.ScoreGroupsRequest,
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Uploads the images of groups that fit into one call, then sends them; `settings`: the call without groups."""
        refused = await replica.upload({i.sha256: i for m in part for i in groups[m.group_id].images}, limits)
        request = pb.ScoreGroupsRequest()
        request.CopyFrom(settings)
        for message in part:
            images = groups[message.group_id].images
            refusal = next((refused[i.sha256] for i in images if i.sha256 in refused), None)
            refusal = refusal or _check_size(message, limits)
            if refusal is None:
                request.groups.append(message)
            else:
                yield GroupFailure(group_id=message.group_id, error=refusal)
        if request.groups:
            async with aclosing(self._call(replica, request, groups)) as results:
                async for result in results:
                    yield result

    async def _call(
        self, replica: Replica, request: pb.ScoreGroupsRequest, groups: Mapping[str, ScoreRequest]
    ) -> AsyncGenerator[GroupScore | GroupFailure, None]:
        """Makes one ScoreGroups call."""
        unanswered = {group.group_id for group in request.groups}
        open_groups: dict[str, GroupAssembly] = {}
        metadata = replica.metadata()
        call = replica.stub.ScoreGroups(request, metadata=metadata)
        async for message in self._read_messages(call, replica.target):
            part = getattr(message, message.WhichOneof("item"))
            if part.group_id not in unanswered:
                raise TeacherFault(
                    f"the teacher at {replica.target} answered group {part.group_id!r}, which wasn't asked for"
                )
            if isinstance(part, pb.GroupError):
                unanswered.discard(part.group_id)
                refusal = group_error_of(part)
                refusal.request_id = dict(metadata)[REQUEST_ID_KEY]
                yield GroupFailure(group_id=part.group_id, error=refusal)
                continue
            if isinstance(part, pb.GroupScore):
                asked = groups[part.group_id]
                open_groups[part.group_id] = GroupAssembly(part, asked, self._payload, request.columns)
            elif part.group_id in open_groups:
                open_groups[part.group_id].add(part)
            else:
                raise TeacherFault(f"the teacher sent a payload for group {part.group_id!r} before its score")
            if open_groups[part.group_id].complete:
                unanswered.discard(part.group_id)
                yield open_groups.pop(part.group_id).make_result()
        if unanswered:
            missing = sorted(unanswered)[:5]
            raise TeacherFault(f"the teacher at {replica.target} ended a call without an answer for {missing}")

    async def _ask_until_answered(self, ask: Callable[[Replica], Awaitable[T]]) -> T:
        backoff, failures = Backoff(self._patience_s), Failures()
        while True:
            replica = await self._replicas.pick(failures)
            try:
                return await ask(replica)
            except (Unavailable, Busy) as error:
                await self._recover(replica, error, failures, backoff)

    async def _recover(self, replica: Replica, error: VaopdError, failures: Failures, backoff: Backoff) -> None:
        """Notes a failed attempt and waits until the next one."""
        if isinstance(error, Unavailable):
            error = await replica.explain(error)
            replica.mark_lost(error)
        failures[replica] = error
        await self._replicas.pause(failures, backoff)

    async def _read_messages(self, call: Any, target: str) -> AsyncIterator[Any]:
        """Yields the messages of a streaming call; raises the tree's errors, and Unavailable after a silence.

        Cancels the call when its consumer stops early.
        """
        try:
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        message = await call.read()
                except TimeoutError:
                    raise Unavailable(f"the teacher at {target} was silent for {self._timeout_s:g} s") from None
                except grpc.aio.AioRpcError as error:
                    raise read_error(error, target) from None
                if message is grpc.aio.EOF:
                    return
                yield message
        finally:
            call.cancel()


def _split(groups: Sequence[pb.PromptGroup], limits: TeacherLimits) -> Iterator[list[pb.PromptGroup]]:
    """Yields consecutive groups that fit into one call; a group that fits into none goes alone and is refused later."""
    part: list[pb.PromptGroup] = []
    size, tokens = _ENVELOPE_BYTES, 0
    for group in groups:
        # Ten bytes bound what protobuf adds to each nested message.
        added, more = group.ByteSize() + 10, count_tokens(group)
        fits = size + added <= limits.max_message_bytes and tokens + more <= limits.max_tokens_per_request
        if part and (not fits or len(part) == limits.max_groups_per_request):
            yield part
            part, size, tokens = [], _ENVELOPE_BYTES, 0
        part.append(group)
        size, tokens = size + added, tokens + more
    if part:
        yield part


def _check_size(group: pb.PromptGroup, limits: TeacherLimits) -> LimitExceeded | None:
    """Returns an error for a group that fits into no call."""
    if (size := group.ByteSize() + _ENVELOPE_BYTES) > limits.max_message_bytes:
        return LimitExceeded(
            f"group {group.group_id!r} takes {size} bytes, the limit of a message is {limits.max_message_bytes}; "
            "send fewer rollouts in a group"
        )
    if (tokens := count_tokens(group)) > limits.max_tokens_per_request:
        return LimitExceeded(
            f"group {group.group_id!r} holds {tokens} tokens, the limit of a call is {limits.max_tokens_per_request}; "
            "send fewer rollouts in a group"
        )
    return None
