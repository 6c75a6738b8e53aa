"""The student's forward pass and the loss of method.md over a few prompt groups.

In: scored groups and their token weights. Out: the scalar loss, whose gradient is the step's, and each token's KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vaopd import divergence, objective
from vaopd.config import ObjectiveConfig, TrainerConfig
from vaopd.errors import ConfigError
from vaopd.payloads import hidden_states, to_torch
from vaopd.types import GroupScore, RolloutGroup
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.prompts import PreparedPrompt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredGroup:
    """A prompt group with everything that the loss needs. `index` is its place in the step, 0 … B − 1."""

    index: int
    group: RolloutGroup
    prompt: PreparedPrompt
    score: GroupScore

    @property
    def responses(self) -> list[np.ndarray]:
        return [rollout.response_ids for rollout in self.group.rollouts]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedGroup:
    """A scored group with its rollout weights (K,) and the weights of its tokens, flat over siblings (M,)."""

    scored: ScoredGroup
    rollout_weights: Tensor
    token_weights: Tensor


def weigh(scored: ScoredGroup, settings: ObjectiveConfig, *, seed: int) -> WeightedGroup:
    """The weights of one complete group under `settings.variant`. They depend on nothing outside the group."""
    advantages = [torch.from_numpy(np.array(va)) for va in scored.score.visual_advantage]
    va_KT = nn.utils.rnn.pad_sequence(advantages, batch_first=True)
    mask_KT = nn.utils.rnn.pad_sequence([torch.ones(len(va), dtype=torch.bool) for va in advantages], batch_first=True)
    uniform_K = torch.full((len(advantages),), 1 / len(advantages))
    own = settings.as_keywords()
    by_va_K = objective.rollout_weights(
        objective.mean_visual_advantage(va_KT, mask_KT)[None], temperature=own.get("temperature", 1.0)
    )[0]
    grouped = {key: own[key] for key in ("high_fraction", "high_weight") if key in own}
    match settings.variant:
        case "va_opd":
            weights_KT = objective.token_weights(va_KT, mask_KT, by_va_K, **grouped)
        case "token_groups":
            weights_KT = objective.token_weights(va_KT, mask_KT, uniform_K, **grouped)
        case "rollout_weights":
            weights_KT = objective.mean_weights(mask_KT, by_va_K)
        case "standard":
            weights_KT = objective.mean_weights(mask_KT, uniform_K)
        case "masked":
            kept_KT = objective.masked_response(
                va_KT, mask_KT, which=own["mask"], fraction=own["mask_fraction"], seed=seed
            )
            weights_KT = objective.mean_weights(kept_KT, uniform_K)
    rollout_weights = by_va_K if settings.variant in ("va_opd", "rollout_weights") else uniform_K
    return WeightedGroup(scored=scored, rollout_weights=rollout_weights, token_weights=weights_KT[mask_KT])


class StudentLoss(nn.Module):
    """Σ weight·KL over the tokens of some groups. One module, so that DDP and FSDP wrap model and head together."""

    def __init__(
        self,
        student: Vlm,
        *,
        teacher_head: Tensor | None,
        trainer: TrainerConfig,
        estimator: Literal["k1", "k3"] = "k3",
        checkpoint_activations: bool | None = None,
    ) -> None:
        """`estimator`: of the KL where the payload is sampled.

        `checkpoint_activations`: layers keep their input only and are computed again in the backward pass, a third more
        work for a fraction of the memory; None means on a GPU, where memory is what bounds the batch.
        """
        super().__init__()
        if student.device.type == "cuda" if checkpoint_activations is None else checkpoint_activations:
            if not student.model.supports_gradient_checkpointing:
                raise ConfigError(f"{type(student.model).__name__} has no activation checkpointing; switch it off")
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
            student.model.train()  # transformers checkpoints in this mode only; the families here have no dropout
        self.model = student.model
        self._student = student
        self._teacher_head = teacher_head
        self._chunk_tokens = trainer.chunk_tokens
        self._estimator = estimator

    def forward(self, groups: Sequence[WeightedGroup]) -> tuple[Tensor, Tensor]:
        """-> loss (), not yet divided by B, and kl (M,), flat over groups, siblings and tokens."""
        segments = [Segment(prompt=g.scored.prompt, responses=tuple(g.scored.responses)) for g in groups]
        responses = [response for segment in segments for response in segment.responses]
        hidden = self._student.response_hidden(segments)
        weights = torch.cat([group.token_weights for group in groups])
        return divergence.fused_loss(
            hidden,
            self._student.head,
            self._target(groups, responses, hidden.device),
            weights,
            chunk_tokens=self._chunk_tokens,
        )

    def _target(
        self, groups: Sequence[WeightedGroup], responses: Sequence[np.ndarray], device: torch.device
    ) -> divergence.Target:
        """What the teacher said of these tokens, as the job's payload has it."""
        payloads = [group.scored.score.payload for group in groups]

        def column(name: str) -> Tensor:
            return torch.cat([to_torch(payload.tensors[name]) for payload in payloads]).to(device)

        match payloads[0].kind:
            case "hidden" | "hidden_int8":
                assert self._teacher_head is not None, "the hidden payloads need the teacher's head"
                hidden = torch.cat([hidden_states(payload, self._teacher_head.dtype) for payload in payloads])
                return divergence.FullTarget(hidden=hidden.to(device), head=self._teacher_head)
            case "top_k":
                return divergence.TopKTarget(
                    token_ids=column("token_ids"),
                    logprobs=column("logprobs"),
                    tail_logprobs=column("tail_logprobs"),
                )
            case kind:
                assert kind == "sampled", f"payload {kind!r} carries no distribution"
                teacher = np.concatenate([lp for group in groups for lp in group.scored.score.teacher_logprobs])
                return divergence.SampledTarget(
                    token_ids=torch.from_numpy(np.concatenate(responses)).to(device),
                    logprobs=torch.from_numpy(teacher).to(device),
                    estimator=self._estimator,
                )
