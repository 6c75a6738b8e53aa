"""Types ↔ protobuf, in both directions; used by the client, the servicer and the queue. Torch-free."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from vaopd import types as t
from vaopd.errors import InvalidInput
from vaopd.pb import common_pb2, queue_pb2, teacher_pb2

PAYLOAD_KINDS: dict[t.PayloadKind, teacher_pb2.PayloadKind] = {
    "none": teacher_pb2.PAYLOAD_KIND_NONE,
    "hidden": teacher_pb2.PAYLOAD_KIND_HIDDEN,
    "hidden_int8": teacher_pb2.PAYLOAD_KIND_HIDDEN_INT8,
    "top_k": teacher_pb2.PAYLOAD_KIND_TOP_K,
    "sampled": teacher_pb2.PAYLOAD_KIND_SAMPLED,
}
DEGRADATION_KINDS: dict[t.DegradationKind, teacher_pb2.DegradationKind] = {
    "pixelate": teacher_pb2.DEGRADATION_KIND_PIXELATE,
    "blur": teacher_pb2.DEGRADATION_KIND_BLUR,
    "mean_colour": teacher_pb2.DEGRADATION_KIND_MEAN_COLOUR,
    "black": teacher_pb2.DEGRADATION_KIND_BLACK,
    "noise": teacher_pb2.DEGRADATION_KIND_NOISE,
}
_IMAGE_TOKENS, TOKEN_LETTERS = 512, 3
"""Guesses for prompts and responses that come as texts."""
_PAYLOAD_NAMES = {value: name for name, value in PAYLOAD_KINDS.items()}
_DEGRADATION_NAMES = {value: name for name, value in DEGRADATION_KINDS.items()}


def tensor_to_pb(tensor: t.Tensor | np.ndarray) -> common_pb2.Tensor:
    if isinstance(tensor, np.ndarray):
        tensor = t.Tensor.from_numpy(tensor)
    return common_pb2.Tensor(dtype=tensor.dtype, shape=tensor.shape, data=tensor.data)


def tensor_from_pb(message: common_pb2.Tensor) -> t.Tensor:
    """Raises InvalidInput when the bytes don't fit the dtype and shape."""
    return checked_tensor(message.dtype, tuple(message.shape), message.data)


def checked_tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> t.Tensor:
    if dtype not in t.ITEMSIZE_BYTES:
        raise InvalidInput(f"tensor dtype {dtype!r} is unknown; use one of {', '.join(t.ITEMSIZE_BYTES)}")
    expected = math.prod(shape) * t.ITEMSIZE_BYTES[dtype]
    if len(data) != expected:
        raise InvalidInput(f"tensor of dtype {dtype} and shape {shape} needs {expected} bytes, got {len(data)}")
    return t.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


def _array(message: common_pb2.Tensor, dtype: str, name: str) -> np.ndarray:
    tensor = tensor_from_pb(message)
    if tensor.dtype != dtype or len(tensor.shape) != 1:
        raise InvalidInput(f"{name} must be a 1-d {dtype} tensor, got {tensor.dtype} of shape {tensor.shape}")
    return tensor.numpy()


def messages_to_pb(messages: Iterable[t.Message]) -> list[common_pb2.ChatMessage]:
    def part(item: t.TextPart | t.ImagePart) -> common_pb2.ContentPart:
        if isinstance(item, t.TextPart):
            return common_pb2.ContentPart(text=item.text)
        return common_pb2.ContentPart(image_sha256=item.sha256)

    return [common_pb2.ChatMessage(role=m.role, content=[part(p) for p in m.content]) for m in messages]


def messages_from_pb(messages: Iterable[common_pb2.ChatMessage]) -> tuple[t.Message, ...]:
    def part(item: common_pb2.ContentPart) -> t.TextPart | t.ImagePart:
        match item.WhichOneof("part"):
            case "text":
                return t.TextPart(text=item.text)
            case "image_sha256":
                return t.ImagePart(sha256=item.image_sha256)
            case _:
                raise InvalidInput("a content part is empty; give it text or image_sha256")

    def message(item: common_pb2.ChatMessage) -> t.Message:
        if item.role not in ("system", "user", "assistant"):
            raise InvalidInput(f"message role {item.role!r} is unknown; use system, user or assistant")
        return t.Message(role=item.role, content=tuple(part(p) for p in item.content))  # type: ignore[arg-type]

    return tuple(message(m) for m in messages)


def _images_from_pb(images: Iterable[common_pb2.EncodedImage]) -> tuple[t.EncodedImage, ...]:
    decoded = []
    for message in images:
        image = t.EncodedImage(data=message.data)
        if message.sha256 and message.sha256 != image.sha256:
            raise InvalidInput(
                f"image declared as {message.sha256[:12]}… has content {image.sha256[:12]}…; upload it again"
            )
        decoded.append(image)
    return tuple(decoded)


def image_to_pb(image: t.EncodedImage) -> common_pb2.EncodedImage:
    return common_pb2.EncodedImage(sha256=image.sha256, data=image.data)


