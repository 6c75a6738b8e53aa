"""The laboratory's settings: worlds, objectives and experiments. A new objective is one line of `OBJECTIVES`.

An objective takes `Scores`, of prompt groups that share it, and returns each token's weight (N, T). The weights of a
group's tokens add up to 1, and the loss is the mean over groups of Σ weight·KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from worlds import World

from vaopd import objective as library

MISREADS: dict[str, Any] = {"scans_per_digit": 2, "neglecting_steps": 0}
PHRASES: dict[str, Any] = {"form": "phrases"}
_WORLDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("base", "85 tokens, other habits of language, a student that can read and neglects it", {}),
    ("learned teacher", "the same, under a network that has learnt the process", {"learned_teacher": True}),
    ("long", "the same with 157 tokens", {"words": 24}),
    ("short", "the same with 37 tokens", {"words": 4}),
    ("same habits", "85 tokens, no gap of language", {"same_habits": True}),
    (
        "misreaders",
        "85 tokens, other habits, a student that misreads with confidence",
        MISREADS | {"reading_steps": 300},
    ),
    (
        "short misreaders",
        "37 tokens, little language, a student that misreads with confidence",
        MISREADS | {"words": 4, "second_order": 0.0, "reading_steps": 700},
    ),
    (
        "phrases",
        "four phrasings as in the product, a student that can read and neglects it",
        PHRASES | {"reading_steps": 280, "neglecting_steps": 120},
    ),
    (
        "phrases, misreaders",
        "four phrasings, a student that misreads with confidence",
        PHRASES | MISREADS | {"reading_steps": 500},
    ),
)
WORLDS = {name: World(name=name, meaning=meaning, **settings) for name, meaning, settings in _WORLDS}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an objective may look at: N rollouts, K siblings of a group side by side; log-probs (N, T, V)."""

    tokens: Tensor
    """(N, T), as the student sampled them."""
    valid: Tensor
    """(N, T) bool: the response mask."""
    student: Tensor
    teacher: Tensor
    degraded: Tensor
    siblings: int
    seeds: tuple[int, ...]
    """Of random draws: one for each run; a run's rollouts lie side by side."""

    @property
    def uniform(self) -> Tensor:
        """Equal rollout weights, (N,)."""
        return torch.full_like(self.valid[:, 0], 1 / self.siblings, dtype=torch.float32)

    @property
    def both_views(self) -> tuple[Tensor, Tensor]:
        """The sampled tokens' log-probs in the original and the degraded view, (N, T) each."""
        picked = self.tokens[..., None]
        return self.teacher.gather(-1, picked)[..., 0], self.degraded.gather(-1, picked)[..., 0]

    @property
    def advantage(self) -> Tensor:
        """VA, (N, T)."""
        return library.visual_advantage(*self.both_views, self.valid)

    def weigh_rollouts(self, *, deviation_floor: float = 0.0) -> Tensor:
        """The paper's rollout weights, (N,)."""
        means = library.mean_visual_advantage(self.advantage, self.valid).view(-1, self.siblings)
        return library.rollout_weights(means, deviation_floor=deviation_floor).flatten()

    def weigh_tokens(self, score: Tensor | None = None, rollouts: Tensor | None = None, **settings: float) -> Tensor:
        """Token groups, (N, T): by VA or another score (N, T), within equal or other rollout weights (N,)."""
        score = self.advantage if score is None else score
        return library.token_weights(score, self.valid, self.uniform if rollouts is None else rollouts, **settings)

    def mask(self, which: str, *, ties: str = "earlier") -> Tensor:
        """Standard OPD without a tenth of each rollout's tokens."""
        runs = zip(self.advantage.chunk(len(self.seeds)), self.valid.chunk(len(self.seeds)), self.seeds, strict=True)
        options: dict[str, Any] = {"which": which, "fraction": 0.1, "ties": ties}
        kept = [library.masked_response(va, valid, seed=seed, **options) for va, valid, seed in runs]
        return library.mean_weights(torch.cat(kept), self.uniform)


OBJECTIVES: dict[str, Callable[[Scores], Tensor]] = {
    "standard": lambda s: library.mean_weights(s.valid, s.uniform),
    "va_opd": lambda s: s.weigh_tokens(rollouts=s.weigh_rollouts()),
    "token_groups": lambda s: s.weigh_tokens(),
    "token_groups_6_percent": lambda s: s.weigh_tokens(high_fraction=0.06),
    "rollout_weights": lambda s: library.mean_weights(s.valid, s.weigh_rollouts()),
    "rollout_weights_floor": lambda s: library.mean_weights(s.valid, s.weigh_rollouts(deviation_floor=0.02)),
    "mask_top": lambda s: s.mask("top"),
    "mask_bottom": lambda s: s.mask("bottom"),
    "mask_bottom_random_ties": lambda s: s.mask("bottom", ties="random"),
    "mask_random": lambda s: s.mask("random"),
    # Groups by how much the teacher's whole distribution depends on the image,
    "view_divergence": lambda s: s.weigh_tokens(library.view_divergence(s.teacher, s.degraded)),
    # by |log p − log p̃| of the sampled token, which is large where the image speaks against it, too,
    "absolute": lambda s: s.weigh_tokens(library.absolute_advantage(*s.both_views, s.valid)),
    # and by VA's expectation over the student's own distribution.
    "expected": lambda s: s.weigh_tokens(library.expected_advantage(s.student, s.teacher, s.degraded)),
    "view_divergence_and_rollouts": lambda s: s.weigh_tokens(
        library.view_divergence(s.teacher, s.degraded), s.weigh_rollouts()
    ),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Objectives that are compared in one world; the first one is the baseline. All share seeds and pictures."""

    world: str
    objectives: tuple[str, ...]
    rates: tuple[float, ...]
    """With several, each objective's own is chosen on validation pictures."""
    prompts: int = 8
    siblings: int = 4
    seeds: int = 6


MAIN = ("standard", "va_opd", "view_divergence")
PARTS = tuple(name for name in OBJECTIVES if name not in MAIN)
_BESIDE_BASE = (
    *("phrases, misreaders", "short misreaders", "misreaders", "short", "same habits", "phrases"),
    *("long", "learned teacher"),
)
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(world="base", objectives=MAIN, rates=(3e-4, 1e-3, 3e-3, 6e-3)),
    Experiment(world="base", objectives=("standard", *PARTS), rates=(1e-3,)),
    *(Experiment(world=name, objectives=MAIN, rates=(1e-3, 3e-3, 6e-3)) for name in _BESIDE_BASE),
    Experiment(world="base", objectives=MAIN[:2], rates=(1e-3,), prompts=4, siblings=8),
    Experiment(world="base", objectives=MAIN[:2], rates=(1e-3,), prompts=16, siblings=4),
)


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One student under one objective."""

    world: str
    objective: str
    rate: float
    prompts: int
    siblings: int
    seed: int


def list_runs() -> Iterator[Run]:
    """Yields every run of the experiments once, in their order."""
    yield from dict.fromkeys(
        Run(world=e.world, objective=name, rate=rate, prompts=e.prompts, siblings=e.siblings, seed=seed)
        for e in EXPERIMENTS
        for rate in e.rates
        for name in e.objectives
        for seed in range(e.seeds)
    )
