"""One of several ranks that take a training step together, for test_trainer_ranks.py.

`main` takes a model's folder, one for its own files, B, and where rank 1 runs out of memory, in a "forward" or a
"backward". The trainer's own loop shares B groups out, and every rank compares loss and gradient with those of all
groups in this process. Then rank 1 alone is asked to stop. At last the run ends, and is stopped in its last evaluation.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support import tolerance
from tests.support.weighted import Scarce, a_weighted_group, teacher_head
from vaopd.config import Config, TrainerConfig, validate
from vaopd.errors import Mismatch
from vaopd.run.checkpoints import RunState
from vaopd.run.teacher import TeacherRecord
from vaopd.run.tensor_files import TensorStream
from vaopd.types import EncodedImage, GroupId, Prompt, RolloutGroup, user_turn
from vaopd.vlm.model import Vlm
from vaopd_trainer import rank_messages
from vaopd_trainer.alike import check_alike
from vaopd_trainer.compose import hold_weights, make_accelerator, make_loss
from vaopd_trainer.loop import Trainer
from vaopd_trainer.rank_messages import SILENCE_S, Ranks, Stopped
from vaopd_trainer.scorer import BusyTime
from vaopd_trainer.step_numbers import average_ranks
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup
from vaopd_trainer.student_weights import StudentWeights

STEPS = 2
LENGTHS = ([9, 1, 17], [6, 6], [4, 12, 3, 8], [5], [7, 2])


class Scorer:
    """Knows every group's score beforehand."""

    def __init__(self, groups: Sequence[WeightedGroup]) -> None:
        self.busy = BusyTime()
        self._scored = {group.scored.group.group_id: group.scored for group in groups}
        self._results: list[ScoredGroup] = []

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        self._results += [self._scored[group.group_id] for group in groups]

    def clear(self) -> None:
        self._results = []

    def wait_for_results(self, *, check: Callable[[], None]) -> Iterator[ScoredGroup]:
        yield from self._results


class Coordinator:
    """Hands out groups as the real one does, without a queue, and keeps the step's numbers."""

    def __init__(self, groups: Sequence[WeightedGroup], ranks: Ranks) -> None:
        self.numbers: dict[str, float] = {}
        self.evaluating = self.saved = -1
        self._groups = [group.scored.group for group in groups]
        self._ranks = ranks

    def distribute(self, step: int, submit: Callable[[Sequence[RolloutGroup]], None]) -> None:
        for group in self._groups:
            rank = GroupId.parse(group.group_id).index % self._ranks.world
            if rank == 0:
                submit([group])
            else:
                self._ranks.send_group(group, to=rank)
        for rank in range(1, self._ranks.world):
            self._ranks.send_group(None, to=rank)

    def give_up(self, refused: Iterator[Any]) -> None:
        assert not list(refused)

    def finish_evaluation(self) -> None:
        """There is none but the last, in which a signal arrives."""
        if self.evaluating == STEPS:
            self._ranks.stop_others()
            raise Stopped

    def publish(self, version: int, weights: TensorStream) -> None:
        list(weights)

    def enqueue(self, step: int) -> None:
        pass

    def evaluate_if_due(self, version: int) -> None:
        self.evaluating = version

    def save_checkpoint(self, state: RunState, weights: StudentWeights) -> None:
        self.saved = state.step

    def record(self, step: int, sums: Sequence[dict[str, float] | None], *rest: Any, **more: Any) -> None:
        self.numbers = average_ranks(sums)


def check_connections() -> None:
    """All of this process notice a host that is gone."""
    mine = [connection for connection in psutil.Process().net_connections("tcp") if connection.status == "ESTABLISHED"]
    assert mine
    for connection in mine:
        with socket.socket(fileno=os.dup(connection.fd)) as found:
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * SILENCE_S


def refuse_what_differs(ranks: Ranks, config: Config, student: Path, scratch: Path) -> None:
    """Rank 1 reads another configuration, then other contents; then only its places are others."""
    last = ranks.rank == 1
    trainer = config.trainer.model_copy(update={"learning_rate": 2e-6 if last else 1e-6})
    teacher = TeacherRecord(model="m", revision="r", tokenizer_fingerprint="t", dtype="float32", payload="hidden")
    another_image = EncodedImage(data=bytes([last]))
    same: Any = {"student": student, "teacher": teacher, "prompts": []}
    with pytest.raises(Mismatch, match=r"rank 1 has trainer\.learning_rate = 2e-06, not 1e-06: give every host"):
        check_alike(ranks, config.model_copy(update={"trainer": trainer}), **same)
    others = {
        "set of prompts": {
            "prompts": [Prompt(prompt_id="p", messages=user_turn("?", [another_image]), images=(), answer="")]
        },
        "teacher": {"teacher": replace(teacher, revision=f"r{last}")},
        r"chat_template\.jinja": {"student": copy_student(student, scratch) if last else student},
    }
    for what, other in others.items():
        with pytest.raises(Mismatch, match=f"rank 1 has another {what}: give every host"):
            check_alike(ranks, config, **same | other)
    places = config.run.model_copy(update={"folder": Path("elsewhere" if last else "runs")})
    teacher = replace(teacher, model="a path of this host" if last else "m")
    check_alike(ranks, config.model_copy(update={"run": places}), **same | {"teacher": teacher})


