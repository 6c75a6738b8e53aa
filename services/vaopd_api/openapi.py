"""Completes the OpenAPI schema: the problems of each route, and the bodies that FastAPI doesn't read itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vaopd.http_types import PIXEL, BatchBody, BatchReply, Problem, ScoreBody
from vaopd_api.problems import PROBLEM_JSON

REF = "#/components/schemas/{model}"
DESCRIPTION = """Visual advantage (VA) of every token of a response: how much seeing the image helps to predict it.

Every reply has `X-Request-Id`, the request's own if it sent one. Errors are problem details (RFC 9457). Where the API
was started with keys, send `Authorization: Bearer KEY`; where it has a quota, `RateLimit-*` says how much is left."""
MEANINGS = {
    400: "the body is not JSON, or not a valid form",
    401: "no key, or one that isn't valid",
    403: "a key that may not do this",
    404: "no such teacher or run, or no student",
    409: "the teacher has changed",
    413: "over a size limit",
    415: "another content type, or an image that is not PNG, JPEG or WEBP",
    422: "a value that can't be scored; `field` names it",
    429: "busy, or the quota is used up; see Retry-After",
    500: "a number that is not finite, or an error of the API",
    502: "the teacher failed",
    503: "the teacher is down, starting or draining; see Retry-After",
}
EXAMPLE = {
    "type": "urn:vaopd:problem:invalid_input",
    "title": "Unprocessable Content",
    "status": 422,
    "detail": "images.1 is an address; nothing is fetched: send the file's bytes as base64",
    "code": "invalid_input",
    "field": "images.1",
    "request_id": "6f1d0c2e",
}


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describes the problems with these statuses for a route's `responses`."""
    content = {PROBLEM_JSON: {"schema": {"$ref": REF.format(model=Problem.__name__)}, "example": EXAMPLE}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


PROBLEMS = describe_problems(*MEANINGS)
BATCH_REPLIES: dict[int | str, dict[str, Any]] = PROBLEMS | {
    200: {
        "model": BatchReply,
        "content": {"text/event-stream": {"example": "event: result\nid: 0\ndata: {…}\n\nevent: done\ndata: {…}\n\n"}},
        "description": "a result for each request, in the requests' order; as events, in the order of completion",
    }
}
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["question", "response"],
    "properties": {
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "files, in order"},
        "question": {"type": "string"},
        "response": {"type": "array", "items": {"type": "string"}, "description": "repeat it for a group"},
        "degradation": {"type": "string", "description": "kind of the degraded view", "default": "pixelate"},
        "strength": {"type": "number", "default": 0.1},
        "teacher": {"type": "string"},
        "top_k": {"type": "integer", "default": 0},
    },
}
SCORE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": REF.format(model=ScoreBody.__name__)}},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}
_BATCH_EXAMPLE = {
    "requests": [
        {"image": PIXEL, "question": "Which colour is this?", "response": "It is white."},
        {"question": "What is 2+2?", "response": "4"},
    ]
}
BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": REF.format(model=BatchBody.__name__)}, "example": _BATCH_EXAMPLE}
        },
    }
}


def install(app: FastAPI) -> None:
    """Makes /openapi.json return the completed schema."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    built = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = built.setdefault("components", {}).setdefault("schemas", {})
    for model in (ScoreBody, BatchBody, Problem):
        described = model.model_json_schema(ref_template=REF)
        components.update(described.pop("$defs", {}))
        components[model.__name__] = described
    # FastAPI's own error shape is never sent; a route that doesn't describe its 422 has none.
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    for operation in (operation for path in built["paths"].values() for operation in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
    built["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    built["security"] = [{}, {"key": []}]
    return built
