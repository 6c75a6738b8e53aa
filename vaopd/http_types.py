"""The scoring API's requests and replies as JSON. Torch-free.

The server validates requests with these models, and `vaopd.http_client` returns the replies. T response tokens of one
rollout, K rollouts of the group; log-probs and VA in nats.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic
from pydantic import Field

from vaopd.columns import columns_on_request
from vaopd.types import STRENGTH_MEANINGS, DegradationKind

T = TypeVar("T")

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
ImageText = Annotated[str, Field(min_length=1)]


def _check_column(name: str) -> str:
    if name not in columns_on_request():
        raise ValueError(f"there is no such column; known are {', '.join(columns_on_request())}")
    return name


ColumnName = Annotated[
    str,
    pydantic.AfterValidator(_check_column),
    pydantic.WithJsonSchema({"type": "string", "enum": list(columns_on_request())}),
]

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
MAX_ALTERNATIVES = 20
MAX_BATCH_ITEMS = 256
MAX_TILES = 12
MAX_IMAGES = 256
Images = Annotated[list[ImageText], Field(max_length=MAX_IMAGES, fail_fast=True)]


class Model(pydantic.BaseModel):
    """A request: unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _keep_one_unknown_key(cls, values: Any) -> Any:
        """An error is made of each unknown key, a kilobyte and microseconds: of a million, they took 27 s and 5 GB."""
        if not isinstance(values, dict) or len(values) <= len(cls.model_fields):
            return values
        unknown = next(key for key in values if key not in cls.model_fields)
        return {key: values[key] for key in (*cls.model_fields, unknown) if key in values}


class Reply(pydantic.BaseModel):
    """A reply: unknown keys are ignored, so that clients can read the replies of newer servers."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    def dump_json(self) -> str:
        """Returns its JSON; a list in which `one_by_one` stands is made while it is written."""
        return self.model_dump_json(warnings=False)  # pydantic warns of an iterator in the place of a list


def one_by_one(values: Iterable[T]) -> list[T]:
    """Stands for a long list in a reply's `model_construct`.

    A million numbers and objects of Python at once would take ten times the text's memory, and would leave it in
    fragments: a few small objects that stay hold a megabyte each.
    """
    return cast("list[T]", iter(values))


class DegradationModel(Model):
    """How the degraded view is made from the image."""

    kind: DegradationKind = "pixelate"
    """The kind of degradation (paper: pixelate)."""
    strength: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description=f"{STRENGTH_MEANINGS}; else unused.")


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
                    "top_k": 5,
                },
            ]
        }
    )

    question: Text
    """The user's turn; the images come before it."""
    image: ImageText | None = None
    """A PNG, JPEG or WEBP file as base64, or as a data URL. Web addresses are refused: nothing is fetched."""
    images: Images = []
    """Several images, in the order in which the model reads them."""
    response: Text | None = None
    """A text that the teacher tokenises as a finished turn."""
    response_token_ids: TokenIds | None = None
    """The response as token ids, scored as they are."""
    responses: Annotated[list[Text | TokenIds], Field(min_length=1, fail_fast=True)] | None = None
    """The K responses of a group, each a text or token ids; the rollout weights compare them."""
    degradation: DegradationModel = DegradationModel()
    """The degraded view."""
    teacher: str | None = None
    """The model to score with, by its name in GET /v1/teachers; empty: the first one."""
    top_k: int = Field(0, ge=0, le=MAX_ALTERNATIVES)
    """The number of most likely tokens to list at each place; above 0 each token's rank is given too."""
    columns: list[ColumnName] = Field([], fail_fast=True)
    """Further numbers to compute for each token, by name."""

    @pydantic.model_validator(mode="after")
    def _check_choices(self) -> ScoreBody:
        given = [name for name in ("response", "response_token_ids", "responses") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of response, response_token_ids and responses, got {' and '.join(given) or 'none'}"
            )
        if self.image is not None and self.images:
            raise ValueError("give image or images, not both")
        return self


class Token(Reply):
    """One token of a response."""

    id: int
    text: str


class Alternative(Reply):
    """A token that the teacher finds likely with the original image."""

    id: int
    text: str
    logprob: float


class RolloutScore(Reply):
    """One response. Each list has T entries, in the order of `tokens`."""

    tokens: list[Token]
    teacher_logprobs: list[float]
    """The teacher's, with the original image."""
    degraded_logprobs: list[float]
    """The teacher's, with the degraded image."""
    visual_advantage: list[float]
    """max(teacher_logprobs − degraded_logprobs, 0): how much seeing the image helps to predict the token."""
    high_group: list[bool]
    """Whether the token is among the `high_fraction` of the response's tokens with the largest VA; none is, where no
    token has any VA."""
    mean_visual_advantage: float
    rollout_weight: float
    """The response's share of the group's loss; the K of them add up to 1."""
    ranks: list[int | None] | None = None
    """With top_k: 1 for the token that the teacher finds most likely; null beyond 20."""
    alternatives: list[list[Alternative]] | None = None
    """With top_k: the most likely tokens of each place, best first."""
    columns: dict[str, list[float]] = {}
    """The columns that were asked for, by name."""


class ScoreReply(Reply):
    """The scores of a group of responses."""

    model: str
    revision: str
    prompt_tokens: int
    """Tokens of the prompt, image placeholders included."""
    degradation: DegradationModel
    high_fraction: float
    share_of_top_10: float | None
    """The share of all VA that the top 10 % of the group's tokens carry, 0 to 1; null when there is no VA at all."""
    share_of_top_20: float | None
    """The same for the top 20 %."""
    rollouts: list[RolloutScore]


