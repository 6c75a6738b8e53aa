"""AdamW with moments of 8 bits: what a checkpoint restores, and how far its steps are from float32's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vaopd.config import TrainerConfig
from vaopd.run.checkpoints import RunState, make_name
from vaopd_trainer import checkpoint
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_weights import WholeWeights

pytest.importorskip("bitsandbytes")


class Student(nn.Module):
    """8192 weights, of which bitsandbytes keeps 8 bits, and 128 of which it keeps 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(64, 128)


def hold(optimizer: str) -> WholeWeights:
    loss = Student()
    settings = TrainerConfig(steps=9, optimizer=optimizer, learning_rate=1e-2)  # type: ignore[arg-type]
    return WholeWeights(loss, model=loss.model, settings=settings, ranks=Ranks())


def step(weights: WholeWeights, seed: int) -> None:
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    weights.loss.model(inputs).square().sum().backward()  # type: ignore[operator, union-attr]
    weights.optimizer.step()
    weights.optimizer.zero_grad()


def test_a_restored_run_takes_the_same_steps_bit_for_bit(tmp_path: Path) -> None:
    weights, other = hold("adamw_8bit"), hold("adamw_8bit")
    for seed in range(3):
        step(weights, seed)
    assert {name: tensor.dtype for name, tensor in weights.list_moments().items() if name.endswith("state1")} == {
        "0.state1": torch.uint8,
        "1.state1": torch.float32,
    }
    checkpoint.save(tmp_path, RunState(step=3), weights, keep=1)

    checkpoint.load(tmp_path / make_name(3), other)

    for seed in range(3, 6):
        step(weights, seed)
        step(other, seed)
    for name, weight in weights.list_weights().items():
        assert torch.equal(other.list_weights()[name], weight), name


def test_its_steps_are_near_those_of_float32() -> None:
    """Rounded to 8 bits by a map of relative steps of a few percent, block by block; mean over all weights."""
    exact, rounded = hold("adamw"), hold("adamw_8bit")
    before = {name: weight.clone() for name, weight in exact.list_weights().items()}
    for seed in range(6):
        step(exact, seed)
        step(rounded, seed)
    way = (exact.list_weights()["weight"] - before["weight"]).norm()
    apart = (exact.list_weights()["weight"] - rounded.list_weights()["weight"]).norm()
    assert 0 < apart < 0.1 * way
