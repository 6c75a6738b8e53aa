r"""Judges responses: the first committed answer counts, and equality is mathematical.

>>> committed_answer(r"Either \boxed{12} or \boxed{13}.")
'12'
>>> is_correct(r"So it is \boxed{\frac{1}{2}}.", "0.5")
True
>>> avg_at_n([[True, False], [True, True]])
0.75
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vaopd.errors import InvalidInput
from vaopd.grading import Verdict, committed_answer, judge, judge_version
from vaopd.types import GroupId, Prompt, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from vaopd.config import Config

__all__ = [
    "HeldOutResult",
    "Verdict",
    "avg_at_n",
    "committed_answer",
    "describe_unasked",
    "held_out_requests",
    "held_out_result",
    "is_correct",
    "judge",
    "judge_version",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """A held-out accuracy: mean correctness over prompts and samples (avg@n), with its standard error over prompts.

    Both in [0, 1], and None where no question was asked. prompts: those that were asked. not_judged: answers with a
    comparison that was cut off, counted as wrong. not_asked: questions without an answer, by reason; they count
    neither as right nor as wrong. judge: its version.
    """

    accuracy: float | None
    standard_error: float | None
    prompts: int
    samples: int
    not_judged: int = 0
    not_asked: Mapping[str, int] = field(default_factory=dict)
    judge: str = field(default_factory=judge_version)

    def __str__(self) -> str:
        unasked = describe_unasked(self.not_asked, asked=self.prompts)
        if self.accuracy is None or self.standard_error is None:
            return f"no accuracy: {unasked or 'there was no question'}"
        unjudged = f", {self.not_judged} not judged" if self.not_judged else ""
        gap = f"; {unasked}" if unasked else ""
        notes = f"avg@{self.samples}, {self.prompts} problems{unjudged}{gap}; judge {self.judge}"
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} ({notes})"


def describe_unasked(not_asked: Mapping[str, int], *, asked: int) -> str:
    """Says how many questions were not asked, and why; "" where all were.

    >>> describe_unasked({"picture": 3, "over-long": 1}, asked=6)
    '4 of 10 not asked: 3 picture, 1 over-long'
    """
    total = sum(not_asked.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in not_asked.items())
    return f"{total} of {asked + total} not asked: {reasons}" if total else ""


def held_out_requests(prompts: Sequence[Prompt], *, version: int, config: Config) -> Iterator[RolloutRequest]:
    """Yields a request for each held-out prompt, to be answered by policy version `version`."""
    settings = SamplingSettings(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
    )
    for index, prompt in enumerate(prompts):
        yield RolloutRequest(
            group_id=str(GroupId(purpose="eval", step=version, index=index)),
            messages=prompt.messages,
            images=prompt.images,
            num_rollouts=config.evaluation.samples,
            sampling=settings,
            policy_version=version,
        )


def held_out_result(
    correct: Mapping[str, Sequence[Verdict | bool]], *, samples: int = 0, not_asked: Mapping[str, int] | None = None
) -> HeldOutResult:
    """Computes the accuracy from the verdicts on each asked prompt's samples, by group id; equally many for all.

    samples: how many were to be drawn, for a result without a verdict. not_asked: the other prompts, by reason.
    """
    rows = [[bool(verdict) for verdict in row] for row in correct.values()]
    means = np.array([np.mean(row) for row in rows])
    return HeldOutResult(
        accuracy=avg_at_n(rows) if rows else None,
        standard_error=float(means.std() / math.sqrt(len(means))) if rows else None,
        prompts=len(rows),
        samples=len(rows[0]) if rows else samples,
        not_judged=sum(verdict is Verdict.NOT_JUDGED for row in correct.values() for verdict in row),
        not_asked={reason: count for reason, count in (not_asked or {}).items() if count},
    )


def is_correct(response_text: str, answer: str) -> bool:
    """Whether the response's committed answer equals the reference; False where that was not judged.

    Raises InvalidInput when the reference is empty. `vaopd.grading.judge` also distinguishes wrong from not judged.
    """
    return bool(judge(response_text, answer))


def avg_at_n(correct: Sequence[Sequence[bool]]) -> float:
    """Returns avg@n: the mean, over questions, of the share of right samples (not best-of, not a vote).

    Raises InvalidInput without a question, or a question without a sample.
    """
    if not correct or not all(len(samples) for samples in correct):
        raise InvalidInput(f"avg@n needs at least one question and one sample of each, got {len(correct)} questions")
    return sum(sum(samples) / len(samples) for samples in correct) / len(correct)
