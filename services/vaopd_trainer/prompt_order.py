"""The order of the training prompts: a seeded shuffle per epoch. A position determines its prompt, so none is saved.

In: the data set. Out: a step's group ids, each group's prompt, and the request for it that goes to the rollout workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vaopd.config import Config
from vaopd.types import GroupId, Prompt, RolloutRequest, SamplingSettings


class PromptOrder:
    """Maps a position in the run to a prompt's index in the data set; every epoch is a new permutation of the prompts.

    Positions count from 0, over the whole run. As in the paper, an epoch ends with its last whole step: the rest of the
    permutation is left out, unless the data set is smaller than one step.
    """

    def __init__(self, *, prompts: int, seed: int, per_step: int = 1) -> None:
        self.prompts = prompts
        self.seed = seed
        self._dealt = prompts // per_step * per_step or prompts

    def index(self, position: int) -> int:
        """Returns the data set's index, 0 … prompts − 1, of the prompt at `position`."""
        epoch, place = divmod(position, self._dealt)
        return int(_permute(self.prompts, self.seed, epoch)[place])


class TrainingPrompts:
    """Deals the training prompts out to steps, `per_step` groups to each."""

    def __init__(self, prompts: Sequence[Prompt], *, per_step: int, seed: int) -> None:
        self.per_step = per_step
        self._prompts = prompts
        self._order = PromptOrder(prompts=len(prompts), seed=seed, per_step=per_step)

    def list_groups(self, step: int) -> list[GroupId]:
        """Returns the ids of the step's groups, in the order of their prompts."""
        return [GroupId(purpose="train", step=step, index=index) for index in range(self.per_step)]

    def find_prompt(self, group: GroupId) -> Prompt:
        """Returns the prompt of a training group."""
        return self._prompts[self._order.index(group.step * self.per_step + group.index)]


@lru_cache(maxsize=4)
def _permute(prompts: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(prompts)


def make_request(prompt: Prompt, *, group: GroupId, version: int, config: Config) -> RolloutRequest:
    """Asks for K responses of policy `version` to a training prompt, sampled as the configuration has it."""
    return RolloutRequest(
        group_id=str(group),
        messages=prompt.messages,
        images=prompt.images,
        num_rollouts=config.trainer.rollouts_per_prompt,
        sampling=SamplingSettings(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.run.seed,
        ),
        policy_version=version,
    )
