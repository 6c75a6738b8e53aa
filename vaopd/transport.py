"""How the teacher's client speaks gRPC: channel options, statuses as the error tree, and waiting between attempts."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from vaopd import logs, status, tracing
from vaopd.errors import (
    Busy,
    InvalidInput,
    LimitExceeded,
    Mismatch,
    NotFound,
    NumericalError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VaopdError,
)
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import TeacherLimits

T = TypeVar("T")

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0

_ERRORS: dict[grpc.StatusCode, type[VaopdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: Mismatch,
    grpc.StatusCode.UNIMPLEMENTED: Mismatch,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    # The server never chooses these two; gRPC reports so a server that ended in the middle of a call.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.UNKNOWN: Unavailable,
}
_GROUP_ERRORS = {code.value[0]: error for code, error in _ERRORS.items()} | {
    grpc.StatusCode.INTERNAL.value[0]: NumericalError
}
"""By the status number in a GroupError; INTERNAL is the only fault of one group that is the teacher's own."""


class Patience:
    """Waits longer and longer between attempts, and no longer than `timeout_s` since the last result."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.renew()

    def renew(self) -> None:
        self._deadline = time.monotonic() + self._timeout_s
        self._delay_s = _FIRST_DELAY_S

    async def wait(self, error: VaopdError) -> None:
        """Raises `error` when the time is over."""
        delay_s = error.retry_after_s if isinstance(error, Busy) else self._delay_s
        if time.monotonic() + delay_s > self._deadline:
            raise error
        # Jitter, so that the clients of a server that comes back don't all knock at once.
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
        self._delay_s = min(2 * self._delay_s, _LONGEST_DELAY_S)


def channel_options() -> list[tuple[str, Any]]:
    size = TeacherLimits().max_message_bytes
    policy: dict[str, Any] = {"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": True}}]}
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        # A frozen server is noticed within 15 s; gRPC's own ping time-out alone would make that 70 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
        # Where a name resolves to several servers a client stays with one, as its images do; `vaopd.replicas` balances.
        ("grpc.service_config", json.dumps(policy)),
    ]


def carried() -> tuple[tuple[str, str], ...]:
    """The metadata by which a call is found again on the other side: the request that it belongs to, and the trace."""
    name = logs.request_id.get()
    return (*(() if name is None else ((logs.REQUEST_ID_KEY, name),)), *tracing.metadata())


async def typed(answer: Awaitable[T], target: str) -> T:
    """An answer, or the tree's error for gRPC's."""
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        raise error_of(error, target) from None


def error_of(error: grpc.aio.AioRpcError, target: str) -> VaopdError:
    details = error.details() or error.code().name
    kind = _ERRORS.get(error.code(), VaopdError)
    if kind is Unavailable:
        return Unavailable(f"the teacher at {target} can't be reached ({details}); is it running?")
    if kind is VaopdError:
        details = f"{error.code().name}: {details}"
    return status.unpack(error.trailing_metadata() or (), message=details, default=kind)


def group_error_of(error: pb.GroupError) -> VaopdError:
    kind = _GROUP_ERRORS.get(error.code, VaopdError)
    return status.unpack([(status.KEY, error.status_details)], message=error.message, default=kind)
