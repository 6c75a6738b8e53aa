"""The objective with the tensors that other trainers have; its implementations in torch and numpy agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from tests.support.tolerance import assert_within, gamma
from vaopd import objective
from vaopd.config import Config, find_variants
from vaopd.errors import InvalidInput, NumericalError
from vaopd.scoring import weights as in_numpy

pytestmark = pytest.mark.numeric

VA = tensor([[0.0, 3.0, 0.5], [0.1, 0.3, 0.0]])
MASK = tensor([[True, True, True], [True, True, False]])
WEIGHTS = tensor([0.25, 0.75])

# Each function that takes a mask, with the mask left open.
WITH_MASK: dict[str, Callable[[Tensor], Any]] = {
    "visual_advantage": lambda mask: objective.visual_advantage(-VA, -2 * VA, mask),
    "absolute_advantage": lambda mask: objective.absolute_advantage(-VA, -2 * VA, mask),
    "mean_visual_advantage": lambda mask: objective.mean_visual_advantage(VA, mask),
    "high_group": lambda mask: objective.high_group(VA, mask),
    "token_weights": lambda mask: objective.token_weights(VA, mask, WEIGHTS),
    "mean_weights": lambda mask: objective.mean_weights(mask, WEIGHTS),
    "masked_response": lambda mask: objective.masked_response(VA, mask, which="top", fraction=0.5),
    "va_share_of_top": lambda mask: tensor(objective.va_share_of_top(VA, mask)),
    "group_weights": lambda mask: objective.group_weights(VA, mask).token_weights,
}
FUNCTIONS = pytest.mark.parametrize("function", WITH_MASK.values(), ids=WITH_MASK.keys())


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_an_integer_mask_is_as_good_as_a_bool_one(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    torch.testing.assert_close(function(MASK.to(dtype)), function(MASK), rtol=0, atol=0)


@FUNCTIONS
def test_another_value_in_a_mask_is_named(function: Callable[[Tensor], Tensor]) -> None:
    for value in (2, -1):
        with pytest.raises(InvalidInput, match=f"response_mask holds {value}; make it bool, or integers 0 and 1"):
            function(tensor([[1, 1, value], [1, 1, 0]]))
    with pytest.raises(InvalidInput, match=r"response_mask is torch\.float32; make it bool"):
        function(MASK.float())


@FUNCTIONS
def test_a_mask_of_another_shape_is_an_error(function: Callable[[Tensor], Tensor]) -> None:
    """It would be spread over the siblings without one."""
    if function is WITH_MASK["mean_weights"]:  # has nothing but the mask to compare the rollout weights with
        with pytest.raises(InvalidInput, match=r"rollout_weights have shape \(2,\), expected one per rollout, \(1,\)"):
            function(MASK[:1])
    else:
        with pytest.raises(InvalidInput, match=r"response_mask has shape \(1, 3\), the tokens have \(2, 3\)"):
            function(MASK[:1])


def test_rollout_weights_of_another_shape_are_an_error() -> None:
    with pytest.raises(InvalidInput, match=r"rollout_weights have shape \(1, 2\), expected one per rollout, \(2,\)"):
        objective.token_weights(VA, MASK, WEIGHTS[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_is_summed(dtype: torch.dtype) -> None:
    """4097 tokens of 1/256: their sum has 13 binary digits, float16 holds 11 and bfloat16 8."""
    values, mask = torch.full((1, 4097), 1 / 256, dtype=dtype), torch.ones(1, 4097, dtype=torch.bool)
    mean = objective.mean_visual_advantage(values, mask)
    assert (mean.dtype, float(mean)) == (torch.float32, 1 / 256)
    found = objective.visual_advantage(-values, -3 * values, mask)
    assert (found.dtype, float(found[0, 0])) == (torch.float32, 2 / 256)
    assert objective.token_weights(values, mask, tensor([0.5], dtype=dtype)).dtype == torch.float32
    assert objective.rollout_weights(tensor([[0.5, 0.5]], dtype=dtype)).dtype == torch.float32


def test_float64_stays_float64() -> None:
    """Two advantages that are one number in float32."""
    close, mask = tensor([[1.0, 1.0 + 1e-9]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    assert objective.high_group(close, mask, high_fraction=0.5).tolist() == [[False, True]]
    assert objective.mean_visual_advantage(close, mask).dtype == torch.float64


def test_means_that_float32_rounds_to_one_number_keep_their_order() -> None:
    """Means 8 and 8 + 2^-22: apart by a quarter of float32's spacing there, half of which is the deviation, 2^-23."""
    va = torch.full((2, 4), 8.0)
    va[1, 0] += 2.0**-20  # exact in float32, whose spacing there is 2^-20
    found = objective.group_weights(va, torch.ones(2, 4, dtype=torch.bool)).rollout_weights
    z = 2.0**-23 / (2.0**-23 + 1e-6)
    expected = math.exp(z) / (math.exp(z) + math.exp(-z))
    # Made in float64 and rounded to float32 at the end.
    assert_within(found, [1 - expected, expected], gamma(2) * expected)
    assert expected > 0.55


