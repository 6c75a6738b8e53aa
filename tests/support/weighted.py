"""Weighted groups as the trainer's loss takes them, without a teacher or a worker: random responses and scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.support.families import ask
from tests.support.teacher import drawing
from vaopd.config import VaOpd
from vaopd.payloads import from_torch
from vaopd.types import GroupScore, Payload, Rollout, RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd_trainer.student_loss import ScoredGroup, WeightedGroup, weigh

TEACHER_WIDTH = 24


def teacher_head(vlm: Vlm) -> torch.Tensor:
    """(V, 24), with logits of a few nats."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(vlm.vocab_size, TEACHER_WIDTH, generator=generator)


def a_weighted_group(vlm: Vlm, index: int, lengths: Sequence[int], *, image: bool = True) -> WeightedGroup:
    """A group of the given responses' lengths, with the hidden payload; every index has other numbers."""
    rng = np.random.default_rng(index)
    prompt = ask(vlm, [drawing(index)] if image else [])
    logprobs = tuple(-rng.random(n).astype(np.float32) for n in lengths)
    degraded = tuple(-3 * rng.random(n).astype(np.float32) for n in lengths)
    hidden = torch.from_numpy(rng.standard_normal((sum(lengths), TEACHER_WIDTH)).astype(np.float32))
    name = f"train-000000-{index:04d}"
    group = RolloutGroup(
        group_id=name,
        policy_version=0,
        policy_sha256="",
        prompt_token_ids=prompt.token_ids.astype(np.int32),
        rollouts=tuple(
            Rollout(
                rollout_id=f"{name}/{k}",
                response_ids=rng.integers(0, 200, n).astype(np.int32),
                rollout_logprobs=logprobs[k],
                finish_reason="length",
            )
            for k, n in enumerate(lengths)
        ),
        worker="w",
        generation_s=0.0,
    )
    score = GroupScore(
        group_id=name,
        teacher_logprobs=logprobs,
        degraded_logprobs=degraded,
        visual_advantage=tuple(o - d for o, d in zip(logprobs, degraded, strict=True)),
        payload=Payload(kind="hidden", tensors={"hidden": from_torch(hidden)}),
        prompt_tokens=len(prompt.token_ids),
    )
    return weigh(ScoredGroup(index=index, group=group, prompt=prompt, score=score), VaOpd(), seed=index)
