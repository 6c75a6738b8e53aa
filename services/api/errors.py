"""Every error of the API in one JSON shape, made in one place.

    {"error": {"code": "invalid_input", "message": "…", "field": "images.0"}}

`field` is null where the fault belongs to no single field. Messages never hold what a client sent beyond names and
numbers, nor texts of libraries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vaopd import errors
from vaopd.transport import Busy

logger = logging.getLogger("vaopd.api")

RETRY_AFTER_S = 1

# The first class that matches decides, so subclasses stand before their parents.
STATUS_OF: tuple[tuple[type[errors.VaopdError], int, str], ...] = (
    (errors.InvalidInput, 422, "invalid_input"),
    (errors.LimitExceeded, 413, "too_large"),
    (errors.Mismatch, 409, "mismatch"),
    (errors.NotFound, 404, "not_found"),
    (errors.NumericalError, 500, "numerical_error"),
)
CODE_OF_STATUS = {
    400: "invalid_request",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_input",
    429: "busy",
    499: "cancelled",
    502: "bad_gateway",
    503: "unavailable",
}


class ApiError(HTTPException):
    """An answer other than 2xx that is known where it is raised. FastAPI lets HTTPExceptions pass."""

    def __init__(self, status: int, message: str, *, field: str | None = None) -> None:
        super().__init__(status, message)
        self.field = field


def install(app: FastAPI) -> None:
    """Registers the one handler for whatever may be raised while a request is answered."""
    for kind in (ApiError, errors.VaopdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    match error:
        case ApiError():
            return error_response(error.status_code, error.detail, field=error.field)
        case Busy():
            seconds = max(1, math.ceil(error.retry_after_s))
            return error_response(429, str(error), headers={"Retry-After": str(seconds)})
        case errors.Unavailable():
            # The message would tell everybody where the teacher runs.
            logger.warning("%s", error)
            return error_response(503, "the teacher can't be reached, is starting or is draining; try again")
        case errors.VaopdError():
            return _vaopd(error)
        case RequestValidationError():
            return _validation(error)
        case HTTPException():
            return error_response(error.status_code, str(error.detail), headers=error.headers)
        case _:
            logger.error("unexpected error at %s", request.url.path, exc_info=error)
            return error_response(500, "the API failed unexpectedly; its log tells why", code="internal")


def error_response(
    status: int,
    message: str,
    *,
    field: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    code = code or CODE_OF_STATUS.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
    sent = dict(headers or {})
    if status in (429, 503):
        sent.setdefault("Retry-After", str(RETRY_AFTER_S))
    return JSONResponse({"error": {"code": code, "message": message, "field": field}}, status, sent)


def _vaopd(error: errors.VaopdError) -> JSONResponse:
    for kind, status, code in STATUS_OF:
        if isinstance(error, kind):
            return error_response(status, str(error), code=code)
    logger.error("the teacher failed: %s", error)
    return error_response(502, "the teacher failed; its log tells why")


def _validation(error: RequestValidationError) -> JSONResponse:
    """The first fault found; clients mend one thing at a time, and one shape stays one shape."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'unreadable')}")
    field = field_name(first["loc"])
    if first["type"] == "extra_forbidden":
        return error_response(422, f"{field}: no such key; /docs lists the keys that are known", field=field)
    message = first["msg"].removeprefix("Value error, ")
    return error_response(422, f"{field}: {message}" if field else message, field=field)


def field_name(location: tuple[Any, ...]) -> str | None:
    """("body", "responses", 0, "list[constrained-int]", 3) -> "responses.0.3": names of a union's arms are left out."""
    parts = [str(part) for part in location if part not in ("body", "str", "constrained-str") and "[" not in str(part)]
    return ".".join(parts) or None
