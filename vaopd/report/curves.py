"""Smooths curves and averages them over seeds. Pure functions, without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from vaopd.report.groups import split_by_seed
from vaopd.run.records import Run

SMOOTHING_STEPS = 9
Band = tuple[list[int], list[float], list[float], list[float]]
"""Steps; at each the mean, and the lower and upper edge of the band around it."""


def seed_band(runs: Sequence[Run], *, band: str) -> Band:
    """Returns the steps that all seeds evaluated; at each the mean accuracy and the band's edges, in percent."""
    return compute_seed_band(runs, list_accuracy, band=band)


def compute_seed_band(runs: Sequence[Run], draw: Callable[[Run], Mapping[int, float]], *, band: str = "range") -> Band:
    """Returns the band over the seeds; a seed that ran more than once counts once, with the mean of its runs."""
    curves = []
    for same in split_by_seed(runs).values():
        steps, means, _, _ = compute_band([draw(run) for run in same], band="range")
        curves.append(dict(zip(steps, means, strict=True)))
    return compute_band(curves, band=band)


def compute_band(curves: Sequence[Mapping[int, float]], *, band: str) -> Band:
    """Returns the steps that all curves have; at each the mean, and the band's lower and upper edge."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means, lows, highs = [], [], []
    for step in steps:
        values = [curve[step] for curve in curves]
        mean = sum(values) / len(values)
        if band == "range" or len(values) == 1:
            low, high = min(values), max(values)
        else:
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            error = math.sqrt(variance / len(values))
            low, high = mean - error, mean + error
        means.append(mean)
        lows.append(low)
        highs.append(high)
    return steps, means, lows, highs


def list_accuracy(run: Run) -> dict[int, float]:
    """Returns the held-out accuracy in percent by the step of its evaluation."""
    return {e.step: 100 * e.accuracy for e in run.evaluations}


def list_student_va(run: Run) -> dict[int, float]:
    """Returns the student's own VA in nats by the step of its evaluation; empty for a run that didn't measure it."""
    return {e.step: e.student_va.mean for e in run.evaluations if e.student_va is not None}


def smooth_series(run: Run, key: str) -> dict[int, float]:
    """Returns the running mean of `key` by step; empty for a run that didn't record it."""
    steps, values = run.list_series(key)
    return dict(zip(steps, smooth(values), strict=True))


def smooth(values: Sequence[float], *, width: int = SMOOTHING_STEPS) -> list[float]:
    """Returns the centred mean over `width` values, fewer at either end.

    >>> smooth([1, 2, 6, 3], width=3)
    [1.5, 3.0, 3.6666666666666665, 4.5]
    """
    half = width // 2
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
