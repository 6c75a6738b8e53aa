"""What the API and `vaopd score` share: an ad-hoc prompt, and `vaopd.objective` in numpy for one group. Torch-free."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

HIGH_FRACTION = 0.2  # method.md, "Token groups"


def rollout_weights(mean_va: np.ndarray, *, temperature: float = 1.0, eps: float = 1e-6) -> np.ndarray:
    """(K,) -> (K,), method.md "Rollout weights": softmax of the standardised means; they add up to 1.

    >>> rollout_weights(np.array([0.5, 0.5])).tolist()
    [0.5, 0.5]
    """
    z = (mean_va - mean_va.mean()) / (mean_va.std() + eps)
    exponentials = np.exp(z / temperature - (z / temperature).max())
    return exponentials / exponentials.sum()


def high_group(va: np.ndarray, *, high_fraction: float = HIGH_FRACTION) -> np.ndarray:
    """(T,) -> (T,) bool, method.md "Token groups": the ⌈high_fraction·T⌉ tokens of largest VA, ties: earlier first.

    >>> high_group(np.array([0.0, 2.0, 0.0, 2.0, 1.0, 0.0])).tolist()
    [False, True, False, True, False, False]
    """
    high = np.zeros(len(va), bool)
    high[np.argsort(-va, kind="stable")[: _top(len(va), high_fraction)]] = True
    return high


def va_share_of_top(va: np.ndarray, *, fraction: float) -> float | None:
    """(M,) -> the share of all VA that the top `fraction` of these tokens carry; None when there is no VA at all.

    >>> va_share_of_top(np.array([3.0, 0.0, 1.0, 0.0, 0.0]), fraction=0.2)
    0.75
    """
    values = np.sort(va.astype(np.float64))[::-1]
    total = values.sum()
    return float(values[: _top(len(values), fraction)].sum() / total) if total > 0 else None


def _top(tokens: int, fraction: float) -> int:
    """⌈fraction·tokens⌉, exactly: 0.1 of 30 tokens are 3."""
    return math.ceil(Fraction(str(fraction)) * tokens)
