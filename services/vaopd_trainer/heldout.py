"""Evaluates a policy version during a run: avg@n over the held-out prompts, answered by the rollout workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from vaopd.config import Config
from vaopd.evaluation import HeldOutResult, held_out_requests, held_out_result
from vaopd.grading import Verdict, judge
from vaopd.types import GroupId, Prompt
from vaopd_trainer.collector import Check, Collector
from vaopd_trainer.student_va import HeldOutAnswer

GIVEN_UP = "given up by the workers"
"""The reason of questions that became dead letters; `vaopd queue dead` shows why each did."""


class Evaluation:
    """The evaluation of a policy version: requested at once, waited for by `finish`.

    Its groups stay unacknowledged: a run that is resumed at this version evaluates it again, out of the same groups.
    """

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Prompt],
        *,
        version: int,
        config: Config,
        check: Check,
        keep: Collection[int] = (),
    ) -> None:
        """Requests an answer to every prompt from this policy version. keep: places of prompts, for `kept`."""
        requests = list(held_out_requests(prompts, version=version, config=config))
        self.version = version
        self.group_ids = tuple(request.group_id for request in requests)
        self._collector = collector
        self._answers = dict(zip(self.group_ids, (prompt.answer for prompt in prompts), strict=True))
        self._samples = config.evaluation.samples
        self._keep = keep
        self.kept: list[HeldOutAnswer] = []
        """After `finish`: the first answer to each prompt that was to be kept and was answered, by place."""
        collector.enqueue(requests, oldest_version=version, step=None, check=check)

    def finish(
        self,
        *,
        decode: Callable[[np.ndarray], str],
        check: Check,
        not_asked: Mapping[str, int] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> HeldOutResult:
        """Waits until every prompt is answered; one that is given up counts as not asked.

        not_asked: further problems, which can't be asked, by reason. on_progress: called with how many have been
        answered, and of how many.
        """
        answers = self._answers
        verdicts: dict[str, list[Verdict]] = {}
        done = 0
        for groups in self._collector.wait_for_groups(list(answers), check=check):
            done += len(groups)
            on_progress(done, len(answers))
            for group in groups:
                verdicts[group.group_id] = [
                    judge(decode(rollout.response_ids), answers[group.group_id]) for rollout in group.rollouts
                ]
                if (place := GroupId.parse(group.group_id).index) in self._keep:
                    ids = group.rollouts[0].response_ids
                    verdict = verdicts[group.group_id][0]
                    self.kept.append(HeldOutAnswer(place, group.prompt_token_ids, ids, verdict))
        self.kept.sort(key=lambda answer: answer.problem)
        unasked = {**(not_asked or {}), GIVEN_UP: len(answers) - len(verdicts)}
        return held_out_result(verdicts, samples=self._samples, not_asked=unasked)
