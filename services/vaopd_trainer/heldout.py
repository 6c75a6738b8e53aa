"""Evaluates a policy version during a run: avg@n over the held-out prompts, answered by the rollout workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vaopd.config import Config
from vaopd.evaluation import HeldOutResult, held_out_requests, held_out_result
from vaopd.grading import Verdict, judge
from vaopd.types import Prompt
from vaopd_trainer.collector import Collector

GIVEN_UP = "given up by the workers"
"""The reason of questions that became dead letters; `vaopd queue dead` shows why each did."""


def evaluate(
    collector: Collector,
    prompts: Sequence[Prompt],
    *,
    version: int,
    config: Config,
    decode: Callable[[np.ndarray], str],
    check: Callable[[], None],
    not_asked: Mapping[str, int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HeldOutResult, tuple[str, ...]]:
    """Waits until this policy version has answered every prompt; one that is given up counts as not asked.

    not_asked: further problems, which can't be asked, by reason.
    on_progress: called with how many have been answered, and of how many. Also returns the ids of the groups, which
    stay unacknowledged: a run that is resumed at this version evaluates it again, out of the same groups.
    """
    requests = list(held_out_requests(prompts, version=version, config=config))
    answers = {request.group_id: prompt.answer for request, prompt in zip(requests, prompts, strict=True)}
    collector.enqueue(requests, oldest_version=version, step=None, check=check)
    verdicts: dict[str, list[Verdict]] = {}
    done = 0
    for groups in collector.wait_for_groups(list(answers), check=check):
        done += len(groups)
        on_progress(done, len(answers))
        for group in groups:
            verdicts[group.group_id] = [
                judge(decode(rollout.response_ids), answers[group.group_id]) for rollout in group.rollouts
            ]
    unasked = {**(not_asked or {}), GIVEN_UP: len(answers) - len(verdicts)}
    return held_out_result(verdicts, samples=config.evaluation.samples, not_asked=unasked), tuple(answers)
