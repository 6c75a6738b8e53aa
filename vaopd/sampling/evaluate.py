"""Measures a model's held-out accuracy with a rollout engine in this process, without queue, trainer or teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from vaopd.config import Config
from vaopd.evaluation import HeldOutResult, held_out_requests, held_out_result
from vaopd.files.hub import model_folder
from vaopd.grading import Verdict, judge, prepare
from vaopd.run.snapshots import describe_model
from vaopd.sampling.build import build_engine
from vaopd.sampling.engine import open_stream, sample_all
from vaopd.types import Prompt, RolloutGroup
from vaopd.vlm.prompts import load_processor


def evaluate_model(
    config: Config,
    prompts: Sequence[Prompt],
    *,
    not_asked: Mapping[str, int],
    on_progress: Callable[[int], None],
    on_refused: Callable[[Prompt, Exception], None],
) -> HeldOutResult:
    """Returns avg@n of `config.student.model` over `prompts`.

    A prompt that the engine refuses counts as not asked, never as wrong. not_asked: further problems, which can't be
    asked, by reason. on_progress: called with the number of prompts done so far; on_refused: with each refused one.
    """
    unasked = Counter(not_asked)
    if not prompts:
        return held_out_result({}, samples=config.evaluation.samples, not_asked=unasked)
    name = config.student.model
    folder = model_folder(name, role="student")
    tokenizer = load_processor(folder).tokenizer
    prepare()

    policy = describe_model(folder)
    engine = build_engine(config, worker="eval")
    try:
        engine.load_policy(policy)
        verdicts: dict[str, list[Verdict]] = {}
        requests = list(held_out_requests(prompts, version=policy.version, config=config))
        at_once = config.rollout.requests_per_batch
        ended = sample_all(open_stream(engine), requests, at_once=at_once)
        for done, (index, outcome) in enumerate(ended, 1):
            if isinstance(outcome, RolloutGroup):
                texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in outcome.rollouts]
                verdicts[requests[index].group_id] = [judge(text, prompts[index].answer) for text in texts]
            else:
                unasked["refused by the engine"] += 1
                on_refused(prompts[index], outcome)
            on_progress(done)
        return held_out_result(verdicts, samples=config.evaluation.samples, not_asked=unasked)
    finally:
        engine.close()
