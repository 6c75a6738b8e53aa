"""`vaopd.objective` in numpy, for one group or one response: what the teacher, the API and `vaopd score` compute."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from vaopd.errors import NumericalError

HIGH_FRACTION = 0.2  # the paper's


def visual_advantage(teacher_logprobs: np.ndarray, degraded_logprobs: np.ndarray) -> np.ndarray:
    """Returns VA, max(teacher − degraded, 0), in nats: log-probs (M,), (M,) -> (M,) float32.

    Raises NumericalError when a log-prob is not finite.

    >>> visual_advantage(np.array([-0.5, -2.0]), np.array([-2.0, -0.5])).tolist()
    [1.5, 0.0]
    """
    teacher, degraded = np.asarray(teacher_logprobs, np.float32), np.asarray(degraded_logprobs, np.float32)
    if not (np.isfinite(teacher).all() and np.isfinite(degraded).all()):
        raise NumericalError("a token has a teacher log-prob that is not finite in one of the views")
    return np.maximum(teacher - degraded, np.float32(0))


def rollout_weights(mean_va: np.ndarray, *, temperature: float = 1.0, eps: float = 1e-6) -> np.ndarray:
    """Returns the softmax of the standardised mean VA, which adds up to 1: (K,) nats -> (K,).

    >>> rollout_weights(np.array([0.5, 0.5])).tolist()
    [0.5, 0.5]
    """
    z = (mean_va - mean_va.mean()) / (mean_va.std() + eps)
    exponentials = np.exp(z / temperature - (z / temperature).max())
    return exponentials / exponentials.sum()


def high_group(va: np.ndarray, *, high_fraction: float = HIGH_FRACTION) -> np.ndarray:
    """Marks the ⌈high_fraction·T⌉ tokens of largest VA, of equal ones the earlier: (T,) nats -> (T,) bool.

    >>> high_group(np.array([0.0, 2.0, 0.0, 2.0, 1.0, 0.0])).tolist()
    [False, True, False, True, False, False]
    """
    high = np.zeros(len(va), bool)
    high[np.argsort(-va, kind="stable")[: _count_top(len(va), high_fraction)]] = True
    return high


def va_share_of_top(va: np.ndarray, *, fraction: float) -> float | None:
    """Returns the share of all VA that the top `fraction` of the tokens (M,) carry; None where all VA is 0.

    >>> va_share_of_top(np.array([3.0, 0.0, 1.0, 0.0, 0.0]), fraction=0.2)
    0.75
    """
    values = np.sort(va.astype(np.float64))[::-1]
    total = values.sum()
    return float(values[: _count_top(len(values), fraction)].sum() / total) if total > 0 else None


def _count_top(tokens: int, fraction: float) -> int:
    """Returns ⌈fraction·tokens⌉ without rounding errors: 0.1 of 30 tokens are 3."""
    return math.ceil(Fraction(str(fraction)) * tokens)
