"""Held-out evaluation of one policy version: avg@n over the validation prompts, sampled by the rollout workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.trainer.collector import Collector
from vaopd.config import Config
from vaopd.evaluation import avg_at_n, is_correct
from vaopd.types import Prompt, RolloutRequest, SamplingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """accuracy: mean correctness over prompts and samples; standard_error: over prompts; group_ids: what it read."""

    accuracy: float
    standard_error: float
    prompts: int
    samples: int
    group_ids: tuple[str, ...]


def requests_for(prompts: Sequence[Prompt], *, version: int, config: Config) -> list[RolloutRequest]:
    settings = SamplingSettings(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
    )
    return [
        RolloutRequest(
            group_id=f"eval-{version:06d}-{index:05d}",
            messages=prompt.messages,
            images=prompt.images,
            num_rollouts=config.evaluation.samples,
            sampling=settings,
            policy_version=version,
        )
        for index, prompt in enumerate(prompts)
    ]


def evaluate(
    collector: Collector,
    prompts: Sequence[Prompt],
    *,
    version: int,
    config: Config,
    decode: Callable[[np.ndarray], str],
    check: Callable[[], None],
) -> HeldOutResult:
    """Blocks until every prompt has been answered with this policy version, or given up (which counts as wrong).

    The groups stay unacknowledged: a run that is resumed at this version evaluates it again, out of the same groups.
    """
    requests = requests_for(prompts, version=version, config=config)
    answers = {request.group_id: prompt.answer for request, prompt in zip(requests, prompts, strict=True)}
    collector.enqueue(requests, oldest_version=version)
    correct = {group_id: [False] * config.evaluation.samples for group_id in answers}
    for groups in collector.groups(list(answers), check=check):
        for group in groups:
            correct[group.group_id] = [
                is_correct(decode(rollout.response_ids), answers[group.group_id]) for rollout in group.rollouts
            ]
    means = np.array([np.mean(row) for row in correct.values()])
    return HeldOutResult(
        accuracy=avg_at_n(list(correct.values())),
        standard_error=float(means.std() / math.sqrt(len(means))),
        prompts=len(prompts),
        samples=config.evaluation.samples,
        group_ids=tuple(answers),
    )
