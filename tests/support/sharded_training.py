"""Students that ranks train together, held in every way, against one plain process, for test_sharded_students.py.

`main` is one of the ranks (tests/support/rank_processes.py). The trainer's own loop shares five groups out, two of
them without an image, one in the step's last forward; rank 0 compares. Four ranks resume each other's checkpoints, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support import tolerance
from tests.support.ranks_step import LENGTHS, Coordinator, Scorer
from tests.support.weighted import a_weighted_group, teacher_head
from vaopd.config import Config, LoraConfig, TrainerConfig, validate
from vaopd.run.checkpoints import RunState, find_latest_checkpoint
from vaopd.run.tensor_files import TensorStream
from vaopd.vlm.adapters import add_adapters, name_adapters
from vaopd.vlm.model import Vlm
from vaopd_trainer import checkpoint
from vaopd_trainer.compose import hold_weights, make_accelerator
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.sharded_weights import is_sharded
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup
from vaopd_trainer.student_weights import StudentWeights

STEPS = 3


def make_config(kind: str, *, dtype: str = "float32", lora: bool = False) -> Config:
    sharding: dict[str, Any] = {"kind": kind} | ({"ranks_per_copy": 2} if kind == "hybrid" else {})
    values = {
        "run": {"name": "r"},
        "data": {"source": "unused"},
        "student": {"model": "unused", "dtype": dtype} | ({"lora": {"rank": 3}} if lora else {}),
        "teacher": {"model": "unused"},
        "trainer": {
            "steps": 10,
            "prompts_per_step": len(LENGTHS),
            "learning_rate": 1e-3,
            "warmup_fraction": 0.0,
            "forward_tokens": 60,  # ranks have different numbers of forwards
            "trackers": [],
            "sharding": sharding,
        },
    }
    return validate(Config, values, origin="test")


def make_groups(student: Vlm) -> list[WeightedGroup]:
    return [
        a_weighted_group(student, index, lengths, image=index not in (2, 4)) for index, lengths in enumerate(LENGTHS)
    ]


def load(
    model: Path, lora: LoraConfig | None, *, frozen: bool = False, dtype: str = "float32", device: str | None = None
) -> Vlm:
    student = Vlm.load(model, dtype=dtype, device=device)
    student.family.vision_tower(student.model).requires_grad_(not frozen)
    if lora is not None:
        add_adapters(student, lora, vision_tower=not frozen, dtype=getattr(torch, dtype))
    return student


class Recorder(Coordinator):
    """Rank 0's: keeps each step's numbers and the weights published, and writes checkpoints."""

    def __init__(self, groups: Sequence[WeightedGroup], ranks: Ranks, checkpoints: Path) -> None:
        super().__init__(groups, ranks)
        self.steps: dict[int, dict[str, float]] = {}
        self.weights: dict[str, Tensor] = {}
        self._checkpoints = checkpoints

    def record(self, step: int, sums: Sequence[dict[str, float] | None], own: Any, **rest: Any) -> None:
        super().record(step, sums)
        self.steps[step] = self.numbers | own

    def publish(self, version: int, weights: TensorStream) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}

    def save_checkpoint(self, state: RunState, weights: StudentWeights) -> None:
        checkpoint.save(self._checkpoints, state, weights, keep=2)


class Run:
    """One rank's trainer of a student as its configuration holds it."""

    def __init__(self, model: Path, config: Config, checkpoints: Path, *, frozen: bool = False, **loss: Any) -> None:
        AcceleratorState._reset_state()  # it has one precision for a process
        self.accelerator, self.ranks = make_accelerator(config), Ranks()
        sharded = is_sharded(config.trainer)
        student = load(model, config.student.lora, frozen=frozen, device="meta" if sharded else None)
        self.groups = make_groups(student)
        head = teacher_head(student)
        module = StudentLoss(student, teacher_head=head, trainer=config.trainer, **loss)
        weights = hold_weights(config, module, student, self.accelerator, self.ranks)
        assert all(isinstance(parameter, DTensor) == sharded for parameter in weights.parameters)
        self.recorder = Recorder(self.groups, self.ranks, checkpoints) if self.ranks.is_coordinator else None
        self.trainer = Trainer(
            config=config,
            accelerator=self.accelerator,
            ranks=self.ranks,
            weights=weights,
            coordinator=self.recorder,  # type: ignore[arg-type]
        )

    def resume(self, checkpoints: Path) -> None:
        newest = find_latest_checkpoint(checkpoints)
        assert newest is not None
        checkpoint.check(newest)
        self.trainer.resume(newest)

    def step(self) -> None:
        scorer: Any = Scorer(self.groups)
        step = self.trainer.state.step
        self.trainer._train(step, *self.trainer._collect(step, scorer))

    def finish(self, expected: Reference | None, **bounds: Any) -> None:
        self.trainer._publish(self.trainer.state.step)
        if self.recorder is not None:
            assert expected is not None
            compare(self.recorder, expected, **bounds)
        self.ranks.barrier()