def test_strides_do_not_matter() -> None:
    columns, mask = VA.T.contiguous().T, MASK.T.contiguous().T
    assert not columns.is_contiguous()
    for found, expected in zip(objective.group_weights(columns, mask), objective.group_weights(VA, MASK), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_empty_group_an_empty_response_and_a_missing_number_are_errors() -> None:
    none, mask = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)
    for empty in (
        lambda: objective.group_weights(none, mask),
        lambda: objective.group_weights(none, mask, variant="standard"),
        lambda: objective.rollout_weights(torch.zeros(2, 0)),
        lambda: objective.pad_rows([]),
    ):
        with pytest.raises(InvalidInput, match="has no rollouts; it needs at least one"):
            empty()
    with pytest.raises(InvalidInput, match="rollout 1 is empty"):
        objective.group_weights(VA, tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(NumericalError, match="not finite"):
        objective.group_weights(torch.where(MASK, VA, 0).index_put((tensor(0), tensor(0)), tensor(math.nan)), MASK)
    objective.group_weights(torch.where(MASK, VA, math.nan), MASK)  # padding may hold anything


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_part_takes_a_number_that_is_not_finite(number: float) -> None:
    va = VA.index_put((tensor(0), tensor(0)), tensor(number))
    for part in (
        lambda: objective.mean_visual_advantage(va, MASK),
        lambda: objective.rollout_weights(va[:1, :2]),
        lambda: objective.high_group(va, MASK),
        lambda: objective.token_weights(va, MASK, WEIGHTS),
        lambda: objective.token_weights(VA, MASK, va[:, 0]),
        lambda: objective.mean_weights(MASK, va[:, 0]),
        lambda: objective.masked_response(va, MASK, which="top", fraction=0.5),
        lambda: objective.va_share_of_top(va, MASK),
    ):
        with pytest.raises(NumericalError, match="not finite"):
            part()


def test_another_shape_is_refused_and_never_spread() -> None:
    for spread in (VA[:, :1], VA[0]):
        with pytest.raises(InvalidInput, match=r"degraded_logprobs has shape .*, the tokens have \(2, 3\)"):
            objective.visual_advantage(-VA, spread, MASK)
    for groups in (torch.ones(3), torch.ones(3, 3, 3)):  # one rollout; several groups
        with pytest.raises(InvalidInput, match=r"give one row per rollout, \(N, T\)"):
            objective.high_group(groups, groups.bool())


def test_the_smallest_temperature_leaves_the_largest_mean_alone() -> None:
    assert objective.rollout_weights(tensor([[0.0, 1.0, 1.0]]), temperature=1e-300).tolist() == [[0.0, 0.5, 0.5]]
    with pytest.raises(InvalidInput, match=r"eps must be above 0, .* got 0"):
        objective.rollout_weights(tensor([[1.0, 1.0]]), eps=0)


def test_a_share_of_more_than_all_tokens_is_refused() -> None:
    for fraction in (-0.4, 2.0, math.nan):
        with pytest.raises(InvalidInput, match=f"at most 1, got {fraction}"):
            objective.va_share_of_top(VA, MASK, fraction=fraction)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"variant": "grpo"}, "variant 'grpo' is unknown; use one of va_opd, standard"),
        ({"temperature": 0.0}, "temperature .* must be above 0 .*, got 0.0"),
        ({"high_fraction": 0.0}, "high_fraction must be above 0 and at most 1 .*, got 0.0"),
        ({"high_fraction": math.nan}, "high_fraction .* got nan"),
        ({"high_weight": 1.5}, r"high_weight must be in \[0, 1\] .*, got 1.5"),
        ({"variant": "masked", "mask": "middle"}, "'middle' names no tokens"),
        ({"variant": "masked", "mask_fraction": 1.0}, "masked fraction must be .* below 1 .*, got 1.0"),
    ],
)
def test_a_setting_out_of_range_is_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        objective.group_weights(VA, MASK, **changed)


def test_rows_are_padded_and_may_be_read_only() -> None:
    first = np.frombuffer(np.array([1.0, 2.0], np.float32).tobytes(), np.float32)
    values, mask = objective.pad_rows([first, tensor([3.0])])
    assert values.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert mask.tolist() == [[True, True], [True, False]]
    mixed, _ = objective.pad_rows([np.array([0, 0]), np.array([0.5], np.float32)])
    assert mixed.tolist() == [[0.0, 0.0], [0.5, 0.0]]  # in integers it would be 0


