"""The objective of VA-OPD (arXiv 2605.21924): weights of rollouts and of their tokens. Pure functions on tensors.

Shapes: N = B·K rollouts, siblings adjacent; T response tokens, padded; response_mask (N, T) is true, or 1, on valid
ones. The loss is `(token_weights * kl).sum() / B`, where kl (N, T) is the per-token divergence of `vaopd.divergence`.
`group_weights` does all of it for one prompt group; the other functions are its parts.

Results are float32, or float64 for float64 inputs (`group_weights`: always float32). A mask is bool, or integers 0 and
1. `vaopd.scoring.weights` has the parts that are needed without torch, in numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vaopd.errors import InvalidInput, NumericalError

VARIANTS = ("va_opd", "standard", "rollout_weights", "token_groups", "masked")
"""The paper's loss, the baseline, either component alone, and the baseline with tokens masked out."""


class GroupWeights(NamedTuple):
    """The weights of one prompt group: rollout_weights (K,), which sum to 1, and token_weights (K, T)."""

    rollout_weights: Tensor
    token_weights: Tensor


def group_weights(
    visual_advantage_KT: Tensor,
    mask_KT: Tensor,
    *,
    variant: str = "va_opd",
    token_score_KT: Tensor | None = None,
    temperature: float = 1.0,
    rollout_deviation_floor: float = 0.0,
    high_fraction: float = 0.2,
    high_weight: float = 0.5,
    mask: str = "top",
    mask_fraction: float = 0.1,
    mask_ties: str = "earlier",
    seed: int = 0,
) -> GroupWeights:
    """Weights one complete prompt group under a variant of the loss: (K, T), (K, T) -> (K,) and (K, T), float32.

    variant: one of `VARIANTS`. token_score_KT: ranks the tokens for the token groups in place of VA; rollout weights
    and masks are by VA. temperature, rollout_deviation_floor: of `rollout_weights`. high_fraction, high_weight: of
    `token_weights`. mask, mask_fraction, mask_ties, seed: of `masked_response`. Settings that a variant doesn't use
    have no effect.

    Raises InvalidInput for an empty group, an empty response, a mask or a setting out of range; NumericalError for a
    valid token with a VA or score that is not finite.
    """
    if variant not in VARIANTS:
        raise InvalidInput(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    valid_KT = _read_mask(mask_KT, visual_advantage_KT.shape)
    _refuse_empty(len(valid_KT))
    # In float64: siblings' means may differ by less than float32's rounding of them, and z divides by that difference.
    va_KT = visual_advantage_KT.detach().double()
    _refuse_not_finite(va_KT, valid_KT, "visual advantage")
    scores_KT = va_KT if token_score_KT is None else token_score_KT.detach()
    _refuse_shape("token_score_KT", scores_KT.shape, va_KT.shape)
    _refuse_not_finite(scores_KT, valid_KT, "score")

    means_K = mean_visual_advantage(va_KT, valid_KT)
    if variant in ("va_opd", "rollout_weights"):
        rollouts_K = rollout_weights(means_K[None], temperature=temperature, deviation_floor=rollout_deviation_floor)[0]
    else:
        rollouts_K = torch.full_like(means_K, 1 / len(means_K))

    if variant in ("va_opd", "token_groups"):
        tokens_KT = token_weights(scores_KT, valid_KT, rollouts_K, high_fraction=high_fraction, high_weight=high_weight)
    elif variant == "masked":
        kept_KT = masked_response(va_KT, valid_KT, which=mask, fraction=mask_fraction, ties=mask_ties, seed=seed)
        tokens_KT = mean_weights(kept_KT, rollouts_K)
    else:
        tokens_KT = mean_weights(valid_KT, rollouts_K)
    return GroupWeights(rollouts_K.float(), tokens_KT.float())


def pad_rows(rows: Sequence[Tensor | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stacks K rows of different lengths: -> values (K, T), padded with 0, and their mask (K, T) bool."""
    _refuse_empty(len(rows))
    # Copied, since arrays that came over the wire are read-only, which torch can't represent.
    tensors = [row if isinstance(row, Tensor) else torch.from_numpy(np.array(row)) for row in rows]
    dtype = functools.reduce(torch.promote_types, (row.dtype for row in tensors))
    values = pad_sequence([row.to(dtype) for row in tensors], batch_first=True)  # by itself it takes the first's dtype
    lengths = torch.tensor([len(row) for row in tensors], device=values.device)
    return values, torch.arange(values.shape[1], device=values.device) < lengths[:, None]


def visual_advantage(teacher_logprobs: Tensor, degraded_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Returns VA, a_t = max(log p_T(y_t | v) − log p_T(y_t | ṽ), 0), in nats, 0 on masked tokens: (N, T). Detached.

    Raises InvalidInput for shapes that differ, NumericalError when a valid token's log-prob is not finite.
    """
    return _compare_views(teacher_logprobs, degraded_logprobs, response_mask).clamp_min(0)


def absolute_advantage(teacher_logprobs: Tensor, degraded_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Returns |log p_T(y_t | v) − log p_T(y_t | ṽ)|, which is also large where the image speaks against a token.

    In nats, 0 on masked tokens: (N, T). Detached. Raises as `visual_advantage` does.
    """
    return _compare_views(teacher_logprobs, degraded_logprobs, response_mask).abs()


def view_divergence(teacher_logprobs: Tensor, degraded_logprobs: Tensor) -> Tensor:
    """Returns KL(p_T(·|v) ‖ p_T(·|ṽ)) in nats, from both views' log-probs of the whole vocabulary: (..., V) -> (...).

    How much the teacher's next-token distribution depends on the image, whatever token was sampled. Detached. A token
    of −∞ in the original view adds 0; of −∞ in the degraded view alone, ∞. Raises InvalidInput for shapes that differ.
    """
    teacher, degraded = _widen(teacher_logprobs.detach()), _widen(degraded_logprobs.detach())
    _refuse_shape("degraded_logprobs", degraded.shape, teacher.shape)
    gap = (teacher - degraded).masked_fill_(teacher.isneginf(), 0)  # 0·log 0 is 0
    # Rounding can bring equal distributions slightly below 0, which no divergence is.
    return teacher.exp().mul_(gap).sum(-1).clamp_min(0)


def expected_advantage(student_logprobs: Tensor, teacher_logprobs: Tensor, degraded_logprobs: Tensor) -> Tensor:
    """Returns Σ_y p_S(y)·max(log p_T(y | v) − log p_T(y | ṽ), 0): VA as it is expected of the student at each place.

    From log-probs of the whole vocabulary: (..., V) -> (...), nats. Detached. A token of −∞ in the student's or the
    teacher's original view adds 0. Raises InvalidInput for shapes that differ.
    """
    _refuse_shape("teacher_logprobs", teacher_logprobs.shape, student_logprobs.shape)
    _refuse_shape("degraded_logprobs", degraded_logprobs.shape, student_logprobs.shape)
    # In place: the trainer has memory for two further matrices of this size.
    gap = (_widen(teacher_logprobs.detach()) - _widen(degraded_logprobs.detach())).clamp_min_(0)
    for logprobs in (student_logprobs, teacher_logprobs):
        gap.masked_fill_(logprobs.isneginf(), 0)
    return _widen(student_logprobs.detach()).exp().mul_(gap).sum(-1)


def mean_visual_advantage(visual_advantage: Tensor, response_mask: Tensor) -> Tensor:
    """Returns m_k, the mean of a_t over each rollout's valid tokens: (N, T) -> (N,).

    Raises InvalidInput for an empty response, NumericalError for a valid token's VA that is not finite.
    """
    response_mask = _read_mask(response_mask, visual_advantage.shape)
    _refuse_not_finite(visual_advantage, response_mask, "visual advantage")
    lengths = _count_tokens(response_mask)
    return torch.where(response_mask, _widen(visual_advantage), 0.0).sum(-1) / lengths


def rollout_weights(
    mean_va: Tensor, *, temperature: float = 1.0, deviation_floor: float = 0.0, eps: float = 1e-6
) -> Tensor:
    """Returns w_k = softmax_k(z_k / τ), z_k the standardised mean VA in the group: (B, K) -> (B, K), rows sum to 1.

    Needs complete groups. Equal means give uniform weights, a group of one weight 1. Detached.

    mean_va: in nats. deviation_floor: in nats; a smaller standard deviation counts as this. Without it (the paper),
    siblings that hardly differ get weights as unequal as those that differ much.

    Raises InvalidInput for an empty group and for settings out of range, NumericalError for a mean that isn't finite.
    """
    _refuse_empty(mean_va.shape[-1])
    if not temperature > 0:
        raise InvalidInput(f"the temperature of the rollout weights must be above 0 (the paper: 1), got {temperature}")
    if not deviation_floor >= 0:
        raise InvalidInput(f"the floor of the deviation must be at least 0 nats (the paper: 0), got {deviation_floor}")
    if not eps > 0:
        raise InvalidInput(f"eps must be above 0, since the deviation of equal means is 0, got {eps}")
    if not bool(mean_va.isfinite().all()):
        raise NumericalError("a rollout's mean visual advantage is not finite")
    wide_va = mean_va.detach().double()
    centred = wide_va - wide_va.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()  # population: divided by K
    z = centred / (deviation.clamp_min(deviation_floor) + eps)
    # Less the largest before the division: a tiny temperature makes ∞ of the others only, which weigh 0.
    weights = torch.softmax((z - z.amax(-1, keepdim=True)) / temperature, dim=-1)
    return weights.to(torch.promote_types(mean_va.dtype, torch.float32))


def high_group(visual_advantage: Tensor, response_mask: Tensor, *, high_fraction: float = 0.2) -> Tensor:
    """Marks V, each rollout's ⌈high_fraction·T⌉ tokens of largest VA, of equal ones the earlier: (N, T) -> (N, T) bool.

    Raises InvalidInput for a mask or fraction out of range, and for an empty response; NumericalError for a valid
    token's VA that is not finite.
    """
    response_mask = _read_mask(response_mask, visual_advantage.shape)
    if not 0.0 < high_fraction <= 1.0:
        raise InvalidInput(f"high_fraction must be above 0 and at most 1 (the paper: 0.2), got {high_fraction}")
    exact = _read_decimal(high_fraction)
    count = -(-_count_tokens(response_mask) * exact.numerator // exact.denominator)  # rounded up
    return response_mask & (_rank(visual_advantage, response_mask) < count[:, None])


def token_weights(
    visual_advantage: Tensor,
    response_mask: Tensor,
    rollout_weights: Tensor,
    *,
    high_fraction: float = 0.2,
    high_weight: float = 0.5,
) -> Tensor:
    """Weights each token's KL: (N, T), (N, T), (N,) -> (N, T); a rollout's tokens sum to its rollout weight.

    The `high_group` shares `high_weight`, the other tokens the rest. Where there are no others (T = 1), the high group
    takes all of it. Raises as `high_group` does, InvalidInput for weights of another shape, NumericalError for weights
    that are not finite.
    """
    response_mask = _read_mask(response_mask, visual_advantage.shape)
    if not 0.0 <= high_weight <= 1.0:
        raise InvalidInput(f"high_weight must be in [0, 1] (the paper: 0.5), got {high_weight}")
    high = high_group(visual_advantage, response_mask, high_fraction=high_fraction)
    low = response_mask & ~high
    high_count, low_count = high.sum(-1), low.sum(-1)
    weights = _check_weights(rollout_weights, response_mask)
    high_mass = torch.where(low_count > 0, high_weight * weights, weights)
    high_share, low_share = high_mass / high_count, (weights - high_mass) / low_count.clamp_min(1)
    return high * high_share[:, None] + low * low_share[:, None]


def mean_weights(response_mask: Tensor, rollout_weights: Tensor) -> Tensor:
    """Weights each token by the plain mean of its rollout: (N, T), (N,) -> (N, T). Uniform 1/K is Standard OPD."""
    response_mask = _read_mask(response_mask, response_mask.shape)
    return response_mask * (_check_weights(rollout_weights, response_mask) / _count_tokens(response_mask))[:, None]


def masked_response(
    visual_advantage: Tensor,
    response_mask: Tensor,
    *,
    which: str,
    fraction: float,
    ties: str = "earlier",
    seed: int = 0,
) -> Tensor:
    """Drops ⌊fraction·T⌋ tokens of each rollout from the mask (N, T): "top" or "bottom" ones by VA, or "random" ones.

    The masking ablation of the paper. Rounding down keeps at least one token of every rollout as long as fraction < 1.
    ties: of equal VA the "earlier" token counts as the larger one, or a "random" one. VA is 0 on most tokens, so with
    "earlier" the bottom ones are the last tokens, which hold the answer. seed: of what is random.

    Raises InvalidInput for an unknown word, a fraction out of range, and an empty response; NumericalError for a VA by
    which tokens are ranked and that is not finite.
    """
    response_mask = _read_mask(response_mask, visual_advantage.shape)
    if not 0.0 <= fraction < 1.0:
        raise InvalidInput(f"the masked fraction must be at least 0 and below 1 (the paper: 0.1), got {fraction}")
    lengths, exact = _count_tokens(response_mask), _read_decimal(fraction)
    dropped = (lengths * exact.numerator // exact.denominator)[:, None]
    if ties not in ("earlier", "random"):
        raise InvalidInput(f"ties = {ties!r} is unknown; use earlier or random")
    if which == "random" or ties == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(response_mask.shape, generator=generator).to(response_mask.device)
    if which == "random":
        return response_mask & (_rank(noise, response_mask) >= dropped)
    ranks = _rank(visual_advantage, response_mask, noise if ties == "random" else None)
    if which == "top":
        return response_mask & (ranks >= dropped)
    if which == "bottom":
        return response_mask & (ranks < lengths[:, None] - dropped)
    raise InvalidInput(f"which = {which!r} names no tokens; use top, bottom or random")


def va_share_of_top(visual_advantage: Tensor, response_mask: Tensor, *, fraction: float = 0.1) -> float:
    """Returns the share of all VA that the top `fraction` of all valid tokens carries; NaN when there is no VA.

    Raises InvalidInput for a mask or fraction out of range, NumericalError for a valid token's VA that is not finite.
    """
    response_mask = _read_mask(response_mask, visual_advantage.shape)
    _refuse_not_finite(visual_advantage, response_mask, "visual advantage")
    if not 0.0 < fraction <= 1.0:
        raise InvalidInput(f"fraction must be above 0 and at most 1, got {fraction}")
    values = visual_advantage[response_mask].double().sort(descending=True).values
    count = math.ceil(_read_decimal(fraction) * len(values))
    return float(values[:count].sum() / values.sum())


def _refuse_empty(num_rollouts: int) -> None:
    if not num_rollouts:
        raise InvalidInput("the prompt group has no rollouts; it needs at least one")


def _refuse_shape(name: str, shape: torch.Size, expected: torch.Size) -> None:
    """Refuses what torch would spread over tokens or siblings without an error."""
    if shape != expected:
        raise InvalidInput(f"{name} has shape {tuple(shape)}, the tokens have {tuple(expected)}")


def _refuse_not_finite(values: Tensor, valid: Tensor, name: str) -> None:
    if not bool((values.isfinite() | ~valid).all()):
        raise NumericalError(f"a valid token's {name} is not finite")


def _compare_views(teacher_logprobs: Tensor, degraded_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Returns log p_T(y_t | v) − log p_T(y_t | ṽ), 0 on masked tokens: (N, T), detached; see `visual_advantage`."""
    response_mask = _read_mask(response_mask, teacher_logprobs.shape)
    _refuse_shape("degraded_logprobs", degraded_logprobs.shape, teacher_logprobs.shape)
    finite = teacher_logprobs.isfinite() & degraded_logprobs.isfinite()
    if not bool((finite | ~response_mask).all()):
        raise NumericalError("a valid token has a teacher log-prob that is not finite in one of the views")
    return torch.where(response_mask, _widen(teacher_logprobs.detach()) - _widen(degraded_logprobs.detach()), 0.0)


def _read_mask(response_mask: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask as bool, after its shape and values were checked.

    Floats are refused even as 0.0 and 1.0: an additive mask, 0 and −∞, would be read as its opposite.
    """
    _refuse_shape("response_mask", response_mask.shape, shape)
    if len(shape) != 2:
        raise InvalidInput(f"response_mask has shape {tuple(shape)}; give one row per rollout, (N, T)")
    if response_mask.dtype == torch.bool:
        return response_mask
    if response_mask.is_floating_point() or response_mask.is_complex():
        raise InvalidInput(f"response_mask is {response_mask.dtype}; make it bool, or integers 0 and 1")
    other = response_mask[(response_mask != 0) & (response_mask != 1)]
    if len(other):
        raise InvalidInput(f"response_mask holds {int(other[0])}; make it bool, or integers 0 and 1")
    return response_mask.bool()


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_weights(rollout_weights: Tensor, response_mask: Tensor) -> Tensor:
    """Refuses weights of another shape than (N,): a (B, K) tensor would be spread over tokens without an error."""
    if rollout_weights.shape != response_mask.shape[:1]:
        raise InvalidInput(
            f"rollout_weights have shape {tuple(rollout_weights.shape)}, expected one per rollout, "
            f"({len(response_mask)},)"
        )
    if not bool(rollout_weights.isfinite().all()):
        raise NumericalError("a rollout weight is not finite")
    return _widen(rollout_weights)


def _count_tokens(response_mask: Tensor) -> Tensor:
    lengths = response_mask.sum(-1)
    if bool((lengths == 0).any()):
        raise InvalidInput(f"rollout {int((lengths == 0).nonzero()[0])} is empty; it needs at least one response token")
    return lengths


def _read_decimal(fraction: float) -> Fraction:
    """Reads it as the decimal that was written: 0.1 of 30 tokens is 3, never ⌈3.0000000000000004⌉ = 4."""
    return Fraction(str(fraction))


def _rank(values: Tensor, response_mask: Tensor, noise: Tensor | None = None) -> Tensor:
    """Ranks each rollout's tokens, (N, T): 0 is the largest value, padding last.

    Of equal values the earlier comes first, or with `noise` (N, T) the one with the larger noise.
    """
    _refuse_not_finite(values, response_mask, "score")
    values = torch.where(response_mask, _widen(values), -math.inf)
    if noise is None:
        order = torch.sort(values, stable=True, dim=-1, descending=True).indices
    else:  # by noise first: a stable sort keeps that order among equal values
        shuffled = torch.sort(noise, dim=-1, descending=True).indices
        by_value = torch.sort(values.gather(-1, shuffled), stable=True, dim=-1, descending=True).indices
        order = shuffled.gather(-1, by_value)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
