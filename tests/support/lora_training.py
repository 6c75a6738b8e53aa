"""One of several ranks that train adapters for three steps, for test_lora_ranks.py.

python -m tests.support.lora_training FOLDER KIND, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
environment. Rank 0 compares loss, norm and adapters with those of one process in float64, whose gradients are plain
PEFT's (tests/unit/test_adapters.py). Ends with 0 when all agree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support import tolerance
from tests.support.ranks_step import LENGTHS, Coordinator, Scorer
from tests.support.weighted import a_weighted_group, teacher_head
from vaopd.config import Config, LoraConfig, TrainerConfig, validate
from vaopd.run.tensor_files import TensorStream
from vaopd.vlm.adapters import add_adapters, name_adapters
from vaopd.vlm.model import Vlm
from vaopd_trainer.compose import hold_weights, make_accelerator, make_loss
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup

STEPS, RATE = 3, 1e-3
TOTAL = 10_000
"""Of the schedule, so that the rate stays what it is."""
LORA = LoraConfig(rank=3)


class Recorder(Coordinator):
    """Keeps each step's numbers and the adapters published."""

    def __init__(self, groups: Sequence[WeightedGroup], ranks: Ranks) -> None:
        super().__init__(groups, ranks)
        self.steps: list[dict[str, float]] = []
        self.adapters: dict[str, Tensor] = {}

    def record(self, step: int, sums: Sequence[dict[str, float] | None], own: Any, **rest: Any) -> None:
        super().record(step, sums)
        self.steps.append(self.numbers | own)

    def publish(self, version: int, weights: TensorStream) -> None:
        self.adapters = {name: tensor.clone() for name, tensor in weights}


def load(folder: str, dtype: str, device: str | None = None) -> Vlm:
    student = Vlm.load(folder, dtype=dtype, device=device)
    add_adapters(student, LORA, vision_tower=True, dtype=getattr(torch, dtype))
    return student


def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    values = {
        "run": {"name": "r"},
        "data": {"source": "unused"},
        "student": {"model": "unused", "dtype": "float32", "lora": LORA.model_dump()},
        "teacher": {"model": "unused"},
        "trainer": {
            "steps": TOTAL,
            "warmup_fraction": 0.0,
            "learning_rate": RATE,
            "prompts_per_step": len(LENGTHS),
            "trackers": [],
            "sharding": {"kind": kind},
        },
    }
    config = validate(Config, values, origin="test")
    accelerator, ranks = make_accelerator(config), Ranks()
    student = load(folder, "float32", "meta" if kind != "none" else None)
    groups = [a_weighted_group(student, index, lengths) for index, lengths in enumerate(LENGTHS)]
    loss = make_loss(config, student, teacher_head=teacher_head(student), device=accelerator.device)
    weights = hold_weights(config, loss, student, accelerator, ranks)
    recorder = Recorder(groups, ranks) if ranks.is_coordinator else None
    trainer = Trainer(config=config, accelerator=accelerator, ranks=ranks, weights=weights, coordinator=recorder)  # type: ignore[arg-type]
    scorer: Any = Scorer(groups)
    for step in range(STEPS):
        scored, timings = trainer._collect(step, scorer)
        trainer._train(step, scored, timings)
        scorer.clear()
    trainer._publish(STEPS)
    if recorder is not None:
        compare(recorder, folder, groups, config.trainer)
    ranks.barrier()
    accelerator.end_training()


def compare(found: Recorder, folder: str, groups: Sequence[WeightedGroup], settings: TrainerConfig) -> None:
    student = load(folder, "float64")
    loss = StudentLoss(student, teacher_head=teacher_head(student).double(), trainer=TrainerConfig(steps=1))
    named = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, betas=settings.betas, weight_decay=settings.weight_decay)
    relative = tolerance.forward(student.config, sides=1)
    bounds = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(groups)[0] / len(groups)
        value.backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        errors = tolerance.backward(student.config, gradients, sides=1)
        norm = float(torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm))
        optimizer.step()
        expected = float(value.detach())
        tolerance.assert_within(found.steps[step]["loss"], expected, relative * expected, f"loss {step}")
        tolerance.assert_within(found.steps[step]["grad_norm"], norm, 3 * relative * norm, f"norm {step}")
        for name, gradient in gradients.items():
            if not gradient.any():  # of A in the first step, since B is zero, in every precision
                continue
            root = optimizer.state[named[name]]["exp_avg_sq"].div(1 - settings.betas[1] ** (step + 1)).sqrt()
            # An update m/√v moves by 2·error/√v when all gradients do by `error`, and never by more than 2.
            scale = min(1.0, settings.max_grad_norm / norm)
            bounds[name] += RATE * (2 * scale * errors[name] / root).clamp(max=2).nan_to_num(nan=2.0)
    weights, limits = name_adapters({n: p.detach() for n, p in named.items()}), name_adapters(bounds)
    assert found.adapters.keys() == weights.keys()
    decay = RATE * STEPS * (math.pi * STEPS / TOTAL) ** 2 / 4  # the cosine's in these steps
    for name, weight in weights.items():
        own = 4 * torch.finfo(torch.float32).eps * weight.abs() + decay
        tolerance.assert_within(found.adapters[name], weight, limits[name] + own, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
