"""How the teacher's client speaks gRPC: channel options, and statuses as the error tree."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from vaopd.errors import VaopdError
from vaopd.telemetry import logs, tracing
from vaopd.types import TeacherLimits
from vaopd.wire.errors import make_error

T = TypeVar("T")


def make_channel_options() -> list[tuple[str, Any]]:
    """Returns gRPC's options for a channel to one replica: message size, keep-alive, reconnection."""
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
        # Of the environment, which gRPC would use for the loopback too: the teacher is a neighbour.
        ("grpc.enable_http_proxy", 0),
        # If a name resolves to several servers, a client stays with one, as its images do; `replicas.py` balances.
        ("grpc.service_config", json.dumps(policy)),
    ]


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns a call's metadata: the request's id or one of its own, and its trace, both for the teacher's logs."""
    return ((logs.REQUEST_ID_KEY, logs.request_id.get() or uuid.uuid4().hex), *tracing.make_metadata())


async def await_answer(answer: Awaitable[T], target: str) -> T:
    """Awaits an answer of the teacher at `target`; raises the error tree's error for gRPC's."""
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        raise read_error(error, target) from None


def read_error(error: grpc.aio.AioRpcError, target: str) -> VaopdError:
    """Returns the tree's error for a failed call, with the call's id where the teacher says that its log has it."""
    found = make_error(error, target)
    name = dict(error.trailing_metadata() or ()).get(logs.REQUEST_ID_KEY)
    if isinstance(name, str) and logs.REQUEST_ID.fullmatch(name):
        found.request_id = name
    return found
