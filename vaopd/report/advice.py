"""Says in words which regime a run is in: where its divergence lies, and whether its tokens differ in VA.

docs/when_va_opd_helps.md has the measurements. In: a run's last steps. Out: a sentence for each thing that stands out.
"""

from __future__ import annotations

import statistics

from vaopd.run.records import Run

STEPS = 20
"""Sentences are about the mean of so many last steps; before them nothing is said."""
LARGE_UNSEEN, SMALL_SPREAD, LARGE_TIES = 0.3, 0.02, 0.5
"""Shares of the divergence and of the high group, and nats, from which on something is said."""


def describe_regime(run: Run) -> list[str]:
    """Returns the sentences; none for a run without token or rollout weights, where they change nothing."""
    objective = run.config.get("objective", {})
    variant, score = objective.get("variant", "va_opd"), objective.get("token_score", "va")
    unseen, spread, ties = (_average(run, key) for key in ("kl_unseen_share", "va_spread", "high_ties_share"))
    by_va = variant in ("va_opd", "token_groups") and score == "va"
    scales_up = variant in ("va_opd", "rollout_weights") and not objective.get("rollout_deviation_floor")
    found = []
    if by_va and unseen is not None and unseen >= LARGE_UNSEEN:
        found.append(
            f"{unseen:.0%} of the divergence lies on tokens with no visual advantage on which teacher and student "
            "differ by a nat or more: the student is sure of what it misreads, or words it otherwise than the teacher. "
            'Consider objective.token_score = "view_divergence".'
        )
    if by_va and ties is not None and ties >= LARGE_TIES:
        found.append(
            f"{ties:.0%} of the high group has the same VA as tokens outside it: few tokens depend on the image, and "
            "the place in the answer decides. Consider a smaller objective.high_fraction."
        )
    if scales_up and spread is not None and spread <= SMALL_SPREAD:
        found.append(
            f"Siblings' mean VA differs by {spread:.2g} nats only, which the rollout weights scale up. Consider "
            "objective.rollout_deviation_floor = 0.02."
        )
    return found


def _average(run: Run, key: str) -> float | None:
    _, values = run.list_series(key)
    return statistics.fmean(values[-STEPS:]) if len(values) >= STEPS else None
