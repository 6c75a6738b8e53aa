"""Computes the numbers of the paper's figures from runs. Without drawing, which is `figure_plots.py`'s.

    figure      function              reads of a run
    1, right    keep_measured         metrics.jsonl
    2a          rank_tokens           samples.jsonl
    2b          compare_masks         metrics.jsonl of masked runs
    4a          compare_components    benchmarks/summary.json of `vaopd eval --benchmark`
    4b          trace_trajectories    metrics.jsonl
    5           race                  metrics.jsonl
    6           choose_rollout        heldout.jsonl

Each raises NotFound, which says what to run, where no run has the data. Times are in seconds, the rest in percent.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vaopd.errors import InvalidInput, NotFound
from vaopd.report.charts import TIMES
from vaopd.report.curves import compute_seed_band, seed_band, smooth_series
from vaopd.report.groups import Group, name_variant
from vaopd.report.rollouts import SAMPLES_BYTES
from vaopd.run.json_lines import read_json_lines
from vaopd.run.records import Run, is_number

TOP_PERCENT = 10
"""The share of the tokens that the paper marks, and masks."""
_OF_AN_ANSWER = ("step", "problem", "question", "answer", "response_ids", "tokens", "student_va", "verdict")
UP = "vaopd up CONFIG --set objective.variant"
_COMPONENTS = ("va_opd", "rollout_weights", "token_groups")


class Curve(NamedTuple):
    """A group's points in order; `steps` of training before each, where the points are policies."""

    group: Group
    xs: Sequence[float]
    ys: Sequence[float]
    steps: Sequence[int] = ()


