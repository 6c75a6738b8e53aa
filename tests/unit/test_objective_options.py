"""The objective's options beside the paper's: other scores for the token groups, a floor, ties drawn at random."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from tests.support.tolerance import assert_noticed, assert_within, gamma, log_softmax, rollout_weights
from vaopd import objective
from vaopd.config import MaskedOpd, TokenGroupsOnly, VaOpd
from vaopd.errors import InvalidInput, NumericalError

pytestmark = pytest.mark.numeric

LOG2 = math.log(2)
TEACHER = tensor([0.5, 0.25, 0.25]).log()
DEGRADED = tensor([0.25, 0.5, 0.25]).log()
STUDENT = tensor([0.2, 0.3, 0.5]).log()
ROUNDED = float(gamma(4, exps=1) * 2 * LOG2)
"""Of three terms: logarithms up to 2·log 2, a difference, an exp and a product each, and their sum."""


def test_view_divergence_is_the_kl_between_the_views() -> None:
    """0.5·log 2 − 0.25·log 2 + 0: whatever was sampled."""
    found = objective.view_divergence(TEACHER[None], DEGRADED[None])
    assert_within(found, [0.25 * LOG2], ROUNDED)
    assert_noticed([0.5 * LOG2], [0.25 * LOG2], ROUNDED)  # as if negative terms were left out
    assert objective.view_divergence(TEACHER, TEACHER) == 0
    assert not objective.view_divergence(TEACHER.clone().requires_grad_(), DEGRADED).requires_grad


@pytest.mark.parametrize("seed", range(5))
def test_view_divergence_is_never_negative_and_that_of_torch(seed: int) -> None:
    """Distributions that differ by a few units of rounding: Σ p·(log p − log q) itself can be below 0."""
    logits = 9 * torch.randn(50, 40, generator=torch.Generator().manual_seed(seed))
    close = logits + 1e-6 * logits.roll(1, 0)
    views = logits.log_softmax(-1), close.log_softmax(-1)
    found = objective.view_divergence(*views)
    assert (found >= 0).all()
    exact = [view.double() for view in (logits, close)]
    expected = torch.nn.functional.kl_div(
        exact[1].log_softmax(-1), exact[0].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    errors = sum(log_softmax(view) for view in (logits, close))  # of both log-probs, weighted by p
    assert_within(found, expected, (views[0].double().exp() * errors).sum(-1) * (1 + gamma(40, exps=1)))


def test_expected_advantage_is_va_over_the_student_s_own_distribution() -> None:
    """Only the first token is likelier with the image, by log 2; the student gives it 0.2."""
    found = objective.expected_advantage(STUDENT[None], TEACHER[None], DEGRADED[None])
    assert_within(found, [0.2 * LOG2], ROUNDED)


def test_a_token_that_can_not_occur_adds_nothing() -> None:
    """0·log 0 is 0, in both views and in the original one; a token that only the degraded view rules out costs ∞."""
    never = tensor([0.5, 0.5, 0.0]).log()
    both = tensor([0.25, 0.75, 0.0]).log()  # 0.5·log 2 + 0.5·log(2/3)
    found = objective.view_divergence(torch.stack([never, never]), torch.stack([both, DEGRADED]))
    assert_within(found, [0.5 * math.log(4 / 3), 0.5 * LOG2], ROUNDED)  # 0.5·log(0.5 / 0.25) + 0.5·log(0.5 / 0.5)
    assert objective.view_divergence(TEACHER, never) == math.inf
    assert_within(objective.expected_advantage(never, never, both), 0.5 * LOG2, ROUNDED)
    assert_within(objective.expected_advantage(never, TEACHER, never), 0.0, ROUNDED)  # the student rules it out
    with pytest.raises(InvalidInput, match=r"degraded_logprobs has shape \(3,\), the tokens have \(1, 3\)"):
        objective.view_divergence(TEACHER[None], DEGRADED)


def test_absolute_advantage_also_sees_where_the_image_speaks_against_a_token() -> None:
    mask = tensor([[True, True, False]])
    teacher, degraded = tensor([[-1.0, -4.0, 0.0]]), tensor([[-3.0, -1.0, math.nan]])
    assert objective.absolute_advantage(teacher, degraded, mask).tolist() == [[2.0, 3.0, 0.0]]
    assert objective.visual_advantage(teacher, degraded, mask).tolist() == [[2.0, 0.0, 0.0]]
    with pytest.raises(NumericalError, match="not finite"):
        objective.absolute_advantage(teacher, degraded, ~mask)


# ---------------------------------------------------------------------------------------------- what they do to a group

VA = tensor([[0.0, 3.0, 0.0], [0.1, 0.3, 0.0]])  # means 1.0 and 0.2 over the valid tokens, deviation 0.4
MASK = tensor([[True, True, True], [True, True, False]])


def test_a_token_score_chooses_the_high_group_and_leaves_the_rollout_weights() -> None:
    score = tensor([[0.0, 0.0, 5.0], [9.0, 0.0, math.nan]])  # padding may hold anything
    paper, found = objective.group_weights(VA, MASK), objective.group_weights(VA, MASK, token_score_KT=score)
    assert torch.equal(found.rollout_weights, paper.rollout_weights)
    w, v = paper.rollout_weights.tolist()
    expected = tensor([[w / 4, w / 4, w / 2], [v / 2, v / 2, 0]])  # one high token of three, and one of two
    assert_within(found.token_weights, expected, gamma(4) * expected)
    masked = [
        objective.group_weights(VA, MASK, variant="masked", mask_fraction=0.4, token_score_KT=each).token_weights
        for each in (None, score)
    ]
    assert torch.equal(*masked)  # masks are by VA


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (torch.zeros(2, 2), InvalidInput, r"token_score_KT has shape \(2, 2\), the tokens have \(2, 3\)"),
        (tensor([[0.0, math.inf, 0.0], [0.0, 0.0, 0.0]]), NumericalError, "a valid token's score is not finite"),
    ],
)
def test_a_score_that_does_not_fit_is_an_error(score: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        objective.group_weights(VA, MASK, token_score_KT=score)


def test_a_floor_takes_the_place_of_a_smaller_deviation() -> None:
    """At 0.8, twice the deviation of 0.4, z is ±0.5 in place of ±1."""
    found = objective.group_weights(VA, MASK, rollout_deviation_floor=0.8).rollout_weights
    high = math.exp(0.5) / (math.exp(0.5) + math.exp(-0.5))
    error = rollout_weights(tensor([1.0, 0.2]), gamma(6)) + 1.25e-6  # ε = 1e-6 beside the deviation
    assert_within(found, [high, 1 - high], error)
    assert_noticed(objective.group_weights(VA, MASK).rollout_weights, [high, 1 - high], error)
    below = objective.group_weights(VA, MASK, rollout_deviation_floor=0.3).rollout_weights
    assert torch.equal(below, objective.group_weights(VA, MASK).rollout_weights)


def test_with_a_floor_siblings_that_hardly_differ_weigh_about_the_same() -> None:
    """Means 3 millinats apart: weights differ by e^2.7 without a floor, and by e^0.15 with one of 20 millinats."""
    means = tensor([[0.100, 0.101, 0.102, 0.103]], dtype=torch.float64)
    paper, floored = objective.rollout_weights(means), objective.rollout_weights(means, deviation_floor=0.02)
    assert float(paper.max() / paper.min()) == pytest.approx(math.exp(0.003 / (math.sqrt(1.25e-6) + 1e-6)))
    assert float(floored.max() / floored.min()) == pytest.approx(math.exp(0.003 / (0.02 + 1e-6)))


@pytest.mark.parametrize("floor", [-0.1, math.nan])
def test_a_floor_below_zero_is_named(floor: float) -> None:
    with pytest.raises(InvalidInput, match=rf"floor of the deviation must be at least 0 .*, got {floor}"):
        objective.group_weights(VA, MASK, rollout_deviation_floor=floor)


@pytest.mark.parametrize(("which", "possible"), [("bottom", range(8)), ("top", (8, 9))])
def test_ties_at_random_drop_any_of_the_equal_tokens_and_are_seeded(which: str, possible: range) -> None:
    """Eight tokens of VA 0 and two of VA 1; with ties to the earlier, the bottom one is always the last zero."""
    va, mask = tensor([[0.0] * 8 + [1.0] * 2]), torch.ones(1, 10, dtype=torch.bool)

    def drop(seed: int, ties: str = "random") -> int:
        kept = objective.masked_response(va, mask, which=which, fraction=0.1, ties=ties, seed=seed)
        (dropped,) = (~kept[0]).nonzero()[:, 0].tolist()
        return dropped

    assert {drop(seed) for seed in range(100)} == set(possible)
    assert [drop(seed) for seed in range(9)] == [drop(seed) for seed in range(9)]
    assert {drop(seed, "earlier") for seed in range(9)} == {7 if which == "bottom" else 8}


def test_ties_of_another_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match="ties = 'last' is unknown; use earlier or random"):
        objective.group_weights(VA, MASK, variant="masked", mask_ties="last")


def test_the_configuration_names_the_columns_that_an_objective_needs() -> None:
    assert VaOpd().columns == MaskedOpd().columns == TokenGroupsOnly(token_score="absolute").columns == ()
    assert TokenGroupsOnly(token_score="view_divergence").columns == ("view_divergence_nats",)
