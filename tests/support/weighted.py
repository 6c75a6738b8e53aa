"""Weighted groups as the trainer's loss takes them, without a teacher or a worker: random responses and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.families import ask
from tests.support.teacher import drawing
from vaopd.config import VaOpd
from vaopd.payloads import from_torch
from vaopd.types import GroupScore, Payload, Rollout, RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer.student_loss import Part, ScoredGroup, StudentLoss, TokenValues, WeightedGroup, weigh

TEACHER_WIDTH = 24


def teacher_head(vlm: Vlm) -> Tensor:
    """(V, 24), with logits of a few nats."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(vlm.vocab_size, TEACHER_WIDTH, generator=generator)


def a_weighted_group(vlm: Vlm, index: int, lengths: Sequence[int], *, image: bool = True) -> WeightedGroup:
    """A group of the given responses' lengths; every index has other numbers."""
    rng = np.random.default_rng(index)
    prompt = ask(vlm, [drawing(index)] if image else [])
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
                rollout_logprobs=-rng.random(n).astype(np.float32),
                finish_reason="length",
            )
            for k, n in enumerate(lengths)
        ),
        worker="w",
        generation_s=0.0,
    )
    return score_randomly(group, prompt, index)


def score_randomly(group: RolloutGroup, prompt: PreparedPrompt, index: int) -> WeightedGroup:
    """Weights a group by scores of no teacher, with the hidden payload."""
    rng = np.random.default_rng([index, 1])
    lengths = [len(rollout.response_ids) for rollout in group.rollouts]
    logprobs = tuple(-rng.random(n).astype(np.float32) for n in lengths)
    degraded = tuple(-3 * rng.random(n).astype(np.float32) for n in lengths)
    hidden = torch.from_numpy(rng.standard_normal((sum(lengths), TEACHER_WIDTH)).astype(np.float32))
    score = GroupScore(
        group_id=group.group_id,
        teacher_logprobs=logprobs,
        degraded_logprobs=degraded,
        visual_advantage=tuple(o - d for o, d in zip(logprobs, degraded, strict=True)),
        payload=Payload(kind="hidden", tensors={"hidden": from_torch(hidden)}),
        prompt_tokens=len(prompt.token_ids),
    )
    return weigh(ScoredGroup(index=index, group=group, prompt=prompt, score=score), VaOpd(), seed=index)


class Scarce(nn.Module):
    """A loss on a device that holds so many tokens; beyond it, memory runs out in the forward or in the backward."""

    def __init__(self, loss: StudentLoss, *, tokens: int | None = None, fails_in: str = "forward") -> None:
        super().__init__()
        self.loss = loss
        self.tokens_of_forwards: list[int] = []
        self._most = tokens
        self._fails_in = fails_in
        self._too_large = False
        first = loss.model.model.language_model.layers[0]
        self._hook = first.register_forward_hook(self._watch)

    def forward(
        self, groups: Sequence[WeightedGroup], *, parts: frozenset[Part] = frozenset()
    ) -> tuple[Tensor, TokenValues]:
        tokens = sum(group.tokens for group in groups)
        self.tokens_of_forwards.append(tokens)
        self._too_large = self._most is not None and tokens > self._most
        if self._too_large and self._fails_in == "forward":
            raise torch.OutOfMemoryError(f"{tokens} tokens")
        return self.loss(groups, parts=parts)

    def _watch(self, _: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._too_large:
            hidden.register_hook(self._fail)  # most layers above have their gradients by then

    def _fail(self, _: Tensor) -> None:
        raise torch.OutOfMemoryError("in the backward")

    def close(self) -> None:
        self._hook.remove()
