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
    "held_out_prompts",
    "held_out_requests",
    "held_out_result",
    "is_correct",
    "judge",
    "judge_version",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """A held-out accuracy: mean correctness over prompts and samples (avg@n), with its standard error over prompts.

    Both in [0, 1]. not_judged: answers with a comparison that was cut off, counted as wrong. judge: its version.
    """

    accuracy: float
    standard_error: float
    prompts: int
    samples: int
    not_judged: int = 0
    judge: str = field(default_factory=judge_version)

    def __str__(self) -> str:
        of = f"avg@{self.samples}, {self.prompts} problems"
        open_ = f", {self.not_judged} not judged" if self.not_judged else ""
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} ({of}{open_}; judge {self.judge})"


def held_out_prompts(config: Config) -> Sequence[Prompt]:
    """Loads the first `evaluation.prompts` of the validation split, shuffled with seed 42 in every run."""
    from vaopd.data.loaders import load_prompts
    from vaopd.files.hub import read_control_tokens

    return load_prompts(
        config.data.validation_source or config.data.source,
        split=config.data.validation_split,
        limit=config.evaluation.prompts,
        shuffle_seed=42,  # method.md
        instruction=config.data.instruction or None,
        control_tokens=read_control_tokens(config.student.model),
    )


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


def held_out_result(correct: Mapping[str, Sequence[Verdict | bool]]) -> HeldOutResult:
    """Computes the accuracy from the verdicts on each prompt's samples, by group id; equally many for all."""
    rows = [[bool(verdict) for verdict in row] for row in correct.values()]
    accuracy = avg_at_n(rows)
    means = np.array([np.mean(row) for row in rows])
    return HeldOutResult(
        accuracy=accuracy,
        standard_error=float(means.std() / math.sqrt(len(means))),
        prompts=len(rows),
        samples=len(rows[0]),
        not_judged=sum(verdict is Verdict.NOT_JUDGED for row in correct.values() for verdict in row),
    )


def is_correct(response_text: str, answer: str) -> bool:
    """Whether the response's committed answer equals the reference; False where that was not judged.

    Raises InvalidInput when the reference is empty. `vaopd.grading.judge` also distinguishes wrong from not judged.
    """
    return bool(judge(response_text, answer))


def avg_at_n(correct: Sequence[Sequence[bool]]) -> float:
    """Returns avg@n: the mean, over questions, of the share of right samples (not best-of, not a vote)."""
    if not correct or not all(len(samples) for samples in correct):
        raise InvalidInput(f"avg@n needs at least one question and one sample of each, got {len(correct)} questions")
    return sum(sum(samples) / len(samples) for samples in correct) / len(correct)
