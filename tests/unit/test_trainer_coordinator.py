"""Rank 0's own work, in the order in which queue, ledger, folder and other ranks see it; without any of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.groups import a_request, an_answer
from vaopd.config import Config, TrainerConfig, validate
from vaopd.errors import LeaseLost
from vaopd.evaluation import HeldOutResult, held_out_result
from vaopd.run.checkpoints import LedgerLine, RunState
from vaopd.types import PolicyVersion, Prompt, RolloutGroup
from vaopd_trainer import coordinator
from vaopd_trainer.coordinator import Coordinator
from vaopd_trainer.metrics import TrainerMetrics
from vaopd_trainer.prompt_order import TrainingPrompts
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.student_weights import WholeWeights


class World:
    """Collector, ledger, keeper and ranks in one, which write down what they are asked; three ranks."""

    world = 3

    def __init__(
        self, folder: Path, *, arriving: Sequence[Sequence[str]] = (), lengths: Sequence[int] = (3,) * 6, steps: int = 4
    ) -> None:
        """lengths: of each group's one response, by its index."""
        self.events: list[tuple[Any, ...]] = []
        self.submitted: list[str] = []
        self.counts: dict[str, int] = {}
        self.lease_lost = False
        self.stop = threading.Event()
        self._arriving, self._lengths = arriving, lengths
        self._checkpoints = folder / "r" / "checkpoints"
        values = {
            "run": {"name": "r", "folder": str(folder)},
            "data": {"source": "unused"},
            "student": {"model": "unused"},
            "teacher": {"model": "unused"},
            "trainer": {"steps": steps, "prompts_per_step": 6},
        }
        prompt = Prompt(prompt_id="p", messages=(), images=(), answer="1")
        everything: Any = self
        self.coordinator = Coordinator(
            config=validate(Config, values, origin="test"),
            ranks=everything,
            student=SimpleNamespace(path=folder),  # type: ignore[arg-type]
            prompts=TrainingPrompts([prompt] * 6, per_step=6, seed=0),
            validation=[],
            collector=everything,
            ledger=everything,
            keeper=everything,
            status=everything,
            progress_line=everything,
            metrics=TrainerMetrics(job="r", steps=4),
            track=lambda values, step: None,
            stop=self.stop,
        )

    # The collector.
    def wait_for_groups(self, group_ids: Sequence[str], *, check: Callable[[], None]) -> Iterator[list[RolloutGroup]]:
        for part in self._arriving:
            check()
            yield [self._answer(group_id) for group_id in part]

    def _answer(self, group_id: str) -> RolloutGroup:
        group = an_answer(a_request(group_id))
        ids = np.zeros(self._lengths[int(group_id[-1])], np.int32)
        return replace(group, rollouts=(replace(group.rollouts[0], response_ids=ids),))

    def confirm(self) -> None:
        self.events.append(("confirm",))

    def acknowledge(self, group_ids: Iterable[str]) -> None:
        newest = sorted(path.name for path in self._checkpoints.iterdir())[-1]
        self.events.append(("acknowledge", list(group_ids), newest))

    def forget(self, before_version: int) -> None:
        self.events.append(("forget", before_version))

    # The ledger.
    def sync(self) -> None:
        self.events.append(("sync", sorted(path.name for path in self._checkpoints.glob("step_*"))))

    # The status, and the line of progress.
    def note_step(self, step: int) -> None:
        self.events.append(("note", step))

    def show_step(self, step: int, values: dict[str, float]) -> None:
        self.events.append(("show", step, values))

    accuracy: float | None = None

    def print_line(self, text: str) -> None:
        self.events.append(("print", text))

    def write(self, event: str, **values: Any) -> None:
        self.events.append(("write", event, values))

    # The lease's keeper; and the ranks.
    def check(self) -> None:
        if self.lease_lost:
            raise LeaseLost("another trainer has the job")

    def send_group(self, group: RolloutGroup | None, *, to: int) -> None:
        self.events.append(("send", to, None if group is None else group.group_id))

    def stop_others(self) -> None:
        self.events.append(("stop others",))

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        self.submitted += [group.group_id for group in groups]


def names(step: int, *indices: int) -> list[str]:
    return [f"train-{step:06d}-{index:04d}" for index in indices]


def test_groups_go_on_arrival_to_the_rank_with_the_fewest_tokens_the_longest_first(tmp_path: Path) -> None:
    """Six groups, of which 1 never comes. A group is its prompt's 3 tokens and its one response's, less the last.

    0 (42) takes rank 0, then 3 (32) rank 1 and 5 (12) rank 2. 4 (22) makes rank 2's 34, so 2 (7) is rank 1's.
    """
    world = World(tmp_path, arriving=[names(2, 0), names(2, 5, 3), names(2, 2, 4)], lengths=[40, 0, 5, 30, 20, 10])
    world.coordinator.distribute(2, world.submit)
    assert world.submitted == names(2, 0)
    assert world.events == [
        ("send", 1, "train-000002-0003"),
        ("send", 2, "train-000002-0005"),
        ("send", 2, "train-000002-0004"),
        ("send", 1, "train-000002-0002"),
        ("send", 1, None),
        ("send", 2, None),
    ]


