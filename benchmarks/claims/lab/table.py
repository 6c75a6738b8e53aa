"""The laboratory's settings: worlds, objectives and experiments. A new objective is one function in this file.

An objective takes `Scores`, of prompt groups that share it, and returns each token's weight (N, T). The weights of a
group's tokens add up to 1, and the loss is the mean over groups of Σ weight·KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from worlds import World

from vaopd import objective as library

WORLDS = {
    world.name: world
    for world in (
        World(name="base", meaning="85 tokens, other habits of language, a student that can read and neglects it"),
        World(
            name="learned teacher",
            meaning="the same, under a network that has learnt the process",
            learned_teacher=True,
        ),
        World(name="long", meaning="the same with 157 tokens", words=24),
        World(name="short", meaning="the same with 37 tokens", words=4),
        World(name="same habits", meaning="85 tokens, no gap of language", same_habits=True),
        World(
            name="misreaders",
            meaning="85 tokens, other habits, a student that misreads with confidence",
            scans_per_digit=2,
            reading_steps=300,
            neglecting_steps=0,
        ),
        World(
            name="short misreaders",
            meaning="37 tokens, little language, a student that misreads with confidence",
            words=4,
            second_order=0.0,
            scans_per_digit=2,
            reading_steps=700,
            neglecting_steps=0,
        ),
        World(
            name="phrases",
            meaning="four phrasings as in the product, a student that can read and neglects it",
            form="phrases",
            reading_steps=280,
            neglecting_steps=120,
        ),
        World(
            name="phrases, misreaders",
            meaning="four phrasings, a student that misreads with confidence",
            form="phrases",
            scans_per_digit=2,
            reading_steps=500,
            neglecting_steps=0,
        ),
    )
}


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

    def mask(self, which: str, *, ties: str = "earlier") -> Tensor:
        """Standard OPD without a tenth of each rollout's tokens."""
        runs = zip(self.advantage.chunk(len(self.seeds)), self.valid.chunk(len(self.seeds)), self.seeds, strict=True)
        kept = [
            library.masked_response(va, valid, which=which, fraction=0.1, ties=ties, seed=seed)
            for va, valid, seed in runs
        ]
        return library.mean_weights(torch.cat(kept), self.uniform)


Objective = Callable[[Scores], Tensor]
OBJECTIVES: dict[str, Objective] = {
    "standard": lambda s: library.mean_weights(s.valid, s.uniform),
    "va_opd": lambda s: library.token_weights(s.advantage, s.valid, s.weigh_rollouts()),
    "token_groups": lambda s: library.token_weights(s.advantage, s.valid, s.uniform),
    "token_groups_6_percent": lambda s: library.token_weights(s.advantage, s.valid, s.uniform, high_fraction=0.06),
    "rollout_weights": lambda s: library.mean_weights(s.valid, s.weigh_rollouts()),
    "rollout_weights_floor": lambda s: library.mean_weights(s.valid, s.weigh_rollouts(deviation_floor=0.02)),
    "mask_top": lambda s: s.mask("top"),
    "mask_bottom": lambda s: s.mask("bottom"),
    "mask_bottom_random_ties": lambda s: s.mask("bottom", ties="random"),
    "mask_random": lambda s: s.mask("random"),
}


def objective(function: Objective) -> Objective:
    """Adds a function to the objectives, by its name."""
    OBJECTIVES[function.__name__] = function
    return function


@objective
def view_divergence(s: Scores) -> Tensor:
    """Token groups by how much the teacher's whole distribution depends on the image."""
    return library.token_weights(library.view_divergence(s.teacher, s.degraded), s.valid, s.uniform)


@objective
def absolute(s: Scores) -> Tensor:
    """Token groups by |log p − log p̃| of the sampled token: also where the image speaks against it."""
    return library.token_weights(library.absolute_advantage(*s.both_views, s.valid), s.valid, s.uniform)


@objective
def expected(s: Scores) -> Tensor:
    """Token groups by VA's expectation over the student's own distribution."""
    score = library.expected_advantage(s.student, s.teacher, s.degraded)
    return library.token_weights(score, s.valid, s.uniform)


@objective
def view_divergence_and_rollouts(s: Scores) -> Tensor:
    """The paper's rollout weights, with token groups by view divergence."""
    return library.token_weights(library.view_divergence(s.teacher, s.degraded), s.valid, s.weigh_rollouts())


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
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(world="base", objectives=MAIN, rates=(3e-4, 1e-3, 3e-3, 6e-3)),
    Experiment(world="base", objectives=("standard", *PARTS), rates=(1e-3,)),
    *(
        Experiment(world=name, objectives=MAIN, rates=(1e-3, 3e-3, 6e-3))
        for name in (
            "phrases, misreaders",
            "short misreaders",
            "misreaders",
            "short",
            "same habits",
            "phrases",
            "long",
            "learned teacher",
        )
    ),
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
    seen: set[Run] = set()
    for e in EXPERIMENTS:
        for rate in e.rates:
            for name in e.objectives:
                for seed in range(e.seeds):
                    run = Run(
                        world=e.world, objective=name, rate=rate, prompts=e.prompts, siblings=e.siblings, seed=seed
                    )
                    if run not in seen:
                        seen.add(run)
                        yield run
