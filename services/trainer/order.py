"""Which prompt comes when: a seeded shuffle per epoch, so that a position says everything and nothing needs saving."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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
