"""How the teacher's client speaks gRPC: channel options, statuses as the error tree, and waiting between attempts."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from vaopd.errors import (
    Busy,
    VaopdError,
)
from vaopd.telemetry import logs, tracing
from vaopd.types import TeacherLimits
from vaopd.wire.errors import error_of

T = TypeVar("T")

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0


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
        # Where a name resolves to several servers a client stays with one, as its images do; `replicas.py` balances.
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
