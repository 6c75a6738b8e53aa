"""Which prompt comes when: a seeded shuffle per epoch, so that a position says everything and nothing needs saving.

And what the rollout workers are asked for it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vaopd.config import Config
from vaopd.types import Prompt, RolloutRequest, SamplingSettings


class PromptOrder:
    """Position 0, 1, 2, … in the run → index into the data set; every epoch is a new permutation of all prompts."""

    def __init__(self, *, prompts: int, seed: int) -> None:
        self.prompts = prompts
        self.seed = seed

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.prompts)
        return int(_permutation(self.prompts, self.seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(prompts: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(prompts)


def training_request(prompt: Prompt, *, group_id: str, version: int, config: Config) -> RolloutRequest:
    """K responses of policy `version` to a training prompt, sampled as the run says."""
    return RolloutRequest(
        group_id=group_id,
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
