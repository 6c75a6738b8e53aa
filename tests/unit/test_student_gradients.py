"""The student's gradients with shared prompts against transformers' own forwards, one rollout at a time, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.families import ask, family_folder, plain_logprobs, plain_model
from tests.support.teacher import drawing
from vaopd.config import TrainerConfig
from vaopd.divergence import token_logprobs
from vaopd.vlm.model import Segment, Vlm
from vaopd_trainer.student_loss import StudentLoss

PICTURES = [drawing(0), drawing(1, (128, 64))]
LENGTHS = (9, 1, 17, 9, 16)


@pytest.fixture
def student() -> Vlm:
    """Of its own, since gradients are left in it."""
    return Vlm.load(family_folder("qwen3_vl"))


def prompts_and_responses(vlm: Vlm) -> list[Segment]:
    """Two groups: an image with ragged siblings, and another with one response."""
    rng = np.random.default_rng(0)
    return [
        Segment(prompt=ask(vlm, [PICTURES[0]]), responses=tuple(rng.integers(0, 200, n) for n in LENGTHS)),
        Segment(prompt=ask(vlm, [PICTURES[1]]), responses=(rng.integers(0, 200, 6),)),
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def shared_gradients(vlm: Vlm) -> dict[str, torch.Tensor]:
    segments = prompts_and_responses(vlm)
    ids = np.concatenate([ids for segment in segments for ids in segment.responses])
    token_logprobs(vlm.response_hidden(segments), vlm.head, torch.from_numpy(ids)).sum().backward()
    return gradients(vlm.model)


def plain_gradients(vlm: Vlm) -> dict[str, torch.Tensor]:
    model = plain_model("qwen3_vl")
    model.zero_grad()
    for segment, picture in zip(prompts_and_responses(vlm), PICTURES, strict=True):
        for ids in segment.responses:
            plain_logprobs(model, vlm, [picture], ids).sum().backward()
    return gradients(model)


def assert_equal_within(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float) -> None:
    """The difference of all gradients as one vector, and of each parameter's, relative to their norms."""
    assert mine.keys() == theirs.keys()
    total = torch.stack([(mine[n] - theirs[n]).norm() for n in theirs]).norm()
    assert total <= relative * torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, expected in theirs.items():
        # Key biases have no gradient but rounding: a constant added to all scores changes no softmax.
        floor = 1e-4 * expected.numel() ** 0.5
        assert (mine[name] - expected).norm() <= 10 * relative * expected.norm() + floor, name


def test_gradients_equal_those_of_one_rollout_at_a_time(student: Vlm) -> None:
    expected = plain_gradients(student)
    assert any("visual" in name for name in expected)  # the tower trains along, deepstack mergers included
    assert_equal_within(shared_gradients(student), expected, 1e-5)


def test_activation_checkpointing_computes_layers_twice_and_changes_no_gradient(student: Vlm) -> None:
    kept = shared_gradients(student)
    student.model.zero_grad()
    StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1), checkpoint_activations=True)
    runs: list[str] = []
    last = student.model.model.language_model.layers[-1]
    last.mlp.register_forward_pre_hook(lambda *_: runs.append("mlp"))
    recomputed = shared_gradients(student)
    assert len(runs) == 2
    assert_equal_within(recomputed, kept, 1e-6)


def test_on_a_cpu_activations_are_kept_unless_asked(student: Vlm) -> None:
    StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1))
    assert not student.model.is_gradient_checkpointing
