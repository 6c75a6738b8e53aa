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

from tests.support import divergences, tolerance
from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS
from tests.support.scored import (
    Scored,
    divergence_error,
    logits_error,
    logprobs_error,
    reference_kl,
    reference_rows,
    sampled_groups,
    sampled_ids,
    score,
    vlm,
)
from tests.support.tolerance import assert_noticed, assert_within, gamma
from vaopd.config import MaskedOpd, ObjectiveConfig, TokenGroupsOnly, TrainerConfig, VaOpd
from vaopd.payloads import to_torch
from vaopd.types import Degradation
from vaopd.vlm.model import Vlm
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup, weigh

pytestmark = pytest.mark.numeric

K = 3


@pytest.fixture(scope="module")
def scored() -> Scored:
    return score()


def student_loss(scored: Scored, *, student: Vlm | None = None, **of_payload: Any) -> StudentLoss:
    """7 tokens per chunk, so that a group takes several chunks and the last one is not full."""
    trainer = TrainerConfig(steps=1, chunk_tokens=7)
    student = student or vlm("student")
    head = scored.teacher_head.to(student.head.dtype)
    return StudentLoss(student, teacher_head=head, trainer=trainer, **of_payload)


def weighed(groups: list[ScoredGroup], **objective: Any) -> list[WeightedGroup]:
    settings: ObjectiveConfig = pydantic.TypeAdapter(ObjectiveConfig).validate_python(objective)
    return [weigh(group, settings, seed=group.index) for group in groups]


def kl_of(scored: Scored, **of_payload: Any) -> np.ndarray:
    """(M,) over all groups."""
    with torch.no_grad():
        _, (kl, *_) = student_loss(scored, **of_payload)(weighed(scored.groups))
    return kl.numpy()


def test_a_teacher_that_is_the_student_has_no_divergence_and_at_ratio_1_no_advantage() -> None:
    same = score("student", degradation=Degradation(kind="pixelate", strength=1.0))
    # Equal distributions are a minimum: how far the forwards are apart doesn't show, what the sum rounds does.
    error = divergence_error(teacher="student")
    assert_within(kl_of(same), 0.0, error)
    assert_noticed(np.concatenate(reference_kl()), 0.0, error)
    for group in same.groups:
        assert all((va == 0.0).all() for va in group.score.visual_advantage)
        # Without any advantage all siblings weigh the same.
        assert_within(weigh(group, VaOpd(), seed=0).rollout_weights, 1 / K, gamma(4) / K)


def test_what_the_teacher_says_over_grpc_is_what_the_student_would_say_of_itself() -> None:
    """teacher = student once more: its log-probs are those that the rollout engine recorded when it sampled."""
    groups = score("student").groups
    found = np.concatenate([logprobs for group in groups for logprobs in group.score.teacher_logprobs])
    recorded = np.concatenate([rollout.rollout_logprobs for group in groups for rollout in group.group.rollouts])
    assert_within(found, recorded, logprobs_error("student"))


def test_the_hidden_payload_gives_the_exact_divergence(scored: Scored) -> None:
    expected = np.concatenate(reference_kl())
    assert expected.max() > 0.1  # or the comparison would say nothing
    assert_within(kl_of(scored), expected, divergence_error())


def test_a_padded_id_a_shifted_row_and_another_view_are_noticed() -> None:
    """Each in the reference alone: the divergence is then outside what two float32 forwards can differ by."""
    p, q, error = reference_rows("student"), reference_rows("teacher"), divergence_error()
    expected = divergences.full(p, q).sum(-1)
    end = vlm("student").tokenizer.eos_token_id
    padded_p, padded_q = (torch.cat((x, x[:, end, None]), -1).log_softmax(-1)[:, :-1] for x in (p, q))
    for wrong_p, wrong_q in ((padded_p, q), (p, padded_q), (p, q.roll(1, 0))):
        assert_noticed(divergences.full(wrong_p, wrong_q).sum(-1), expected, error)
    original, degraded = (
        np.concatenate([logprobs for group in score("teacher").groups for logprobs in getattr(group.score, view)])
        for view in ("teacher_logprobs", "degraded_logprobs")
    )
    assert_noticed(degraded, original, logprobs_error("teacher"))


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_top_k_and_tail_never_exceed_the_exact_divergence(top_k: int) -> None:
    """And are the divergence of both distributions with the teacher's tail merged into one bucket."""
    terms = divergences.top_k(top_k)
    found, error = torch.from_numpy(kl_of(score(payload="top_k", top_k=top_k))), divergence_error(terms)
    assert (found <= torch.from_numpy(np.concatenate(reference_kl())) + error).all()
    expected = terms(reference_rows("student"), reference_rows("teacher")).sum(-1)
    assert_within(found, expected, error)
    # The least likely of the k ids taken for a part of the tail. Of 64, it is too unlikely to matter at any token.
    fewer = divergences.top_k(top_k - 1)(reference_rows("student"), reference_rows("teacher")).sum(-1)
    if top_k < 64:
        assert_noticed(fewer, expected, error)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_sampled_payload_gives_the_single_sample_estimators(estimator: str) -> None:
    found = kl_of(score(payload="sampled"), estimator=estimator)
    terms = divergences.sampled(sampled_ids(), estimator)
    expected, error = terms(reference_rows("student"), reference_rows("teacher")).sum(-1), divergence_error(terms)
    assert_within(found, expected, error)  # of k3 larger where e^(-log ratio) magnifies what float32 rounds
    other = divergences.sampled(sampled_ids(), "k3" if estimator == "k1" else "k1")
    assert_noticed(other(reference_rows("student"), reference_rows("teacher")).sum(-1), expected, error)


