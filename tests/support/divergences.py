"""The divergences as sums of terms in float64, independent of `vaopd.divergence`, and the errors of these sums.

Shapes: M tokens, V ids. Terms are functions of both sides' log-probs (M, V) -> (M, n); their sum is the divergence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support import tolerance

Terms = Callable[[Tensor, Tensor], Tensor]


def full(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p·(log p − log q)."""
    return log_p.exp() * (log_p - log_q)


def top_k(k: int) -> Terms:
    """The same with all but the teacher's k likeliest ids merged into one."""

    def terms(log_p: Tensor, log_q: Tensor) -> Tensor:
        if k >= log_q.shape[-1] - 1:  # a tail of at most one id merges nothing
            return full(log_p, log_q)
        top = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, log_q.topk(k).indices, True)
        rest_p, rest_q = (x.exp().masked_fill(top, 0).sum(-1, keepdim=True) for x in (log_p, log_q))
        return torch.cat((full(log_p, log_q).masked_fill(~top, 0), rest_p * (rest_p / rest_q).log()), -1)

    return terms


def sampled(ids: Tensor, estimator: str) -> Terms:
    """k1 = log p − log q of the sampled ids (M,), k3 = r − 1 − log r with r = q / p."""

    def terms(log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = (x.gather(-1, ids.long()[:, None]) for x in (log_p, log_q))
        return (
            torch.cat((p, -q), -1) if estimator == "k1" else torch.cat(((q - p).exp(), -torch.ones_like(p), p, -q), -1)
        )

    return terms


def rest_error(log_probs: Tensor, k: int, n: int) -> Tensor:
    """Bounds the error of the log-mass after the k likeliest ids as vLLM's teacher computes it: (M, V) -> (M,).

    It is made of n log-probs: the mass of k … n, and what all n leave of 1. float32 moves that rest by up to 2^-22 of
    the entropy, and it is left out when it isn't larger than that. So a small rest may be lost, for which the bound is
    doubled, because the rest that is seen has moved too. Rounding alone makes up no rest: its errors cancel to less
    than half the bound.
    """
    mass = log_probs.exp().sort(-1, descending=True).values
    tail, known, rest = mass[:, k:].sum(-1), mass[:, k:n].sum(-1), mass[:, n:].sum(-1)
    bound = 2**-22 * -(log_probs.exp() * log_probs).sum(-1)
    most = torch.where(rest > bound / 2, tail + bound, tail)
    least = torch.maximum(known, tail - 2 * bound)
    # And every log-prob of the known ones is itself rounded.
    return torch.maximum(most / tail, tail / least).log() + tolerance.gamma(4) * log_probs.abs().amax(-1)


def error(
    terms: Terms,
    student: Tensor,
    teacher: Tensor,
    student_error: Tensor | float = 0.0,
    teacher_error: Tensor | float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Bounds the error of the sum in `dtype`, (M,), when both sides' logits (M, V) are off by these errors.

    The logits' errors reach the sum through its derivative; then both log-softmaxes and the sum round for themselves.
    """
    logits = [z.detach().double() for z in (student, teacher)]
    log_probs = [z.log_softmax(-1) for z in logits]

    def of_logits(p: Tensor, q: Tensor) -> Tensor:
        return terms(p.log_softmax(-1), q.log_softmax(-1)).sum(-1, keepdim=True)

    moved = tolerance.propagated(of_logits, logits, [student_error, teacher_error], torch.float64)
    own = [tolerance.log_softmax(z, dtype=dtype) for z in logits]
    return moved + tolerance.propagated(terms, log_probs, own, dtype)
