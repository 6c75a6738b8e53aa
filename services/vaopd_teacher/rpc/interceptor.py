"""An interceptor that every call passes: authenticates it, counts it, traces it, and maps its errors to statuses.

A handler raises; the interceptor aborts the call with the status, the error's own message and its details. An exception
outside the error tree is a fault of this program: it is logged with its traceback, and the client reads "internal
error" only. The caller is identified before anything of the request is parsed. Each refused call is a line of the
audit log.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from vaopd.errors import Busy, InvalidInput, QueueFull, VaopdError
from vaopd.telemetry import logs, tracing
from vaopd.telemetry.logs import REQUEST_ID, REQUEST_ID_KEY
from vaopd.wire import errors as wire_errors
from vaopd.wire.errors import choose_status
from vaopd_teacher.intake.prepare import check_id
from vaopd_teacher.rpc.access import Access

log = logging.getLogger(__name__)
audit = logging.getLogger("vaopd.audit")
"""One line per refused call: job, method, status, peer, id. Never a key, nor any part of the request."""

_OPEN = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
"""Methods that need no key, for probes and load balancers."""


def name_reason(error: Exception) -> str:
    """Returns the `reason` label of a refused call."""
    if isinstance(error, QueueFull):
        return "queue_full"
    if isinstance(error, Busy):
        return "quota"
    return choose_status(error).name.lower() if isinstance(error, VaopdError) else "internal"


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for bytes that can't be parsed as the method's request."""

    size_bytes: int
    message_name: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler and the parsing of its request: gRPC itself would answer malformed bytes with INTERNAL.

    Counts the calls of `service` in progress, so that a draining server knows when they are done; a health Watch, which
    never ends by itself, is not waited for.
    """

    def __init__(
        self,
        service: str,
        access: Access,
        *,
        check_room: Callable[[], object],
        on_refused: Callable[[str | None, str], object],
    ) -> None:
        """`check_room` raises when no ScoreGroups call fits now: then it is refused before its request is read.

        `on_refused` is called with the job, None if unknown, and the reason of each refused call.
        """
        self._access = access
        self._check_room = check_room
        self._with_work = f"/{service}/ScoreGroups"
        self._on_refused = on_refused
        self._counted = f"/{service}/"
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Waits until no call of the service is in progress."""
        await self._idle.wait()

    @contextmanager
    def _count(self, method: str) -> Iterator[None]:
        one = method.startswith(self._counted)
        self._in_progress += one
        if one:
            self._idle.clear()
        try:
            yield
        finally:
            self._in_progress -= one
            if self._in_progress == 0:
                self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wraps a method's handler, or replaces it by a refusal."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        caller: str | None = None
        if method not in _OPEN:
            try:
                caller = self._access.identify(handler_call_details.invocation_metadata)
                if method == self._with_work:
                    self._check_room()
            except VaopdError as error:
                return self._make_refusing_handler(method, error, job=caller)
        call = _CallContext(handler_call_details, caller, self._access)
        parse = _tolerate_malformed(handler.request_deserializer)
        serialise = handler.response_serializer
        if handler.stream_stream:
            stream = self._guard_stream(handler.stream_stream, call)
            return grpc.stream_stream_rpc_method_handler(stream, parse, serialise)
        if handler.unary_stream:
            stream = self._guard_stream(handler.unary_stream, call)
            return grpc.unary_stream_rpc_method_handler(stream, parse, serialise)
        if handler.stream_unary:
            unary = self._guard_unary(handler.stream_unary, call)
            return grpc.stream_unary_rpc_method_handler(unary, parse, serialise)
        return grpc.unary_unary_rpc_method_handler(self._guard_unary(handler.unary_unary, call), parse, serialise)

    def _make_refusing_handler(self, method: str, error: VaopdError, *, job: str | None) -> grpc.RpcMethodHandler:
        """Returns a handler that answers any call with a status, without reading its messages."""

        async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
            await self._abort(context, method, error, job=job)

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _abort(
        self, context: grpc.aio.ServicerContext, method: str, error: Exception, *, job: str | None
    ) -> None:
        if isinstance(error, grpc.aio.AbortError):  # the handler has answered with a status itself
            raise error
        self._on_refused(job, name_reason(error))
        name = logs.request_id.get() or _name_request(context.invocation_metadata())
        metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, name)]
        if isinstance(error, VaopdError):
            code, message = choose_status(error), str(error)
            metadata.append((wire_errors.KEY, wire_errors.pack(code.value[0], error)))
        else:
            log.error("request %s: %s failed", name, method, exc_info=error)
            code, message = grpc.StatusCode.INTERNAL, "internal error"
        # The message stays out of the log: it may quote the request.
        job = job[:64] if job else None
        refused = (repr(job) if job else "-", method, code.name, context.peer(), name)
        audit.info("refused: job %s, %s, %s, %s, request %s", *refused, extra=logs.make_fields(job=job))
        return await context.abort(code, message, tuple(metadata))

    def _guard_unary(
        self, behaviour: Callable[..., Awaitable[Any]], call: _CallContext
    ) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            end = call.begin()
            with self._count(call.method):
                try:
                    return await behaviour(call.check(request), context)
                except Exception as error:
                    return await self._abort(context, call.method, call.locate(error), job=call.job)
                finally:
                    end()

        return answer

    def _guard_stream(self, behaviour: Callable[..., Any], call: _CallContext) -> Callable[..., AsyncIterator[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            end = call.begin()
            with self._count(call.method):
                try:
                    answers = behaviour(call.check(request), context)
                    if hasattr(answers, "__aiter__"):
                        async with aclosing(answers) as items:
                            async for item in items:
                                yield item
                    else:  # the handler writes to the context itself, as the health service's Watch does
                        await answers
                except Exception as error:
                    await self._abort(context, call.method, call.locate(error), job=call.job)
                finally:
                    end()

        return answer


class _CallContext:
    """One call's method, job, trace and progress, while its handler runs."""

    def __init__(self, details: grpc.HandlerCallDetails, caller: str | None, access: Access) -> None:
        self.method = details.method
        self.job = caller
        self._metadata = details.invocation_metadata
        self._read = 0
        self._access = access

    def begin(self) -> Callable[[], None]:
        """Sets the request id for the log lines of this task, and opens a span; returns the function that ends it."""
        logs.request_id.set(_name_request(self._metadata))
        return tracing.begin(self.method, parent=tracing.read_parent(self._metadata), job=self.job)

    def check(self, request: Any) -> Any:
        """Returns the request, or the stream of them; raises an error for a malformed or forbidden one."""
        return self._check_each(request) if hasattr(request, "__aiter__") else self._check_message(request)

    async def _check_each(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._read += 1
            yield self._check_message(request)

    def locate(self, error: Exception) -> Exception:
        """Adds the index of a stream's wrong message, unless the error names a field; streams are read in order."""
        if isinstance(error, InvalidInput) and error.field is None and self._read:
            error.field = f"[{self._read - 1}]"
        return error

    def _check_message(self, request: Any) -> Any:
        if isinstance(request, _Malformed):
            raise InvalidInput(f"{request.size_bytes} bytes are not a {request.message_name} message")
        check_id("job", getattr(request, "job", ""), field="job")
        self._access.check_job(self.job, request)
        self.job = getattr(request, "job", None) or self.job
        return request


def _name_request(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """Returns the id that a client gave its call, or a new one."""
    name = dict(metadata or ()).get(REQUEST_ID_KEY)
    return name if isinstance(name, str) and REQUEST_ID.fullmatch(name) else uuid.uuid4().hex


def _tolerate_malformed(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            owner = getattr(deserializer, "__self__", None)
            return _Malformed(len(data), getattr(owner, "__name__", "request"))

    return parse
