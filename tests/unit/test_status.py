"""An error of the tree goes through google.rpc's details and comes out as what it was."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from vaopd import errors
from vaopd.wire.errors import KEY, pack, unpack


def there_and_back(error: errors.VaopdError, default: type[errors.VaopdError]) -> errors.VaopdError:
    return unpack([("other", "x"), (KEY, pack(3, error))], message=str(error), default=default)


def test_the_class_arrives_where_the_status_says_less() -> None:
    received = there_and_back(errors.ImageRefused("no PNG", field="images[2]"), errors.InvalidInput)
    assert type(received) is errors.ImageRefused
    assert str(received) == "no PNG"
    assert received.field == "images[2]"


def test_a_retry_hint_arrives() -> None:
    received = there_and_back(errors.Busy("full", 1.25), errors.LimitExceeded)
    assert isinstance(received, errors.Busy)
    assert received.retry_after_s == 1.25


def test_a_subclass_that_only_the_server_knows_arrives_as_its_nearest_known_parent() -> None:
    class QueueFull(errors.Busy):
        pass

    assert type(there_and_back(QueueFull("full", 2), errors.LimitExceeded)) is errors.Busy


def test_a_class_that_contradicts_the_status_is_not_believed() -> None:
    assert type(there_and_back(errors.Unavailable("down"), errors.InvalidInput)) is errors.InvalidInput


def with_broken_detail() -> bytes:
    status = status_pb2.Status(code=3)
    status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")
    return status.SerializeToString()


@pytest.mark.parametrize(
    "packed", [b"", b"\xff\xff", status_pb2.Status(code=3).SerializeToString(), with_broken_detail()]
)
def test_a_server_without_details_or_with_broken_ones_is_understood(packed: bytes) -> None:
    received = unpack([(KEY, packed)], message="wrong", default=errors.InvalidInput)
    assert type(received) is errors.InvalidInput
    assert str(received) == "wrong"


def test_others_read_the_details_as_google_defines_them() -> None:
    status = status_pb2.Status.FromString(pack(3, errors.InvalidInput("top_k = 0", field="top_k")))
    assert (status.code, status.message) == (3, "top_k = 0")
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INVALID_INPUT", "vaopd")
    assert status.details[1].Unpack(request)
    assert [(v.field, v.description) for v in request.field_violations] == [("top_k", "top_k = 0")]
