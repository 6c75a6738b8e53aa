"""Score requests, scores and descriptions to protobuf (teacher.proto) and back. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

import numpy as np

from vaopd import types as t
from vaopd.columns import COLUMNS
from vaopd.errors import InvalidInput
from vaopd.pb import common_pb2, teacher_pb2
from vaopd.wire.common import messages_to_pb, tensor_to_pb

PAYLOAD_KINDS: dict[t.PayloadKind, teacher_pb2.PayloadKind] = {
    "none": teacher_pb2.PAYLOAD_KIND_NONE,
    "hidden": teacher_pb2.PAYLOAD_KIND_HIDDEN,
    "hidden_int8": teacher_pb2.PAYLOAD_KIND_HIDDEN_INT8,
    "hidden_pair": teacher_pb2.PAYLOAD_KIND_HIDDEN_PAIR,
    "top_k": teacher_pb2.PAYLOAD_KIND_TOP_K,
    "sampled": teacher_pb2.PAYLOAD_KIND_SAMPLED,
}
DEGRADATION_KINDS: dict[t.DegradationKind, teacher_pb2.DegradationKind] = {
    kind: teacher_pb2.DegradationKind.Value(f"DEGRADATION_KIND_{kind.upper()}") for kind in t.DEGRADATIONS
}
_IMAGE_TOKENS, TOKEN_LETTERS = 512, 3
"""Tokens of an image and letters of a token, for prompts and responses that come as texts: guesses."""
_AS_THEY_ARE = ("model", "revision", "tokenizer_fingerprint", "vocab_size", "hidden_size", "dtype")
"""Fields of a description that are the same in both forms."""
_PAYLOAD_NAMES = {value: name for name, value in PAYLOAD_KINDS.items()}
_DEGRADATION_NAMES = {value: name for name, value in DEGRADATION_KINDS.items()}


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
    columns: Sequence[str] = (),
) -> teacher_pb2.ScoreGroupsRequest:
    """One ScoreGroups call. Raises InvalidInput for an unknown setting, and as `prompt_group_to_pb`."""
    for name, value, known in (
        ("payload", payload, PAYLOAD_KINDS),
        ("degradation.kind", degradation.kind, DEGRADATION_KINDS),
    ):
        if value not in known:
            raise InvalidInput(f"{name} = {value!r} is unknown; use one of {', '.join(known)}", field=name)
    if not isinstance(top_k, int | np.integer) or not 0 <= top_k < 2**31:
        raise InvalidInput(f"top_k = {top_k} must be a whole number from 0 to 2147483647", field="top_k")
    return teacher_pb2.ScoreGroupsRequest(
        job=job,
        groups=[prompt_group_to_pb(request) for request in requests],
        payload=PAYLOAD_KINDS[payload],
        top_k=top_k,
        degradation=teacher_pb2.Degradation(kind=DEGRADATION_KINDS[degradation.kind], strength=degradation.strength),
        tokenizer_fingerprint=tokenizer_fingerprint,
        revision=revision,
        with_token_texts=with_token_texts,
        columns=columns,
    )


def prompt_group_to_pb(request: t.ScoreRequest) -> teacher_pb2.PromptGroup:
    """One group of a call. Raises InvalidInput when it has no prompt, or two, or what protobuf can't hold."""
    if (request.prompt_token_ids is None) == (request.messages is None):
        raise InvalidInput(f"group {request.group_id!r} needs exactly one of prompt_token_ids and messages")
    try:
        group = teacher_pb2.PromptGroup(
            group_id=request.group_id,
            rollouts=[_encode_rollout(str(k), response) for k, response in enumerate(request.responses)],
        )
        if request.messages is not None:
            group.messages.messages.extend(messages_to_pb(request.messages))
        else:
            group.tokens.token_ids.extend(request.prompt_token_ids)
            group.tokens.image_sha256.extend(image.sha256 for image in request.images)
    except (TypeError, ValueError) as error:  # a lone surrogate's UnicodeEncodeError is one
        raise InvalidInput(
            f"group {request.group_id!r} can't be sent ({error}); give ids as rows of integers, and texts in Unicode"
        ) from None
    return group


