"""Reads the bodies that FastAPI doesn't: a request to score as JSON or as a form with files, and a batch.

A form has the keys of the JSON body. `image` is a file, and may be repeated, as may `response`; `degradation` is the
kind, and `strength` a key of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vaopd.http_types import MAX_BATCH_ITEMS, MAX_IMAGES, ScoreBody
from vaopd.types import EncodedImage
from vaopd_api.problems import ApiError, parse
from vaopd_api.scorer import decode_images
from vaopd_api.uploads import image_from_bytes, image_from_text

FORM = "multipart/form-data"
MAX_FORM_PARTS = MAX_IMAGES
MAX_FORM_FIELD_BYTES = 8 * 2**20


class _InMemory(MultiPartParser):
    """Keeps files in memory: the body's size is capped already, and the container's file system is read-only."""

    spool_max_size = 2**40
    ended = False

    def on_part_end(self) -> None:
        """Takes a field that is UTF-8; Starlette would take the bytes of any other for Latin-1."""
        self._charset = "utf-8"
        if self._current_part.file is None:
            self._current_part.data.decode()
        super().on_part_end()

    def on_end(self) -> None:
        """Notes the last boundary."""
        self.ended = True
        super().on_end()


class JsonRoute(APIRoute):
    """A route whose body, where FastAPI reads it, is read as by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler, with a request that reads its JSON so."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read


class _JsonRequest(Request):
    async def json(self) -> Any:
        return await read_json(self)


async def read_score(request: Request) -> tuple[ScoreBody, list[EncodedImage]]:
    """Returns a request to score with its images. Raises ApiError or RequestValidationError."""
    if read_content_type(request) == FORM:
        return _from_form(await _read_form(request))
    body = parse(ScoreBody, await read_json(request))
    return body, await asyncio.to_thread(decode_images, body.image, body.images)


async def read_batch(request: Request) -> list[Any]:
    """Returns the requests of a batch, not yet validated, since each is by itself. Raises ApiError."""
    body = await read_json(request)
    if not isinstance(body, dict) or set(body) != {"requests"} or not isinstance(body["requests"], list):
        raise ApiError(422, 'the body must be {"requests": [ … ]} and nothing else', field="requests")
    items = body["requests"]
    if not items:
        raise ApiError(422, "requests is empty; give at least one", field="requests")
    if len(items) > MAX_BATCH_ITEMS:
        raise ApiError(413, f"{len(items)} requests, the limit is {MAX_BATCH_ITEMS}; split them", field="requests")
    return items


async def require_json(request: Request) -> None:
    """Raises ApiError (415) for a body that is not JSON."""
    kind = read_content_type(request)
    if kind != "application/json":
        raise ApiError(415, f"content type {kind or 'none'!r} is not application/json")


async def read_json(request: Request) -> Any:
    """Returns the body's JSON.

    Raises ApiError: 415 for another content type, 400 for malformed JSON, 422 for a key that occurs twice.
    """
    kind = read_content_type(request)
    if kind != "application/json":
        raise ApiError(415, f"content type {kind or 'none'!r} is neither application/json nor {FORM}")
    content = await request.body()
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": (), "msg": "the body is empty"}])
    try:
        return json.loads(content, object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:  # the messages contain positions, never the body's text
        rest = "not UTF-8, nested too deep, or a number is too long"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else rest
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ApiError for a key that occurs twice: readers differ on which one counts."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ApiError(422, f"{twice[:64]!r} occurs twice in one object; send it once")
    return made


def read_content_type(request: Request) -> str:
    """Returns the content type in lower case, without parameters; "" where there is none.

    Raises ApiError (415) for a compressed body: it could be a bomb, and images don't shrink.
    """
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        raise ApiError(415, f"the body's content encoding {coding[:40]!r} isn't read; send it uncompressed")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_form(request: Request) -> FormData:
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=MAX_FORM_PARTS,
        max_fields=MAX_FORM_PARTS,
        max_part_size=MAX_FORM_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
        if not parser.ended:
            raise ValueError("cut short")
    except (MultiPartException, KeyError, ValueError):
        raise ApiError(
            400,
            f"the body is not a valid {FORM} in UTF-8 with a boundary, also at its end, at most {MAX_FORM_PARTS} parts "
            f"and {MAX_FORM_FIELD_BYTES} bytes in a field",
        ) from None
    return form


def _from_form(form: FormData) -> tuple[ScoreBody, list[EncodedImage]]:
    values: dict[str, Any] = {}
    images: list[EncodedImage] = []
    responses: list[Any] = []
    degradation: dict[str, Any] = {}
    for key, value in form.multi_items():
        if key == "image":
            images.append(_read_image(value, field=f"image.{len(images)}"))
        elif isinstance(value, UploadFile):
            raise ApiError(422, f"{key[:64]}: only image is a file", field=key[:64])
        elif key == "response":
            responses.append(value)
        elif key in ("degradation", "strength"):
            degradation[{"degradation": "kind"}.get(key, key)] = value
        elif key in values:
            raise ApiError(422, f"{key[:64]}: occurs twice in the form", field=key[:64])
        else:
            values[key] = value
    values |= {"response": responses[0]} if len(responses) == 1 else {"responses": responses} if responses else {}
    return parse(ScoreBody, values | ({"degradation": degradation} if degradation else {})), images


def _read_image(value: UploadFile | str, *, field: str) -> EncodedImage:
    if isinstance(value, str):
        return image_from_text(value, field=field)
    return image_from_bytes(value.file.read(), field=field)