class Reference:
    """The same steps by one process that holds the whole student, in float64, with torch's own clipping and AdamW."""

    def __init__(self, model: Path, config: Config, *, steps: int = STEPS, frozen: bool = False) -> None:
        student = load(model, config.student.lora, frozen=frozen, dtype="float64")
        groups, settings = make_groups(student), config.trainer
        loss = StudentLoss(student, teacher_head=teacher_head(student).double(), trainer=TrainerConfig(steps=1))
        named = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            named.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.config, self.losses, self.norms = student.config, [], []
        bounds = {name: torch.zeros_like(p) for name, p in named.items()}
        for step in range(steps):
            optimizer.zero_grad()
            value = loss(groups)[0] / len(groups)
            value.backward()
            self.losses.append(float(value.detach()))
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
            errors = tolerance.backward(student.config, gradients, sides=1)
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)))
            scale = min(1.0, settings.max_grad_norm / self.norms[-1])
            rate = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            for name, gradient in gradients.items():
                if not gradient.any():  # of an adapter's A in the first step, since B is zero, in every precision
                    continue
                root = optimizer.state[named[name]]["exp_avg_sq"].div(1 - settings.betas[1] ** (step + 1)).sqrt()
                # An update m/√v moves by 2·error/√v when all gradients do by `error`, and never by more than 2.
                moved = (2 * scale * errors[name] / root).clamp(max=2).nan_to_num(nan=2.0)
                bounds[name] += rate * moved
        for name, p in named.items():
            # Each step rounds twice: the decay, and the sum.
            bounds[name] += steps * torch.finfo(torch.float32).eps * (p.detach().abs() + steps * settings.learning_rate)
        weights = {name: p.detach() for name, p in student.model.named_parameters()}
        self.weights, self.bounds = name_adapters(weights) or weights, name_adapters(bounds) or bounds


def compare(found: Recorder, expected: Reference, *, dtype: torch.dtype = torch.float32, weights: bool = True) -> None:
    """Loss and gradient norm of every step that was taken, and the weights after the last one."""
    bound = tolerance.forward(expected.config, sides=1, dtype=dtype)
    assert found.steps
    for step, numbers in found.steps.items():
        loss, norm = expected.losses[step], expected.norms[step]
        tolerance.assert_within(numbers["loss"], loss, bound * loss, f"loss of step {step}")
        tolerance.assert_within(numbers["grad_norm"], norm, 3 * bound * norm, f"norm of step {step}")
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items() if weights else ():
        tolerance.assert_within(found.weights[name], weight, expected.bounds[name], name)


def take_steps(model: Path, folder: Path, kinds: Sequence[str]) -> None:
    """Compares three steps of full weights and of adapters, for each way to hold them."""
    for lora in (False, True):
        expected = None
        for kind in kinds:
            print(f"{kind}, {'adapters' if lora else 'full weights'}", flush=True)  # the last one printed has failed
            run = Run(model, make_config(kind, lora=lora), folder / f"{kind}-{lora}")
            if run.recorder is not None and expected is None:
                expected = Reference(model, make_config(kind, lora=lora))
            for _ in range(STEPS):
                run.step()
            run.finish(expected)


def resume_each_other(model: Path, tied: Path, folder: Path) -> None:
    """Continues checkpoints of ranks that hold the student otherwise. Four ranks."""
    config = make_config("full")
    print("sharded over all ranks, a checkpoint", flush=True)
    run = Run(model, config, folder / "full")
    run.step()
    run.trainer._checkpoint()
    expected = Reference(model, config) if run.ranks.is_coordinator else None

    print("resumed as copies of two ranks, with activation checkpointing", flush=True)
    run = Run(model, make_config("hybrid"), folder / "hybrid", checkpoint_activations=True)
    run.resume(folder / "full")
    run.step()
    run.trainer._checkpoint()
    run.step()
    run.finish(expected)

    print("resumed from an unsharded checkpoint", flush=True)
    run = Run(model, config, folder / "again")
    run.resume(folder / "whole")
    run.step()
    run.step()
    run.finish(expected)

    print("a tied head and a frozen vision tower, in bfloat16", flush=True)
    config = make_config("full", dtype="bfloat16")
    run = Run(tied, config, folder / "tied", frozen=True)
    run.step()
    reference = Reference(tied, config, steps=1, frozen=True) if run.ranks.is_coordinator else None
    run.finish(reference, dtype=torch.bfloat16, weights=False)


def main(*folders: str) -> None:
    torch.set_num_threads(1)
    model, tied, folder = map(Path, folders)
    world = make_accelerator(make_config("none")).num_processes
    take_steps(model, folder, ("none", "full"))
    if world == 4:
        resume_each_other(model, tied, folder)
    Accelerator().end_training()
