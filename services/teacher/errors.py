"""The error tree ↔ gRPC statuses, in the one place that maps it: an interceptor that every call passes.

A handler raises; the interceptor aborts the call with the status and the error's own message. What isn't of the tree is
a fault of ours: it is logged with its traceback here and the client reads "internal error", nothing more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from vaopd.errors import (
    ConfigError,
    InvalidInput,
    LeaseLost,
    LimitExceeded,
    Mismatch,
    NotFound,
    NumericalError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VaopdError,
)

log = logging.getLogger(__name__)

RETRY_AFTER_KEY = "retry-after-ms"
"""Trailing metadata of a call that was refused only because there is no room now."""

_STATUS: tuple[tuple[type[VaopdError], grpc.StatusCode], ...] = (
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Mismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (LeaseLost, grpc.StatusCode.ABORTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (NumericalError, grpc.StatusCode.INTERNAL),
)


class QueueFull(LimitExceeded):
    """No room now; the same request may be sent again a little later."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def status_of(error: VaopdError) -> grpc.StatusCode:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Bytes that are not the message that the method takes."""

    size_bytes: int
    message_name: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler, its request's parsing included: gRPC itself would answer malformed bytes with INTERNAL.

    It also counts the calls of `service` in progress, so that a server that drains knows when they are done; a health
    Watch, which never ends by itself, is no reason to wait.
    """

    def __init__(self, service: str) -> None:
        self._counted = f"/{service}/"
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
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
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return handler
        parse = _tolerant(handler.request_deserializer)
        method = handler_call_details.method
        serialise = handler.response_serializer
        if handler.stream_stream:
            stream = self._guard_stream(handler.stream_stream, method)
            return grpc.stream_stream_rpc_method_handler(stream, parse, serialise)
        if handler.unary_stream:
            stream = self._guard_stream(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(stream, parse, serialise)
        if handler.stream_unary:
            unary = self._guard_unary(handler.stream_unary, method)
            return grpc.stream_unary_rpc_method_handler(unary, parse, serialise)
        return grpc.unary_unary_rpc_method_handler(self._guard_unary(handler.unary_unary, method), parse, serialise)

    def _guard_unary(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with self._count(method):
                try:
                    return await behaviour(_incoming(request), context)
                except Exception as error:
                    return await _abort(context, method, error)

        return call

    def _guard_stream(self, behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            with self._count(method):
                try:
                    answer = behaviour(_incoming(request), context)
                    if hasattr(answer, "__aiter__"):
                        async with aclosing(answer) as items:
                            async for item in items:
                                yield item
                    else:  # a handler that writes to the context itself, as the health service's Watch does
                        await answer
                except Exception as error:
                    await _abort(context, method, error)

        return call


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            owner = getattr(deserializer, "__self__", None)
            return _Malformed(len(data), getattr(owner, "__name__", "request"))

    return parse


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidInput(f"{request.size_bytes} bytes are not a {request.message_name} message")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _incoming(request: Any) -> Any:
    return _checked_stream(request) if hasattr(request, "__aiter__") else _checked(request)


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):  # a handler that has answered with a status itself
        raise error
    if not isinstance(error, VaopdError):
        log.error("%s failed", method, exc_info=error)
        return await context.abort(grpc.StatusCode.INTERNAL, "internal error")
    status = status_of(error)
    # The message stays out of the log: it may quote what the client sent.
    log.info("%s refused: %s (%s)", method, status.name, type(error).__name__)
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, QueueFull):
        metadata = ((RETRY_AFTER_KEY, str(int(error.retry_after_s * 1000))),)
    return await context.abort(status, str(error), metadata)
