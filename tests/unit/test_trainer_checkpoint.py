"""Checkpoints: what is saved comes back bit for bit, and appears whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.disks import full_disk
from vaopd.config import TrainerConfig
from vaopd.errors import InvalidInput, LimitExceeded
from vaopd.run.checkpoints import (
    LedgerLine,
    NoSoundCheckpoint,
    RunState,
    find_latest_checkpoint,
    load_run_state,
)
from vaopd_trainer import checkpoint
from vaopd_trainer.optimizer import make_schedule
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_weights import WholeWeights


class Loss(nn.Module):
    """A small model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)  # never gets a gradient, so the optimizer has no state for it


class Run:
    """A small model, AdamW and the schedule, as the trainer has them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        loss = Loss()
        settings = TrainerConfig(steps=10, learning_rate=0.1)
        self.model = loss.model
        self.weights = WholeWeights(loss, model=loss.model, settings=settings, ranks=Ranks())
        self.optimizer = self.weights.optimizer
        self.schedule = make_schedule(self.optimizer, warmup_steps=2, steps=10)

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
        return checkpoint.save(folder, state, self.weights, keep=keep)

    def restore(self, folder: Path) -> RunState:
        """As `Trainer.resume` does."""
        state = load_run_state(folder)
        checkpoint.load(folder, self.weights)
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
    for step in (2, 999_999, 1_000_000):  # the last one's name has a digit more
        Run().save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1000000", "step_999999"]
    assert find_latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


def test_an_old_one_that_cannot_be_removed_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """rmtree follows no link."""
    (tmp_path / "step_000001").symlink_to(tmp_path)
    saved = Run().save(tmp_path, 2, keep=1)
    assert find_latest_checkpoint(tmp_path) == saved
    assert f"checkpoint {tmp_path / 'step_000001'} can't be removed" in caplog.text


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    class DiskFull(RuntimeError):
        pass

    run = Run()
    saved = run.save(tmp_path, 2)

    class Failing:
        def save(self, folder: Path) -> dict:
            (folder / "student.safetensors").write_bytes(b"half")
            raise DiskFull

    with pytest.raises(DiskFull):
        checkpoint.save(tmp_path, RunState(step=4), Failing(), keep=1)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert find_latest_checkpoint(tmp_path) == saved


@pytest.mark.parametrize("file", ["state.json", "ledger.jsonl", "student.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, file: str) -> None:
    saved = Run().save(tmp_path, 2)
    (saved / file).write_bytes((saved / file).read_bytes()[:-7])
    with pytest.raises(InvalidInput, match=r"step_000002 can't be read .*; remove that folder to resume from the one"):
        Run().restore(saved)


def test_a_full_disk_is_told_and_the_old_checkpoint_is_intact(tmp_path: Path) -> None:
    run = Run()
    saved = run.save(tmp_path, 2)
    with full_disk(), pytest.raises(LimitExceeded, match=r"step_000004 can't be written .* make room, and resume"):
        run.save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert run.restore(saved).step == 2


FILES = ("state.json", "ledger.jsonl", "student.safetensors", "optimizer.safetensors", "rng.safetensors")


def save_two(folder: Path) -> tuple[Path, Path]:
    run = Run()
    saved = []
    for step in (2, 4):
        run.step()
        saved.append(run.save(folder, step, keep=3))
    return saved[0], saved[1]


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 4
    file.write_bytes(content)


def zero_half(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "first byte": lambda file, other: flip(file, 0),
    "a byte in the middle": lambda file, other: flip(file, file.stat().st_size // 2),
    "last byte but one": lambda file, other: flip(file, -2),
    "half of it zeroed": zero_half,
    "the file of another step": lambda file, other: shutil.copy(other, file),
    "missing": lambda file, other: file.unlink(),
    "empty": lambda file, other: file.write_bytes(b""),
    "a pipe": lambda file, other: (file.unlink(), os.mkfifo(file)),
    "a folder": lambda file, other: (file.unlink(), file.mkdir()),
    "a loop of links": lambda file, other: (file.unlink(), file.symlink_to(file.name)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_the_run_falls_back_aloud_to_the_newest_sound_checkpoint(
    file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = save_two(tmp_path)
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    DAMAGES[damage](newest / file, older / file)
    checkpoint.set_damaged_aside(tmp_path)
    assert find_latest_checkpoint(tmp_path) == older
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith(f"checkpoint {newest} can't be read (")
    assert file in line
    assert f"the run continues from {older.name}" in line
    assert (tmp_path / "damaged_step_000004").is_dir()


def test_no_byte_of_the_state_can_be_flipped_unnoticed(tmp_path: Path) -> None:
    _, newest = save_two(tmp_path)
    text = (newest / "state.json").read_bytes()
    for at in range(len(text)):
        flip(newest / "state.json", at)
        with pytest.raises(InvalidInput, match="step_000004 can't be read"):
            checkpoint.check(newest)
        (newest / "state.json").write_bytes(text)
    checkpoint.check(newest)


def test_a_whole_checkpoint_in_another_ones_place_is_refused(tmp_path: Path) -> None:
    older, newest = save_two(tmp_path)
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.raises(InvalidInput, match=r"step_000004 can't be read \(state.json: it is of step 2\)"):
        checkpoint.check(newest)


def test_without_a_sound_one_the_run_does_not_begin_again(tmp_path: Path) -> None:
    """However often a supervisor tries."""
    for saved in save_two(tmp_path):
        flip(saved / "student.safetensors", -2)
    for _ in range(2):
        with pytest.raises(NoSoundCheckpoint, match=r"none of the 2 checkpoints in .* is sound:\n.*004.*\n.*002.*\n"):
            checkpoint.set_damaged_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004"]


def test_a_damaged_one_is_no_reason_to_remove_the_sound_one_before_it(tmp_path: Path) -> None:
    """With keep=1: what counts as the newest is what the next save keeps."""
    older, newest = save_two(tmp_path)
    (newest / "rng.safetensors").unlink()
    checkpoint.set_damaged_aside(tmp_path)
    saved = Run().save(tmp_path, 3, keep=1)
    assert find_latest_checkpoint(tmp_path) == saved
    assert not older.exists()
