"""Turns every error of the API into one JSON shape, problem details (RFC 9457).

    {"type": "urn:vaopd:problem:invalid_input", "title": "Unprocessable Content", "status": 422,
     "detail": "…", "code": "invalid_input", "field": "images.0", "request_id": "…"}

`field` is null where the error belongs to no single field. Of the request, details contain names and numbers only; they
never contain texts of libraries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vaopd import errors
from vaopd.http_types import Problem
from vaopd.telemetry.logs import request_id

logger = logging.getLogger("vaopd.api")

RETRY_AFTER_S = 1
PROBLEM_JSON = "application/problem+json"

# The first class that matches decides, so subclasses come before their parents.
STATUS_OF: tuple[tuple[type[errors.VaopdError], int, str], ...] = (
    (errors.InvalidInput, 422, "invalid_input"),
    (errors.LimitExceeded, 413, "too_large"),
    (errors.Mismatch, 409, "mismatch"),
    (errors.NotFound, 404, "not_found"),
    (errors.NumericalError, 500, "numerical_error"),
    (errors.Unauthenticated, 401, "unauthenticated"),
    (errors.PermissionDenied, 403, "permission_denied"),
)
CODE_OF_STATUS = {
    400: "invalid_request",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
    421: "misdirected",
    422: "invalid_input",
    429: "busy",
    431: "too_large",
    499: "cancelled",
    500: "internal",
    502: "bad_gateway",
    503: "unavailable",
}
TITLES = {413: "Content Too Large", 422: "Unprocessable Content", 499: "Client Closed Request"}


class ApiError(HTTPException):
    """An error with its HTTP status, and the field of the request that caused it. FastAPI lets HTTPExceptions pass."""

    def __init__(
        self, status: int, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.field = field


def install(app: FastAPI) -> None:
    """Registers the handler of expected errors; `vaopd_api.middleware` handles all others."""
    for kind in (ApiError, errors.VaopdError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    return make_error_response(error)


def parse(model: type[pydantic.BaseModel], value: Any) -> Any:
    """Returns `value` as a `model`. Raises FastAPI's RequestValidationError."""
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def make_error_response(error: Exception) -> JSONResponse:
    """Returns the HTTP response for an error."""
    answer, headers = describe(error)
    if answer.status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return JSONResponse(answer.model_dump(), answer.status, headers, media_type=PROBLEM_JSON)


def describe(error: Exception) -> tuple[Problem, dict[str, str]]:
    """Returns an error's problem, and the headers that go with it."""
    match error:
        case HTTPException():
            problem = make_problem(error.status_code, str(error.detail), field=getattr(error, "field", None))
            return problem, dict(error.headers or {})
        case ClientDisconnect():  # during the body, or refused there by the HTTP server
            return make_problem(499, "the client disconnected"), {}
        case errors.Busy():
            seconds = max(1, math.ceil(error.retry_after_s))
            return make_problem(429, error.message), {"Retry-After": str(seconds)}
        case errors.Unavailable():
            # The message contains the teacher's address, which clients must not see.
            logger.warning("%s", error)
            return make_problem(503, "the teacher can't be reached, is starting or is draining; try again"), {}
        case errors.Unauthenticated():
            return _describe_vaopd_error(error), {"WWW-Authenticate": 'Bearer realm="vaopd"'}
        case errors.VaopdError():
            return _describe_vaopd_error(error), {}
        case RequestValidationError():
            return _describe_validation_error(error), {}
        case _:
            logger.error("unexpected error", exc_info=error)
            return make_problem(500, "the API failed unexpectedly; see its log"), {}


def make_problem(status: int, detail: str, *, field: str | None = None, code: str | None = None) -> Problem:
    """Returns a problem with the current request's id; `code` is the status's own unless given."""
    phrase = TITLES.get(status) or HTTPStatus(status).phrase
    code = code or CODE_OF_STATUS.get(status) or phrase.lower().replace(" ", "_")
    return Problem(
        type=f"urn:vaopd:problem:{code}",
        title=phrase,
        status=status,
        detail=detail,
        code=code,
        field=field,
        request_id=request_id.get(),
    )


def _describe_vaopd_error(error: errors.VaopdError) -> Problem:
    for kind, status, code in STATUS_OF:
        if isinstance(error, kind):
            return make_problem(status, error.message, code=code, field=getattr(error, "field", None))
    logger.error("the teacher failed: %s", error)
    return make_problem(502, "the teacher failed; see its log")


def _describe_validation_error(error: RequestValidationError) -> Problem:
    """Returns the problem of the first error only, so that all problems have one shape."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return make_problem(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'unreadable')}")
    field = name_field(first["loc"])
    if first["type"] == "extra_forbidden":
        return make_problem(422, f"{field}: no such key; /docs lists the known keys", field=field)
    message = first["msg"].removeprefix("Value error, ")
    return make_problem(422, f"{field}: {message}" if field else message, field=field)


def name_field(location: tuple[Any, ...]) -> str | None:
    """Returns a location as a field's name, without a union's arms.

    >>> name_field(("body", "responses", 0, "list[constrained-int]", 3))
    'responses.0.3'
    """
    parts = [str(part) for part in location if part not in ("body", "str", "constrained-str") and "[" not in str(part)]
    return ".".join(parts) or None
