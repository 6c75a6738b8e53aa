"""Accumulates a step's gradient over forwards of bounded size, and answers a GPU that is out of memory.

In: a rank's weighted groups. Out: the gradient in the parameters, summed over all ranks; the loss and each token's
numbers. Groups are packed in order up to `trainer.forward_tokens`; one that is larger is split between siblings, whose
weights are known before. Out of memory, the step begins again with half as many tokens: no partial gradient stays.

Ranks may have different numbers of groups and of forwards. So no forward exchanges gradients: a last one without
groups, in which every rank takes part, does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vaopd.config import TrainerConfig
from vaopd.errors import LimitExceeded
from vaopd_trainer.student_loss import TokenValues, WeightedGroup

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


class Accumulator:
    """Runs the forwards and backwards of one rank's steps."""

    def __init__(self, *, accelerator: Accelerator, loss: nn.Module, settings: TrainerConfig, world: int) -> None:
        """`loss`: a `StudentLoss`, prepared by `accelerator`; `world`: the number of ranks."""
        self.forward_tokens = settings.forward_tokens
        """The bound of the next forward: the configured one, halved whenever memory ran out."""
        self._accelerator = accelerator
        self._loss = loss
        self._prompts_per_step = settings.prompts_per_step
        self._world = world

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
            self._begin_again(forwards[failed])
        if self._world > 1:
            self._exchange()
        if not groups:
            return 0.0, []
        lengths = [len(group.token_weights) for group in groups]
        of_groups = [torch.cat(parts).float().cpu().split(lengths) for parts in zip(*values, strict=True)]
        return float(torch.stack(losses).sum()), [TokenValues(*parts) for parts in zip(*of_groups, strict=True)]

    def _run(self, forwards: Sequence[Sequence[WeightedGroup]]) -> tuple[list[Tensor], list[TokenValues], int | None]:
        """Returns losses, values, and the number of the forward that ran out of memory, if one did."""
        losses: list[Tensor] = []
        values: list[TokenValues] = []
        for number, forward in enumerate(forwards):
            try:
                share, found = self._run_one(forward)
            except torch.OutOfMemoryError as error:
                log.warning("out of memory: %s", error)
                return [], [], number
            losses.append(share)
            values.append(found)
        return losses, values, None

    def _run_one(self, forward: Sequence[WeightedGroup]) -> tuple[Tensor, TokenValues]:
        with self._accelerator.autocast(), self._accelerator.no_sync(self._loss):
            loss, values = self._loss(forward)
            share = loss / self._prompts_per_step
            # Data parallelism averages gradients over ranks; the loss is a sum over all groups.
            self._accelerator.backward(share * self._world)
        return share.detach(), values

    def _exchange(self) -> None:
        """Sums what the ranks have accumulated: a forward of no groups is connected to the model, and adds nothing."""
        nothing, _ = self._loss([])
        self._accelerator.backward(nothing)

    def _begin_again(self, forward: Sequence[WeightedGroup]) -> None:
        """Drops the step's gradients and halves the bound; raises LimitExceeded when nothing is left to halve."""
        self._loss.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # blocks of the sizes that no longer come
        tokens = sum(part.tokens for part in forward)
        if len(forward) == 1 and len(forward[0].scored.responses) == 1:
            group = forward[0].scored.group
            raise LimitExceeded(
                f"group {group.group_id}: rollout {group.rollouts[0].rollout_id} alone doesn't fit on the device "
                f"({tokens} tokens, {len(group.prompt_token_ids)} of them the prompt's); lower data.max_pixels or "
                "rollout.max_new_tokens, or train on more memory"
            )
        self.forward_tokens = max(1, min(self.forward_tokens, tokens) // 2)
        log.warning(
            "a forward of %d tokens is too large: the step begins again with %d (trainer.forward_tokens)",
            tokens,
            self.forward_tokens,
        )
