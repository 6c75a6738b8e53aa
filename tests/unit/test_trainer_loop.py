"""The order of one rank's run: what is published, asked for, trained, saved; without queue, teacher or student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.support.groups import a_request, an_answer
from vaopd.config import Config, validate
from vaopd.run.checkpoints import LedgerLine, RunState
from vaopd.types import GroupScore, Payload, RolloutGroup
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer.coordinator import Weights
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.scorer import BusyTime, Refused
from vaopd_trainer.student_loss import ScoredGroup, WeightedGroup

RESPONSE_TOKENS = 2 * 3  # of the group that `an_answer` makes


class Loss(nn.Module):
    """A student of one weight, 1 at first, and a loss that falls as it falls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)

    def forward(self, groups: Sequence[WeightedGroup]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.weight.sum() * len(groups), torch.ones(RESPONSE_TOKENS * len(groups))


class Scorer:
    """Scores every group at once, but refuses those that it was told to."""

    def __init__(self, *refused: str) -> None:
        self.busy = BusyTime()
        self._refused = refused
        self._results: list[ScoredGroup | Refused] = []

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        self._results += [
            Refused(group_id=group.group_id, reason="too long") if group.group_id in self._refused else scored(group)
            for group in groups
        ]

    def wait_for_results(self, *, check: Callable[[], None]) -> Iterator[ScoredGroup | Refused]:
        check()
        results, self._results = self._results, []
        yield from results


def scored(group: RolloutGroup) -> ScoredGroup:
    va = tuple(np.ones(len(rollout.response_ids), np.float32) for rollout in group.rollouts)
    score = GroupScore(
        group_id=group.group_id,
        teacher_logprobs=va,
        degraded_logprobs=va,
        visual_advantage=va,
        payload=Payload(kind="sampled"),
        prompt_tokens=1,
    )
    prompt = PreparedPrompt(token_ids=np.array([1], np.int64), images=())
    return ScoredGroup(index=int(group.group_id[-1]), group=group, prompt=prompt, score=score)


class Coordinator:
    """Writes down what it is asked; weights by their value. Two groups come in every step."""

    def __init__(self, *, stop_in: int = -1) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._stop_in = stop_in

    def publish(self, version: int, weights: Weights) -> None:
        self.events.append(("publish", version, weights["weight"].item()))

    def enqueue(self, step: int) -> None:
        self.events.append(("enqueue", step))

    def evaluate_if_due(self, version: int) -> None:
        self.evaluating = version
        self.events.append(("evaluate", version))

    def distribute(self, step: int, submit: Callable[[Sequence[RolloutGroup]], None]) -> None:
        if step == self._stop_in:
            raise Stopped
        for index in range(2):
            submit([an_answer(a_request(f"step{step}-{index}", policy_version=step))])

    def finish_evaluation(self) -> None:
        self.events.append(("evaluated", self.evaluating))

    def check(self) -> None:
        pass

    def give_up(self, refused: Iterator[tuple[str, str]]) -> None:
        self.events += [("give up", *group) for group in refused]

    def record(self, step: int, sums: Any, own: Any, *, trained: Sequence[LedgerLine], **rest: Any) -> None:
        self.events.append(("record", step, [line.group_id for line in trained]))

    def save_checkpoint(self, state: RunState, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        self.events.append(("save", state.step, weights["weight"].item()))

    def finish(self) -> None:
        self.events.append(("finish",))


class Run:
    def __init__(self, coordinator: Coordinator, *, checkpoint_every: int = 1, refused: Sequence[str] = ()) -> None:
        values = {
            "run": {"name": "r"},
            "data": {"source": "unused"},
            "student": {"model": "unused"},
            "teacher": {"model": "unused"},
            "trainer": {"steps": 2, "checkpoint_every": checkpoint_every, "prompts_per_step": 2, "learning_rate": 0.1},
        }
        accelerator = Accelerator(cpu=True)
        self.gathered = 0
        whole_state = accelerator.get_state_dict

        def get_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
            self.gathered += 1
            return whole_state(model)

        accelerator.get_state_dict = get_state_dict  # type: ignore[method-assign, assignment]
        self.trainer = Trainer(
            config=validate(Config, values, origin="test"),
            accelerator=accelerator,
            ranks=Ranks(),
            loss=Loss(),  # type: ignore[arg-type]
            coordinator=coordinator,  # type: ignore[arg-type]
        )
        self.scorer = Scorer(*refused)

    def start(self) -> None:
        self.trainer.run(self.scorer)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def accelerate_begins_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_step_is_published_asked_for_trained_and_saved_in_this_order() -> None:
    coordinator = Coordinator()
    Run(coordinator).start()
    assert [event[:2] for event in coordinator.events] == [
        *[("publish", 0), ("enqueue", 0), ("evaluate", 0), ("evaluated", 0), ("record", 0), ("save", 1)],
        *[("publish", 1), ("enqueue", 1), ("evaluate", 1), ("evaluated", 1), ("record", 1), ("save", 2)],
        *[("publish", 2), ("enqueue", 2), ("evaluate", 2), ("evaluated", 2), ("finish",)],
    ]


def test_a_run_that_is_stopped_in_an_evaluation_saves_the_version_that_is_evaluated() -> None:
    """The gradient is there by then, and is not applied: the resumed run evaluates, and trains on, the same groups."""

    class Impatient(Coordinator):
        def finish_evaluation(self) -> None:
            if self.evaluating == 1:
                raise Stopped

    coordinator = Impatient()
    with pytest.raises(Stopped):
        Run(coordinator, checkpoint_every=2).start()
    weights = {event[1]: event[2] for event in coordinator.events if event[0] == "publish"}
    assert coordinator.events[-1] == ("save", 1, weights[1])


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_a_policy_s_weights_are_gathered_once_whether_they_are_saved_too_or_not(checkpoint_every: int) -> None:
    """Versions 0, 1 and 2: what is saved after a step is what is published after it."""
    coordinator = Coordinator()
    run = Run(coordinator, checkpoint_every=checkpoint_every)
    run.start()
    assert run.gathered == 3
    published = [event[1:] for event in coordinator.events if event[0] == "publish"]
    assert [version for version, _ in published] == [0, 1, 2]
    assert 1.0 == published[0][1] > published[1][1] > published[2][1]
    assert {event[1:] for event in coordinator.events if event[0] == "save"} <= set(published)


def test_a_refused_group_is_given_up_before_the_step_and_not_in_the_ledger() -> None:
    coordinator = Coordinator()
    run = Run(coordinator, refused=["step0-1"])
    run.start()
    kinds = [event[0] for event in coordinator.events]
    assert kinds.index("give up") < kinds.index("record")
    assert ("give up", "step0-1", "too long") in coordinator.events
    assert [line.group_id for line in run.trainer.state.ledger] == ["step0-0", "step1-0", "step1-1"]
    assert [(line.step, line.policy_version) for line in run.trainer.state.ledger] == [(0, 0), (1, 1), (1, 1)]


def test_a_stopped_run_saves_the_steps_that_it_has_finished() -> None:
    coordinator = Coordinator(stop_in=1)
    with pytest.raises(Stopped):
        Run(coordinator, checkpoint_every=2).start()
    assert [event[:2] for event in coordinator.events[-2:]] == [("evaluate", 1), ("save", 1)]