# -- the loss of every variant, worked out by hand in float64 ----------------------------------------------------------


def advantages(scored: Scored) -> list[np.ndarray]:
    """float32's difference of two numbers is the same everywhere; all that follows is float64."""
    return [
        np.maximum(teacher - degraded, 0).astype(np.float64)
        for group in scored.groups
        for teacher, degraded in zip(group.score.teacher_logprobs, group.score.degraded_logprobs, strict=True)
    ]


def siblings_weights(advantages: list[np.ndarray]) -> np.ndarray:
    """The paper's rollout weights for one group."""
    means = np.array([a.mean() for a in advantages])
    z = (means - means.mean()) / (means.std() + 1e-6)
    return np.exp(z) / np.exp(z).sum()


def by_advantage(va: np.ndarray) -> list[int]:
    """Tokens, those of largest advantage first, earlier ones first among equals."""
    return sorted(range(len(va)), key=lambda t: (-va[t], t))


def grouped(va: np.ndarray) -> np.ndarray:
    """The paper's token groups: half of the weight goes to the ⌈T/5⌉ tokens of largest VA, half to the others."""
    count, weights = math.ceil(len(va) / 5), np.empty(len(va))
    high, low = by_advantage(va)[:count], by_advantage(va)[count:]
    weights[high] = (0.5 if low else 1.0) / count
    weights[low] = 0.5 / max(1, len(low))
    return weights


def without(va: np.ndarray, *, which: str) -> np.ndarray:
    """Equal weights, but for the ⌊T/10⌋ tokens of largest or smallest VA."""
    dropped = len(va) // 10
    kept = by_advantage(va)[dropped:] if which == "top" else by_advantage(va)[: len(va) - dropped]
    weights = np.zeros(len(va))
    weights[kept] = 1 / len(kept)
    return weights


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
    """Weights, the sum of weights times divergences, and that sum with the reference's divergences."""
    va = advantages(scored)
    expected, of_weights = [], []
    for start in range(0, len(va), K):
        group = va[start : start + K]
        rollouts, of_rollouts = np.full(K, 1 / K), np.zeros(K)
        if objective["variant"] in ("va_opd", "rollout_weights"):
            means = torch.tensor([a.mean() for a in group])
            rollouts = siblings_weights(group)
            of_rollouts = tolerance.rollout_weights(means, gamma(21) * means).numpy()  # means of up to 20
        for weight, error, a in zip(rollouts, of_rollouts, group, strict=True):
            match objective["variant"]:
                case "va_opd" | "token_groups":
                    tokens = grouped(a)
                case "masked":
                    tokens = without(a, which=objective["mask"])
                case _:
                    tokens = np.full(len(a), 1 / len(a))
            expected.append(weight * tokens)
            of_weights.append((error + gamma(4) * weight) * tokens)  # a share, a division and a product
    weights, error = torch.from_numpy(np.concatenate(expected)), torch.from_numpy(np.concatenate(of_weights))

    groups = weighed(scored.groups, **objective)
    assert_within(torch.cat([group.token_weights for group in groups]), weights, error, "weights")
    with torch.no_grad():
        loss, (kl, *_) = student_loss(scored)(groups)
    rounded = ((error + gamma(len(kl)) * weights) * kl.abs()).sum()
    assert_within(loss, (weights * kl).sum(), rounded, "sum")
    reference = torch.from_numpy(np.concatenate(reference_kl()))
    assert_within(loss, (weights * reference).sum(), rounded + (weights * divergence_error()).sum(), "loss")
    for token in weights.nonzero():
        off = weights.clone()
        off[token] *= 1.01
        assert_noticed(off, weights, error)


