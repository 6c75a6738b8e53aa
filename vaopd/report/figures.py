"""Computes the numbers of the paper's figures from runs. Without drawing, which is `figure_plots.py`'s.

    figure      function              reads of a run
    1, right    select_measured       metrics.jsonl
    2a          rank_tokens           samples.jsonl
    2b          compare_masks         metrics.jsonl of masked runs
    4a          compare_components    benchmarks/summary.json of `vaopd eval --benchmark`
    4b          trace_trajectories    metrics.jsonl
    5           race                  metrics.jsonl
    6           choose_rollout        heldout.jsonl

Each raises NotFound, which says what to run, where no run has the data. Times are seconds, accuracies percent.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vaopd.errors import InvalidInput, NotFound
from vaopd.report.curves import compute_seed_band, list_student_va, seed_band, smooth_series
from vaopd.report.groups import Group, name_variant
from vaopd.report.rollouts import SAMPLES_BYTES
from vaopd.run.json_lines import read_json_lines
from vaopd.run.records import Run, is_number
from vaopd.scoring.weights import va_share_of_top

TOP = 0.1
"""The share of the tokens that the paper marks, and masks."""
STEP_PARTS = ("publish_s", "wait_s", "score_s", "forward_backward_s")
_OF_AN_ANSWER = ("step", "problem", "question", "answer", "response_ids", "tokens", "student_va", "verdict")
UP = "vaopd up CONFIG --set objective.variant"


def select_measured(groups: Sequence[Group]) -> tuple[list[Run], list[Run]]:
    """Returns the runs of figure 1: those that recorded their rollouts' VA, and of these those with the student's."""
    taught = [run for group in groups for run in group.runs if run.list_series("mean_va")[0]]
    if not taught:
        raise NotFound(f"no step yet; train: {UP}=va_opd")
    return taught, [run for run in taught if list_student_va(run)]


# -- 2a: share of VA by token rank -------------------------------------------------------------------------------------


class RankCurve(NamedTuple):
    """The share of all VA that the tokens of largest VA carry: `shares` of the first `ranks`, both from 0 to 1.

    top: the share of the first 10 %.
    """

    group: Group
    ranks: np.ndarray
    shares: np.ndarray
    top: float


def rank_tokens(groups: Sequence[Group]) -> list[RankCurve]:
    """Ranks all response tokens of each group's recorded rollouts by VA."""
    curves = []
    for group in groups:
        lines = (line for run in group.runs for line in _read_lines(run, "samples.jsonl", ("visual_advantage",)))
        va = np.concatenate([np.empty(0), *(np.asarray(line["visual_advantage"], np.float64) for line in lines)])
        top = va_share_of_top(va, fraction=TOP) if len(va) else None
        if top is not None:
            curves.append(RankCurve(group, *share_by_rank(va), top))
    if not curves:
        raise NotFound(f"no recorded rollout has VA (RUN/samples.jsonl); train: {UP}=va_opd")
    return curves


