"""From rollouts to the loss through the real stack: a gRPC teacher, the trainer's scorer and its loss.

Everything is compared with plain transformers forwards over whole sequences, full logits, float64 log-softmax.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS
from tests.support.scored import Scored, reference_kl, reference_logprobs, sampled_groups, score, vlm
from vaopd.config import MaskedOpd, ObjectiveConfig, TrainerConfig, VaOpd
from vaopd.types import Degradation
from vaopd.vlm.model import Vlm
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup, weigh

K = 3


@pytest.fixture(scope="module")
def scored() -> Scored:
    return score()


def student_loss(scored: Scored, *, student: Vlm | None = None, **of_payload: Any) -> StudentLoss:
    """7 tokens per chunk, so that a group takes several chunks and the last one is not full."""
    trainer = TrainerConfig(steps=1, chunk_tokens=7)
    return StudentLoss(student or vlm("student"), teacher_head=scored.teacher_head, trainer=trainer, **of_payload)


def weighed(groups: list[ScoredGroup], **objective: Any) -> list[WeightedGroup]:
    settings: ObjectiveConfig = pydantic.TypeAdapter(ObjectiveConfig).validate_python(objective)
    return [weigh(group, settings, seed=group.index) for group in groups]


def kl_of(scored: Scored, **of_payload: Any) -> np.ndarray:
    """(M,) over all groups."""
    with torch.no_grad():
        _, kl = student_loss(scored, **of_payload)(weighed(scored.groups))
    return kl.numpy()


def test_a_teacher_that_is_the_student_has_no_divergence_and_at_ratio_1_no_advantage() -> None:
    same = score("student", degradation=Degradation(kind="pixelate", strength=1.0))
    assert np.abs(kl_of(same)).max() < 1e-5
    for group in same.groups:
        assert all((va == 0.0).all() for va in group.score.visual_advantage)
        # Without any advantage all siblings weigh the same.
        torch.testing.assert_close(weigh(group, VaOpd(), seed=0).rollout_weights, torch.full((K,), 1 / K))


def test_what_the_teacher_says_over_grpc_is_what_the_student_would_say_of_itself() -> None:
    """teacher = student once more: its log-probs are those that the rollout engine recorded when it sampled."""
    for group in score("student").groups:
        for rollout, teacher in zip(group.group.rollouts, group.score.teacher_logprobs, strict=True):
            np.testing.assert_allclose(teacher, rollout.rollout_logprobs, atol=1e-4)


def test_the_hidden_payload_gives_the_exact_divergence(scored: Scored) -> None:
    expected = np.concatenate(reference_kl())
    assert expected.max() > 0.1  # or the comparison would say nothing
    np.testing.assert_allclose(kl_of(scored), expected, atol=1e-5, rtol=1e-6)  # of up to 28 nats, in float32


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_top_k_and_tail_never_exceed_the_exact_divergence(top_k: int) -> None:
    """And are the divergence of both distributions with the teacher's tail merged into one bucket."""
    found = kl_of(score(payload="top_k", top_k=top_k))
    assert (found <= np.concatenate(reference_kl()) + 1e-5).all()

    expected = []
    for p, q in zip(reference_logprobs("student"), reference_logprobs("teacher"), strict=True):
        ids = np.argsort(-q, axis=-1)[:, :top_k]
        rest = np.ones_like(p, dtype=bool)
        np.put_along_axis(rest, ids, False, axis=-1)
        top_p, top_q = np.take_along_axis(p, ids, -1), np.take_along_axis(q, ids, -1)
        tail_p, tail_q = (np.where(rest, np.exp(x), 0).sum(-1) for x in (p, q))
        expected.append((np.exp(top_p) * (top_p - top_q)).sum(-1) + tail_p * np.log(tail_p / tail_q))
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_sampled_payload_gives_the_single_sample_estimators(estimator: str) -> None:
    found = kl_of(score(payload="sampled"), estimator=estimator)
    ids = [rollout.response_ids for group in sampled_groups() for rollout in group.rollouts]
    log_ratio = np.concatenate(
        [
            (p - q)[np.arange(len(tokens)), tokens]
            for p, q, tokens in zip(reference_logprobs("student"), reference_logprobs("teacher"), ids, strict=True)
        ]
    )
    expected = log_ratio if estimator == "k1" else np.exp(-log_ratio) - 1 + log_ratio
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)  # e^(-log ratio) magnifies what float32 rounds


# -- the loss of every variant, worked out by hand in float64 ----------------------------------------------------------


def advantages(scored: Scored) -> list[np.ndarray]:
    return [
        np.maximum(teacher.astype(np.float64) - degraded, 0)
        for group in scored.groups
        for teacher, degraded in zip(group.score.teacher_logprobs, group.score.degraded_logprobs, strict=True)
    ]


def siblings_weights(advantages: list[np.ndarray]) -> np.ndarray:
    """method.md, "Rollout weights", for one group."""
    means = np.array([a.mean() for a in advantages])
    z = (means - means.mean()) / (means.std() + 1e-6)
    return np.exp(z) / np.exp(z).sum()