class Problem(Reply):
    """An error in the form of RFC 9457 (application/problem+json); `field` is the key that caused it, if any."""

    type: str
    """urn:vaopd:problem:CODE"""
    title: str
    status: int
    detail: str
    """What is wrong, with the value, the bound and the remedy."""
    code: str
    field: str | None = None
    request_id: str | None = None


class BatchBody(Model):
    """Several requests to score."""

    requests: Annotated[list[ScoreBody], Field(min_length=1, max_length=MAX_BATCH_ITEMS)]
    """Each is scored by itself; if one is refused, the others are still scored."""


class BatchResult(Reply):
    """The result of one request of a batch: a score or a problem."""

    index: int
    """The request's place in `requests`, from 0."""
    score: ScoreReply | None = None
    problem: Problem | None = None


class BatchReply(Reply):
    """The results of a batch; `failed` counts the problems."""

    results: list[BatchResult]
    failed: int


class DegradeBody(Model):
    """An image to degrade."""

    model_config = pydantic.ConfigDict(json_schema_extra={"examples": [{"image": PIXEL}]})

    image: ImageText
    """A PNG, JPEG or WEBP file as base64, as in a request to score."""
    degradation: DegradationModel = DegradationModel()


class RegionsBody(Model):
    """Images, a question and one response, to find the regions of an image that its tokens depend on."""

    model_config = pydantic.ConfigDict(
        json_schema_extra={
            "examples": [{"image": PIXEL, "question": "Which colour is this?", "response": "It is white.", "tiles": 2}]
        }
    )

    question: Text
    image: ImageText | None = None
    images: Images = []
    response: Text | TokenIds
    """A text, or token ids, as in a request to score."""
    picture: int = Field(0, ge=0)
    """The place in `images` of the one that is examined, from 0."""
    tiles: int = Field(6, ge=1, le=MAX_TILES)
    """Tiles along the picture's longer side; along the shorter one, as many as make them about square."""
    degradation: DegradationModel = DegradationModel()
    """What is done to one tile at a time."""
    teacher: str | None = None


class RegionsReply(Reply):
    """What each token loses while one tile of the picture is degraded; the tiles row by row, from the top left."""

    model: str
    columns: int
    rows: int
    tokens: list[Token]
    teacher_logprobs: list[float]
    """With the whole picture."""
    losses: list[list[float]]
    """For each tile, T numbers in nats: the log-prob with the whole picture less the one without the tile's detail."""


class SampleBody(Model):
    """A question for the student."""

    model_config = pydantic.ConfigDict(
        json_schema_extra={"examples": [{"image": PIXEL, "question": "Which colour is this?", "max_new_tokens": 16}]}
    )

    question: Text
    images: Images = []
    image: ImageText | None = None
    student: str | None = None
    """The student to ask, by its name in GET /v1/students; empty: the first one."""
    num_responses: int = Field(4, ge=1, le=16)
    temperature: float = Field(0.7, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1, allow_inf_nan=False)
    max_new_tokens: int = Field(512, ge=1, le=4096)
    seed: int = Field(0, ge=0, lt=2**31)


class SampledResponse(Reply):
    """One response of the student."""

    text: str
    token_ids: list[int]
    """Score these rather than the text, which may be tokenised into other tokens than those that were sampled."""
    finish_reason: Literal["stop", "length"]


class SampleReply(Reply):
    """The student's responses."""

    model: str
    tokenizer_fingerprint: str
    """A teacher with the same fingerprint uses the same token ids."""
    responses: list[SampledResponse]


class StudentModel(Reply):
    """A student that answers questions."""

    model: str
    loaded: bool
    """Whether it is in memory; if not, the first question waits while it is loaded."""


class StudentsReply(Reply):
    """The students of this API."""

    students: list[StudentModel]
    """In the order of --student; none if the API was started without."""


class TeacherModel(Reply):
    """A teacher and its limits."""

    model: str
    revision: str
    """SHA-256 over the weights and the configuration, in hex."""
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    dtype: str
    limits: dict[str, int]
    payloads: list[str]
    degradations: list[str]
    columns: list[str] = []
    """What it computes on request."""
    strengths: dict[str, str] = {}
    """The meaning of `strength` for each of `degradations` that has one."""


class TeachersReply(Reply):
    """The teachers that score here."""

    teachers: list[TeacherModel]


class RunModel(Reply):
    """A run; accuracies are held-out, from 0 to 1, and null before the first evaluation.

    Of a run whose folder can't be read only name, state and reason are known: objective, seed and steps are null.
    """

    name: str
    objective: str | None
    seed: int | None
    steps_done: int | None
    steps_planned: int | None
    finished: bool
    state: str
    """starting, running, stopped, failed, finished or broken; a run of an earlier vaopd: finished or not finished."""
    reason: str = ""
    """Why it failed, or what is broken in its folder."""
    accuracy_before: float | None
    """Accuracy of the initial student."""
    accuracy: float | None
    """Accuracy at the last evaluation."""
    judge_before: str | None = None
    """Version of the judge of `accuracy_before`; accuracies of different versions are not comparable."""
    judge: str | None = None
    """Version of the judge of `accuracy`; null where none was recorded."""
    changed: datetime
    """Time of the last change in the run's folder."""


class RunsReply(Reply):
    """The runs that this API has reports of."""

    runs: list[RunModel]
    """Latest change first; none if the API was started without --runs."""


class Health(Reply):
    """The state of the API."""

    status: Literal["ok", "ready"]
