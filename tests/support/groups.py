"""Small requests and groups for tests of the queue, and the steps that they take through it."""

from __future__ import annotations

import numpy as np

from vaopd.queue import Delivered, Lease, TrainerEnd, WorkerEnd
from vaopd.types import EncodedImage, Message, Rollout, RolloutGroup, RolloutRequest, SamplingSettings, TextPart


def a_request(group_id: str = "g1", *, policy_version: int = 0, image_bytes: int = 0) -> RolloutRequest:
    """`image_bytes` makes the entry as large as wanted."""
    return RolloutRequest(
        group_id=group_id,
        messages=(Message(role="user", content=(TextPart(text="How long is the side?"),)),),
        images=(EncodedImage(data=bytes(image_bytes)),) if image_bytes else (),
        num_rollouts=2,
        sampling=SamplingSettings(),
        policy_version=policy_version,
    )


def an_answer(request: RolloutRequest, *, worker: str = "w1") -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            rollout_id=f"{request.group_id}/{k}",
            response_ids=np.array([5, 6, 7 + k], np.int32),
            rollout_logprobs=np.array([-0.5, -1.0, -0.25], np.float32),
            finish_reason="stop",
        )
        for k in range(request.num_rollouts)
    )
    return RolloutGroup(
        group_id=request.group_id,
        policy_version=request.policy_version,
        policy_sha256="ab" * 32,
        prompt_token_ids=np.array([1, 2, 3], np.int32),
        rollouts=rollouts,
        worker=worker,
        generation_s=0.1,
    )


def take_one(worker: WorkerEnd) -> Lease:
    [lease] = worker.take(block_s=10)
    return lease


def collect_one(trainer: TrainerEnd) -> Delivered:
    [delivered] = trainer.collect(block_s=10, max_groups=1)
    return delivered


def answer(worker: WorkerEnd) -> RolloutRequest:
    """Takes a request and answers it."""
    lease = take_one(worker)
    worker.complete(lease, an_answer(lease.request, worker=worker.worker))
    return lease.request
