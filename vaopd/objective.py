"""The objective of VA-OPD (arXiv 2605.21924): which rollouts to learn from, how to weight their tokens. Pure functions.

Shapes: N = B·K rollouts, siblings adjacent; T response tokens, padded, response_mask (N, T) true on valid ones.
The loss is `(token_weights * kl).sum() / B`, where kl (N, T) is the per-token divergence of `vaopd.divergence`.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from vaopd.errors import InvalidInput, NumericalError


def visual_advantage(teacher_logprobs: Tensor, degraded_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """a_t = max(log p_T(y_t | v) − log p_T(y_t | ṽ), 0) in nats, 0 on masked tokens: (N, T). Detached.

    Raises NumericalError when a valid token's log-prob is not finite.
    """
    advantage = (teacher_logprobs.detach().float() - degraded_logprobs.detach().float()).clamp_min(0)
    # clamp hides the NaN of inf − inf on some devices and turns −inf into 0: look at the inputs.
    finite = teacher_logprobs.isfinite() & degraded_logprobs.isfinite()
    if not bool((finite | ~response_mask).all()):
        raise NumericalError("a valid token has a teacher log-prob that is not finite in one of the views")
    return torch.where(response_mask, advantage, 0.0)


def mean_visual_advantage(visual_advantage: Tensor, response_mask: Tensor) -> Tensor:
    """m_k, the mean of a_t over a rollout's valid tokens: (N, T) -> (N,). An empty response is an error."""
    lengths = _lengths(response_mask)
    return torch.where(response_mask, visual_advantage, 0.0).sum(-1) / lengths


def rollout_weights(mean_va: Tensor, *, temperature: float = 1.0, eps: float = 1e-6) -> Tensor:
    """w_k = softmax_k(z_k / τ) with z_k the standardised mean VA within the group: (B, K) -> (B, K), rows sum to 1.

    Needs complete groups. Equal means give uniform weights, a group of one weight 1.
    """
    mean_va = mean_va.detach().float()
    centred = mean_va - mean_va.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()  # population: divided by K
    return torch.softmax(centred / (deviation + eps) / temperature, dim=-1)


def high_group(visual_advantage: Tensor, response_mask: Tensor, *, high_fraction: float = 0.2) -> Tensor:
    """V: the ⌈high_fraction·T⌉ tokens of largest VA of each rollout, ties: earlier first; (N, T) bool."""
    count = _count(_lengths(response_mask), high_fraction, math.ceil)
    return response_mask & (_ranks(visual_advantage, response_mask) < count[:, None])


def token_weights(
    visual_advantage: Tensor,
    response_mask: Tensor,
    rollout_weights: Tensor,
    *,
    high_fraction: float = 0.2,
    high_weight: float = 0.5,
) -> Tensor:
    """The weight of each token's KL: (N, T), (N, T), (N,) -> (N, T); a rollout's weights sum to its rollout weight.

    The `high_group` shares `high_weight`, the other tokens the rest. Where there are no others (T = 1), the high group
    takes all of it.
    """
    high = high_group(visual_advantage, response_mask, high_fraction=high_fraction)
    low = response_mask & ~high
    high_count, low_count = high.sum(-1), low.sum(-1)
    high_share = torch.where(low_count > 0, high_weight, 1.0) / high_count
    low_share = torch.where(low_count > 0, 1.0 - high_weight, 0.0) / low_count.clamp_min(1)
    return (high * high_share[:, None] + low * low_share[:, None]) * rollout_weights.float()[:, None]


def mean_weights(response_mask: Tensor, rollout_weights: Tensor) -> Tensor:
    """The plain token mean of each rollout, times its weight: (N, T), (N,) -> (N, T). Uniform 1/K is Standard OPD."""
    return response_mask * (rollout_weights.float() / _lengths(response_mask))[:, None]


def masked_response(
    visual_advantage: Tensor, response_mask: Tensor, *, which: str, fraction: float, seed: int = 0
) -> Tensor:
    """The response mask without ⌊fraction·T⌋ tokens per rollout: the "top" or "bottom" ones by VA, or "random" ones.

    The masking ablation of the paper. Rounding down keeps at least one token of every rollout as long as fraction < 1.
    """
    lengths = _lengths(response_mask)
    dropped = _count(lengths, fraction, math.floor)[:, None]
    if which == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(response_mask.shape, generator=generator).to(response_mask.device)
        return response_mask & (_ranks(noise, response_mask) >= dropped)
    ranks = _ranks(visual_advantage, response_mask)
    if which == "top":
        return response_mask & (ranks >= dropped)
    if which == "bottom":
        return response_mask & (ranks < lengths[:, None] - dropped)
    raise InvalidInput(f"which = {which!r} names no tokens; use top, bottom or random")


def va_share_of_top(visual_advantage: Tensor, response_mask: Tensor, *, fraction: float = 0.1) -> float:
    """The share of all VA that the top `fraction` of the valid tokens of all rollouts carries; NaN without any VA."""
    values = visual_advantage[response_mask].double().sort(descending=True).values
    count = math.ceil(Fraction(str(fraction)) * len(values))
    return float(values[:count].sum() / values.sum())


def _lengths(response_mask: Tensor) -> Tensor:
    lengths = response_mask.sum(-1)
    if bool((lengths == 0).any()):
        raise InvalidInput(f"rollout {int((lengths == 0).nonzero()[0])} is empty; it needs at least one response token")
    return lengths


def _count(lengths: Tensor, fraction: float, rounding: object) -> Tensor:
    """fraction·T, rounded exactly: as a decimal, so that 0.1 of 30 tokens is 3 and never ⌈3.0000000000000004⌉ = 4."""
    exact = Fraction(str(fraction))
    product = lengths * exact.numerator
    return -(-product // exact.denominator) if rounding is math.ceil else product // exact.denominator


def _ranks(values: Tensor, response_mask: Tensor) -> Tensor:
    """(N, T): 0 for a rollout's largest value, earlier tokens first among equals; padding comes last."""
    order = torch.sort(
        torch.where(response_mask, values.float(), -math.inf), stable=True, dim=-1, descending=True
    ).indices
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
