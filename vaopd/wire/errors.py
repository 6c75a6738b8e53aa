"""Maps the error tree to gRPC statuses and back, with details in google.rpc's messages.

    reason       ErrorInfo, e.g. IMAGE_REFUSED: the class in `vaopd.errors`, so that the client raises the same one
    field        BadRequest: the path of the wrong field in the request
    retry after  RetryInfo: when a Busy request may be sent again

The server packs them into the trailing metadata `grpc-status-details-bin`, and the client unpacks them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from vaopd.errors import (
    Busy,
    ConfigError,
    ImageRefused,
    InvalidInput,
    LeaseLost,
    LimitExceeded,
    Mismatch,
    NotFound,
    NumericalError,
    PermissionDenied,
    TlsRefused,
    Unauthenticated,
    Unavailable,
    VaopdError,
)
from vaopd.pb import teacher_pb2 as pb

KEY = "grpc-status-details-bin"
DOMAIN = "vaopd"


_CLASSES: tuple[type[VaopdError], ...] = (
    VaopdError,
    InvalidInput,
    ImageRefused,
    LimitExceeded,
    Busy,
    Unauthenticated,
    PermissionDenied,
    Mismatch,
    NotFound,
    LeaseLost,
    Unavailable,
    NumericalError,
    ConfigError,
)
"""The classes with a reason on the wire; any other is sent as its nearest base among these."""


def name_reason(kind: type[VaopdError]) -> str:
    """Returns the nearest class of `_CLASSES` in capitals.

    >>> name_reason(ImageRefused)
    'IMAGE_REFUSED'
    """
    known = next(base for base in kind.__mro__ if base in _CLASSES)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", known.__name__).upper()


_BY_REASON = {name_reason(kind): kind for kind in _CLASSES}


def pack(code: int, error: VaopdError) -> bytes:
    """Returns a serialised google.rpc.Status with `error`'s message and details; `code` is gRPC's number."""
    status = status_pb2.Status(code=code, message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=name_reason(type(error)), domain=DOMAIN))
    if isinstance(error, InvalidInput) and error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Busy):
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(info)
    return status.SerializeToString()


def unpack(metadata: Iterable[tuple[str, Any]], *, message: str, default: type[VaopdError]) -> VaopdError:
    """Returns the error behind a status: a `default`, or the more exact class that the details name.

    Details that another server sends, or none at all, give a `default`.
    """
    found = _Details()
    with contextlib.suppress(DecodeError):
        found = _read(next((value for key, value in metadata if key == KEY), b""))
    if found.retry_after_s is not None and issubclass(Busy, default):
        return Busy(message, found.retry_after_s)
    named = _BY_REASON.get(found.reason or "", default)
    kind = named if issubclass(named, default) and named is not Busy else default
    return kind(message, field=found.field) if issubclass(kind, InvalidInput) else kind(message)


@dataclass(slots=True)
class _Details:
    reason: str | None = None
    field: str | None = None
    retry_after_s: float | None = None


def _read(packed: bytes) -> _Details:
    """Reads the details. Raises DecodeError for bytes that are no google.rpc.Status."""
    found = _Details()
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            found.reason = info.reason if info.domain == DOMAIN else None
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            found.field = violations[0].field if violations else None
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            found.retry_after_s = delay.ToMilliseconds() / 1000
    return found


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
    # The server never chooses these two; gRPC reports them when a server ends in the middle of a call.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.UNKNOWN: Unavailable,
}
_GROUP_ERRORS = {code.value[0]: error for code, error in _ERRORS.items()} | {
    grpc.StatusCode.INTERNAL.value[0]: NumericalError
}
"""By the status number in a GroupError; INTERNAL is the only fault of one group that is the teacher's own."""


def make_error(error: grpc.aio.AioRpcError, target: str) -> VaopdError:
    """Returns the tree's error for a failed call to the teacher at `target`."""
    details = error.details() or error.code().name
    kind = _ERRORS.get(error.code(), VaopdError)
    if kind is Unavailable and (reason := _find_tls_reason(details)):
        return TlsRefused(
            f"TLS with the teacher at {target} failed: {reason}. VAOPD_TLS_CA must name the authority that signed its "
            "certificate, which must be valid now and for this host name"
        )
    if kind is Unavailable:
        return Unavailable(f"the teacher at {target} can't be reached ({details}); is it running?")
    if kind is VaopdError:
        details = f"{error.code().name}: {details}"
    return unpack(error.trailing_metadata() or (), message=details, default=kind)


_TLS_REASONS = (
    (re.compile(r"CERTIFICATE_VERIFY_FAILED: ([\w .,'-]+?)(?:: OK)?$"), r"\1"),
    (re.compile("WRONG_VERSION_NUMBER"), "it speaks plain text"),
    (re.compile("Hostname Verification Check failed"), "its certificate is for another host name"),
    (re.compile(r"handshake failed .*OPENSSL_internal:(\w+)"), r"\1"),
)


def _find_tls_reason(details: str) -> str | None:
    """Returns why gRPC's handshake failed; None where it wasn't TLS. It retries these for ever by itself."""
    for pattern, reason in _TLS_REASONS:
        if found := pattern.search(details):
            return found.expand(reason)
    return None


def group_error_of(error: pb.GroupError) -> VaopdError:
    """Returns the tree's error for one group of a call."""
    kind = _GROUP_ERRORS.get(error.code, VaopdError)
    return unpack([(KEY, error.status_details)], message=error.message, default=kind)


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


def choose_status(error: VaopdError) -> grpc.StatusCode:
    """Returns the status that a call which fails with `error` ends with."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
