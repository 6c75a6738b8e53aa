"""Measures a model's held-out accuracy with a rollout engine in this process, without queue, trainer or teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from vaopd.config import Config
from vaopd.evaluation import HeldOutResult, held_out_requests, held_out_result
from vaopd.files.hub import model_folder
from vaopd.grading import Verdict, judge, prepare
from vaopd.run.snapshots import make_snapshot
from vaopd.sampling.build import build_engine
from vaopd.sampling.engine import Outcome, open_stream, sample_all
from vaopd.types import Prompt, RolloutGroup
from vaopd.vlm.prompts import load_processor


def evaluate_model(config: Config, prompts: Sequence[Prompt], *, on_progress: Callable[[int], None]) -> HeldOutResult:
    """Returns avg@n of `config.student.model` over `prompts`; a prompt that the engine refuses counts as wrong.

    on_progress: called with the number of prompts answered so far.
    """
    name = config.student.model
    folder = model_folder(name, role="student")
    tokenizer = load_processor(folder).tokenizer
    prepare()

    def grade(outcome: Outcome, answer: str) -> list[Verdict]:
        if not isinstance(outcome, RolloutGroup):
            return [Verdict.WRONG] * config.evaluation.samples
        texts = (tokenizer.decode(rollout.response_ids, skip_special_tokens=True) for rollout in outcome.rollouts)
        return [judge(text, answer) for text in texts]

    with tempfile.TemporaryDirectory(prefix="vaopd-eval-") as scratch:
        policy = make_snapshot(folder, Path(scratch))
        engine = build_engine(config, worker="eval")
        try:
            engine.load_policy(policy)
            verdicts: dict[str, list[Verdict]] = {}
            requests = list(held_out_requests(prompts, version=policy.version, config=config))
            at_once = config.rollout.requests_per_batch
            for index, outcome in sample_all(open_stream(engine), requests, at_once=at_once):
                verdicts[requests[index].group_id] = grade(outcome, prompts[index].answer)
                on_progress(len(verdicts))
            return held_out_result(verdicts)
        finally:
            engine.close()
