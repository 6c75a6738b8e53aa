"""A step's gradient over forwards of bounded size: packed, split and begun again, it is the same gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.support import tolerance
from tests.support.families import family_folder
from tests.support.tolerance import assert_noticed, assert_within
from tests.support.weighted import Scarce, a_weighted_group, teacher_head
from vaopd import divergence
from vaopd.config import TrainerConfig
from vaopd.errors import LimitExceeded
from vaopd.vlm.model import Vlm
from vaopd_trainer.forwards import Accumulator, plan_forwards
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup
from vaopd_trainer.student_weights import WholeWeights

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def student() -> Vlm:
    """In float64: what isn't rounding is then seen down to a millionth."""
    return Vlm.load(family_folder("qwen3_vl"), dtype="float64")


@pytest.fixture(scope="module")
def groups(student: Vlm) -> list[WeightedGroup]:
    return [
        a_weighted_group(student, 0, [9, 1, 17]),
        a_weighted_group(student, 1, [6, 6]),
        a_weighted_group(student, 2, [4, 12, 3, 8], image=False),
    ]


@pytest.fixture(autouse=True)
def accelerate_begins_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Step:
    """Loss, KL and gradients of one step."""

    def __init__(self, student: Vlm, groups: Sequence[WeightedGroup], *, forward_tokens: int, **scarce: Any) -> None:
        student.model.zero_grad()
        settings = TrainerConfig(steps=1, prompts_per_step=1, chunk_tokens=7, forward_tokens=forward_tokens)
        head = teacher_head(student).double()
        self.module = Scarce(StudentLoss(student, teacher_head=head, trainer=settings), **scarce)
        try:
            weights = WholeWeights(self.module, model=student.model, settings=settings, ranks=Ranks())
            self.accumulator = Accumulator(accelerator=Accelerator(cpu=True), weights=weights, settings=settings)
            self.loss, values = self.accumulator.backward(groups)
            self.kl = [of_group.kl.numpy() for of_group in values]
            self.logprobs = [of_group.logprobs.numpy() for of_group in values]
        finally:
            self.module.close()
        self.gradients = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def expected(student: Vlm, groups: list[WeightedGroup]) -> Iterator[Step]:
    """One group in a forward, as the loss is defined."""
    yield Step(student, groups, forward_tokens=max(group.tokens for group in groups))
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_same_step(student: Vlm, found: Step, expected: Step) -> None:
    bounds = tolerance.backward(student.config, expected.gradients, dtype=torch.float64)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, bound in bounds.items():
        assert_within((found.gradients[name] - expected.gradients[name]).norm(), 0.0, bound, name)
    of_forward = tolerance.forward(student.config, dtype=torch.float64)
    assert_within(found.loss, expected.loss, of_forward * expected.loss, "loss")
    pairs = zip([*found.kl, *found.logprobs], [*expected.kl, *expected.logprobs], strict=True)
    for mine, theirs in pairs:  # float64 through float32 norms, then float32 numbers of up to some nats
        assert_within(mine, theirs, 10 * of_forward * np.abs(theirs).max(), "KL or log-probs")


# -- the plan ----------------------------------------------------------------------------------------------------------


def ids_of(forwards: list[list[WeightedGroup]]) -> list[list[str]]:
    return [[rollout.rollout_id[-6:] for g in forward for rollout in g.scored.group.rollouts] for forward in forwards]


def test_groups_are_packed_whole_and_in_order(groups: list[WeightedGroup]) -> None:
    one, two, three = (group.tokens for group in groups)
    assert [len(forward) for forward in plan_forwards(groups, one + two + three)] == [3]
    assert [len(forward) for forward in plan_forwards(groups, max(one + two, three))] == [2, 1]
    assert min(one + two, two + three) > (largest := max(one, two, three))
    assert [len(forward) for forward in plan_forwards(groups, largest)] == [1, 1, 1]
    assert plan_forwards([], 100) == []


def test_a_group_that_is_too_large_is_split_between_siblings(groups: list[WeightedGroup]) -> None:
    """Prompt and one response need more than the bound: they go all the same, alone."""
    group = groups[0]
    prompt = len(group.scored.prompt.token_ids)
    assert group.tokens == prompt + 8 + 0 + 16
    assert ids_of(plan_forwards([group], prompt + 8 + 0)) == [["0000/0", "0000/1"], ["0000/2"]]
    assert ids_of(plan_forwards([group], 1)) == [["0000/0"], ["0000/1"], ["0000/2"]]
    (first, *_), (last,) = plan_forwards([group], prompt + 8)
    assert torch.equal(torch.cat([first.token_weights, last.token_weights]), group.token_weights)
    assert last.scored.score.payload.tensors["hidden"].shape == (17, 24)


