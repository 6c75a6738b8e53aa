"""The order of one rank's run: what is published, asked for, trained, saved; without queue, teacher or student."""

from __future__ import annotations

import os
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
from vaopd.errors import NumericalError
from vaopd.run.checkpoints import LedgerLine, RunState, find_latest_checkpoint
from vaopd.run.tensor_files import TensorStream
from vaopd.types import GroupScore, Payload, RolloutGroup
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer import checkpoint, kill_points
from vaopd_trainer.__main__ import set_environment
from vaopd_trainer.kill_points import KILL_POINTS
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.scorer import BusyTime, Refused
from vaopd_trainer.student_loss import ScoredGroup, TokenValues, WeightedGroup
from vaopd_trainer.student_weights import StudentWeights, WholeWeights

RESPONSE_TOKENS = 2 * 3  # of the group that `an_answer` makes


class Loss(nn.Module):
    """A student of one weight, 1 at first, and a loss that falls as it falls; infinite for groups of some names."""

    def __init__(self, *infinite: str) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)
        self._infinite = infinite

    def forward(
        self, groups: Sequence[WeightedGroup], *, parts: frozenset[str] = frozenset()
    ) -> tuple[torch.Tensor, TokenValues]:
        sizes = [float("inf") if g.scored.group.group_id in self._infinite else 1.0 for g in groups]
        kl = torch.tensor(sizes).repeat_interleave(RESPONSE_TOKENS)
        return self.model.weight.sum() * sum(sizes), TokenValues(kl, torch.zeros_like(kl))


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

    def publish(self, version: int, weights: TensorStream) -> None:
        self.events.append(("publish", version, dict(weights)["weight"].item()))

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
        self.sums = sums
        self.events.append(("record", step, [line.group_id for line in trained], own.get("skipped")))

    def save_checkpoint(self, state: RunState, weights: StudentWeights) -> None:
        self.events.append(("save", state.step, weights.list_weights()["weight"].item()))

    def finish(self) -> None:
        self.events.append(("finish",))


