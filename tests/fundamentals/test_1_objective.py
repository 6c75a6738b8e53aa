"""The method, step by step, on one prompt group small enough to work out by hand.

Two siblings: the first looked at the image (its second token needs it), the second did not.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from tests.support.tolerance import assert_noticed, assert_within, gamma, rollout_weights
from vaopd import objective
from vaopd.errors import InvalidInput, NumericalError

pytestmark = pytest.mark.numeric

MASK = tensor([[True, True, True], [True, True, False]])
TEACHER = tensor([[-0.5, -1.0, -0.2], [-0.1, -0.4, 0.0]])
DEGRADED = tensor([[-0.5, -4.0, -0.1], [-0.2, -0.7, 0.0]])
ADVANTAGE_ERROR = gamma(2) * (TEACHER.abs() + DEGRADED.abs())
"""Of two numbers rounded to float32, and of their difference."""
MEANS_ERROR = ADVANTAGE_ERROR.amax(-1) + gamma(4)
"""Of the means 1 and 0.2: their terms', three terms and a division."""


def weights_error(weights: Tensor) -> Tensor:
    """Of a share (a division), times a rollout's weight, all rounded to float32."""
    return gamma(4) * weights.abs()


def test_visual_advantage_is_what_the_image_adds_and_never_negative() -> None:
    va = objective.visual_advantage(TEACHER, DEGRADED, MASK)
    assert_within(va, [[0.0, 3.0, 0.0], [0.1, 0.3, 0.0]], ADVANTAGE_ERROR)


def test_no_gradient_flows_through_visual_advantage() -> None:
    teacher = TEACHER.clone().requires_grad_()
    assert not objective.visual_advantage(teacher, DEGRADED, MASK).requires_grad


def test_padding_may_hold_anything_but_a_valid_token_must_be_finite() -> None:
    garbage = TEACHER.clone()
    garbage[1, 2] = math.nan
    assert objective.visual_advantage(garbage, DEGRADED, MASK)[1, 2] == 0
    garbage[0, 0] = -math.inf
    with pytest.raises(NumericalError, match="not finite"):
        objective.visual_advantage(garbage, DEGRADED, MASK)


def test_mean_visual_advantage_is_over_valid_tokens_only() -> None:
    va = objective.visual_advantage(TEACHER, DEGRADED, MASK)
    assert_within(objective.mean_visual_advantage(va, MASK), [1.0, 0.2], MEANS_ERROR)
    assert_noticed(va.mean(-1), [1.0, 0.2], MEANS_ERROR)  # padding counted


def test_rollout_weights_standardise_within_the_group_and_sum_to_one() -> None:
    # Means 1.0 and 0.2: z = ±1 (population deviation 0.4), so the weights are e / (e + 1/e) and the rest.
    weights = objective.rollout_weights(tensor([[1.0, 0.2]]))
    high = math.e / (math.e + 1 / math.e)
    # ε = 1e-6 beside the deviation of 0.4 makes z smaller by 2.5e-6, and both weights off by half of that at most.
    error = rollout_weights(tensor([[1.0, 0.2]])) + 1.25e-6
    assert_within(weights, [[high, 1 - high]], error)
    sample = math.exp(1 / math.sqrt(2))  # divided by K − 1
    assert_noticed([[sample / (sample + 1 / sample), 1 / (1 + sample**2)]], [[high, 1 - high]], error)


def test_four_rollouts_against_float64() -> None:
    means = [0.3, 0.1, 0.4, 0.2]  # mean 0.25, population variance 0.0125
    z = [(m - 0.25) / (math.sqrt(0.0125) + 1e-6) for m in means]
    expected = [math.exp(v / 2) / sum(math.exp(u / 2) for u in z) for v in z]
    found = objective.rollout_weights(tensor([means]), temperature=2.0)[0]
    assert_within(found, expected, rollout_weights(tensor(means)))  # of τ = 1, more than of z / 2


def test_equal_means_give_uniform_weights_and_a_group_of_one_weight_one() -> None:
    assert objective.rollout_weights(tensor([[0.7, 0.7, 0.7, 0.7]])).tolist() == [[0.25, 0.25, 0.25, 0.25]]
    assert objective.rollout_weights(tensor([[0.7]])).tolist() == [[1.0]]


def test_groups_do_not_see_each_other() -> None:
    alone = objective.rollout_weights(tensor([[1.0, 0.2]]))
    together = objective.rollout_weights(tensor([[1.0, 0.2], [9.0, 5.0]]))
    assert_within(together[:1], alone, 2 * rollout_weights(tensor([[1.0, 0.2]])))


