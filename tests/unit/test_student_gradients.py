"""The student's gradients with shared prompts against transformers' own forwards, one rollout at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.families import ask, family_folder, plain_logprobs, plain_model
from tests.support.teacher import drawing
from tests.support.tolerance import assert_within
from vaopd.config import Config, TrainerConfig, validate
from vaopd.divergence import token_logprobs
from vaopd.vlm.model import Segment, Vlm
from vaopd_trainer.compose import make_loss
from vaopd_trainer.student_loss import StudentLoss

pytestmark = pytest.mark.numeric

PICTURES = [drawing(0), drawing(1, (128, 64))]
LENGTHS = (9, 1, 17, 9, 16)


@pytest.fixture
def student() -> Vlm:
    """Of its own, since gradients are left in it."""
    return Vlm.load(family_folder("qwen3_vl"), dtype="float64")


def prompts_and_responses(vlm: Vlm) -> list[Segment]:
    """Two groups: an image with ragged siblings, and another with one response."""
    rng = np.random.default_rng(0)
    return [
        Segment(prompt=ask(vlm, [PICTURES[0]]), responses=tuple(rng.integers(0, 200, n) for n in LENGTHS)),
        Segment(prompt=ask(vlm, [PICTURES[1]]), responses=(rng.integers(0, 200, 6),)),
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shared_gradients(vlm: Vlm) -> dict[str, torch.Tensor]:
    segments = prompts_and_responses(vlm)
    ids = np.concatenate([ids for segment in segments for ids in segment.responses])
    token_logprobs(vlm.compute_response_hidden(segments), vlm.head, torch.from_numpy(ids)).sum().backward()
    return gradients(vlm.model)


def plain_gradients(vlm: Vlm) -> dict[str, torch.Tensor]:
    model = plain_model("qwen3_vl", dtype="float64")
    model.zero_grad()
    for segment, picture in zip(prompts_and_responses(vlm), PICTURES, strict=True):
        for ids in segment.responses:
            plain_logprobs(model, vlm, [picture], ids).sum().backward()
    return gradients(model)


def assert_equal(vlm: Vlm, mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, bound in tolerance.backward(vlm.config, theirs, dtype=torch.float64).items():
        assert_within((mine[name] - theirs[name]).norm(), 0.0, bound, name)


def test_gradients_equal_those_of_one_rollout_at_a_time(student: Vlm) -> None:
    expected = plain_gradients(student)
    assert any("visual" in name for name in expected)  # the tower trains along, deepstack mergers included
    assert_equal(student, shared_gradients(student), expected)


def test_a_token_that_weighs_one_percent_more_is_noticed_in_nearly_every_parameter(student: Vlm) -> None:
    expected = plain_gradients(student)
    model = plain_model("qwen3_vl", dtype="float64")
    (segment, _), (picture, _) = prompts_and_responses(student), PICTURES
    (0.01 * plain_logprobs(model, student, [picture], segment.responses[2])[16]).backward()
    off = {name: g - expected[name] for name, g in gradients(model).items()}
    errors = tolerance.backward(student.config, expected, dtype=torch.float64)
    noticed = [name for name, bound in errors.items() if off[name].norm() > 2 * bound]
    assert len(noticed) > 0.9 * len(expected)


def test_activation_checkpointing_computes_layers_twice_and_changes_no_gradient(student: Vlm) -> None:
    kept = shared_gradients(student)
    student.model.zero_grad()
    StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1), checkpoint_activations=True)
    runs: list[str] = []
    last = student.model.model.language_model.layers[-1]
    last.mlp.register_forward_pre_hook(lambda *_: runs.append("mlp"))
    recomputed = shared_gradients(student)
    assert len(runs) == 2
    assert_equal(student, recomputed, kept)


@pytest.mark.parametrize(("device", "checkpoints"), [("cpu", False), ("cuda", True)])
def test_checkpointing_is_decided_by_where_accelerate_will_put_the_student(
    student: Vlm, device: str, checkpoints: bool
) -> None:
    """It is on the CPU when the trainer is composed. A GPU's layers will be compiled, too, in their first forward."""
    config = validate(
        Config,
        {
            "run": {"name": "r"},
            "data": {"source": "unused"},
            "student": {"model": "unused"},
            "teacher": {"model": "unused"},
            "trainer": {"steps": 1},
        },
        origin="test",
    )
    make_loss(config, student, teacher_head=None, device=torch.device(device))
    assert student.device.type == "cpu"
    assert student.model.is_gradient_checkpointing == checkpoints
    assert student.model.training == checkpoints  # transformers checkpoints in this mode only
    layers = [*student.model.model.language_model.layers, *student.model.model.visual.blocks]
    assert {layer._compiled_call_impl is not None for layer in layers} == {checkpoints}


def test_where_the_student_is_decides_without_a_device(student: Vlm) -> None:
    StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1))
    assert not student.model.is_gradient_checkpointing
