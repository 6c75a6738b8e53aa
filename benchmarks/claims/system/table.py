"""The settings of `make claims`: arms, learning rates, teachers and sizes of the data, and the order of the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ARMS: dict[str, dict[str, str]] = {
    "standard": {"variant": "standard"},
    "va_opd": {"variant": "va_opd"},
    "view_divergence": {"variant": "token_groups", "token_score": "view_divergence"},
    "token_groups": {"variant": "token_groups"},
    "rollout_weights": {"variant": "rollout_weights"},
    **{
        f"mask_{mask}": {"variant": "masked", "mask": mask, "mask_ties": "random"}
        for mask in ("top", "bottom", "random")
    },
}
"""Name → the settings of [objective]."""
NAMES = {
    "standard": "Standard OPD",
    "va_opd": "VA-OPD",
    "view_divergence": "groups by view divergence",
    "token_groups": "token groups alone",
    "rollout_weights": "rollout weights alone",
    "mask_top": "without the top 10 % by VA",
    "mask_bottom": "without the bottom 10 %, ties at random",
    "mask_random": "without a random 10 %",
}
MAIN = ("standard", "va_opd", "view_divergence")
SEEDS = {arm: 5 if arm in MAIN else 3 for arm in ARMS}
RATES = (1e-3, 3e-4, 3e-3)
"""At 3e-3, the laboratory's best, this student reads worse."""
SLOW = RATES[1]
"""40 steps don't suffice here to catch up with the teacher, and objectives differ: every arm has all of its seeds."""
TRIED_SEEDS = {arm: 2 if arm in MAIN else 1 for arm in ARMS}
TEACHERS = ("tiny-cards-teacher", "tiny-cards-teacher-small", "tiny-cards-teacher-large")
PROBLEMS = (4000, 500, 100)
"""Training problems; 40 steps see 320, so of 100 problems each one three times."""
VARIED = ("standard", "va_opd")
VARIED_SEEDS = 3


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One student under one objective."""

    arm: str
    rate: float
    seed: int
    teacher: str = TEACHERS[0]
    problems: int = PROBLEMS[0]

    @property
    def name(self) -> str:
        """The name of its folder."""
        size = "" if self.problems == PROBLEMS[0] else f"-{self.problems}"
        teacher = "" if self.teacher == TEACHERS[0] else self.teacher.removeprefix(TEACHERS[0])
        return f"{self.arm}-{self.rate:g}{teacher}{size}-{self.seed}"


Done = Mapping[Run, Mapping[str, Any]]
"""Finished run → its line of the results."""


def list_runs(done: Done) -> Iterator[Run]:
    """Yields the runs in their order, the finished ones too.

    Those at a rate that was chosen follow once the arm has tried all: the list grows as runs are finished.
    """
    for rate in RATES[:2]:
        yield from (Run(arm=arm, rate=rate, seed=seed) for seed in range(SEEDS[MAIN[0]]) for arm in MAIN)
    for arm in ARMS:
        yield from list_tried(arm)
        for rate in list_rates(arm, done):
            yield from (Run(arm=arm, rate=rate, seed=seed) for seed in range(SEEDS[arm]))
    for other in [{"teacher": teacher} for teacher in TEACHERS[1:]] + [{"problems": count} for count in PROBLEMS[1:]]:
        for arm in VARIED:
            for rate in list_rates(arm, done):
                yield from (Run(arm=arm, rate=rate, seed=seed, **other) for seed in range(VARIED_SEEDS))  # type: ignore[arg-type]


def list_tried(arm: str) -> Iterable[Run]:
    """Returns the runs that choose an arm's rate."""
    return [Run(arm=arm, rate=rate, seed=seed) for rate in RATES for seed in range(TRIED_SEEDS[arm])]


def list_rates(arm: str, done: Done) -> Iterable[float]:
    """Returns the rates at which an arm has all of its seeds: the chosen one, and the slow one."""
    chosen = choose_rate(arm, done)
    return dict.fromkeys((chosen, SLOW)) if chosen else ()


def choose_rate(arm: str, done: Done) -> float | None:
    """Returns the rate with the largest mean p(right digit) on validation pictures; None before all were tried."""
    tried = list_tried(arm)
    if any(run not in done for run in tried):
        return None

    def measure(rate: float) -> float:
        return sum(done[run]["validation"]["p_right"] for run in tried if run.rate == rate)

    return max(RATES, key=measure)
