"""From a request's body to the teacher's question, and from its answer to the reply."""

from __future__ import annotations

import re
import uuid

import numpy as np

from vaopd.errors import InvalidInput
from vaopd.http_types import MAX_ALTERNATIVES, DegradationModel, ScoreBody, ScoreReply, TeacherModel
from vaopd.scoring.reply import make_reply
from vaopd.telemetry import logs
from vaopd.types import Degradation, EncodedImage, ScoreRequest, TeacherDescription, unique_images, user_turn
from vaopd_api.metrics import Metrics
from vaopd_api.teachers import Teachers
from vaopd_api.uploads import image_from_text

ROLLOUT = re.compile(r"rollout '(\d+)' of group '[^']*': ")


class Scorer:
    def __init__(self, *, teachers: Teachers, metrics: Metrics) -> None:
        self._teachers = teachers
        self._metrics = metrics

    async def score(self, body: ScoreBody, images: list[EncodedImage], *, suffix: str = "") -> ScoreReply:
        """`suffix` tells the requests of a batch apart in the teacher's log."""
        address, description = await self._teachers.find(body.teacher)
        # A rank is told further down than alternatives are named.
        top_k = min(MAX_ALTERNATIVES, description.vocab_size) if body.top_k else 0
        request = score_request(body, images, suffix=suffix)
        try:
            score = await self._teachers.score(address, request, degradation_of(body.degradation), top_k=top_k)
        except InvalidInput as error:
            raise in_the_request_s_words(error, body, images) from None
        answer = make_reply(score, description, degradation=body.degradation, top_k=body.top_k)
        for rollout in answer.rollouts:
            self._metrics.tokens.inc(len(rollout.tokens))
            self._metrics.visual_advantage.observe(rollout.mean_visual_advantage)
        return answer


def in_the_request_s_words(error: InvalidInput, body: ScoreBody, images: list[EncodedImage]) -> InvalidInput:
    """The teacher names images by their digests and responses by its own ids; clients of the API know keys."""
    told = str(error)
    for index, image in enumerate(images):
        if (name := f"image {image.sha256[:12]}…") in told:
            field = "image" if body.image is not None else f"images.{index}" if body.images else f"image.{index}"
            return InvalidInput(told.replace(name, field), field=field)
    if match := ROLLOUT.match(told):
        field = f"responses.{match[1]}" if body.responses else "response" if body.response else "response_token_ids"
        return InvalidInput(f"{field}: {told[match.end() :]}", field=field)
    return error


def degradation_of(model: DegradationModel) -> Degradation:
    return Degradation(kind=model.kind, strength=model.strength)


def decode_images(image: str | None, images: list[str]) -> list[EncodedImage]:
    if image is not None:
        return [image_from_text(image, field="image")]
    return [image_from_text(text, field=f"images.{index}") for index, text in enumerate(images)]


def score_request(body: ScoreBody, images: list[EncodedImage], *, suffix: str = "") -> ScoreRequest:
    given: list[str | list[int]] = list(body.responses or [])
    if body.response is not None:
        given = [body.response]
    if body.response_token_ids is not None:
        given = [body.response_token_ids]
    return ScoreRequest(
        # So that one name follows a request through the logs of API and teacher.
        group_id=(logs.request_id.get() or uuid.uuid4().hex) + suffix,
        responses=tuple(item if isinstance(item, str) else np.array(item, np.int32) for item in given),
        images=unique_images(images),
        messages=user_turn(body.question, images),
    )


def teacher_model(description: TeacherDescription) -> TeacherModel:
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
    )
