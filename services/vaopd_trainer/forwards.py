"""Accumulates a step's gradient over forwards of bounded size, and answers a GPU that is out of memory.

In: a rank's weighted groups. Out: the gradient in the parameters, summed over all ranks; the loss and each token's
numbers. Groups are packed in order up to `trainer.forward_tokens`; one that is larger is split between siblings, whose
weights are known before. Out of memory, the step begins again with half as many tokens: no partial gradient stays.

Ranks may have different numbers of groups and of forwards; how they exchange gradients all the same is
`StudentWeights`' business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from vaopd.config import TrainerConfig
from vaopd.errors import LimitExceeded
from vaopd_trainer.student_loss import Part, TokenValues, WeightedGroup, list_parts
from vaopd_trainer.student_weights import StudentWeights

log = logging.getLogger(__name__)


def plan_forwards(groups: Sequence[WeightedGroup], tokens: int) -> list[list[WeightedGroup]]:
    """Packs groups, in order, into forwards of at most so many tokens; only a single rollout may exceed that."""
    forwards: list[list[WeightedGroup]] = []
    room = 0
    for part in (part for group in groups for part in _split(group, tokens)):
        if part.tokens > room:
            forwards.append([])
            room = tokens
        forwards[-1].append(part)
        room -= part.tokens
    return forwards


def _split(group: WeightedGroup, tokens: int) -> Iterator[WeightedGroup]:
    """Yields a group whole, or as few siblings at a time as fit, one at least."""
    siblings, start = len(group.scored.responses), 0
    while start < siblings:
        end = siblings
        while end - start > 1 and group.select(start, end).tokens > tokens:
            end -= 1
        yield group.select(start, end)
        start = end


def _split_values(parts: Sequence[Tensor | None], lengths: list[int]) -> Sequence[Tensor | None]:
    """Joins one number of all forwards' tokens, and splits it by groups; None for one that isn't computed."""
    found = [part for part in parts if part is not None]
    return torch.cat(found).float().cpu().split(lengths) if found else [None] * len(lengths)


class Accumulator:
    """Runs the forwards and backwards of one rank's steps."""

    def __init__(self, *, accelerator: Accelerator, weights: StudentWeights, settings: TrainerConfig) -> None:
        """weights: their `loss` is called as a `StudentLoss`."""
        self.forward_tokens = settings.forward_tokens
        """The bound of the next forward: the configured one, halved whenever memory ran out."""
        self._accelerator = accelerator
        self._weights = weights
        self._prompts_per_step = settings.prompts_per_step

    def backward(self, groups: Sequence[WeightedGroup]) -> tuple[float, list[TokenValues]]:
        """Adds the gradient of this rank's share of the loss -> that share, and each group's values, on the CPU.

        Raises LimitExceeded that names the group when a single rollout doesn't fit.
        """
        while True:
            forwards = plan_forwards(groups, self.forward_tokens)
            losses, values, failed = self._run(forwards)
            if failed is None:
                break
            # Out of the handler, so that the failed forward's tensors are free.
            self._begin_again(failed)
        self._weights.exchange()
        if not groups:
            return 0.0, []
        lengths = [len(group.token_weights) for group in groups]
        of_groups = [_split_values(parts, lengths) for parts in zip(*values, strict=True)]
        return float(torch.stack(losses).sum()), [TokenValues(*parts) for parts in zip(*of_groups, strict=True)]

    def _run(
        self, forwards: Sequence[Sequence[WeightedGroup]]
    ) -> tuple[list[Tensor], list[TokenValues], Sequence[WeightedGroup] | None]:
        """Returns losses, values, and the forward that ran out of memory, if one did."""
        losses: list[Tensor] = []
        values: list[TokenValues] = []
        plan = self._weights.plan([list_parts(forward) for forward in forwards])
        for number, parts in enumerate(plan):
            forward = forwards[number] if number < len(forwards) else []
            try:
                share, found = self._run_one(forward, parts, last=number == len(plan) - 1)
            except torch.OutOfMemoryError as error:
                log.warning("out of memory: %s", error)
                return [], [], forward
            if forward:
                losses.append(share)
                values.append(found)
        return losses, values, None

    def _run_one(
        self, forward: Sequence[WeightedGroup], parts: frozenset[Part], *, last: bool
    ) -> tuple[Tensor, TokenValues]:
        with self._accelerator.autocast(), self._weights.accumulate(last=last):
            loss, values = self._weights.loss(forward, parts=parts)
            share = loss / self._prompts_per_step
            # Gradients are averaged over ranks; the loss is a sum over all groups.
            (share * self._weights.ranks.world).backward()
        return share.detach(), values

    def _begin_again(self, forward: Sequence[WeightedGroup]) -> None:
        """Drops the step's gradients and halves the bound; raises LimitExceeded when nothing is left to halve."""
        self._weights.loss.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # blocks of the sizes that no longer come
        tokens = sum(part.tokens for part in forward)
        if len(forward) == 1 and len(forward[0].scored.responses) == 1:
            group = forward[0].scored.group
            raise LimitExceeded(
                f"group {group.group_id}: rollout {group.rollouts[0].rollout_id} alone doesn't fit on the device "
                f"({tokens} tokens, {len(group.prompt_token_ids)} of them the prompt's); lower data.max_pixels or "
                "rollout.max_new_tokens, or train on more memory"
            )
        if not self._weights.can_begin_again:
            groups = ", ".join(dict.fromkeys(part.scored.group.group_id for part in forward)) or "a placeholder's"
            raise LimitExceeded(
                f"a forward of {tokens} tokens doesn't fit on the device beside this rank's share (groups {groups}); "
                f"resume with trainer.forward_tokens below {min(self.forward_tokens, tokens)}: the other ranks of a "
                "sharded student can't begin their step again"
            )
        self.forward_tokens = max(1, min(self.forward_tokens, tokens) // 2)
        log.warning(
            "a forward of %d tokens is too large: the step begins again with %d (trainer.forward_tokens)",
            tokens,
            self.forward_tokens,
        )
