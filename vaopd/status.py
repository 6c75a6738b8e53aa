"""An error's details on the wire, as google.rpc defines them: what gRPC's status and text leave out.

    reason       ErrorInfo, e.g. IMAGE_REFUSED: the class in `vaopd.errors`, so that the client raises the same one
    field        BadRequest, the path of what is wrong in the request
    retry after  RetryInfo, of what is refused only for now

The server packs, the client unpacks; they travel in the trailing metadata `grpc-status-details-bin`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from vaopd import errors
from vaopd.errors import Busy, InvalidInput, VaopdError

KEY = "grpc-status-details-bin"
DOMAIN = "vaopd"


def _classes(kind: type[VaopdError] = VaopdError) -> Iterator[type[VaopdError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _classes(child)


def reason_of(kind: type[VaopdError]) -> str:
    """The nearest class of the tree in capitals.

    >>> reason_of(errors.ImageRefused)
    'IMAGE_REFUSED'
    """
    known = next(base for base in kind.__mro__ if base.__module__ == errors.__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", known.__name__).upper()


_BY_REASON = {reason_of(kind): kind for kind in _classes()}


def pack(code: int, error: VaopdError) -> bytes:
    """A google.rpc.Status with `error`'s message and details; `code` is gRPC's number."""
    status = status_pb2.Status(code=code, message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason_of(type(error)), domain=DOMAIN))
    if isinstance(error, InvalidInput) and error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Busy):
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(info)
    return status.SerializeToString()


def unpack(metadata: Iterable[tuple[str, Any]], *, message: str, default: type[VaopdError]) -> VaopdError:
    """The error behind a status: a `default`, or the more exact class that the details name.

    What a server other than ours sends, or none at all, is `default`.
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
    """Raises DecodeError."""
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