class Run:
    def __init__(
        self,
        coordinator: Coordinator,
        *,
        refused: Sequence[str] = (),
        infinite: Sequence[str] = (),
        steps: int = 2,
        **trainer: Any,
    ) -> None:
        values = {
            "run": {"name": "r"},
            "data": {"source": "unused"},
            "student": {"model": "unused", "dtype": "float32"},
            "teacher": {"model": "unused"},
            "trainer": {"checkpoint_every": 1, "prompts_per_step": 2, "learning_rate": 0.1, "steps": steps, **trainer},
        }
        config = validate(Config, values, origin="test")
        loss, ranks = Loss(*infinite), Ranks()
        self.trainer = Trainer(
            config=config,
            accelerator=Accelerator(cpu=True),
            ranks=ranks,
            weights=WholeWeights(loss, model=loss.model, settings=config.trainer, ranks=ranks),
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


def test_what_is_saved_after_a_step_is_what_is_published_after_it() -> None:
    coordinator = Coordinator()
    Run(coordinator).start()
    published = [event[1:] for event in coordinator.events if event[0] == "publish"]
    assert [version for version, _ in published] == [0, 1, 2]
    assert 1.0 == published[0][1] > published[1][1] > published[2][1]
    assert {event[1:] for event in coordinator.events if event[0] == "save"} == set(published[1:])


def test_a_step_compares_its_log_probs_with_those_of_the_groups_that_its_own_policy_sampled() -> None:
    """The student's are 0 (`Loss`); two groups of six tokens that were sampled with −1 to −0.25."""
    coordinator = Coordinator()
    Run(coordinator).start()
    [sums] = coordinator.sums
    assert (sums["drift_tokens"], sums["drift_max"]) == (2 * RESPONSE_TOKENS, 1.0)


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


# -- a gradient that is not finite -------------------------------------------------------------------------------------


def skipped_lines(run: Run) -> list[tuple[int, str, bool]]:
    return [(line.step, line.group_id, line.skipped) for line in run.trainer.state.ledger]


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_the_next_one_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    coordinator = Coordinator()
    run = Run(coordinator, steps=3, infinite=["step1-1"])
    run.start()
    weights = [event[2] for event in coordinator.events if event[0] == "publish"]
    assert weights[0] > weights[1] == weights[2] > weights[3]
    assert np.isfinite(weights).all()
    assert [event[3] for event in coordinator.events if event[0] == "record"] == [None, 1.0, None]
    assert skipped_lines(run) == [(s, f"step{s}-{i}", s == 1) for s in range(3) for i in range(2)]
    assert "step 1 is skipped: the gradient's norm is inf; groups whose KL is not finite: step1-1" in caplog.text


def test_the_learning_rate_follows_the_step_whether_it_was_skipped_or_not() -> None:
    rates = []
    for infinite in ([], ["step0-0", "step1-1"]):
        run = Run(Coordinator(), steps=4, infinite=infinite)
        run.start()
        rates.append(run.trainer.schedule.state_dict()["_last_lr"])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert rates[0] == rates[1]


def test_too_many_in_a_row_end_the_run_by_name_behind_a_checkpoint() -> None:
    coordinator = Coordinator()
    run = Run(coordinator, steps=9, infinite=["step0-0", "step2-1", "step3-0"], max_skipped_steps=2, checkpoint_every=9)
    with pytest.raises(NumericalError, match=r"2 steps in a row, 2 to 3 .*groups: step2-0, step2-1, step3-0, step3-1"):
        run.start()
    assert coordinator.events[-1][:2] == ("save", 4)


class Killed(BaseException):
    """In place of SIGKILL."""


class DurableCoordinator(Coordinator):
    """Keeps real checkpoints."""

    def save_checkpoint(self, state: RunState, weights: StudentWeights) -> None:
        checkpoint.save(Path("checkpoints"), state, weights, keep=2)


@pytest.mark.parametrize("point", KILL_POINTS[:-1])  # the last one is in the real coordinator
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_killed_around_a_skipped_step_has_each_group_once_and_goes_on(
    point: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 and 1 are skipped; a checkpoint's points count the steps taken before."""
    options: dict[str, Any] = {"steps": 3, "infinite": ["step0-1", "step1-0"]}

    def kill(reached: str, number: int) -> None:
        if (reached, number) == (point, step + (point in ("written", "renamed"))):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kill_points, "pass_point", kill)
        with pytest.raises(Killed):
            Run(DurableCoordinator(), **options).start()
    AcceleratorState._reset_state(reset_partial_state=True)

    again = Run(DurableCoordinator(), **options)
    if (latest := find_latest_checkpoint(Path("checkpoints"))) is not None:
        again.trainer.resume(latest)
    again.start()
    assert skipped_lines(again) == [(s, f"step{s}-{i}", s < 2) for s in range(3) for i in range(2)]


def test_a_resumed_run_counts_the_skipped_steps_before_it_and_takes_the_next_groups() -> None:
    """It doesn't meet the same groups again: one more skipped step ends it once more, at the next groups."""
    options: dict[str, Any] = {"steps": 9, "infinite": [f"step{s}-0" for s in range(3)], "max_skipped_steps": 2}
    with pytest.raises(NumericalError, match="0 to 1"):
        Run(DurableCoordinator(), **options).start()
    AcceleratorState._reset_state(reset_partial_state=True)
    for expected in ("3 steps in a row, 0 to 2", None):
        coordinator = DurableCoordinator()
        run = Run(coordinator, **options)
        latest = find_latest_checkpoint(Path("checkpoints"))
        assert latest is not None
        run.trainer.resume(latest)
        if expected is None:
            run.start()
            assert [line.skipped for line in run.trainer.state.ledger] == [True] * 6 + [False] * 12
        else:
            with pytest.raises(NumericalError, match=expected):
                run.start()
            assert ("enqueue", 2) in coordinator.events
            assert ("enqueue", 1) not in coordinator.events
        AcceleratorState._reset_state(reset_partial_state=True)


class TestEnvironment:
    """What torch reads when it is imported."""

    NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")

    @pytest.fixture(autouse=True)
    def unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in self.NAMES:
            monkeypatch.setenv(name, "")  # so that what is set in a test is undone after it
            monkeypatch.delenv(name)
        monkeypatch.setattr(os, "cpu_count", lambda: 12)

    def test_segments_are_expandable_by_both_names_and_ranks_share_the_cores(self) -> None:
        set_environment(processes=4)
        assert [os.environ[name] for name in self.NAMES] == ["expandable_segments:True"] * 2 + ["3"]

    def test_a_single_process_has_all_cores(self) -> None:
        set_environment(processes=1)
        assert "OMP_NUM_THREADS" not in os.environ

    @pytest.mark.parametrize("name", NAMES)
    def test_what_the_user_has_set_stays(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "mine")
        set_environment(processes=4)
        assert os.environ[name] == "mine"
        assert (self.NAMES[0] in os.environ) == (name in (self.NAMES[0], self.NAMES[2]))
