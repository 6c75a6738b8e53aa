"""Rollout requests, groups and policy versions to bytes (queue.proto) and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from vaopd import types as t
from vaopd.errors import InvalidInput
from vaopd.pb import queue_pb2
from vaopd.wire.common import array_from_pb, image_to_pb, images_from_pb, messages_from_pb, messages_to_pb, tensor_to_pb


def rollout_request_to_bytes(request: t.RolloutRequest) -> bytes:
    """Encodes a rollout request."""
    return queue_pb2.RolloutRequest(
        group_id=request.group_id,
        messages=messages_to_pb(request.messages),
        images=[image_to_pb(image) for image in request.images],
        num_rollouts=request.num_rollouts,
        sampling=queue_pb2.SamplingSettings(**asdict(request.sampling)),
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
    """Decodes a rollout request. Raises InvalidInput for bytes or numbers that no worker can answer."""
    message = _parse(queue_pb2.RolloutRequest(), data)
    if not message.group_id or message.num_rollouts < 1 or message.sampling.max_new_tokens < 1:
        raise InvalidInput("a rollout request needs a group_id, num_rollouts >= 1 and max_new_tokens >= 1")
    return t.RolloutRequest(
        group_id=message.group_id,
        messages=messages_from_pb(message.messages),
        images=images_from_pb(message.images),
        num_rollouts=message.num_rollouts,
        sampling=t.SamplingSettings(
            **{field.name: getattr(message.sampling, field.name) for field in fields(t.SamplingSettings)}
        ),
        policy_version=message.policy_version,
    )


def rollout_group_to_bytes(group: t.RolloutGroup) -> bytes:
    """Encodes a finished group."""
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
    """Decodes a finished group. Raises InvalidInput for bytes, shapes or numbers that can't be trained on."""
    message = _parse(queue_pb2.RolloutGroup(), data)
    if not message.rollouts:
        raise InvalidInput(f"group {message.group_id!r} holds no rollouts")
    return t.RolloutGroup(
        group_id=message.group_id,
        policy_version=message.policy_version,
        policy_sha256=message.policy_sha256,
        prompt_token_ids=array_from_pb(message.prompt_token_ids, "int32", "prompt_token_ids"),
        rollouts=tuple(_rollout_from_pb(r) for r in message.rollouts),
        worker=message.worker,
        generation_s=message.generation_s,
    )


def _rollout_from_pb(message: queue_pb2.Rollout) -> t.Rollout:
    response_ids = array_from_pb(message.response_ids, "int32", "response_ids")
    logprobs = array_from_pb(message.rollout_logprobs, "float32", "rollout_logprobs")
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
    """Encodes a policy announcement."""
    return queue_pb2.PolicyVersion(**asdict(policy)).SerializeToString()


def policy_version_from_bytes(data: bytes) -> t.PolicyVersion:
    """Decodes a policy announcement. Raises InvalidInput for bytes that are none."""
    message = _parse(queue_pb2.PolicyVersion(), data)
    return t.PolicyVersion(version=message.version, path=message.path, sha256=message.sha256)