def keep_measured(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with the runs that recorded their rollouts' VA."""
    kept = [(group, tuple(run for run in group.runs if run.list_series("mean_va")[0])) for group in groups]
    if found := [dataclasses.replace(group, runs=runs) for group, runs in kept if runs]:
        return found
    raise NotFound(f"no step yet; train: {UP}=va_opd")


def rank_tokens(groups: Sequence[Group]) -> list[Curve]:
    """Ranks all response tokens of each group's recorded rollouts by VA: their share, and their share of all VA."""
    curves = []
    for group in groups:
        lines = (line for run in group.runs for line in _read_lines(run, "samples.jsonl", ("visual_advantage",)))
        va = np.concatenate([np.empty(0), *(np.asarray(line["visual_advantage"], np.float64) for line in lines)])
        if va.any():
            ranks, shares = share_by_rank(va)
            curves.append(Curve(group, ranks.tolist(), shares.tolist()))
    if not curves:
        raise NotFound(f"no recorded rollout has VA (RUN/samples.jsonl); train: {UP}=va_opd")
    return curves


def share_by_rank(va: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares of all tokens, and of all VA what those of largest VA carry, in %: (M,) -> (M + 1,) each.

    >>> [row.tolist() for row in share_by_rank(np.array([1.0, 0.0, 3.0, 0.0]))]
    [[0.0, 25.0, 50.0, 75.0, 100.0], [0.0, 75.0, 100.0, 100.0, 100.0]]
    """
    summed = np.concatenate([[0.0], np.cumsum(np.sort(va)[::-1])])
    return 100 * np.arange(len(summed)) / len(va), 100 * summed / summed[-1]


class Bar(NamedTuple):
    """A final accuracy: mean over seeds, lowest and highest; of a single run, its standard error around it."""

    label: str
    variant: str
    mean: float
    low: float
    high: float


def compare_masks(groups: Sequence[Group]) -> tuple[float, list[Bar]]:
    """Returns the accuracy before training, and the final ones: of Standard OPD, then of it without some tokens."""
    evaluated = [group for group in groups if seed_band(group.runs, band="range")[0]]
    standard, masked = ([group for group in evaluated if group.variant == name] for name in ("standard", "masked"))
    if not standard or not masked:
        commands = [f"{UP}=masked --set objective.mask={mask}" for mask in ("top", "bottom", "random")]
        raise NotFound(f"it compares Standard OPD with masked runs; train: {UP}=standard, {', '.join(commands)}")
    before = statistics.fmean(seed_band(group.runs, band="range")[1][0] for group in standard)
    return before, [_make_bar(group) for group in (*standard, *masked)]


def _make_bar(group: Group) -> Bar:
    _, means, lows, highs = seed_band(group.runs, band="range")
    mean, low, high = means[-1], lows[-1], highs[-1]
    if len(group.runs) == 1:
        error = 100 * group.runs[0].evaluations[-1].standard_error
        low, high = mean - error, mean + error
    settings = group.runs[0].config.get("objective", {})
    share = 100 * float(settings.get("mask_fraction", TOP_PERCENT / 100))
    other = [part for part in group.label.split(", ")[1:] if not part.startswith(("mask ", "mask_fraction "))]
    masked = ", ".join([f"{settings.get('mask', 'top')} {share:g} % masked", *other])
    return Bar(masked if group.variant == "masked" else group.label, group.variant, mean, low, high)


Scores = dict[str, tuple[float, float]]
"""Benchmark -> score, or a difference of scores, in points, and its standard error; NaN where that isn't known."""


def compare_components(groups: Sequence[Group]) -> list[tuple[Group, Scores]]:
    """Returns the differences from Standard OPD on the benchmarks that both were scored on."""
    baselines = (_average_scores(group) for group in groups if group.variant == "standard")
    standard = next(filter(None, baselines), {})
    found = []
    for group in groups:
        scores = _average_scores(group) if group.variant in _COMPONENTS else {}
        both = {name: (*scores[name], *standard[name]) for name in scores if name in standard}
        if both:
            found.append((group, {n: (a - b, math.hypot(x, y)) for n, (a, x, b, y) in both.items()}))
    if not found:
        raise NotFound(
            "it compares benchmark scores of the components with Standard OPD's, and both are needed: "
            "vaopd eval --benchmark all --model RUN/best, for each RUN"
        )
    return found


def _average_scores(group: Group) -> Scores:
    """Averages the runs' scores by benchmark; errors of independent runs add in quadrature."""
    entries: dict[str, list[tuple[float, float]]] = {}
    for run in group.runs:
        for name, score in _read_scores(run).items():
            entries.setdefault(name, []).append(score)
    return {
        name: (statistics.fmean(score for score, _ in found), math.hypot(*(error for _, error in found)) / len(found))
        for name, found in entries.items()
    }


def _read_scores(run: Run) -> Scores:
    path = run.folder / "benchmarks" / "summary.json"
    if not path.exists():
        return {}
    try:
        scored = {n: e for n, e in json.loads(path.read_text())["benchmarks"].items() if e["score"] is not None}
        unknown = math.nan
        return {
            n: (float(e["score"]), unknown if e["standard_error"] is None else float(e["standard_error"]))
            for n, e in scored.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is no summary of `vaopd eval --benchmark` ({error!r})") from None


def trace_trajectories(groups: Sequence[Group]) -> list[Curve]:
    """Returns the accuracy of each group's policies over the mean VA of their rollouts, in the order of training."""
    if found := _draw_accuracy_over(groups, _find_va_at_evaluations):
        return found
    raise NotFound(f"no run has both VA and an evaluation; train with evaluation.every above 0: {UP}=va_opd")


def _find_va_at_evaluations(run: Run) -> dict[int, float]:
    """Returns the running mean of VA at each evaluation; the last policy samples no more, and takes the last step's."""
    series = smooth_series(run, "mean_va")
    last = max(series, default=-1)
    return {e.step: series[min(e.step, last)] for e in run.evaluations if min(e.step, last) in series}


def race(groups: Sequence[Group]) -> tuple[list[Curve], Curve, Curve, float | None]:
    """Returns accuracy over time: all curves, Standard OPD's, VA-OPD's, when that reaches the other's final accuracy.

    Time: the steps' own seconds, without evaluations and interruptions. None if VA-OPD never reaches it, or if Standard
    OPD gained nothing that could be reached sooner.
    """
    curves = _draw_accuracy_over(groups, measure_elapsed)
    baseline = next((curve for curve in curves if curve.group.variant == "standard"), None)
    leader = next((curve for curve in curves if curve.group.variant.startswith("va_opd")), None)
    if baseline is None or leader is None:
        raise NotFound(f"it compares VA-OPD with Standard OPD; train: {UP}=va_opd, {UP}=standard")
    before, after = baseline.ys[0], baseline.ys[-1]
    return curves, baseline, leader, find_crossing(leader.xs, leader.ys, after) if after > before else None


def measure_elapsed(run: Run) -> dict[int, float]:
    """Returns the seconds of training before each policy version; up to the first step that lacks its times."""
    steps = itertools.takewhile(
        lambda pair: pair[0] == pair[1]["step"] and all(is_number(pair[1].get(part)) for part in TIMES),
        enumerate(run.train),
    )
    seconds = (sum(line[part] for part in TIMES) for _, line in steps)
    return dict(enumerate(itertools.accumulate(seconds, initial=0.0)))


def find_crossing(xs: Sequence[float], ys: Sequence[float], level: float) -> float | None:
    """Returns the x at which the line through the points first reaches `level`; None if it stays below.

    >>> find_crossing([0.0, 10.0, 20.0], [30.0, 50.0, 60.0], 55.0)
    15.0
    """
    if ys[0] >= level:
        return xs[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(xs, ys, strict=True)):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def _draw_accuracy_over(groups: Sequence[Group], draw: Callable[[Run], Mapping[int, float]]) -> list[Curve]:
    """Returns each group's accuracy at its evaluations over what `draw` has at their steps, both means over seeds."""
    curves = []
    for group in groups:
        xs, ys = compute_seed_band(group.runs, draw), seed_band(group.runs, band="range")
        x_of, y_of = (dict(zip(band[0], band[1], strict=True)) for band in (xs, ys))
        if steps := sorted(x_of.keys() & y_of.keys()):
            curves.append(Curve(group, [x_of[step] for step in steps], [y_of[step] for step in steps], steps))
    return curves


class SharedRollout(NamedTuple):
    """The base student's rollout of a held-out problem (heldout.jsonl), and each student's own VA of its tokens."""

    run: Run
    record: Mapping[str, Any]
    readings: Sequence[tuple[str, Sequence[float]]]


def choose_rollout(groups: Sequence[Group]) -> SharedRollout:
    """Returns the first held-out problem, with an image, that one run of each objective answered alike at its start."""
    standard, leaders = (
        [run for group in groups if group.variant == name for run in group.runs] for name in ("standard", "va_opd")
    )
    for pair in itertools.product(standard, leaders):
        if pair[0].seed == pair[1].seed and (found := _compare_readings(*pair)) is not None:
            return found
    raise NotFound(
        "it needs a run of VA-OPD and one of Standard OPD with one seed, whose first evaluations have an answer in "
        f"common (RUN/heldout.jsonl): {UP}=va_opd, {UP}=standard, with evaluation.student_va_prompts above 0"
    )


def _compare_readings(standard: Run, leader: Run) -> SharedRollout | None:
    (first, last), (first_of_leader, last_of_leader) = (_read_ends(run) for run in (standard, leader))
    for problem, base in first.items():
        ends = (last.get(problem, {}), last_of_leader.get(problem, {}))
        same = first_of_leader.get(problem, {}).get("response_ids") == base["response_ids"]
        if same and "image_base64" in base and all("student_va_of_first" in end for end in ends):
            readings = [("base student", base["student_va"])]
            for run, end in zip((standard, leader), ends, strict=True):
                label = f"{name_variant(run.variant)}, {end['step']} steps"
                readings.append((label, end["student_va_of_first"]))
            return SharedRollout(standard, base, readings)
    return None


def _read_ends(run: Run) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Returns problem -> record of the first evaluation on record, and of the last."""
    records = list(_read_lines(run, "heldout.jsonl", _OF_AN_ANSWER))
    steps = [record["step"] for record in records] or [0]
    first, last = ({r["problem"]: r for r in records if r["step"] == step} for step in (min(steps), max(steps)))
    return first, last


def _read_lines(run: Run, name: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of the run, none where it doesn't exist. Raises InvalidInput for a missing key."""
    path = run.folder / name
    for place, line in read_json_lines(path, limit_bytes=SAMPLES_BYTES) if os.path.lexists(path) else ():
        if missing := [key for key in keys if key not in line]:
            raise InvalidInput(f"{place}: {missing[0]} is missing; repair or remove the line")
        yield line
