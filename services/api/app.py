"""The scoring API. What arrives: JSON with images, a question and responses. What leaves: each token's log-probs in
both views and its VA. It waits for: the teacher, over gRPC. It keeps no state and needs no torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import vaopd
from services.api import errors
from services.api.errors import ApiError
from services.api.images import image_from_text
from services.api.models import (
    DegradationModel,
    ErrorReply,
    Health,
    RolloutScore,
    ScoreBody,
    ScoreReply,
    TeacherModel,
    TeachersReply,
    Token,
)
from vaopd.client import GroupFailure, TeacherClient
from vaopd.errors import NotFound, NumericalError
from vaopd.scoring import rollout_weights, unique_images, user_turn
from vaopd.types import Degradation, EncodedImage, GroupScore, ScoreRequest, TeacherDescription

logger = logging.getLogger("vaopd.api")
T = TypeVar("T")

MAX_BODY_BYTES = 48 * 2**20  # one image of the teacher's limit, 32 MiB, is 43 MiB as base64
CONNECT_TIMEOUT_S = 3.0
SCORE_TIMEOUT_S = 120.0
JOB = "api"

ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "the body is not JSON"},
    404: {"model": ErrorReply, "description": "no such teacher"},
    409: {"model": ErrorReply, "description": "the teacher is another one than before"},
    413: {"model": ErrorReply, "description": "over a size limit"},
    415: {"model": ErrorReply, "description": "not application/json, or an image that is not PNG, JPEG or WEBP"},
    422: {"model": ErrorReply, "description": "a value that can't be scored; `field` names it"},
    429: {"model": ErrorReply, "description": "the teacher has no room now; see Retry-After"},
    500: {"model": ErrorReply, "description": "a number that is not finite, or a fault of the API"},
    502: {"model": ErrorReply, "description": "the teacher failed"},
    503: {"model": ErrorReply, "description": "the teacher is down, starting or draining; see Retry-After"},
}


class Teacher:
    """The API's way to its one teacher. A client per request: none outlives a teacher that is replaced by another."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def describe(self) -> TeacherDescription:
        """Answers or refuses soon, so that a teacher that is down is told at once."""
        async with TeacherClient(self._address, job=JOB, timeout_s=CONNECT_TIMEOUT_S) as client:
            return await client.describe()

    async def score(self, request: ScoreRequest, degradation: Degradation) -> GroupScore:
        async with TeacherClient(
            self._address, job=JOB, timeout_s=SCORE_TIMEOUT_S, payload="none", degradation=degradation
        ) as client:
            async for result in client.score([request], with_token_texts=True):
                if isinstance(result, GroupFailure):
                    raise result.error
                return result
        raise ApiError(502, "the teacher ended the call without an answer")


class BodyLimit:
    """Refuses a body above the limit before anything parses it: by its declared length, or while it arrives."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if int(declared) > self._max_bytes:  # the HTTP server refuses what isn't a number
            response = errors.error_response(413, self._message(int(declared)), headers={"Connection": "close"})
            return await response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise ApiError(413, self._message(received))
            return message

        return await self._app(scope, counted, send)

    def _message(self, size: int) -> str:
        return f"the body has {size} bytes or more, the limit is {self._max_bytes}; send fewer or smaller images"


async def json_only(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content type {kind or 'none'!r} is not application/json")


def create_app(*, teacher: Teacher, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application; `services/api/__main__.py` serves it."""
    app = FastAPI(
        title="vaopd scoring API",
        version=vaopd.__version__,
        description="Visual advantage of every token of a response: how much seeing the image helps to predict it.",
    )
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)

    @app.get("/healthz", tags=["health"])
    async def healthz() -> Health:
        """The process is alive."""
        return Health(status="ok")

    @app.get("/readyz", tags=["health"], responses={503: ERROR_REPLIES[503]})
    async def readyz() -> Health:
        """The teacher answers too."""
        await teacher.describe()
        return Health(status="ready")

    @app.get("/v1/teachers", tags=["scoring"], responses={503: ERROR_REPLIES[503]})
    async def teachers() -> TeachersReply:
        """The teachers that score here, with their limits."""
        return TeachersReply(teachers=[teacher_model(await teacher.describe())])

    @app.post("/v1/score", tags=["scoring"], responses=ERROR_REPLIES, dependencies=[Depends(json_only)])
    async def score(body: ScoreBody, request: Request) -> ScoreReply:
        """Scores one response, or a group of them, to a question about no, one or several images."""
        images = decode_images(body)
        description = await teacher.describe()
        if body.teacher is not None and body.teacher != description.model:
            raise NotFound(f"there is no teacher {body.teacher!r} here; GET /v1/teachers names those there are")
        degradation = Degradation(kind=body.degradation.kind, strength=body.degradation.strength)
        answer = await unless_disconnected(request, teacher.score(score_request(body, images), degradation))
        return reply(answer, description, body.degradation)

    return app


def decode_images(body: ScoreBody) -> list[EncodedImage]:
    if body.image is not None:
        return [image_from_text(body.image, field="image")]
    return [image_from_text(text, field=f"images.{index}") for index, text in enumerate(body.images)]


def score_request(body: ScoreBody, images: list[EncodedImage]) -> ScoreRequest:
    given: list[str | list[int]] = list(body.responses or [])
    if body.response is not None:
        given = [body.response]
    if body.response_token_ids is not None:
        given = [body.response_token_ids]
    return ScoreRequest(
        group_id=uuid.uuid4().hex,
        responses=tuple(item if isinstance(item, str) else np.array(item, np.int32) for item in given),
        images=unique_images(images),
        messages=user_turn(body.question, images),
    )


def reply(score: GroupScore, description: TeacherDescription, degradation: DegradationModel) -> ScoreReply:
    """Raises NumericalError rather than to send a number that is none."""
    weights_K = rollout_weights(score.mean_visual_advantage)
    if score.response_ids is None or score.token_texts is None:
        raise ApiError(502, "the teacher sent no token texts; is it of another version?")
    rollouts = []
    for k, ids in enumerate(score.response_ids):
        views = (score.teacher_logprobs[k], score.degraded_logprobs[k], score.visual_advantage[k])
        if not all(np.isfinite(values).all() for values in views):
            raise NumericalError(f"the teacher's scores of response {k} are not all finite numbers")
        rollouts.append(
            RolloutScore(
                tokens=[Token(id=int(token), text=text) for token, text in zip(ids, score.token_texts[k], strict=True)],
                teacher_logprobs=views[0].tolist(),
                degraded_logprobs=views[1].tolist(),
                visual_advantage=views[2].tolist(),
                mean_visual_advantage=float(score.mean_visual_advantage[k]),
                rollout_weight=float(weights_K[k]),
            )
        )
    return ScoreReply(
        model=description.model,
        revision=description.revision,
        prompt_tokens=score.prompt_tokens,
        degradation=degradation,
        rollouts=rollouts,
    )


def teacher_model(description: TeacherDescription) -> TeacherModel:
    return TeacherModel(**dataclasses.asdict(description))


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The work's result; when the client goes away first, the work is cancelled, and with it the teacher's."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