def _encode_rollout(rollout_id: str, response: np.ndarray | str) -> teacher_pb2.RolloutTokens:
    if isinstance(response, str):
        return teacher_pb2.RolloutTokens(rollout_id=rollout_id, response_text=response)
    return teacher_pb2.RolloutTokens(rollout_id=rollout_id, response_ids=response)


def prompt_tokens_of(group: teacher_pb2.PromptGroup) -> int:
    """Returns P: exact for token ids, a guess for messages, which only the teacher can tokenise."""
    if group.WhichOneof("prompt") != "messages":
        return len(group.tokens.token_ids)
    parts = [part for message in group.messages.messages for part in message.content]
    return sum(_IMAGE_TOKENS if part.image_sha256 else len(part.text) // TOKEN_LETTERS for part in parts)


def count_tokens(group: teacher_pb2.PromptGroup) -> int:
    """Counts a group's tokens towards `max_tokens_per_request`: the prompt once, and the responses."""
    responses = (len(r.response_ids) + len(r.response_text) // TOKEN_LETTERS for r in group.rollouts)
    return prompt_tokens_of(group) + sum(responses)


def columns_to_pb(columns: Mapping[str, np.ndarray], score: teacher_pb2.GroupScore) -> None:
    """Puts columns (M,) into a score: those of every score into their own fields, the others by name."""
    for name, values in columns.items():
        place = score.columns[name] if COLUMNS[name].on_request else getattr(score, name)
        place.CopyFrom(tensor_to_pb(values))


def columns_from_pb(score: teacher_pb2.GroupScore) -> dict[str, common_pb2.Tensor]:
    """The columns of a score by name, as they came: dtype and shape are not checked. Unknown names are left out."""
    sent = {name: getattr(score, name) for name, column in COLUMNS.items() if not column.on_request}
    return sent | {name: tensor for name, tensor in score.columns.items() if name in COLUMNS}


def payload_kind_from_pb(kind: int) -> t.PayloadKind:
    """Returns a payload's name; unspecified means "none". Raises KeyError for an unknown number."""
    return _PAYLOAD_NAMES[kind or teacher_pb2.PAYLOAD_KIND_NONE]  # type: ignore[index]


def degradation_from_pb(message: teacher_pb2.Degradation) -> t.Degradation:
    """Decodes a degradation; unspecified means the paper's pixelation. Raises KeyError for an unknown kind."""
    if message.kind == teacher_pb2.DEGRADATION_KIND_UNSPECIFIED:
        return t.Degradation()
    return t.Degradation(kind=_DEGRADATION_NAMES[message.kind], strength=message.strength)


def description_to_pb(d: t.TeacherDescription) -> teacher_pb2.TeacherDescription:
    """Encodes what Describe answers."""
    return teacher_pb2.TeacherDescription(
        **{name: getattr(d, name) for name in _AS_THEY_ARE},
        limits=teacher_pb2.Limits(**asdict(d.limits)),
        payloads=[PAYLOAD_KINDS[name] for name in d.payloads],
        degradations=[DEGRADATION_KINDS[name] for name in d.degradations],
        columns=d.columns,
        pixel_bounds=d.pixel_bounds
        and teacher_pb2.PixelBounds(min_pixels=d.pixel_bounds[0], max_pixels=d.pixel_bounds[1]),
    )


def description_from_pb(message: teacher_pb2.TeacherDescription) -> t.TeacherDescription:
    """Decodes what Describe answered, also by a teacher of another version."""
    limits = {field.name: getattr(message.limits, field.name) for field in fields(t.TeacherLimits)}
    limits["max_tokens_per_request"] = (
        limits["max_tokens_per_request"] or sys.maxsize
    )  # an older teacher has no such limit
    return t.TeacherDescription(
        **{name: getattr(message, name) for name in _AS_THEY_ARE},
        limits=t.TeacherLimits(**limits),
        # A newer teacher may know kinds that this client doesn't; they are left out.
        payloads=tuple(_PAYLOAD_NAMES[kind] for kind in message.payloads if kind in _PAYLOAD_NAMES),
        degradations=tuple(_DEGRADATION_NAMES[kind] for kind in message.degradations if kind in _DEGRADATION_NAMES),
        columns=tuple(message.columns),
        pixel_bounds=(message.pixel_bounds.min_pixels, message.pixel_bounds.max_pixels)
        if message.HasField("pixel_bounds")
        else None,
    )