def image_from_pb(message: common_pb2.EncodedImage) -> t.EncodedImage:
    return _images_from_pb([message])[0]


def rollout_request_to_bytes(request: t.RolloutRequest) -> bytes:
    return queue_pb2.RolloutRequest(
        group_id=request.group_id,
        messages=messages_to_pb(request.messages),
        images=[image_to_pb(image) for image in request.images],
        num_rollouts=request.num_rollouts,
        sampling=queue_pb2.SamplingSettings(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            max_new_tokens=request.sampling.max_new_tokens,
            seed=request.sampling.seed,
        ),
        policy_version=request.policy_version,
    ).SerializeToString()


M = TypeVar("M", queue_pb2.RolloutRequest, queue_pb2.RolloutGroup, queue_pb2.PolicyVersion)


def _parse(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except DecodeError:
        # The library's own text is left out on purpose: it may quote the bytes.
        raise InvalidInput(f"{len(data)} bytes are not a {type(message).__name__} message") from None
    return message


def rollout_request_from_bytes(data: bytes) -> t.RolloutRequest:
    message = _parse(queue_pb2.RolloutRequest(), data)
    if not message.group_id or message.num_rollouts < 1 or message.sampling.max_new_tokens < 1:
        raise InvalidInput("a rollout request needs a group_id, num_rollouts >= 1 and max_new_tokens >= 1")
    return t.RolloutRequest(
        group_id=message.group_id,
        messages=messages_from_pb(message.messages),
        images=_images_from_pb(message.images),
        num_rollouts=message.num_rollouts,
        sampling=t.SamplingSettings(
            temperature=message.sampling.temperature,
            top_p=message.sampling.top_p,
            max_new_tokens=message.sampling.max_new_tokens,
            seed=message.sampling.seed,
        ),
        policy_version=message.policy_version,
    )


def rollout_group_to_bytes(group: t.RolloutGroup) -> bytes:
    return queue_pb2.RolloutGroup(
        group_id=group.group_id,
        policy_version=group.policy_version,
        policy_sha256=group.policy_sha256,
        prompt_token_ids=tensor_to_pb(group.prompt_token_ids),
        rollouts=[
            queue_pb2.Rollout(
                rollout_id=r.rollout_id,
                response_ids=tensor_to_pb(r.response_ids),
                rollout_logprobs=tensor_to_pb(r.rollout_logprobs),
                finish_reason=r.finish_reason,
            )
            for r in group.rollouts
        ],
        worker=group.worker,
        generation_s=group.generation_s,
    ).SerializeToString()


def rollout_group_from_bytes(data: bytes) -> t.RolloutGroup:
    """Raises InvalidInput for bytes, shapes or numbers that can't be trained on."""
    message = _parse(queue_pb2.RolloutGroup(), data)
    if not message.rollouts:
        raise InvalidInput(f"group {message.group_id!r} holds no rollouts")
    return t.RolloutGroup(
        group_id=message.group_id,
        policy_version=message.policy_version,
        policy_sha256=message.policy_sha256,
        prompt_token_ids=_array(message.prompt_token_ids, "int32", "prompt_token_ids"),
        rollouts=tuple(_rollout_from_pb(r) for r in message.rollouts),
        worker=message.worker,
        generation_s=message.generation_s,
    )


def _rollout_from_pb(message: queue_pb2.Rollout) -> t.Rollout:
    response_ids = _array(message.response_ids, "int32", "response_ids")
    logprobs = _array(message.rollout_logprobs, "float32", "rollout_logprobs")
    name = message.rollout_id
    if response_ids.size == 0 or response_ids.shape != logprobs.shape:
        raise InvalidInput(
            f"rollout {name!r} has {response_ids.size} response ids and {logprobs.size} log-probs; "
            "they must be as many, and at least one"
        )
    if not np.isfinite(logprobs).all() or (logprobs > 0).any():
        raise InvalidInput(f"rollout {name!r} has a log-prob that is not finite or above 0")
    if message.finish_reason not in ("stop", "length"):
        raise InvalidInput(f"rollout {name!r} has finish_reason {message.finish_reason!r}; use stop or length")
    return t.Rollout(
        rollout_id=name,
        response_ids=response_ids,
        rollout_logprobs=logprobs,
        finish_reason=message.finish_reason,  # type: ignore[arg-type]
    )


def policy_version_to_bytes(policy: t.PolicyVersion) -> bytes:
    return queue_pb2.PolicyVersion(version=policy.version, path=policy.path, sha256=policy.sha256).SerializeToString()


def policy_version_from_bytes(data: bytes) -> t.PolicyVersion:
    message = _parse(queue_pb2.PolicyVersion(), data)
    return t.PolicyVersion(version=message.version, path=message.path, sha256=message.sha256)


def score_request_to_pb(
    requests: Sequence[t.ScoreRequest],
    *,
    job: str,
    payload: t.PayloadKind,
    top_k: int = 0,
    degradation: t.Degradation = t.Degradation(),
    tokenizer_fingerprint: str = "",
    revision: str = "",
    with_token_texts: bool = False,
) -> teacher_pb2.ScoreGroupsRequest:
    return teacher_pb2.ScoreGroupsRequest(
        job=job,
        groups=[_prompt_group_to_pb(request) for request in requests],
        payload=PAYLOAD_KINDS[payload],
        top_k=top_k,
        degradation=teacher_pb2.Degradation(kind=DEGRADATION_KINDS[degradation.kind], strength=degradation.strength),
        tokenizer_fingerprint=tokenizer_fingerprint,
        revision=revision,
        with_token_texts=with_token_texts,
    )


def _prompt_group_to_pb(request: t.ScoreRequest) -> teacher_pb2.PromptGroup:
    group = teacher_pb2.PromptGroup(
        group_id=request.group_id,
        rollouts=[_rollout_tokens(str(k), response) for k, response in enumerate(request.responses)],
    )
    if (request.prompt_token_ids is None) == (request.messages is None):
        raise InvalidInput(f"group {request.group_id!r} needs exactly one of prompt_token_ids and messages")
    if request.messages is not None:
        group.messages.messages.extend(messages_to_pb(request.messages))
    else:
        group.tokens.token_ids.extend(request.prompt_token_ids)
        group.tokens.image_sha256.extend(image.sha256 for image in request.images)
    return group


def _rollout_tokens(rollout_id: str, response: np.ndarray | str) -> teacher_pb2.RolloutTokens:
    if isinstance(response, str):
        return teacher_pb2.RolloutTokens(rollout_id=rollout_id, response_text=response)
    return teacher_pb2.RolloutTokens(rollout_id=rollout_id, response_ids=response)


def prompt_tokens_of(group: teacher_pb2.PromptGroup) -> int:
    """P: exact for token ids, a guess for messages, which only the teacher can read."""
    if group.WhichOneof("prompt") != "messages":
        return len(group.tokens.token_ids)
    parts = [part for message in group.messages.messages for part in message.content]
    return sum(_IMAGE_TOKENS if part.image_sha256 else len(part.text) // TOKEN_LETTERS for part in parts)


def tokens_of(group: teacher_pb2.PromptGroup) -> int:
    """What counts towards `max_tokens_per_request`: the prompt once, and the responses."""
    responses = (len(r.response_ids) + len(r.response_text) // TOKEN_LETTERS for r in group.rollouts)
    return prompt_tokens_of(group) + sum(responses)


def payload_kind_from_pb(kind: int) -> t.PayloadKind:
    """Raises KeyError for a number that is no payload; unspecified means none."""
    return _PAYLOAD_NAMES[kind or teacher_pb2.PAYLOAD_KIND_NONE]  # type: ignore[index]


def degradation_from_pb(message: teacher_pb2.Degradation) -> t.Degradation:
    """Unspecified means the paper's pixelation. Raises KeyError for a number that is no degradation."""
    if message.kind == teacher_pb2.DEGRADATION_KIND_UNSPECIFIED:
        return t.Degradation()
    return t.Degradation(kind=_DEGRADATION_NAMES[message.kind], strength=message.strength)


def description_to_pb(d: t.TeacherDescription) -> teacher_pb2.TeacherDescription:
    return teacher_pb2.TeacherDescription(
        model=d.model,
        revision=d.revision,
        tokenizer_fingerprint=d.tokenizer_fingerprint,
        vocab_size=d.vocab_size,
        hidden_size=d.hidden_size,
        dtype=d.dtype,
        limits=teacher_pb2.Limits(
            max_groups_per_request=d.limits.max_groups_per_request,
            max_rollouts_per_group=d.limits.max_rollouts_per_group,
            max_tokens_per_rollout=d.limits.max_tokens_per_rollout,
            max_image_bytes=d.limits.max_image_bytes,
            max_image_pixels=d.limits.max_image_pixels,
            max_message_bytes=d.limits.max_message_bytes,
            max_tokens_per_request=d.limits.max_tokens_per_request,
        ),
        payloads=[PAYLOAD_KINDS[name] for name in d.payloads],
        degradations=[DEGRADATION_KINDS[name] for name in d.degradations],
    )


def description_from_pb(message: teacher_pb2.TeacherDescription) -> t.TeacherDescription:
    limits = message.limits
    return t.TeacherDescription(
        model=message.model,
        revision=message.revision,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        vocab_size=message.vocab_size,
        hidden_size=message.hidden_size,
        dtype=message.dtype,
        limits=t.TeacherLimits(
            max_groups_per_request=limits.max_groups_per_request,
            max_rollouts_per_group=limits.max_rollouts_per_group,
            max_tokens_per_rollout=limits.max_tokens_per_rollout,
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_message_bytes=limits.max_message_bytes,
            # An older teacher has no such limit.
            max_tokens_per_request=limits.max_tokens_per_request or sys.maxsize,
        ),
        # A newer teacher may know kinds that this client doesn't; they are left out.
        payloads=tuple(_PAYLOAD_NAMES[kind] for kind in message.payloads if kind in _PAYLOAD_NAMES),
        degradations=tuple(_DEGRADATION_NAMES[kind] for kind in message.degradations if kind in _DEGRADATION_NAMES),
    )