def share_by_rank(va: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares of all tokens, 0 to 1, and what of all VA those of largest VA carry: (M,) -> (M + 1,) each.

    >>> [row.tolist() for row in share_by_rank(np.array([1.0, 0.0, 3.0, 0.0]))]
    [[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.75, 1.0, 1.0, 1.0]]
    """
    summed = np.concatenate([[0.0], np.cumsum(np.sort(va)[::-1])])
    return np.arange(len(summed)) / len(va), summed / summed[-1]


# -- 2b: masking -------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A final accuracy: mean over seeds, lowest and highest; of a single run, its standard error around it."""

    label: str
    variant: str
    mean: float
    low: float
    high: float


class Masks(NamedTuple):
    """The accuracy before training, and the bars: Standard OPD, then Standard OPD with tokens masked."""

    before: float
    bars: list[Bar]


def compare_masks(groups: Sequence[Group]) -> Masks:
    """Returns the final accuracies of Standard OPD, and of Standard OPD without some of the tokens."""
    evaluated = _keep_evaluated(groups)
    standard = [group for group in evaluated if group.variant == "standard"]
    masked = [group for group in evaluated if group.variant == "masked"]
    if not standard or not masked:
        commands = [f"{UP}=masked --set objective.mask={mask}" for mask in ("top", "bottom", "random")]
        raise NotFound(f"it compares Standard OPD with masked runs; train: {UP}=standard, {', '.join(commands)}")
    bars = [_make_bar(group) for group in (*standard, *masked)]
    return Masks(statistics.fmean(seed_band(group.runs, band="range")[1][0] for group in standard), bars)


def _make_bar(group: Group) -> Bar:
    _, means, lows, highs = seed_band(group.runs, band="range")
    mean, low, high = means[-1], lows[-1], highs[-1]
    if len(group.runs) == 1:
        error = 100 * group.runs[0].evaluations[-1].standard_error
        low, high = mean - error, mean + error
    settings = group.runs[0].config.get("objective", {})
    share = 100 * float(settings.get("mask_fraction", TOP))
    masked = f"{settings.get('mask', 'top')} {share:g} % masked"
    return Bar(masked if group.variant == "masked" else group.label, group.variant, mean, low, high)


# -- 4a: the components, by benchmark ----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A benchmark's score minus Standard OPD's, in points; its standard error, None where it isn't known."""

    benchmark: str
    points: float
    error: float | None


Scores = dict[str, tuple[float, float | None]]
"""Benchmark -> score in percent and its standard error."""


def compare_components(groups: Sequence[Group]) -> dict[str, list[Difference]]:
    """Returns label -> differences from Standard OPD on the benchmarks that both were scored on."""
    scores = {id(group): average_scores([_read_scores(run) for run in group.runs]) for group in groups}
    standard = next((scores[id(group)] for group in groups if group.variant == "standard"), {})
    found = {
        group.label: subtract_scores(scores[id(group)], standard)
        for group in groups
        if group.variant in ("va_opd", "rollout_weights", "token_groups")
    }
    found = {label: differences for label, differences in found.items() if differences}
    if not found:
        raise NotFound(
            "it compares benchmark scores of the components with Standard OPD's, and both are needed: "
            "vaopd eval --benchmark all --model RUN/best, for each RUN"
        )
    return found


def average_scores(of_runs: Sequence[Scores]) -> Scores:
    """Averages the runs' scores by benchmark; errors of independent runs add in quadrature."""
    found: Scores = {}
    for name in dict.fromkeys(name for scores in of_runs for name in scores):
        entries = [scores[name] for scores in of_runs if name in scores]
        errors = [error for _, error in entries if error is not None]
        error = math.hypot(*errors) / len(entries) if len(errors) == len(entries) else None
        found[name] = (statistics.fmean(score for score, _ in entries), error)
    return found


def subtract_scores(scores: Scores, standard: Scores) -> list[Difference]:
    """Returns the differences on the benchmarks that both have."""
    found = []
    for name, (score, error) in scores.items():
        if name in standard:
            other, other_error = standard[name]
            both = None if error is None or other_error is None else math.hypot(error, other_error)
            found.append(Difference(name, score - other, both))
    return found


def _read_scores(run: Run) -> Scores:
    path = run.folder / "benchmarks" / "summary.json"
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["benchmarks"]
        return {n: (float(e["score"]), e["standard_error"]) for n, e in entries.items() if e["score"] is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is no summary of `vaopd eval --benchmark` ({error!r})") from None


# -- 4b: trajectories in mean VA and accuracy --------------------------------------------------------------------------


class Point(NamedTuple):
    """A policy: the steps it was trained, the mean VA of its rollouts in nats, its held-out accuracy."""

    step: int
    mean_va: float
    accuracy: float


def trace_trajectories(groups: Sequence[Group]) -> list[tuple[Group, list[Point]]]:
    """Returns each group's policies in the order of training, averaged over seeds."""
    found = []
    for group in _keep_evaluated(groups):
        va = compute_seed_band(group.runs, _find_va_at_evaluations)
        accuracy = seed_band(group.runs, band="range")
        of_step = dict(zip(accuracy[0], accuracy[1], strict=True))
        points = [Point(step, mean, of_step[step]) for step, mean in zip(va[0], va[1], strict=True) if step in of_step]
        found += [(group, points)] if points else []
    if not found:
        raise NotFound(f"no run has both VA and an evaluation; train with evaluation.every above 0: {UP}=va_opd")
    return found


def _find_va_at_evaluations(run: Run) -> dict[int, float]:
    """Returns the running mean of VA at each evaluation; the last policy samples no more, and takes the last step's."""
    series = smooth_series(run, "mean_va")
    last = max(series, default=-1)
    return {e.step: series[min(e.step, last)] for e in run.evaluations if min(e.step, last) in series}


# -- 5: accuracy against time ------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A group's accuracy at its evaluations, and the seconds of training before each, both means over seeds."""

    group: Group
    seconds: list[float]
    accuracies: list[float]


class Race(NamedTuple):
    """All curves; Standard OPD's, and when VA-OPD reaches its final accuracy.

    reached_s: None if it never does, or if Standard OPD gained nothing that could be reached sooner.
    """

    curves: list[Timed]
    baseline: Timed
    reached_s: float | None


def race(groups: Sequence[Group]) -> Race:
    """Returns accuracy against the time of training: the steps' own seconds, without evaluations and interruptions."""
    curves = []
    for group in _keep_evaluated(groups):
        times, accuracy = compute_seed_band(group.runs, measure_elapsed), seed_band(group.runs, band="range")
        of_step = dict(zip(accuracy[0], accuracy[1], strict=True))
        both = [(s, of_step[step]) for step, s in zip(times[0], times[1], strict=True) if step in of_step]
        curves += [Timed(group, [s for s, _ in both], [a for _, a in both])] if both else []
    baseline = next((curve for curve in curves if curve.group.variant == "standard"), None)
    leader = next((curve for curve in curves if curve.group.variant.startswith("va_opd")), None)
    if baseline is None or leader is None:
        raise NotFound(f"it compares VA-OPD with Standard OPD; train: {UP}=va_opd, {UP}=standard")
    before, after = baseline.accuracies[0], baseline.accuracies[-1]
    reached_s = find_crossing(leader.seconds, leader.accuracies, after) if after > before else None
    return Race(curves, baseline, reached_s)


def measure_elapsed(run: Run) -> dict[int, float]:
    """Returns the seconds of training before each policy version; up to the first step that lacks its times."""
    steps = itertools.takewhile(
        lambda pair: pair[0] == pair[1]["step"] and all(is_number(pair[1].get(part)) for part in STEP_PARTS),
        enumerate(run.train),
    )
    seconds = (sum(line[part] for part in STEP_PARTS) for _, line in steps)
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


# -- 6: one rollout under three students -------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A student's own VA of each token of the rollout, in nats."""

    student: str
    va: list[float]


class SharedRollout(NamedTuple):
    """The base student's rollout of a held-out problem; `run` has the degradation of `image_base64`."""

    question: str
    answer: str
    verdict: str
    tokens: list[str]
    image_base64: str
    run: Run
    readings: list[Reading]


def choose_rollout(groups: Sequence[Group]) -> SharedRollout:
    """Returns the first held-out problem, with an image, that one run of each objective answered alike at its start."""
    of = {
        variant: [run for g in groups if g.variant == variant for run in g.runs] for variant in ("standard", "va_opd")
    }
    for standard, leader in itertools.product(of["standard"], of["va_opd"]):
        if standard.seed == leader.seed and (found := _compare_readings(standard, leader)) is not None:
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
        if not same or "image_base64" not in base or any("student_va_of_first" not in end for end in ends):
            continue
        readings = [Reading("base student", base["student_va"])]
        for run, end in zip((standard, leader), ends, strict=True):
            label = f"{name_variant(run.variant)}, {end['step']} steps"
            readings.append(Reading(label, end["student_va_of_first"]))
        texts = (base["question"], str(base["answer"]), base["verdict"], base["tokens"], base["image_base64"])
        return SharedRollout(*texts, standard, readings)
    return None


def _read_ends(run: Run) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Returns problem -> record of the first evaluation on record, and of the last."""
    records = list(_read_lines(run, "heldout.jsonl", _OF_AN_ANSWER))
    steps = [record["step"] for record in records] or [0]
    first, last = ({r["problem"]: r for r in records if r["step"] == step} for step in (min(steps), max(steps)))
    return first, last


# ----------------------------------------------------------------------------------------------------------------------


def _keep_evaluated(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with an evaluation that all their seeds share."""
    return [group for group in groups if seed_band(group.runs, band="range")[0]]


def _read_lines(run: Run, name: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of the run, none where it doesn't exist. Raises InvalidInput for a missing key."""
    path = run.folder / name
    for place, line in read_json_lines(path, limit_bytes=SAMPLES_BYTES) if os.path.lexists(path) else ():
        if missing := [key for key in keys if key not in line]:
            raise InvalidInput(f"{place}: {missing[0]} is missing; repair or remove the line")
        yield line
