"""One of several ranks that train a sharded student for three steps, for test_sharded_students.py.

python -m tests.support.sharded_training FOLDER KIND, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
environment: the trainer's own loop shares five groups out, one of them without an image, and rank 0 compares loss,
gradient norm and weights of each step with those of one plain process. Ends with 0 when all agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support import tolerance
from tests.support.ranks_step import LENGTHS, Coordinator, Scorer
from tests.support.weighted import a_weighted_group, teacher_head
from vaopd.config import Config, TrainerConfig, validate
from vaopd.run.tensor_files import TensorStream
from vaopd.vlm.model import Vlm
from vaopd_trainer.compose import hold_weights, make_accelerator, make_loss
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup

STEPS = 3


def make_config(kind: str, *, dtype: str = "float32") -> Config:
    values = {
        "run": {"name": "r"},
        "data": {"source": "unused"},
        "student": {"model": "unused", "dtype": dtype},
        "teacher": {"model": "unused"},
        "trainer": {
            "steps": 10,
            "prompts_per_step": len(LENGTHS),
            "learning_rate": 1e-3,
            "warmup_fraction": 0.2,
            "forward_tokens": 60,  # ranks have different numbers of forwards
            "trackers": [],
            "sharding": {"kind": kind} | ({"ranks_per_copy": 2} if kind == "hybrid" else {}),
        },
    }
    return validate(Config, values, origin="test")


class Recorder(Coordinator):
    """Keeps each step's numbers and the weights published."""

    def __init__(self, groups: Sequence[WeightedGroup], ranks: Ranks) -> None:
        super().__init__(groups, ranks)
        self.steps: list[dict[str, float]] = []
        self.weights: dict[str, Tensor] = {}

    def record(self, step: int, sums: Sequence[dict[str, float] | None], own: dict[str, float], **rest: Any) -> None:
        super().record(step, sums)
        self.steps.append(self.numbers | own)

    def publish(self, version: int, weights: TensorStream) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}


class Reference:
    """The same steps by one process that holds the whole student, in float64, with torch's own clipping and AdamW."""

    def __init__(self, folder: str, config: Config, groups: Sequence[WeightedGroup]) -> None:
        student = Vlm.load(folder, dtype="float64")
        settings = config.trainer
        loss = StudentLoss(student, teacher_head=teacher_head(student).double(), trainer=TrainerConfig(steps=1))
        named = dict(student.model.named_parameters())
        optimizer = torch.optim.AdamW(
            named.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.losses, self.norms = [], []
        self.bounds = {name: torch.zeros_like(p) for name, p in named.items()}
        for step in range(STEPS):
            optimizer.zero_grad()
            value = loss(groups)[0] / len(groups)
            value.backward()
            self.losses.append(float(value.detach()))
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
            errors = tolerance.backward(student.config, gradients, sides=1)
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)))
            scale = min(1.0, settings.max_grad_norm / self.norms[-1])
            rate = settings.learning_rate * min(1.0, step / 2)  # two steps of warm-up
            if rate:
                optimizer.param_groups[0]["lr"] = rate
            else:
                optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step()
            for name in gradients:
                root = optimizer.state[named[name]]["exp_avg_sq"].div(1 - settings.betas[1] ** (step + 1)).sqrt()
                # An update m/√v moves by 2·error/√v when all gradients do by `error`, and never by more than 2.
                moved = (2 * scale * errors[name] / root).clamp(max=2).nan_to_num(nan=2.0)
                self.bounds[name] += rate * moved
        self.config = student.config
        self.weights = {name: p.detach() for name, p in named.items()}


def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    config = make_config(kind)
    accelerator, ranks = make_accelerator(config), Ranks()
    student = Vlm.load(folder, device="meta" if kind != "none" else None)
    groups = [a_weighted_group(student, index, lengths, image=index != 2) for index, lengths in enumerate(LENGTHS)]
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
        compare(recorder, Reference(folder, config, groups))
    ranks.barrier()
    accelerator.end_training()


def compare(found: Recorder, expected: Reference) -> None:
    bound = tolerance.forward(expected.config, sides=1)
    for step, numbers in enumerate(found.steps):
        print(step, numbers["loss"], expected.losses[step], numbers["grad_norm"], expected.norms[step])
        tolerance.assert_within(numbers["loss"], expected.losses[step], bound * expected.losses[step], f"loss {step}")
        tolerance.assert_within(
            numbers["grad_norm"], expected.norms[step], 3 * bound * expected.norms[step], f"norm {step}"
        )
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        own = torch.finfo(torch.float32).eps * weight.abs() * 4
        tolerance.assert_within(found.weights[name], weight, expected.bounds[name] + own, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
