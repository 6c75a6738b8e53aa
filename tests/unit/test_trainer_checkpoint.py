"""Checkpoints: what is saved comes back bit for bit, and appears whole or not at all."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from vaopd.errors import InvalidInput, LimitExceeded
from vaopd.run.checkpoints import LedgerLine, RunState, find_latest_checkpoint, load_run_state
from vaopd_trainer import checkpoint


class Run:
    """A small model, AdamW and the schedule, as the trainer has them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)  # never gets a gradient, so the optimizer has no state for it
        parameters = [*self.model.parameters(), *self.unused.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95))
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 2, 10)

    def step(self) -> None:
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def save(self, folder: Path, step: int, *, keep: int = 2) -> Path:
        state = RunState(
            step=step,
            schedule=self.schedule.state_dict(),
            ledger=[LedgerLine(group_id=f"train-{s:06d}-0000", step=s, policy_version=s) for s in range(step)],
        )
        return checkpoint.save(folder, state, student=self.model.state_dict(), optimizer=self.optimizer, keep=keep)

    def restore(self, folder: Path) -> RunState:
        """As `Trainer.resume` does."""
        state = load_run_state(folder)
        self.model.load_state_dict(checkpoint.load_student(folder))
        checkpoint.load_optimizer(folder, self.optimizer)
        self.schedule.load_state_dict(state.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return state


def test_a_restored_run_goes_on_exactly_as_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    """Weights, both moments and their step count, learning rate and random state: one missing, and this fails."""
    run = Run()
    for _ in range(3):
        run.step()
    saved = run.save(tmp_path, 3)
    for _ in range(4):
        run.step()

    other = Run()
    torch.manual_seed(99)
    other.restore(saved)
    for _ in range(4):
        other.step()
    assert torch.equal(other.model.weight, run.model.weight)
    assert torch.equal(other.model.bias, run.model.bias)
    assert other.schedule.get_last_lr() == run.schedule.get_last_lr()


def test_before_the_first_step_there_is_nothing_to_remember_and_that_is_fine(tmp_path: Path) -> None:
    run = Run()
    saved = run.save(tmp_path, 0)
    assert run.restore(saved).ledger == []


def test_the_ledger_holds_each_trained_group_with_its_step_and_policy(tmp_path: Path) -> None:
    state = Run().restore(Run().save(tmp_path, 2))
    assert state.step == 2
    assert state.ledger == [
        LedgerLine(group_id="train-000000-0000", step=0, policy_version=0),
        LedgerLine(group_id="train-000001-0000", step=1, policy_version=1),
    ]


def test_the_newest_are_kept_and_the_newest_of_all_is_found(tmp_path: Path) -> None:
    assert find_latest_checkpoint(tmp_path) is None
    for step in (2, 4, 10):
        Run().save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000010"]
    assert find_latest_checkpoint(tmp_path) == tmp_path / "step_000010"


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    class DiskFull(RuntimeError):
        pass

    run = Run()
    saved = run.save(tmp_path, 2)

    class Failing:
        def state_dict(self) -> dict:
            raise DiskFull

    with pytest.raises(DiskFull):
        checkpoint.save(
            tmp_path,
            RunState(step=4),
            student=run.model.state_dict(),
            optimizer=Failing(),  # type: ignore[arg-type]
            keep=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert find_latest_checkpoint(tmp_path) == saved


@pytest.mark.parametrize("file", ["state.json", "ledger.jsonl", "student.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, file: str) -> None:
    saved = Run().save(tmp_path, 2)
    (saved / file).write_bytes((saved / file).read_bytes()[:-7])
    with pytest.raises(InvalidInput, match=r"step_000002 can't be read .*; remove that folder to resume from the one"):
        Run().restore(saved)


def test_a_full_disk_is_told_and_the_old_checkpoint_is_intact(tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk; all else that pytest writes is smaller."""
    run = Run()
    saved = run.save(tmp_path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(LimitExceeded, match=r"step_000004 can't be written .* make room, and resume"):
            run.save(tmp_path, 4, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert run.restore(saved).step == 2
