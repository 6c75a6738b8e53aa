"""Turns a request's body into the teacher's score request, and the teacher's answer into the reply."""

from __future__ import annotations

import asyncio
import re
import uuid

import numpy as np

from vaopd.errors import InvalidInput
from vaopd.http_types import MAX_ALTERNATIVES, DegradationModel, ScoreBody, TeacherModel
from vaopd.scoring.reply import dump_reply
from vaopd.telemetry import logs
from vaopd.types import (
    DEGRADATIONS,
    Degradation,
    EncodedImage,
    GroupScore,
    ScoreRequest,
    TeacherDescription,
    unique_images,
    user_turn,
)
from vaopd_api.metrics import Metrics
from vaopd_api.reply_cost import ReplyBudget, list_responses
from vaopd_api.teachers import Teachers
from vaopd_api.uploads import image_from_text

ROLLOUT = re.compile(r"rollout '(\d+)' of group '[^']*': ")


class AdHocScorer:
    """Scores one request at a time with one of the teachers."""

    def __init__(self, *, teachers: Teachers, metrics: Metrics) -> None:
        self._teachers = teachers
        self._metrics = metrics
        self._budget = ReplyBudget()

    async def score(self, body: ScoreBody, images: list[EncodedImage], *, suffix: str = "") -> str:
        """Scores one request -> the JSON of its `ScoreReply`.

        suffix: distinguishes the requests of a batch in the teacher's log.

        Raises the errors of `vaopd.errors`, InvalidInput with the request's field.
        """
        async with self._budget.hold(body):
            score, description = await self._ask_teacher(body, images, suffix)
            # Off the event loop, since a reply may have a million values.
            text = await asyncio.to_thread(
                dump_reply, score, description, degradation=body.degradation, top_k=body.top_k
            )
        # After it, since a score that is not finite is refused there, and one NaN would stay in a sum for good.
        for logprobs_T, mean in zip(score.teacher_logprobs, score.mean_visual_advantage.tolist(), strict=True):
            self._metrics.tokens.inc(len(logprobs_T))
            self._metrics.visual_advantage.observe(mean)
        return text

    async def _ask_teacher(
        self, body: ScoreBody, images: list[EncodedImage], suffix: str
    ) -> tuple[GroupScore, TeacherDescription]:
        address, description = await self._teachers.find(body.teacher)
        # Ranks go down to MAX_ALTERNATIVES even where fewer alternatives are listed.
        top_k = min(MAX_ALTERNATIVES, description.vocab_size) if body.top_k else 0
        request = score_request(body, images, suffix=suffix)
        try:
            score = await self._teachers.score(
                address, request, make_degradation(body.degradation), top_k=top_k, columns=body.columns
            )
        except InvalidInput as error:
            raise translate_error(error, body, images) from None
        return score, description


def translate_error(error: InvalidInput, body: ScoreBody, images: list[EncodedImage]) -> InvalidInput:
    """Returns the teacher's error with the request's keys in place of the teacher's digests and ids."""
    message = error.message
    for index, image in enumerate(images):
        if (name := f"image {image.sha256[:12]}…") in message:
            field = "image" if body.image is not None else f"images.{index}" if body.images else f"image.{index}"
            return InvalidInput(message.replace(name, field), field=field)
    if match := ROLLOUT.match(message):
        field = f"responses.{match[1]}" if body.responses else "response" if body.response else "response_token_ids"
        return InvalidInput(f"{field}: {message[match.end() :]}", field=field)
    return error


def make_degradation(model: DegradationModel) -> Degradation:
    """Returns the request's degradation as the teacher's client takes it."""
    return Degradation(kind=model.kind, strength=model.strength)


def decode_images(image: str | None, images: list[str]) -> list[EncodedImage]:
    """Returns a request's images, of which `image` is the only one if given. Raises ApiError: 415 or 422."""
    if image is not None:
        return [image_from_text(image, field="image")]
    return [image_from_text(text, field=f"images.{index}") for index, text in enumerate(images)]


def score_request(body: ScoreBody, images: list[EncodedImage], *, suffix: str = "") -> ScoreRequest:
    """Returns the prompt group to score. Its id is the request's, so that the logs of API and teacher match."""
    return ScoreRequest(
        group_id=(logs.request_id.get() or uuid.uuid4().hex) + suffix,
        responses=tuple(item if isinstance(item, str) else np.array(item, np.int32) for item in list_responses(body)),
        images=unique_images(images),
        messages=user_turn(body.question, images),
    )


def make_teacher_model(description: TeacherDescription) -> TeacherModel:
    """Returns a teacher's description as the API sends it."""
    return TeacherModel(
        model=description.model,
        revision=description.revision,
        tokenizer_fingerprint=description.tokenizer_fingerprint,
        vocab_size=description.vocab_size,
        hidden_size=description.hidden_size,
        dtype=description.dtype,
        limits={name: getattr(description.limits, name) for name in description.limits.__slots__},
        payloads=list(description.payloads),
        degradations=list(description.degradations),
        columns=list(description.columns),
        strengths={kind: meaning for kind in description.degradations if (meaning := DEGRADATIONS[kind])},
    )