def test_a_checkpoint_is_durable_before_its_groups_are_acknowledged_and_each_is_acknowledged_once(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    model = torch.nn.Linear(1, 1)
    weights = WholeWeights(model, model=model, settings=TrainerConfig(steps=2), ranks=Ranks())
    state = RunState()
    for step in range(2):
        state.step = step + 1
        state.ledger += [LedgerLine(group_id=name, step=step, policy_version=step) for name in names(step, 0, 1)]
        world.coordinator.save_checkpoint(state, weights)
    assert world.events == [
        ("confirm",),
        ("sync", []),
        ("write", "checkpoint", {"step": 1}),
        ("acknowledge", names(0, 0, 1), "step_000001"),
        ("forget", 1),
        ("confirm",),
        ("sync", ["step_000001"]),
        ("write", "checkpoint", {"step": 2}),
        ("acknowledge", names(1, 0, 1), "step_000002"),
        ("forget", 2),
    ]


@pytest.mark.parametrize(("share", "warned"), [(0.05, []), (0.06, ["step 2: 6 % of the sampled tokens"])])
def test_log_probs_that_differ_from_the_worker_s_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float, warned: list[str]
) -> None:
    values = {"rollouts": 24.0, "response_tokens_mean": 9.0, "policy_drift_share": share, "policy_drift_mean": 0.2}
    monkeypatch.setattr(coordinator.step_numbers, "average_ranks", lambda sums: dict(values))
    (tmp_path / "r").mkdir()
    times = dict.fromkeys([*coordinator.step_numbers.STEP_TIMES, "scoring_s"], 1.0)
    with caplog.at_level("WARNING"):
        World(tmp_path).coordinator.record(2, [], times, trained=[], weighted=[], kl=[])
    assert [record.getMessage()[: len("step 2: 6 % of the sampled tokens")] for record in caplog.records] == warned


def test_a_signal_ends_the_waits_of_all_ranks(tmp_path: Path) -> None:
    world = World(tmp_path, arriving=[names(0, 0), names(0, 3)])
    world.stop.set()
    with pytest.raises(Stopped):
        world.coordinator.distribute(0, world.submit)
    assert world.events == [("stop others",)]


def test_a_lost_lease_ends_a_wait_and_sends_no_word_to_the_others(tmp_path: Path) -> None:
    """They end with this process, as after any error; a stopped rank would write a checkpoint first."""
    world = World(tmp_path, arriving=[names(0, 0)])
    world.lease_lost = True
    world.stop.set()
    with pytest.raises(LeaseLost):
        world.coordinator.distribute(0, world.submit)
    assert world.events == []


class Evaluated:
    """An evaluation with this result."""

    def __init__(self, version: int, result: HeldOutResult) -> None:
        self.version, self.group_ids, self.kept = version, (), ()
        self._result = result

    def finish(self, **_: Any) -> HeldOutResult:
        return self._result


def test_evaluations_before_the_first_step_every_50_and_after_the_last_and_the_first_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies by version; 100 is as good as 50, and comes too late."""
    accuracies = {0: 0.3, 50: 0.5, 100: 0.5, 120: 0.4}
    kept: list[tuple[str, int]] = []

    def write_card(run: Path, model: Path, *, step: int, base: Path) -> None:
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
        kept.append((model.name, step))

    results = {v: HeldOutResult(accuracy=a, standard_error=0.1, prompts=9, samples=8) for v, a in accuracies.items()}
    monkeypatch.setattr(coordinator, "Evaluation", lambda *_, version, **__: Evaluated(version, results[version]))
    monkeypatch.setattr(coordinator, "keep_snapshot", lambda policy, target: None)
    monkeypatch.setattr(coordinator, "write_model_card", write_card)
    world = World(tmp_path, steps=120)
    (tmp_path / "r").mkdir()
    for version in range(121):
        world.coordinator._snapshot = PolicyVersion(version=version, path="unused", sha256="")
        world.coordinator.evaluate_if_due(version)
        world.coordinator.finish_evaluation()
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["accuracy"] for line in lines} == accuracies
    assert kept == [("best", 0), ("best", 50)]


def test_an_evaluation_in_which_nothing_was_asked_is_recorded_and_is_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = held_out_result({}, samples=8, not_asked={"picture": 2})
    kept: list[object] = []
    monkeypatch.setattr(coordinator, "Evaluation", lambda *_, version, **__: Evaluated(version, result))
    monkeypatch.setattr(coordinator, "keep_snapshot", lambda *args: kept.append(args))
    (tmp_path / "r").mkdir()
    world = World(tmp_path)
    world.coordinator.evaluate_if_due(0)
    world.coordinator.finish_evaluation()
    [line] = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert (line["accuracy"], line["prompts"], line["not_asked"]) == (None, 0, {"picture": 2})
    assert kept == []
    world.coordinator.begin(RunState(step=1), resumed=False)  # as after a resume: no accuracy to beat