def test_the_configuration_s_variants_are_the_objective_s() -> None:
    """Each has keyword arguments that `group_weights` takes, with the same defaults."""
    variants = find_variants(Config.model_fields["objective"])
    assert variants is not None
    names = [name for member in variants.members for name in variants.list_tags(member)]
    assert sorted(names) == sorted(objective.VARIANTS)
    for member, name in zip(variants.members, names, strict=True):
        settings = member().as_keywords()
        assert settings["variant"] == name
        weights = objective.group_weights(VA, MASK, **settings)
        torch.testing.assert_close(weights, objective.group_weights(VA, MASK, variant=name), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ torch and numpy agree

# Few distinct values, so that ties are common, and any others.
LOGPROBS = st.one_of(st.sampled_from([-9.0, -1.5, -1.0, -0.5, 0.0]), st.floats(-20, 0, width=32))
ROLLOUT = st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=25)
GROUPS = st.lists(ROLLOUT, min_size=1, max_size=5)
FRACTIONS = st.one_of(st.sampled_from([0.1, 0.2, 0.29, 0.5, 0.7, 1.0]), st.floats(0.001, 1.0))
Views = Sequence[Sequence[tuple[float, float]]]


@given(group=GROUPS, fraction=FRACTIONS)
@example(group=[[(-1.0, -2.0)]], fraction=0.2)  # one sibling of one token
@example(group=[[(-1.0, -1.0)] * 6, [(-0.5, -0.5)]], fraction=0.2)  # no VA at all
@example(group=[[(-1.0, -3.0)] * 30, [(-1.0, -3.0)] * 30], fraction=0.1)  # nothing but ties; ⌈0.1·30⌉ is 3
@settings(deadline=None)
def test_torch_and_numpy_agree(group: Views, fraction: float) -> None:
    teacher = [np.array([seen for seen, _ in rollout], np.float32) for rollout in group]
    degraded = [np.array([blind for _, blind in rollout], np.float32) for rollout in group]
    teacher_KT, mask_KT = objective.pad_rows(teacher)
    va_KT = objective.visual_advantage(teacher_KT, objective.pad_rows(degraded)[0], mask_KT)
    va = [in_numpy.visual_advantage(*views) for views in zip(teacher, degraded, strict=True)]

    for k, values in enumerate(va):
        row = va_KT[k][mask_KT[k]].numpy()
        assert (row.dtype, row.tolist()) == (values.dtype, values.tolist())
        high = objective.high_group(va_KT, mask_KT, high_fraction=fraction)[k][mask_KT[k]]
        assert high.tolist() == in_numpy.high_group(values, high_fraction=fraction).tolist()

    # Both sum in float64; what is left is the rounding of the result to float32.
    means = np.array([values.mean(dtype=np.float64) for values in va])
    found = objective.group_weights(va_KT, mask_KT).rollout_weights.numpy()
    expected = in_numpy.rollout_weights(means)
    assert_within(found, expected, gamma(2) * expected + 1e-30)

    share = in_numpy.va_share_of_top(np.concatenate(va), fraction=fraction)
    in_torch = objective.va_share_of_top(va_KT, mask_KT, fraction=fraction)
    assert math.isnan(in_torch) if share is None else in_torch == pytest.approx(share, rel=1e-12)


def test_the_high_group_in_numpy_by_hand() -> None:
    """⌈0.2·6⌉ = 2 of six tokens; of the three equal ones the earliest."""
    high = in_numpy.high_group(np.array([0.5, 0.1, 2.0, 0.5, 0.5, 0.0]))
    assert high.tolist() == [True, False, True, False, False, False]
    assert in_numpy.high_group(np.array([0.0])).tolist() == [True]


def test_of_no_tokens_there_is_neither_va_nor_a_share() -> None:
    nothing = np.zeros(0, np.float32)
    assert in_numpy.visual_advantage(nothing, nothing).tolist() == []
    assert in_numpy.va_share_of_top(nothing, fraction=0.1) is None
    empty, mask = torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool)
    assert objective.visual_advantage(empty, empty, mask).tolist() == [[]]
    assert math.isnan(objective.va_share_of_top(empty, mask))


def test_a_log_prob_that_is_not_finite_is_an_error_in_both() -> None:
    seen, blind = np.array([-math.inf], np.float32), np.array([-1.0], np.float32)
    with pytest.raises(NumericalError, match="not finite"):
        in_numpy.visual_advantage(seen, blind)
    with pytest.raises(NumericalError, match="not finite"):
        objective.visual_advantage(torch.from_numpy(seen)[None], torch.from_numpy(blind)[None], tensor([[True]]))