def grouped_mean(kl: np.ndarray, va: np.ndarray) -> float:
    """method.md, "Token groups": half of it the ⌈T/5⌉ tokens of largest VA, earlier ones first among equals."""
    order = sorted(range(len(va)), key=lambda t: (-va[t], t))
    count = math.ceil(len(va) / 5)
    high, low = kl[order[:count]], kl[order[count:]]
    return float(high.mean()) if not len(low) else 0.5 * float(high.mean()) + 0.5 * float(low.mean())


def without(kl: np.ndarray, va: np.ndarray, *, which: str) -> float:
    """Mean without the ⌊T/10⌋ tokens of largest or smallest VA."""
    order = sorted(range(len(va)), key=lambda t: (-va[t], t))
    dropped = len(va) // 10
    return float(kl[order[dropped:] if which == "top" else order[: len(va) - dropped]].mean())


@pytest.mark.parametrize(
    "objective",
    [
        {"variant": "va_opd"},
        {"variant": "standard"},
        {"variant": "rollout_weights"},
        {"variant": "token_groups"},
        {"variant": "masked", "mask": "top"},
        {"variant": "masked", "mask": "bottom"},
    ],
    ids=lambda objective: "-".join(objective.values()),
)
def test_the_loss_of_every_variant(scored: Scored, objective: dict[str, str]) -> None:
    kl, va = reference_kl(), advantages(scored)
    expected = 0.0
    for start in range(0, len(kl), K):
        group = range(start, start + K)
        weights = np.full(K, 1 / K)
        if objective["variant"] in ("va_opd", "rollout_weights"):
            weights = siblings_weights([va[k] for k in group])
        for weight, k in zip(weights, group, strict=True):
            match objective["variant"]:
                case "va_opd" | "token_groups":
                    expected += weight * grouped_mean(kl[k], va[k])
                case "masked":
                    expected += weight * without(kl[k], va[k], which=objective["mask"])
                case _:
                    expected += weight * float(kl[k].mean())
    with torch.no_grad():
        loss, _ = student_loss(scored)(weighed(scored.groups, **objective))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_masking_at_random_drops_as_many_and_depends_on_the_seed_only(scored: Scored) -> None:
    settings = MaskedOpd(mask="random")
    for group in scored.groups:
        dropped = sum(len(response) // 10 for response in group.responses)
        one, again, other = (weigh(group, settings, seed=seed).token_weights for seed in (1, 1, 2))
        assert int((one == 0).sum()) == int((other == 0).sum()) == dropped
        assert torch.equal(one, again)
    assert not torch.equal(one, other)


# -- forwards and order ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_student() -> Vlm:
    """One whose gradients may be touched."""
    return Vlm.load(model_folder("student"), dtype="float32", max_pixels=MAX_PIXELS)


def step_of(scored: Scored, student: Vlm, batches: list[list[ScoredGroup]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients summed over forwards of these batches."""
    student.model.zero_grad()
    module = student_loss(scored, student=student)
    total = 0.0
    for batch in batches:
        loss, _ = module(weighed(batch))
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}


def test_neither_groups_per_forward_nor_the_order_of_groups_changes_the_step(
    scored: Scored, trained_student: Vlm
) -> None:
    one, two, three = scored.groups
    together = step_of(scored, trained_student, [[one, two, three]])
    for batches in ([[one], [two], [three]], [[one, two], [three]], [[three, one, two]]):
        loss, gradients = step_of(scored, trained_student, batches)
        assert loss == pytest.approx(together[0], abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, together[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_groups_that_arrive_in_any_order_are_scored_the_same(scored: Scored) -> None:
    """In whatever forwards they then share: up to what float32 rounds of a log-prob, the bound that these have."""
    for order in itertools.islice(itertools.permutations(sampled_groups()), 0, 6, 2):
        again = score(groups=order, batch_tokens=4096)
        assert [group.index for group in again.groups] == [0, 1, 2]
        for group, first in zip(again.groups, scored.groups, strict=True):
            for found, expected in zip(group.score.visual_advantage, first.score.visual_advantage, strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-4)
            tensors = (g.score.payload.tensors["hidden"].numpy() for g in (group, first))
            np.testing.assert_allclose(*tensors, atol=1e-4)


def test_every_parameter_that_the_prompts_use_learns(scored: Scored, trained_student: Vlm) -> None:
    """The vision tower too; a head of its own and the embeddings as well."""
    _, gradients = step_of(scored, trained_student, [scored.groups])
    assert set(gradients) == {name for name, _ in trained_student.model.named_parameters()}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_group_of_another_prompt_is_refused_with_both_sides_named_and_the_others_are_scored() -> None:
    one, two, three = sampled_groups()
    other = dataclasses.replace(two, prompt_token_ids=one.prompt_token_ids)
    result = score(groups=[one, other, three])
    assert [group.index for group in result.groups] == [0, 2]
    [refused] = result.refused
    assert refused.group_id == two.group_id
    assert "use one model folder and equal pixel bounds" in refused.reason


def test_a_group_that_is_too_long_for_the_teacher_is_refused_with_the_bound() -> None:
    longest = max(len(group.prompt_token_ids) for group in sampled_groups())
    result = score(max_tokens=longest)
    assert result.refused
    assert all(f"the limit is {longest}" in refused.reason for refused in result.refused)
