"""From a request's body to the teacher's question, and from its answer to the reply."""

from __future__ import annotations

import uuid

import numpy as np

from services.api import errors
from services.api.errors import ApiError
from services.api.images import image_from_text
from services.api.metrics import Metrics
from services.api.teachers import Teachers
from vaopd.errors import NumericalError
from vaopd.http_types import (
    MAX_ALTERNATIVES,
    Alternative,
    DegradationModel,
    RolloutScore,
    ScoreBody,
    ScoreReply,
    TeacherModel,
    Token,
)
from vaopd.scoring import HIGH_FRACTION, high_group, rollout_weights, unique_images, user_turn, va_share_of_top
from vaopd.types import Degradation, EncodedImage, GroupScore, ScoreRequest, TeacherDescription


class Scorer:
    def __init__(self, *, teachers: Teachers, metrics: Metrics) -> None:
        self._teachers = teachers
        self._metrics = metrics

    async def score(self, body: ScoreBody, images: list[EncodedImage], *, suffix: str = "") -> ScoreReply:
        """`suffix` tells the requests of a batch apart in the teacher's log."""
        address, description = await self._teachers.find(body.teacher)
        # A rank is told further down than alternatives are named.
        top_k = min(MAX_ALTERNATIVES, description.vocab_size) if body.top_k else 0
        score = await self._teachers.score(
            address, score_request(body, images, suffix=suffix), degradation_of(body.degradation), top_k=top_k
        )
        answer = make_reply(score, description, body)
        for rollout in answer.rollouts:
            self._metrics.tokens.inc(len(rollout.tokens))
            self._metrics.visual_advantage.observe(rollout.mean_visual_advantage)
        return answer


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
        group_id=(errors.request_id.get() or uuid.uuid4().hex) + suffix,
        responses=tuple(item if isinstance(item, str) else np.array(item, np.int32) for item in given),
        images=unique_images(images),
        messages=user_turn(body.question, images),
    )


def make_reply(score: GroupScore, description: TeacherDescription, body: ScoreBody) -> ScoreReply:
    """Raises NumericalError rather than to send a number that is none."""
    weights_K = rollout_weights(score.mean_visual_advantage)
    if score.response_ids is None or score.token_texts is None:
        raise ApiError(502, "the teacher sent no token texts; is it of another version?")
    expected = _Expected(score) if body.top_k else None
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
                high_group=high_group(views[2]).tolist(),
                mean_visual_advantage=float(score.mean_visual_advantage[k]),
                rollout_weight=float(weights_K[k]),
                ranks=expected.ranks(k) if expected else None,
                alternatives=expected.alternatives(k, body.top_k) if expected else None,
            )
        )
    every_va = np.concatenate(score.visual_advantage)
    return ScoreReply(
        model=description.model,
        revision=description.revision,
        prompt_tokens=score.prompt_tokens,
        degradation=body.degradation,
        high_fraction=HIGH_FRACTION,
        share_of_top_10=va_share_of_top(every_va, fraction=0.1),
        share_of_top_20=va_share_of_top(every_va, fraction=0.2),
        rollouts=rollouts,
    )


class _Expected:
    """What the teacher expected in the place of each token, out of the top-k payload, (M, k)."""

    def __init__(self, score: GroupScore) -> None:
        assert score.response_ids is not None
        self._ids_Mk = score.payload.tensors["token_ids"].numpy()
        self._logprobs_Mk = score.payload.tensors["logprobs"].numpy()
        self._texts = score.payload_texts
        self._responses = score.response_ids
        self._edges = np.cumsum([0, *(len(ids) for ids in score.response_ids)]).tolist()

    def ranks(self, k: int) -> list[int | None]:
        found_Tk = self._ids_Mk[self._rows(k)] == self._responses[k][:, None]
        return [int(row.argmax()) + 1 if row.any() else None for row in found_Tk]

    def alternatives(self, k: int, count: int) -> list[list[Alternative]]:
        ids_Tk, logprobs_Tk = self._ids_Mk[self._rows(k), :count], self._logprobs_Mk[self._rows(k), :count]
        return [
            [
                Alternative(id=int(token), text=self._texts.get(int(token), ""), logprob=float(logprob))
                for token, logprob in zip(ids, logprobs, strict=True)
            ]
            for ids, logprobs in zip(ids_Tk, logprobs_Tk, strict=True)
        ]

    def _rows(self, k: int) -> slice:
        return slice(self._edges[k], self._edges[k + 1])


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