# -- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_tokens", [1, 60, 10_000])
def test_packing_and_splitting_change_no_gradient(
    student: Vlm, groups: list[WeightedGroup], expected: Step, forward_tokens: int
) -> None:
    found = Step(student, groups, forward_tokens=forward_tokens)
    assert_same_step(student, found, expected)
    assert found.module.tokens_of_forwards == [
        sum(g.tokens for g in forward) for forward in plan_forwards(groups, forward_tokens)
    ]


def test_the_loss_takes_the_head_as_it_is_stored(
    student: Vlm, groups: list[WeightedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a view of it would be copied."""
    given: list[torch.Tensor] = []
    fused = divergence.fused_loss_and_logprobs

    def note(hidden: torch.Tensor, head: torch.Tensor, *rest: Any, **options: Any) -> Any:
        given.append(head)
        return fused(hidden, head, *rest, **options)

    monkeypatch.setattr(divergence, "fused_loss_and_logprobs", note)
    Step(student, groups[:1], forward_tokens=10_000)
    assert [head is student.padded_head for head in given] == [True]


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_out_of_memory_begins_again_with_half_and_leaves_no_partial_gradient(
    student: Vlm, groups: list[WeightedGroup], expected: Step, fails_in: str
) -> None:
    total = sum(group.tokens for group in groups)
    most = max(group.select(k, k + 1).tokens for group in groups for k in range(len(group.rollout_weights)))
    found = Step(student, groups, forward_tokens=10_000, tokens=most, fails_in=fails_in)
    assert_same_step(student, found, expected)
    first, second, *_ = found.module.tokens_of_forwards
    assert first == total
    assert second <= total // 2
    assert found.accumulator.forward_tokens <= max(total // 2, most)
    assert max(found.module.tokens_of_forwards[-len(groups) :]) <= most


def test_a_partial_gradient_would_be_noticed(student: Vlm, groups: list[WeightedGroup], expected: Step) -> None:
    """What the last step would give, had the first group's gradient stayed when the step began again."""
    twice = Step(student, [groups[0], *groups], forward_tokens=10_000)
    bounds = tolerance.backward(student.config, expected.gradients, dtype=torch.float64)
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    assert_noticed((twice.gradients[name] - expected.gradients[name]).norm(), 0.0, bounds[name])


def test_a_rollout_that_does_not_fit_alone_is_named(student: Vlm, groups: list[WeightedGroup]) -> None:
    group = groups[1]
    alone = group.select(0, 1).tokens
    with pytest.raises(
        LimitExceeded, match=rf"group train-000000-0001: rollout train-000000-0001/0 .*\({alone} tokens"
    ):
        Step(student, [group], forward_tokens=10_000, tokens=alone - 1)
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_a_rank_of_a_sharded_student_ends_instead_since_the_others_wait_for_it(
    student: Vlm, groups: list[WeightedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WholeWeights, "can_begin_again", False)
    total = sum(group.tokens for group in groups)
    with pytest.raises(
        LimitExceeded, match=rf"{total} tokens .*0000, .*0002\); resume with trainer.forward_tokens below"
    ):
        Step(student, groups, forward_tokens=10_000, tokens=total - 1)


@pytest.mark.parametrize("parts", [{"text"}, {"vision"}, {"text", "vision"}])
def test_a_placeholder_runs_the_parts_that_it_is_told_and_adds_a_gradient_of_zero(
    student: Vlm, parts: set[Any]
) -> None:
    student.model.zero_grad()
    loss, values = StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1))([], parts=frozenset(parts))
    loss.backward()
    assert (loss.item(), len(values.kl)) == (0.0, 0)
    gradients = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    assert not any(bool(gradient.any()) for gradient in gradients.values())
    tower = {name for name, _ in student.model.named_parameters() if ".visual." in name}
    reached = {"vision": tower, "text": {name for name, _ in student.model.named_parameters()} - tower}
    for part, names in reached.items():
        assert (names <= gradients.keys()) == (part in parts)


def test_without_groups_there_is_a_zero_with_a_gradient_of_zero(student: Vlm) -> None:
    student.model.zero_grad()
    loss, values = StudentLoss(student, teacher_head=None, trainer=TrainerConfig(steps=1))([])
    loss.backward()
    assert (loss.item(), len(values.kl), len(values.logprobs)) == (0.0, 0, 0)
    touched = [p.grad for p in student.model.parameters() if p.grad is not None]
    assert [bool(gradient.any()) for gradient in touched] == [False]
