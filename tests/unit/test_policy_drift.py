"""The on-policy check: worker and trainer agree on a token's log-prob, unless their weights or pixels differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import tolerance
from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS
from tests.support.scored import policy_of, prompts, requests, vlm
from tests.support.weighted import score_randomly, teacher_head
from vaopd import images
from vaopd.config import TrainerConfig
from vaopd.sampling.transformers_engine import TransformersEngine
from vaopd.types import RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd_trainer import step_numbers
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup

pytestmark = pytest.mark.numeric


@pytest.fixture
def engine() -> TransformersEngine:
    """A worker's, with the student's policy loaded; its own, so that it may be spoilt."""
    engine = TransformersEngine(model_folder("student"), worker="w", max_pixels=MAX_PIXELS)
    engine.load_policy(policy_of("student"))
    return engine


def loaded(engine: TransformersEngine) -> Vlm:
    assert engine._vlm is not None
    return engine._vlm


def sample(engine: TransformersEngine, **sampling: Any) -> list[RolloutGroup]:
    asked = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, **sampling)) for r in requests()]
    return [group for group in engine.generate(asked) if isinstance(group, RolloutGroup)]


def prepare(groups: Sequence[RolloutGroup], student: Vlm) -> list[WeightedGroup]:
    """As the trainer's scorer does, which refuses a group whose token ids differ."""
    found = []
    for index, (group, prompt) in enumerate(zip(groups, prompts(), strict=True)):
        pictures = {
            image.sha256: student.prepare_image(student.scale_image(images.decode(image))) for image in prompt.images
        }
        rendered = student.render(prompt.messages, pictures)
        assert rendered.token_ids.tolist() == group.prompt_token_ids.tolist(), "the scorer would refuse it"
        found.append(score_randomly(group, rendered, index))
    return found


def drift(groups: Sequence[RolloutGroup], student: Vlm | None = None, *, version: int = 0) -> dict[str, float]:
    """The step's numbers, by the trainer's own loss and sums."""
    student = student or vlm("student")
    weighted = prepare(groups, student)
    loss = StudentLoss(student, teacher_head=teacher_head(student), trainer=TrainerConfig(steps=1, chunk_tokens=7))
    with torch.no_grad():
        _, values = loss(weighted)
    lengths = [len(group.token_weights) for group in weighted]
    logprobs = [part.numpy() for part in values.logprobs.split(lengths)]
    kl = [part.numpy() for part in values.kl.split(lengths)]
    sums = step_numbers.sum_groups(weighted, kl, loss=0.0)
    assert sums is not None
    return step_numbers.average_ranks([sums | step_numbers.sum_drift(weighted, logprobs, version=version)])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_a_run_that_is_well_has_none_whatever_the_sampling(
    engine: TransformersEngine, sampling: dict[str, float]
) -> None:
    """The log-probs of both sides are those before temperature, top-p and bans: two forwards, rounded differently."""
    found = drift(sample(engine, **sampling))
    largest_logit = 32.0  # no tiny model's logits come near it
    assert found["policy_drift_max"] <= 4 * tolerance.forward(vlm("student").config) * largest_logit
    assert found["policy_drift_share"] == 0.0


def assert_noticed(found: dict[str, float]) -> None:
    assert found["policy_drift_share"] > step_numbers.LARGEST_DRIFT_SHARE, found
    assert found["policy_drift_mean"] > 0.01


def test_stale_weights_are_noticed(engine: TransformersEngine) -> None:
    """The trainer is a step further, of 3 % in every weight, and the worker says that it is as well."""
    student = Vlm.load(model_folder("student"), dtype="float32", max_pixels=MAX_PIXELS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.mul_(1 + 0.03 * torch.randn(weight.shape, generator=generator))
    assert_noticed(drift(sample(engine), student))


def test_another_processor_is_noticed(engine: TransformersEngine) -> None:
    """The same number of tokens, so that no comparison of ids would show it: the worker's pixels are brighter."""
    processor = loaded(engine).processor.image_processor
    processor.image_mean = [0.0, 0.0, 0.0]
    assert_noticed(drift(sample(engine)))


def test_a_tied_head_that_was_left_behind_is_noticed(engine: TransformersEngine) -> None:
    """The trainer has moved the one matrix that is embeddings and head; the worker loaded it as embeddings alone."""
    student = Vlm.load(model_folder("student"), dtype="float32", max_pixels=MAX_PIXELS)
    old = student.padded_head.detach().clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (student.model, loaded(engine).model):
            moved = old * (1 + 0.1 * torch.randn(old.shape, generator=generator.manual_seed(0)))
            model.get_input_embeddings().weight.copy_(moved)
            model.get_output_embeddings().weight = nn.Parameter(moved.clone())
    assert drift(sample(engine), student)["policy_drift_share"] == 0.0
    loaded(engine).model.get_output_embeddings().weight = nn.Parameter(old)
    assert_noticed(drift(sample(engine), student))


def test_groups_of_an_older_policy_are_not_compared(engine: TransformersEngine) -> None:
    """With trainer.max_policy_lag = 1 the difference is one step of training, and no fault."""
    found = drift(sample(engine), version=1)
    assert not any(key.startswith("policy_drift") for key in found)