def copy_student(student: Path, folder: Path) -> Path:
    """A student that reads its chats otherwise."""
    other = folder / "other"
    shutil.copytree(student, other)
    (other / "chat_template.jinja").open("a").write(" ")
    return other


def main(folder: str, scratch: str, number: str, fails_in: str) -> None:
    torch.set_num_threads(1)
    count = int(number)
    student = Vlm.load(folder, dtype="float64")
    groups = [a_weighted_group(student, index, LENGTHS[index]) for index in range(count)]
    config = validate(
        Config,
        {
            "run": {"name": "r"},
            "data": {"source": "unused"},
            "student": {"model": "unused", "dtype": "float32"},
            "teacher": {"model": "unused"},
            "trainer": {"steps": STEPS, "prompts_per_step": count, "max_grad_norm": 1e9, "trackers": []},
        },
        origin="test",
    )
    accelerator = make_accelerator(config)
    rank_messages.is_on_this_host = lambda _: False
    ranks = Ranks()
    check_connections()
    refuse_what_differs(ranks, config, Path(folder), Path(scratch))
    loss = make_loss(config, student, teacher_head=teacher_head(student).double(), device=accelerator.device)
    mine = groups[ranks.rank :: ranks.world]
    short = sum(group.tokens for group in mine) - 1
    scarce = Scarce(loss, tokens=short if ranks.rank == 1 else None, fails_in=fails_in)
    coordinator = Coordinator(groups, ranks) if ranks.is_coordinator else None
    weights = hold_weights(config, scarce, student, accelerator, ranks)  # type: ignore[arg-type]
    stop = threading.Event()
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        ranks=ranks,
        weights=weights,
        coordinator=coordinator,  # type: ignore[arg-type]
        stop=stop,
    )
    whole, expected = gradients_of_all(folder, groups)
    scorer = Scorer(groups)
    found: dict[str, torch.Tensor] = {}

    def keep_gradients() -> None:
        gradients = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
        places = {gradient.untyped_storage().data_ptr() for gradient in gradients.values()}
        assert len(places) < len(gradients), "each gradient has memory of its own, beside DDP's buckets"
        found.update({name: gradient.clone() for name, gradient in gradients.items()})

    trainer.optimizer.step = keep_gradients
    scored, timings = trainer._collect(0, scorer)  # type: ignore[arg-type]
    assert [group.index for group in scored] == [group.scored.index for group in mine]
    trainer._train(0, scored, timings)
    assert_same(student, found, expected)
    if coordinator is not None:
        error = tolerance.forward(student.config, dtype=torch.float64) * whole
        tolerance.assert_within(coordinator.numbers["loss"], whole, error, "loss")
        assert coordinator.numbers["rollouts"] == sum(len(LENGTHS[index]) for index in range(count))
    if ranks.rank == 1:
        assert scarce.tokens_of_forwards[0] == short + 1, "memory was never short"
    if ranks.rank == 1:
        stop.set()
    with pytest.raises(Stopped):  # on every rank, before it trains
        trainer.run(scorer)  # type: ignore[arg-type]
    assert coordinator is None or coordinator.saved == 1
    stop.clear()
    trainer.state.step = STEPS
    with pytest.raises(Stopped):  # on every rank
        trainer.run(scorer)  # type: ignore[arg-type]
    assert coordinator is None or coordinator.saved == STEPS
    accelerator.end_training()


def gradients_of_all(folder: str, groups: Sequence[WeightedGroup]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss over B and its gradient, of one process."""
    other = Vlm.load(folder, dtype="float64")
    loss = StudentLoss(other, teacher_head=teacher_head(other).double(), trainer=TrainerConfig(steps=1))
    value = loss(groups)[0] / len(groups)
    value.backward()
    return float(value.detach()), {name: p.grad for name, p in other.model.named_parameters() if p.grad is not None}


def assert_same(student: Vlm, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, bound in tolerance.backward(student.config, expected, dtype=torch.float64).items():
        tolerance.assert_within((found[name] - expected[name]).norm(), 0.0, bound, name)