def test_masking_at_random_drops_as_many_and_depends_on_the_seed_only(scored: Scored) -> None:
    settings = MaskedOpd(mask="random")
    for group in scored.groups:
        dropped = sum(len(response) // 10 for response in group.responses)
        one, again, other = (weigh(group, settings, seed=seed).token_weights for seed in (1, 1, 2))
        assert int((one == 0).sum()) == int((other == 0).sum()) == dropped
        assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("token_score", ["view_divergence", "absolute"])
def test_the_token_groups_of_another_score(token_score: str) -> None:
    """The high group by the column that came from the teacher, or by both views' log-probs; not VA's."""
    settings = TokenGroupsOnly(token_score=token_score)  # type: ignore[arg-type]
    groups = score(columns=settings.columns).groups
    differing = 0
    for group in groups:
        teacher, degraded = group.score.teacher_logprobs, group.score.degraded_logprobs
        scores = {
            "view_divergence": group.score.columns.get("view_divergence_nats"),
            "absolute": [np.abs(a - b) for a, b in zip(teacher, degraded, strict=True)],
        }[token_score]
        assert scores is not None
        expected = np.concatenate([grouped(row) / K for row in scores])
        assert_within(weigh(group, settings, seed=0).token_weights, expected, gamma(4) * expected)
        differing += int((expected != np.concatenate([grouped(va) / K for va in group.score.visual_advantage])).sum())
    assert differing


# -- forwards and order ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_student() -> Vlm:
    """One whose gradients may be touched, in float64: what isn't rounding is then seen down to a millionth."""
    return Vlm.load(model_folder("student"), dtype="float64", max_pixels=MAX_PIXELS)


def step_of(scored: Scored, student: Vlm, batches: list[list[WeightedGroup]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients summed over forwards of these batches."""
    student.model.zero_grad()
    module = student_loss(scored, student=student)
    total = 0.0
    for batch in batches:
        loss, _ = module(batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}


def test_neither_groups_per_forward_nor_the_order_of_groups_changes_the_step(
    scored: Scored, trained_student: Vlm
) -> None:
    """Beyond rounding, which one token's weight is that is off by 1 %."""
    one, two, three = weighed(scored.groups)
    loss, gradients = step_of(scored, trained_student, [[one, two, three]])
    errors = tolerance.backward(trained_student.config, gradients, dtype=torch.float64)
    # A float64 sum of what went through the norms' float32 (tolerance.forward).
    of_loss = tolerance.forward(trained_student.config, dtype=torch.float64) * loss
    for batches in ([[one], [two], [three]], [[one, two], [three]], [[three, one, two]]):
        found, theirs = step_of(scored, trained_student, batches)
        assert_within(found, loss, of_loss, "loss")
        for name, gradient in theirs.items():
            assert_within((gradient - gradients[name]).norm(), 0.0, errors[name], name)

    with torch.no_grad():
        _, (kl, *_) = student_loss(scored, student=trained_student)([one])
    off = one.token_weights.clone()
    off[(off * kl).argmax()] *= 1.01  # a token without a divergence has no part in the loss
    found, theirs = step_of(scored, trained_student, [[dataclasses.replace(one, token_weights=off), two, three]])
    assert_noticed(found, loss, of_loss)
    noticed = [name for name, bound in errors.items() if (theirs[name] - gradients[name]).norm() > 2 * bound]
    assert len(noticed) > 0.5 * len(errors)


def test_groups_that_arrive_in_any_order_are_scored_the_same(scored: Scored) -> None:
    """In whatever forwards they then share: up to what two float32 forwards may differ by."""
    bound = tolerance.forward(vlm("teacher").config)
    # A log-prob moves by at most twice what its row's logits do, of whichever view.
    errors = {"teacher_logprobs": logprobs_error("teacher"), "degraded_logprobs": 2 * logits_error("teacher")[:, 0]}
    for order in itertools.islice(itertools.permutations(sampled_groups()), 0, 6, 2):
        again = score(groups=order, batch_tokens=4096)
        assert [group.index for group in again.groups] == [0, 1, 2]
        for view, error in errors.items():
            found, expected = (
                np.concatenate([logprobs for group in groups for logprobs in getattr(group.score, view)])
                for groups in (again.groups, scored.groups)
            )
            assert_within(found, expected, error, view)
        found, expected = (
            torch.cat([to_torch(group.score.payload.tensors["hidden"]) for group in groups])
            for groups in (again.groups, scored.groups)
        )
        assert_within((found - expected).norm(dim=-1), 0.0, bound * expected.norm(dim=-1), "hidden states")


def test_every_parameter_that_the_prompts_use_learns(scored: Scored, trained_student: Vlm) -> None:
    """The vision tower too; a head of its own and the embeddings as well."""
    _, gradients = step_of(scored, trained_student, [weighed(scored.groups)])
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