def test_the_high_group_shares_half_of_the_rollout_and_the_others_the_rest() -> None:
    va = tensor([[0.0, 3.0, 0.0, 0.5, 0.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    # ⌈0.2·5⌉ = 1 token is high; the four others share the other half: 0.5/4 each, times the rollout's weight of 0.8.
    weights = objective.token_weights(va, mask, tensor([0.8]))
    expected = tensor([[0.1, 0.4, 0.1, 0.1, 0.1]])
    assert_within(weights, expected, weights_error(expected))
    assert_noticed(expected * tensor([1.0, 1.0, 1.01, 1.0, 1.0]), expected, weights_error(expected))


def test_the_number_of_high_tokens_is_rounded_up_exactly() -> None:
    for length, expected in ((1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (35, 7)):
        mask = torch.ones(1, length, dtype=torch.bool)
        assert objective.high_group(torch.rand(1, length), mask).sum() == expected
    # In floating point 0.1·30 and 0.7·10 round up to 4 and 8.
    assert objective.high_group(torch.rand(1, 30), torch.ones(1, 30, dtype=torch.bool), high_fraction=0.1).sum() == 3
    assert objective.high_group(torch.rand(1, 10), torch.ones(1, 10, dtype=torch.bool), high_fraction=0.7).sum() == 7


def test_among_equal_advantages_the_earlier_token_is_high() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert objective.high_group(tensor([[0.0, 2.0, 2.0, 2.0]]), mask, high_fraction=0.5).tolist() == [
        [False, True, True, False]
    ]


def test_padding_is_never_in_a_group_even_when_no_token_has_any_advantage() -> None:
    va = torch.zeros(1, 4)
    mask = tensor([[True, True, False, False]])
    weights = objective.token_weights(va, mask, tensor([1.0]))
    assert weights.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_a_response_of_one_token_puts_all_its_mass_in_the_high_group() -> None:
    weights = objective.token_weights(tensor([[0.0]]), tensor([[True]]), tensor([0.3]))
    assert_within(weights, [[0.3]], weights_error(weights))


def test_a_rollouts_weights_sum_to_its_rollout_weight() -> None:
    torch.manual_seed(0)
    va, mask = torch.rand(8, 40), torch.arange(40) < torch.randint(1, 41, (8, 1))
    rollout = objective.rollout_weights(objective.mean_visual_advantage(va * mask, mask).view(2, 4)).flatten()
    for weights in (objective.token_weights(va, mask, rollout), objective.mean_weights(mask, rollout)):
        # A sum of 40, each rounded as often as a weight is.
        error = (gamma(40) + gamma(4)) * rollout
        assert_within(weights.sum(-1), rollout, error)
        off = weights.clone()
        off[:, 0] *= 1.01
        assert_noticed(off.sum(-1), rollout, error)


def test_an_empty_response_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="rollout 1 is empty"):
        objective.mean_visual_advantage(torch.zeros(2, 3), tensor([[True, False, False], [False, False, False]]))


def test_the_whole_loss_by_hand() -> None:
    """loss = (1/B) Σ_b Σ_k w_k ℓ_k, from log-probs and KLs to the number."""
    va = objective.visual_advantage(TEACHER, DEGRADED, MASK)
    weights_K = objective.rollout_weights(objective.mean_visual_advantage(va, MASK)[None])[0]
    kl = tensor([[0.2, 0.6, 0.4], [0.1, 0.5, 9.9]])
    weights = objective.token_weights(va, MASK, weights_K)
    w = math.e / (math.e + 1 / math.e)
    # High tokens: the second of either rollout. ℓ_1 = 0.5·0.6 + 0.5·mean(0.2, 0.4), ℓ_2 = 0.5·0.5 + 0.5·0.1.
    expected = w * 0.45 + (1 - w) * 0.30
    # Six products and their sum, with weights as exact as those of the rollouts are (ε = 1e-6 included, see above).
    of_rollouts = rollout_weights(tensor([1.0, 0.2]), MEANS_ERROR) + 1.25e-6
    error = float((gamma(6) + gamma(4)) * expected + (of_rollouts * tensor([0.45, 0.30])).sum())
    assert_within((weights * kl).sum() / 1, expected, error)
    for token in MASK.nonzero():
        off = weights.clone()
        off[tuple(token)] *= 1.01
        assert_noticed((off.double() * kl).sum(), expected, error)


GROUP_VA = tensor([[0.0, 3.0, 0.0], [0.1, 0.3, 0.0]])  # means 1.0 and 0.2 over the valid tokens
W = math.e / (math.e + 1 / math.e)  # the first sibling's weight: z = ±1


@pytest.mark.parametrize(
    ("variant", "rollouts", "tokens"),
    [
        # ⌈0.2·3⌉ = 1 token of each sibling is high, the second one, and has half of the sibling's weight.
        ("va_opd", [W, 1 - W], [[W / 4, W / 2, W / 4], [(1 - W) / 2, (1 - W) / 2, 0]]),
        ("token_groups", [1 / 2, 1 / 2], [[1 / 8, 1 / 4, 1 / 8], [1 / 4, 1 / 4, 0]]),
        ("rollout_weights", [W, 1 - W], [[W / 3, W / 3, W / 3], [(1 - W) / 2, (1 - W) / 2, 0]]),
        ("standard", [1 / 2, 1 / 2], [[1 / 6, 1 / 6, 1 / 6], [1 / 4, 1 / 4, 0]]),
        # ⌊0.4·3⌋ = 1 of the first sibling's tokens is dropped, ⌊0.4·2⌋ = 0 of the second's.
        ("masked", [1 / 2, 1 / 2], [[1 / 4, 0, 1 / 4], [1 / 4, 1 / 4, 0]]),
    ],
)
def test_the_five_variants_of_a_group_by_hand(variant: str, rollouts: list[float], tokens: list[list[float]]) -> None:
    found = objective.group_weights(GROUP_VA, MASK, variant=variant, mask_fraction=0.4)
    # ε = 1e-6 included, as above; a token's share is as exact as its rollout's, and a product.
    error = rollout_weights(tensor([1.0, 0.2]), MEANS_ERROR) + 1.25e-6
    assert_within(found.rollout_weights, rollouts, error)
    of_tokens = (error / tensor(rollouts))[:, None] * tensor(tokens) + weights_error(tensor(tokens))
    assert_within(found.token_weights, tokens, of_tokens)
    assert_noticed(1.01 * tensor(tokens), tokens, of_tokens)


def test_a_variant_s_settings_reach_it() -> None:
    plain = objective.group_weights(GROUP_VA, MASK)
    for changed in ({"temperature": 0.5}, {"high_fraction": 0.5}, {"high_weight": 0.7}):
        assert not torch.allclose(objective.group_weights(GROUP_VA, MASK, **changed).token_weights, plain.token_weights)
    bottom = objective.group_weights(GROUP_VA, MASK, variant="masked", mask="bottom", mask_fraction=0.4)
    # Of the two tokens without VA the later one is the last in rank.
    assert_within(bottom.token_weights[0], [1 / 4, 1 / 4, 0], weights_error(tensor([1 / 4, 1 / 4, 0])))


def test_standard_opd_is_the_mean_over_tokens_and_siblings() -> None:
    kl = tensor([[0.2, 0.6, 0.4], [0.1, 0.5, 9.9]])
    loss = (objective.mean_weights(MASK, tensor([0.5, 0.5])) * kl).sum() / 1
    assert_within(loss, 0.5 * 0.4 + 0.5 * 0.3, (gamma(6) + gamma(4)) * 0.35)


@pytest.mark.parametrize(("which", "kept"), [("top", [1, 0, 1, 1, 1]), ("bottom", [0, 1, 1, 1, 1])])
def test_masking_drops_tokens_by_their_advantage(which: str, kept: list[int]) -> None:
    va = tensor([[0.1, 5.0, 0.2, 0.3, 0.4]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert objective.masked_response(va, mask, which=which, fraction=0.2).int().tolist() == [kept]


def test_random_masking_drops_as_many_and_is_seeded() -> None:
    va, mask = torch.rand(4, 20), torch.ones(4, 20, dtype=torch.bool)
    first = objective.masked_response(va, mask, which="random", fraction=0.1, seed=7)
    assert first.sum(-1).tolist() == [18] * 4
    assert torch.equal(first, objective.masked_response(va, mask, which="random", fraction=0.1, seed=7))
    assert not torch.equal(first, objective.masked_response(va, mask, which="random", fraction=0.1, seed=8))


def test_share_of_the_top_tokens() -> None:
    va = tensor([[8.0] + [0.5] * 4, [0.0] * 5])
    mask = torch.ones(2, 5, dtype=torch.bool)
    # 10 % of ten tokens is one: 8 of 10 nats.
    assert objective.va_share_of_top(va, mask, fraction=0.1) == pytest.approx(0.8)
