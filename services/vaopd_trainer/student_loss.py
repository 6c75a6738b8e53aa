"""Computes the student's forward pass and the paper's loss over a few prompt groups.

In: scored groups and their token weights, which one token score computes here. Out: the scalar loss, to call backward
on, each token's KL, and its log-prob, which should be the one that it was sampled with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from vaopd import divergence, objective
from vaopd.config import ObjectiveConfig, TokenGroupsOnly, TrainerConfig, VaOpd
from vaopd.errors import ConfigError
from vaopd.payloads import hidden_states, to_torch
from vaopd.types import GroupScore, RolloutGroup
from vaopd.vlm.compiled import compile_layers
from vaopd.vlm.families import PreparedImage
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.transfer import upload, upload_rows
from vaopd_trainer.expected_score import score_tokens, weigh_tokens


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredGroup:
    """A prompt group with its prompt and score, as the loss needs them; `index` is its place in the step, 0 … B − 1."""

    index: int
    group: RolloutGroup
    prompt: PreparedPrompt
    score: GroupScore

    @property
    def responses(self) -> list[np.ndarray]:
        """The token ids of each rollout, (T_k,)."""
        return [rollout.response_ids for rollout in self.group.rollouts]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedGroup:
    """A scored group with its rollout weights (K,) and the weights of its tokens, flat over siblings (M,).

    grouping: given when the student's own distribution has to be known first (token score "expected"). `StudentLoss`
    then weights the tokens by these settings, and `token_weights` are NaN.
    """

    scored: ScoredGroup
    rollout_weights: Tensor
    token_weights: Tensor
    grouping: VaOpd | TokenGroupsOnly | None = None

    @property
    def segment(self) -> Segment:
        """The prompt and its responses, as the student reads them."""
        return Segment(prompt=self.scored.prompt, responses=tuple(self.scored.responses))

    @property
    def tokens(self) -> int:
        """Tokens that a forward of this group computes."""
        return self.segment.tokens

    def record_expected_va(self, expected_va: Tensor | None) -> WeightedGroup:
        """Returns the group with this number of its tokens, (M,), beside the teacher's columns; itself without one."""
        if expected_va is None:
            return self
        rows = expected_va.split([len(response) for response in self.scored.responses])
        columns = {**self.scored.score.columns, "expected_va_nats": tuple(row.numpy() for row in rows)}
        return replace(self, scored=replace(self.scored, score=replace(self.scored.score, columns=columns)))

    def select(self, start: int, end: int) -> WeightedGroup:
        """Returns the siblings from `start` up to `end`, with the weights that they have in the whole group."""
        siblings = slice(start, end)
        ends = np.cumsum([0, *(len(response) for response in self.scored.responses)])
        tokens = slice(int(ends[start]), int(ends[end]))
        score = self.scored.score
        part = replace(
            score,
            teacher_logprobs=score.teacher_logprobs[siblings],
            degraded_logprobs=score.degraded_logprobs[siblings],
            visual_advantage=score.visual_advantage[siblings],
            columns={name: rows[siblings] for name, rows in score.columns.items()},
            payload=replace(
                score.payload, tensors={name: t.select_rows(tokens) for name, t in score.payload.tensors.items()}
            ),
        )
        group = replace(self.scored.group, rollouts=self.scored.group.rollouts[siblings])
        return replace(
            self,
            scored=replace(self.scored, group=group, score=part),
            rollout_weights=self.rollout_weights[siblings],
            token_weights=self.token_weights[tokens],
        )


def weigh(scored: ScoredGroup, settings: ObjectiveConfig, *, seed: int) -> WeightedGroup:
    """Weights one complete group by `objective.group_weights`; nothing outside the group has an effect."""
    teacher_KT, mask_KT = objective.pad_rows(scored.score.teacher_logprobs)
    degraded_KT, _ = objective.pad_rows(scored.score.degraded_logprobs)
    weights = objective.group_weights(
        objective.visual_advantage(teacher_KT, degraded_KT, mask_KT),
        mask_KT,
        token_score_KT=_score_tokens(scored.score, teacher_KT, degraded_KT, mask_KT, settings),
        **settings.as_keywords(),
        seed=seed,
    )
    tokens_M = weights.token_weights[mask_KT]
    if isinstance(settings, VaOpd | TokenGroupsOnly) and settings.needs_both_views:
        return WeightedGroup(
            scored=scored,
            rollout_weights=weights.rollout_weights,
            token_weights=torch.full_like(tokens_M, torch.nan),
            grouping=settings,
        )
    return WeightedGroup(scored=scored, rollout_weights=weights.rollout_weights, token_weights=tokens_M)


