"""Held-out evaluation through the queue: avg@n by hand, and what a resumed run makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.collectors import MakeCollector
from tests.support.groups import a_request, an_answer
from tests.support.memory_jobs import MemoryJob
from vaopd.config import Config, validate
from vaopd.grading import Verdict
from vaopd.queue import WorkerEnd
from vaopd.types import Message, Prompt, TextPart
from vaopd_trainer.collector import Collector
from vaopd_trainer.heldout import GIVEN_UP, Evaluation, HeldOutResult

ANSWERS = {5: r"It is \boxed{12}.", 7: r"So the answer is \boxed{13}."}
PROMPTS = [
    Prompt(
        prompt_id=str(index),
        messages=(Message(role="user", content=(TextPart(text="How long?"),)),),
        images=(),
        answer=answer,
    )
    for index, answer in enumerate(["12", "13", "14"])
]


@pytest.fixture
def config() -> Config:
    values = {
        "run": {"name": "r"},
        "data": {"source": "unused"},
        "student": {"model": "unused"},
        "teacher": {"model": "unused"},
        "trainer": {"steps": 1},
        "evaluation": {"samples": 2, "temperature": 1.0},
    }
    return validate(Config, values, origin="test")


def served_by(worker: WorkerEnd, first_tokens: tuple[int, int]) -> Callable[[], None]:
    """Called while the trainer waits: answers what is there; the siblings' first tokens say which text they are."""

    def serve() -> None:
        for lease in worker.take(block_s=0.05, max_requests=8):
            group = an_answer(lease.request)
            rollouts = tuple(
                dataclasses.replace(rollout, response_ids=np.array([token, 0, 0], np.int32))
                for rollout, token in zip(group.rollouts, first_tokens, strict=True)
            )
            worker.complete(lease, dataclasses.replace(group, rollouts=rollouts))

    return serve


def run(collector: Collector, config: Config, check: Callable[[], None]) -> HeldOutResult:
    evaluation = Evaluation(collector, PROMPTS, version=0, config=config, check=check)
    return evaluation.finish(decode=lambda ids: ANSWERS[int(ids[0])], check=check)


def test_accuracy_is_the_mean_over_samples_and_problems(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config
) -> None:
    """Every problem is answered with 12 and 13: half right, half right, never right."""
    result = run(make_collector(a_job.trainer()), config, served_by(a_job.worker("w1"), (5, 7)))
    assert result.accuracy == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert result.standard_error == pytest.approx(np.std([0.5, 0.5, 0]) / np.sqrt(3))
    assert (result.prompts, result.samples) == (3, 2)


def test_the_first_answers_to_the_problems_to_keep_are_kept_by_place(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config
) -> None:
    """The first sibling says 12, which is right for problem 0 and wrong for problem 2."""
    check = served_by(a_job.worker("w1"), (5, 7))
    collector = make_collector(a_job.trainer())
    evaluation = Evaluation(collector, PROMPTS, version=0, config=config, check=check, keep={2, 0})
    evaluation.finish(decode=lambda ids: ANSWERS[int(ids[0])], check=check)
    assert [(kept.problem, kept.response_ids.tolist(), kept.verdict) for kept in evaluation.kept] == [
        (0, [5, 0, 0], Verdict.RIGHT),
        (2, [5, 0, 0], Verdict.WRONG),
    ]


def test_a_step_s_groups_arrive_while_the_evaluation_is_still_answered(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config
) -> None:
    """The worker answers training alone, until the trainer has its group; then the problems."""
    collector, worker = make_collector(a_job.trainer()), a_job.worker("w1")
    collector.enqueue([a_request("g1")], oldest_version=0, step=0, check=lambda: None)
    evaluation = Evaluation(collector, PROMPTS, version=0, config=config, check=lambda: None)
    leases = worker.take(block_s=0, max_requests=8)

    def answer(count: int) -> None:
        """Answers all but the last `count`."""
        while len(leases) > count:
            lease = leases.pop(0)
            worker.complete(lease, an_answer(lease.request))

    [[group]] = collector.wait_for_groups(["g1"], check=lambda: answer(3))
    assert group.group_id == "g1"
    assert len(leases) == 3
    result = evaluation.finish(decode=lambda ids: ANSWERS[5], check=lambda: answer(0))
    assert result.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("given_up", [1, 3])
def test_a_problem_that_was_given_up_was_not_asked(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config, given_up: int
) -> None:
    """The others are answered with 13: right and wrong, where the first is refused. Without any, no accuracy."""
    worker = a_job.worker("w1")
    serve = served_by(worker, (7, 7))
    refused: list[str] = []

    def refuse_the_first() -> None:
        while len(refused) < given_up:
            [lease] = worker.take(block_s=10)
            refused.append(lease.request.group_id)
            worker.fail(lease, "no such image")
        serve()

    result = run(make_collector(a_job.trainer()), config, refuse_the_first)
    assert refused[0] == "eval-000000-00000"  # of the problem whose answer is 12
    assert result.not_asked == {GIVEN_UP: given_up}
    assert (result.accuracy, result.prompts) == ((0.5, 2) if given_up == 1 else (None, 0))
    assert f"{given_up} of 3 not asked: {given_up} {GIVEN_UP}" in str(result)


def test_problems_that_cannot_be_asked_are_counted_with_those_given_up(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config
) -> None:
    check = served_by(a_job.worker("w1"), (5, 7))
    evaluation = Evaluation(make_collector(a_job.trainer()), PROMPTS, version=0, config=config, check=check)
    result = evaluation.finish(decode=lambda ids: ANSWERS[int(ids[0])], check=check, not_asked={"picture": 2})
    assert result.accuracy == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert (result.prompts, result.not_asked) == (3, {"picture": 2})


def test_a_resumed_run_evaluates_again_out_of_the_same_groups(
    make_collector: MakeCollector, a_job: MemoryJob, config: Config
) -> None:
    """The trainer died after its evaluation, before a checkpoint beyond it: no worker is asked a second time."""
    first = run(make_collector(a_job.trainer()), config, served_by(a_job.worker("w1"), (5, 7)))
    a_job.trainer_dies()
    assert run(make_collector(a_job.trainer()), config, lambda: None) == first
