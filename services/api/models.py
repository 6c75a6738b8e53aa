"""What the API takes and gives, as JSON. T response tokens of one rollout, K rollouts of the group."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from vaopd.types import DegradationKind

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
ImageText = Annotated[str, Field(min_length=1)]

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DegradationModel(Model):
    kind: DegradationKind = "pixelate"
    """How the degraded view is made (paper: pixelate)."""
    strength: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    """Pixelate: the ratio; blur: the radius as a fraction of the shorter side; else unused."""


class ScoreBody(Model):
    """One question about no, one or several images, and the response or responses to score.

    Exactly one of `response`, `response_token_ids` and `responses` is given; at most one of `image` and `images`.
    """

    model_config = pydantic.ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": PIXEL, "question": "Which colour is this?", "response": "It is white."},
                {
                    "image": PIXEL,
                    "question": "Which colour is this?",
                    "responses": ["It is white.", "It is black.", [72, 105, 256]],
                    "degradation": {"kind": "pixelate", "strength": 0.1},
                },
            ]
        }
    )

    question: Text
    """The user's turn; the images stand before it."""
    image: ImageText | None = None
    """A PNG, JPEG or WEBP file as base64, or as a data URL. Nothing is ever fetched: a web address is refused."""
    images: list[ImageText] = []
    """Several images, in the order in which the model reads them."""
    response: Text | None = None
    """A text that the teacher tokenises as a finished turn."""
    response_token_ids: TokenIds | None = None
    """The response as token ids, scored just as they are."""
    responses: Annotated[list[Text | TokenIds], Field(min_length=1)] | None = None
    """The K responses of a group, each a text or token ids; the rollout weights compare them."""
    degradation: DegradationModel = DegradationModel()
    """The degraded view."""
    teacher: str | None = None
    """The model to score with, as GET /v1/teachers names it; empty: the one there is."""

    @pydantic.model_validator(mode="after")
    def _one_of_each(self) -> ScoreBody:
        given = [name for name in ("response", "response_token_ids", "responses") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of response, response_token_ids and responses, got {' and '.join(given) or 'none'}"
            )
        if self.image is not None and self.images:
            raise ValueError("give image or images, not both")
        return self


class Token(Model):
    id: int
    text: str


class RolloutScore(Model):
    """One response. Each list has T numbers, in nats, in the order of `tokens`."""

    tokens: list[Token]
    teacher_logprobs: list[float]
    """The teacher's, with the original image."""
    degraded_logprobs: list[float]
    """The teacher's, with the degraded image."""
    visual_advantage: list[float]
    """max(teacher_logprobs − degraded_logprobs, 0): what seeing the image is worth for this token."""
    mean_visual_advantage: float
    rollout_weight: float
    """The response's share of the group's loss; the K of them add up to 1."""


class ScoreReply(Model):
    model: str
    revision: str
    prompt_tokens: int
    """Tokens of the prompt, image placeholders included."""
    degradation: DegradationModel
    rollouts: list[RolloutScore]


class TeacherModel(Model):
    model: str
    revision: str
    """Hex SHA-256 over the weights and the configuration."""
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    dtype: str
    limits: dict[str, int]
    payloads: list[str]
    degradations: list[str]


class TeachersReply(Model):
    teachers: list[TeacherModel]


class Health(Model):
    status: Literal["ok", "ready"]


class ErrorDetail(Model):
    code: str
    message: str
    field: str | None = None


class ErrorReply(Model):
    error: ErrorDetail