def _score_tokens(
    score: GroupScore, teacher_KT: Tensor, degraded_KT: Tensor, mask_KT: Tensor, settings: ObjectiveConfig
) -> Tensor | None:
    """Returns what ranks the tokens for the token groups, (K, T); None: their VA."""
    match getattr(settings, "token_score", "va"):
        case "view_divergence":
            return objective.pad_rows(score.columns["view_divergence_nats"])[0]
        case "absolute":
            return objective.absolute_advantage(teacher_KT, degraded_KT, mask_KT)
        case _:
            return None


class TokenValues(NamedTuple):
    """The KL of tokens, the student's log-probs of them and, where it ranks them, their expected VA: (M,), in nats."""

    kl: Tensor
    logprobs: Tensor
    expected_va: Tensor | None = None


Part = Literal["text", "vision"]
"""A part of the model whose weights ranks gather together when they are sharded."""


def list_parts(groups: Sequence[WeightedGroup]) -> frozenset[Part]:
    """Returns the parts of the model that a forward of these groups runs."""
    if not groups:
        return frozenset()
    return frozenset({"text", "vision"} if any(group.scored.prompt.images for group in groups) else {"text"})


class StudentLoss(nn.Module):
    """Σ weight·KL over the tokens of some groups. One module, so that DDP and FSDP wrap model and head together."""

    def __init__(
        self,
        student: Vlm,
        *,
        teacher_head: Tensor | None,
        trainer: TrainerConfig,
        estimator: Literal["k1", "k3"] = "k3",
        device: torch.device | None = None,
        checkpoint_activations: bool | None = None,
    ) -> None:
        """Takes over `student`, which it may switch to checkpointing; `teacher_head` (V, D_T) is for hidden payloads.

        estimator: of the KL of the sampled payload. device: where the student will run, when accelerate has yet to
        move it there; None: where it is. checkpoint_activations: layers keep their input only and are computed again
        in the backward pass, a third more work for a fraction of the memory. None: on a GPU, where memory bounds the
        batch.
        """
        super().__init__()
        device = device or student.device
        if device.type == "cuda" if checkpoint_activations is None else checkpoint_activations:
            if not student.model.supports_gradient_checkpointing:
                raise ConfigError(f"{type(student.model).__name__} has no activation checkpointing; switch it off")
            # The families here have no dropout, hence no random state to restore in each layer.
            student.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            student.model.train()  # transformers checkpoints in this mode only
        if device.type == "cuda" and trainer.compile_layers:
            compile_layers(student)
        self.model = student.model
        self._student = student
        self._picture: PreparedImage | None = None
        self._vocab_size = None if teacher_head is None else len(teacher_head)
        if teacher_head is not None and teacher_head.is_cuda:
            teacher_head = divergence.pad_head(teacher_head)  # once, in place of every forward
        self._teacher_head = teacher_head
        self._chunk_tokens = trainer.chunk_tokens
        self._estimator = estimator

    def forward(
        self, groups: Sequence[WeightedGroup], *, parts: frozenset[Part] = frozenset()
    ) -> tuple[Tensor, TokenValues]:
        """Returns the loss (), not yet divided by B, and values of M tokens, flat over groups, siblings and tokens.

        parts: run these in any case, because other ranks do in their forwards; where no group needs them, on a
        placeholder that adds zero. Without groups and parts: a zero that is connected to the model, for the ranks'
        common backward, and no tokens.
        """
        missing = parts - list_parts(groups)
        nothing = self._look() if "vision" in missing else None  # first, as in a forward of groups with images
        if groups:
            loss, values = self._compute(groups)
        else:
            loss = self._read() if "text" in missing else self._connect()
            values = TokenValues(loss.new_empty(0), loss.new_empty(0))
        return loss if nothing is None else loss + nothing, values

    def _connect(self) -> Tensor:
        smallest = min((p for p in self.model.parameters() if p.requires_grad), key=Tensor.numel)
        return smallest.sum() * 0

    def _look(self) -> Tensor:
        """Encodes the smallest picture: a zero with the vision tower's gradients of zero."""
        if self._picture is None:
            self._picture = self._student.prepare_image(PIL.Image.new("RGB", (64, 64)))
        (features,) = self._student.encode_images([self._picture])
        return torch.stack([part.float().sum() for part in features]).sum() * 0

    def _read(self) -> Tensor:
        """Reads three tokens: a zero with the gradients of zero of text model and head."""
        ids = np.zeros(2, np.int64)
        segment = Segment(prompt=PreparedPrompt(token_ids=ids, images=()), responses=(ids,))
        hidden = self._student.compute_response_hidden([segment])
        return (hidden.float().sum() + self._student.padded_head[0].float().sum()) * 0

    def _compute(self, groups: Sequence[WeightedGroup]) -> tuple[Tensor, TokenValues]:
        segments = [group.segment for group in groups]
        responses = [response for segment in segments for response in segment.responses]
        hidden = self._student.compute_response_hidden(segments)
        target = self._read_target(groups, responses, hidden.device)
        if (grouping := groups[0].grouping) is None:
            expected_va, weights = None, upload_rows([group.token_weights for group in groups], hidden.device)
        else:
            expected_va = self._expect_advantage(groups, hidden, target)
            rollout_weights = torch.cat([group.rollout_weights for group in groups])
            weights = weigh_tokens(expected_va, list(map(len, responses)), rollout_weights, grouping)
        # The parameter with its padding, not `Vlm.head`, its view: a view's gradient would be copied.
        loss, kl, logprobs = divergence.fused_loss_and_logprobs(
            hidden,
            self._student.padded_head,
            target,
            weights,
            upload(torch.from_numpy(np.concatenate(responses)), hidden.device),
            vocab_size=self._student.vocab_size,
            chunk_tokens=self._chunk_tokens,
        )
        return loss, TokenValues(kl, logprobs, expected_va)

    def _expect_advantage(self, groups: Sequence[WeightedGroup], hidden: Tensor, target: divergence.Target) -> Tensor:
        """Returns the tokens' expected VA (M,) from the student's hidden states and both of the teacher's views."""
        assert isinstance(target, divergence.FullTarget), "the expected VA needs the hidden_pair payload"
        degraded = [to_torch(group.scored.score.payload.tensors["degraded_hidden"]) for group in groups]
        return score_tokens(
            hidden,
            self._student.padded_head,
            target,
            upload_rows(degraded, hidden.device),
            vocab_size=self._student.vocab_size,
            chunk_tokens=self._chunk_tokens,
        )

    def _read_target(
        self, groups: Sequence[WeightedGroup], responses: Sequence[np.ndarray], device: torch.device
    ) -> divergence.Target:
        """Reads the teacher's distribution at these tokens from the job's payload."""
        payloads = [group.scored.score.payload for group in groups]

        def concatenate(name: str) -> Tensor:
            return upload_rows([to_torch(payload.tensors[name]) for payload in payloads], device)

        match payloads[0].kind:
            case "hidden" | "hidden_int8" | "hidden_pair":
                assert self._teacher_head is not None, "the hidden payloads need the teacher's head"
                rows = [hidden_states(payload, self._teacher_head.dtype) for payload in payloads]
                return divergence.FullTarget(
                    hidden=upload_rows(rows, device), head=self._teacher_head, vocab_size=self._vocab_size
                )
            case "top_k":
                return divergence.TopKTarget(
                    token_ids=concatenate("token_ids"),
                    logprobs=concatenate("logprobs"),
                    tail_logprobs=concatenate("tail_logprobs"),
                )
            case kind:
                assert kind == "sampled", f"payload {kind!r} carries no distribution"
                teacher = np.concatenate([lp for group in groups for lp in group.scored.score.teacher_logprobs])
                return divergence.SampledTarget(
                    token_ids=upload(torch.from_numpy(np.concatenate(responses)), device),
                    logprobs=upload(torch.from_numpy(teacher), device),
                    estimator=self._estimator,
                )
