"""All data that crosses a boundary between processes, as frozen dataclasses. Torch-free: numpy and bytes only.

Legend, used in every module: B prompt groups, K rollouts per group, N = B·K, T response tokens of one rollout, M
response tokens of one group (the sum of its T), P prompt tokens, V vocabulary, D hidden size. Log-probs and VA: nats.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from vaopd.errors import InvalidInput, VaopdError

PayloadKind = Literal["none", "hidden", "hidden_int8", "hidden_pair", "top_k", "sampled"]
DegradationKind = Literal["pixelate", "blur", "mean_colour", "black", "noise"]
DEGRADATIONS: Mapping[DegradationKind, str | None] = {
    "pixelate": "the ratio",
    "blur": "the radius as a fraction of the shorter side",
    "mean_colour": None,
    "black": None,
    "noise": None,
}
"""The meaning of each kind's strength; None if it is ignored. `vaopd.degradation` has each kind's function, and
`proto/vaopd/pb/teacher.proto` its number; everything else is derived from here."""
STRENGTH_MEANINGS = "; ".join(f"{kind}: {meaning}" for kind, meaning in DEGRADATIONS.items() if meaning).capitalize()
"""For help texts, e.g. "Pixelate: the ratio; blur: …"."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as bytes (PNG, JPEG or WEBP), named by its content.

    >>> EncodedImage(data=b"abc").sha256[:8]
    'ba7816bf'
    """

    data: bytes

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the bytes, as 64 hex digits."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    """A text within a message.

    >>> TextPart(text="How long is the side?").text
    'How long is the side?'
    """

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """The place of an image within a message; the image itself travels beside the messages.

    >>> ImagePart(sha256=EncodedImage(data=b"abc").sha256).sha256[:8]
    'ba7816bf'
    """

    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat turn; parts stand in the order in which the model reads them.

    >>> Message(role="user", content=(ImagePart(sha256="ba78…"), TextPart(text="How long is the side?"))).role
    'user'
    """

    role: Literal["system", "user", "assistant"]
    content: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A record of a data set: a question, its images, and the answer that evaluation compares with.

    `images` holds each image once; `messages` refer to them by content. There may be none, one or several. `answer` is
    empty for a record that is only trained on.

    >>> sum_of_two = Prompt(prompt_id="p7", messages=user_turn("What is 2 + 2?", ()), images=(), answer="4")
    >>> sum_of_two.messages[0].content[0].text
    'What is 2 + 2?'
    """

    prompt_id: str
    messages: tuple[Message, ...]
    images: tuple[EncodedImage, ...]
    answer: str


def images_in_order(messages: Iterable[Message], images: Iterable[EncodedImage]) -> tuple[EncodedImage, ...]:
    """Returns one image per image part of the messages, in the order in which the model reads them.

    Raises KeyError for an image part that is not among `images`.
    """
    by_sha256 = {image.sha256: image for image in images}
    return tuple(
        by_sha256[part.sha256] for message in messages for part in message.content if isinstance(part, ImagePart)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How a student samples. `temperature=0` is greedy.

    >>> SamplingSettings(temperature=0.0, max_new_tokens=64).top_p
    0.95
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 4096
    seed: int = 0


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class GroupId:
    """Names a prompt group of a run by its step and its place there; as text in Redis, on the wire and in files.

    `step` of an evaluation's group is the policy version. A group asked for again after a crash has the same name.

    >>> str(GroupId(purpose="train", step=12, index=3))
    'train-000012-0003'
    >>> GroupId.parse("eval-000050-00007").index
    7
    """

    purpose: Literal["train", "eval"]
    step: int
    index: int

    def __str__(self) -> str:
        return f"{self.purpose}-{self.step:06d}-{self.index:0{4 if self.purpose == 'train' else 5}d}"

    @classmethod
    def parse(cls, text: str) -> GroupId:
        """Reads what `str` wrote; raises InvalidInput on any other text."""
        if match := _GROUP_ID.fullmatch(text):
            purpose, step, index = match.groups()
            found = cls(purpose=purpose, step=int(step), index=int(index))  # type: ignore[arg-type]
            if str(found) == text:
                return found
        raise InvalidInput(f"{text!r} is not the id of a run's prompt group; one looks like 'train-000012-0003'")


_GROUP_ID = re.compile(r"(train|eval)-(\d+)-(\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """Trainer → rollout worker: sample `num_rollouts` (K) responses with this policy version.

    `images`: each image that the messages refer to, once.
    """

    group_id: str
    messages: tuple[Message, ...]
    images: tuple[EncodedImage, ...]
    num_rollouts: int
    sampling: SamplingSettings
    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled attempt.

    response_ids (T,) int32, the first EOS included; rollout_logprobs (T,) float32, the student's own at temperature 1.

    >>> ids, logprobs = np.array([17, 5, 2], np.int32), np.array([-0.1, -0.7, 0.0], np.float32)
    >>> Rollout(rollout_id="0", response_ids=ids, rollout_logprobs=logprobs, finish_reason="stop").response_ids.size
    3
    """

    rollout_id: str
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """Rollout worker → trainer: the K siblings of one prompt, sampled by one policy version.

    prompt_token_ids (P,) int32, image placeholders expanded; policy_sha256: digest of the weights that sampled.
    """

    group_id: str
    policy_version: int
    policy_sha256: str
    prompt_token_ids: np.ndarray
    rollouts: tuple[Rollout, ...]
    worker: str
    generation_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion:
    """A published policy snapshot: a folder, or its http:// address, and the digest of its weights.

    sha256: `tensor_files.compute_digest` of its safetensors files, the model's or, with LoRA, the adapters'.

    >>> PolicyVersion(version=12, path="runs/tiny/policy/12", sha256="9f86…").version
    12
    """

    version: int
    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Degradation:
    """How the degraded view is made, by default as in the paper: pixelation with ratio 0.1.

    strength: in (0, 1]; `DEGRADATIONS` says what it means for each kind, and which kinds ignore it.

    >>> Degradation(kind="blur", strength=0.05).kind
    'blur'
    """

    kind: DegradationKind = "pixelate"
    strength: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A dense row-major array as bytes, so that bfloat16 travels without torch.

    >>> Tensor.from_numpy(np.array([1.5, 2.0], np.float32)).numpy().tolist()
    [1.5, 2.0]
    """

    dtype: Literal["float32", "bfloat16", "float16", "int32", "int64", "uint8", "int8"]
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> Tensor:
        """Copies an array of any shape; its dtype must be one of `dtype`."""
        array = np.ascontiguousarray(array)
        return cls(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())  # type: ignore[arg-type]

    def select_rows(self, rows: slice) -> Tensor:
        """Returns rows start … stop − 1 of the first dimension."""
        row_bytes = len(self.data) // self.shape[0] if self.shape[0] else 0
        data = self.data[rows.start * row_bytes : rows.stop * row_bytes]
        return Tensor(dtype=self.dtype, shape=(rows.stop - rows.start, *self.shape[1:]), data=data)

    def numpy(self) -> np.ndarray:
        """Returns the values, read-only; bfloat16, which numpy lacks, as float32 (exactly)."""
        if self.dtype == "bfloat16":
            widened = np.frombuffer(self.data, "<u2").astype(np.uint32) << 16
            return widened.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


ITEMSIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "uint8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """Trainer or API → teacher: one prompt group to score. Give exactly one of `prompt_token_ids` and `messages`.

    With token ids (the trainer's way) the teacher reads the very tokens that the student read; `images` then holds one
    image per placeholder run, in order. With messages (ad-hoc use) the teacher's own chat template renders the prompt
    and `images` holds each image that the messages refer to. A response is token ids (T_k,), or, for ad-hoc use, a text
    that the teacher tokenises as a finished assistant turn.

    >>> ScoreRequest(group_id="g7", responses=("It is 12.",), messages=user_turn("What is 5 + 7?", ())).images
    ()
    """

    group_id: str
    responses: tuple[np.ndarray | str, ...]
    images: tuple[EncodedImage, ...] = ()
    prompt_token_ids: np.ndarray | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """The teacher's distribution over a group's M response tokens (siblings one after the other).

    kind "hidden": tensors["hidden"] (M, D). "hidden_int8": ["hidden_int8"] (M, D) int8 and ["scales"] (M,) float32, one
    per token; the hidden state is their product. "hidden_pair": ["hidden"] and, of the degraded view,
    ["degraded_hidden"], (M, D) each. "top_k": ["token_ids"] (M, k) int32, ["logprobs"] (M, k) float32, descending,
    ["tail_logprobs"] (M,) float32, the log of the mass outside the k. "sampled" and "none": no tensors.

    >>> Payload(kind="hidden", tensors={"hidden": Tensor.from_numpy(np.zeros((5, 64), np.float16))}).kind
    'hidden'
    """

    kind: PayloadKind
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScore:
    """Teacher → trainer or API: one scored group. Each tuple has K arrays (T_k,) float32, in the request's order.

    teacher_logprobs, degraded_logprobs and visual_advantage: see `vaopd.columns`; `columns`: those asked for, by name.
    response_ids and token_texts, one tuple of T_k strings per rollout, are given when the texts were asked for;
    with the top_k payload, payload_texts then has the text of each id in it.

    >>> rows = dict.fromkeys(("teacher_logprobs", "degraded_logprobs"), (np.zeros(2, np.float32),))
    >>> va = (np.array([0.0, 1.5], np.float32),)
    >>> score = GroupScore(group_id="g7", **rows, visual_advantage=va, payload=Payload(kind="none"), prompt_tokens=9)
    >>> score.mean_visual_advantage.tolist()
    [0.75]
    """

    group_id: str
    teacher_logprobs: tuple[np.ndarray, ...]
    degraded_logprobs: tuple[np.ndarray, ...]
    visual_advantage: tuple[np.ndarray, ...]
    payload: Payload
    prompt_tokens: int
    columns: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    response_ids: tuple[np.ndarray, ...] | None = None
    token_texts: tuple[tuple[str, ...], ...] | None = None
    payload_texts: Mapping[int, str] = field(default_factory=dict)

    @property
    def mean_visual_advantage(self) -> np.ndarray:
        """The mean VA of each rollout in nats, m_k in `vaopd.objective`: (K,) float64."""
        return np.array([va.mean(dtype=np.float64) for va in self.visual_advantage])


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFailure:
    """A group that was not scored, and why; it says nothing about the other groups of the request.

    >>> GroupFailure(group_id="g7", error=VaopdError("3 log-probs are not finite")).error.args[0]
    '3 log-probs are not finite'
    """

    group_id: str
    error: VaopdError


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLimits:
    """The most that one request may hold; the teacher refuses more, naming the bound."""

    max_groups_per_request: int = 256
    max_rollouts_per_group: int = 64
    max_tokens_per_rollout: int = 16_384
    max_image_bytes: int = 15 * 2**20
    max_image_pixels: int = 32_000_000
    max_message_bytes: int = 16 * 2**20
    max_tokens_per_request: int = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherDescription:
    """Teacher → client: which model it serves, and what it accepts and can answer.

    revision: digest of weights and configuration; tokenizer_fingerprint: digest of the logical vocabulary (V ids).
    """

    model: str
    revision: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    dtype: str
    limits: TeacherLimits
    payloads: tuple[PayloadKind, ...]
    degradations: tuple[DegradationKind, ...]
    columns: tuple[str, ...] = ()
    """The columns that it computes on request."""
    pixel_bounds: tuple[int, int] | None = None
    """The fewest and the most pixels that pictures are scaled to, before views are made; None: unknown, or unscaled."""


def user_turn(question: str, images: Sequence[EncodedImage]) -> tuple[Message, ...]:
    """Returns one user message: the images in order, then the question, as the data sets have it.

    >>> [type(part).__name__ for part in user_turn("How long?", [EncodedImage(data=b"abc")])[0].content]
    ['ImagePart', 'TextPart']
    """
    return (Message(role="user", content=(*(ImagePart(sha256=i.sha256) for i in images), TextPart(text=question))),)


def unique_images(images: Sequence[EncodedImage]) -> tuple[EncodedImage, ...]:
    """Returns each image once, in order of first appearance."""
    return tuple({image.sha256: image for image in images}.values())
