"""The curves of the page as data: what `charts.js` draws, with hover and zoom. No matplotlib.

A chart is a dictionary: title, notes, unit, kind ("lines", "areas" or "bars") and series. A series has name, colour and
points; `low` and `high` are a band, `error` the half of an error bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from vaopd.report.curves import compute_seed_band, list_accuracy, list_student_va, smooth, smooth_series
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.run.records import Evaluation, Run

# Distinguishable on white and on black, and with each kind of colour blindness (a test simulates them).
COLOURS = {
    "va_opd": "#e07b00",
    "standard": "#2f86d6",
    "rollout_weights": "#9100f2",
    "token_groups": "#5e733f",
    "masked": "#a67c99",
}
DASHES = ("", "6 3", "8 3 2 3", "2 3")
"""Dashes of groups with one objective, in turn."""
SCORE_COLOURS = {"view_divergence": "#bf00ac", "absolute": "#a65300", "expected": "#f25565"}
"""Of objectives whose tokens are ranked by another score than VA."""
TIMES = {
    "wait_s": ("waiting for rollouts", COLOURS["standard"]),
    "score_s": ("waiting for scores", COLOURS["va_opd"]),
    "forward_backward_s": ("forward, backward, step", COLOURS["token_groups"]),
    "publish_s": ("publishing the policy", COLOURS["rollout_weights"]),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One curve of metrics.jsonl: its key, title and unit; `top` is the axis's upper end, if it is fixed."""

    key: str
    title: str
    unit: str
    colour: str = "#e07b00"
    top: float | None = None


HIGH = Metric(key="kl_high", title="KL, high-VA tokens", unit="nats", colour="#e07b00")
LOW = Metric(key="kl_low", title="KL, other tokens", unit="nats", colour="#2f86d6")
MEAN_VA = Metric(key="mean_va", title="Mean visual advantage", unit="nats")
# The figures of one run, and the curves that share one.
OF_A_RUN: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("Reverse KL by token group", (HIGH, LOW)),
    ("Loss", (Metric(key="loss", title="loss", unit="nats"),)),
    ("Mean visual advantage", (Metric(key="mean_va", title="mean VA", unit="nats"),)),
    (
        "Share of all VA in the top 10 % of tokens",
        (Metric(key="va_top10_share", title="share", unit="share", top=1.05),),
    ),
    ("Entropy of the rollout weights", (Metric(key="weights_entropy", title="entropy", unit="nats"),)),
    (
        "Rollout and trainer: differences of log-probs",
        (Metric(key="policy_drift_mean", title="mean difference", unit="nats"),),
    ),
)
OF_A_COMPARISON: tuple[Metric, ...] = (
    HIGH,
    LOW,
    MEAN_VA,
    Metric(key="va_top10_share", title="Share of all VA in the top 10 % of tokens", unit="share", top=1.05),
    Metric(key="weights_entropy", title="Entropy of the rollout weights", unit="nats"),
    Metric(key="grad_norm", title="Norm of the gradient", unit="norm"),
)


POINTS = 600
"""Of one series in the page; longer ones are averaged over equal stretches."""
Chart = dict[str, Any]
Series = dict[str, Any]


def make_charts(run: Run) -> Iterator[Chart]:
    """Yields the charts of one run; metrics that it did not record are left out."""
    if run.evaluations:
        yield make_accuracy_chart([run], band="range")
    for title, metrics in OF_A_RUN:
        series = [part for metric in metrics for part in _make_metric(run, metric)]
        if series:
            yield _make_chart(title, metrics[0].unit, series, bottom=0, top=metrics[0].top)
    if list_student_va(run):
        yield _make_student_va([run], band="range")
    if any(run.list_series(key)[0] for key in TIMES):
        yield _make_times(run)


def make_comparison_charts(runs: Sequence[Run], *, band: str) -> Iterator[Chart]:
    """Yields the charts of a comparison: accuracy, each metric that all runs recorded, times."""
    runs = keep_finished(runs)
    if any(run.evaluations for run in runs):
        yield make_accuracy_chart(runs, band=band)
    for metric in OF_A_COMPARISON:
        if all(run.list_series(metric.key)[0] for run in runs):
            series = [
                _make_band(group, colour, dash, band=band, draw=partial(smooth_series, key=metric.key))
                for group, colour, dash in style_groups(group_runs(runs))
            ]
            yield _make_chart(metric.title, metric.unit, series, bottom=0, top=metric.top)
    if all(list_student_va(run) for run in runs):
        yield _make_student_va(runs, band=band)
    if all(run.list_series(key)[0] for run in runs for key in TIMES):
        yield _make_compared_times(runs)


def make_accuracy_chart(runs: Sequence[Run], *, band: str) -> Chart:
    """Returns held-out accuracy by configuration: one seed with its standard error, several as mean and band."""
    notes = {
        "bars: one standard error over problems" if len(group.runs) == 1 else f"line: mean; {describe_band(band)}": None
        for group, _, _ in style_groups(_evaluated(runs))
    }
    series = _compare_evaluations(
        runs, lambda e: (100 * e.accuracy, 100 * e.standard_error), draw=list_accuracy, band=band
    )
    return _make_chart("Held-out accuracy", "%", series, notes=list(notes))


def _make_student_va(runs: Sequence[Run], *, band: str) -> Chart:
    """Returns the student's own VA on held-out answers, by configuration."""
    series = _compare_evaluations(
        runs,
        lambda e: (e.student_va.mean, e.student_va.error) if e.student_va else None,
        draw=list_student_va,
        band=band,
    )
    return _make_chart("The student's own VA on held-out answers", "nats", series, bottom=0)


def _evaluated(runs: Sequence[Run]) -> list[Group]:
    return group_runs([run for run in runs if run.evaluations])


def _compare_evaluations(
    runs: Sequence[Run],
    read: Callable[[Evaluation], tuple[float, float] | None],
    *,
    draw: Callable[[Run], Mapping[int, float]],
    band: str,
) -> list[Series]:
    """Returns a line per configuration, of one run with the errors that `read` gives, of several with their band."""
    found = []
    for group, colour, dash in style_groups(_evaluated(runs)):
        if len(group.runs) > 1:
            series = _make_band(group, colour, dash, band=band, draw=draw)
        else:
            points = [(e.step, *value) for e in group.runs[0].evaluations if (value := read(e)) is not None]
            steps, values, errors = (list(column) for column in zip(*points, strict=True))
            series = {**_make_series("", colour, steps, values, dash=dash), "error": _round(_thin(errors))}
        found.append({**series, "name": group.legend, "dots": True})
    return found


def style_groups(groups: Sequence[Group]) -> Iterator[tuple[Group, str, str]]:
    """Yields each group with its objective's colour, and dashes by its place among those of the objective."""
    seen: dict[str, int] = {}
    for group in groups:
        number = seen[group.variant] = seen.get(group.variant, -1) + 1
        yield group, choose_colour(group.variant), DASHES[number % len(DASHES)]


def choose_colour(variant: str) -> str:
    """Returns the colour of a `Run.variant`."""
    return SCORE_COLOURS.get(variant.partition(" by ")[2]) or COLOURS.get(variant, "#888888")


def describe_band(band: str) -> str:
    """Says what a band is, in words."""
    return "band: lowest to highest seed" if band == "range" else "band: ± one standard error over seeds"


def _make_metric(run: Run, metric: Metric) -> Iterator[Series]:
    """Yields each step's value, faint, and the running mean; nothing for a metric that the run did not record."""
    steps, values = run.list_series(metric.key)
    if steps:
        yield {**_make_series("", metric.colour, steps, values), "faint": True}
        yield _make_series(metric.title.partition(", ")[2] or metric.title, metric.colour, steps, smooth(values))


def _make_times(run: Run) -> Chart:
    keys = [key for key in TIMES if len(run.list_series(key)[0]) == len(run.train)]
    steps = [line["step"] for line in run.train]
    series = [_make_series(*TIMES[key], steps, smooth(run.list_series(key)[1])) for key in keys]
    return _make_chart("Where a step's time goes", "seconds", series, kind="areas", bottom=0)


def _make_compared_times(runs: Sequence[Run]) -> Chart:
    series = [
        {"name": name, "colour": colour, "y": _round([run.compute_mean(key) or 0.0 for run in runs])}
        for key, (name, colour) in TIMES.items()
    ]
    title = "Where a step's time goes"
    return {**_make_chart(title, "seconds per step, mean", series, kind="bars"), "names": [run.name for run in runs]}


def _make_band(
    group: Group, colour: str, dash: str, *, band: str, draw: Callable[[Run], Mapping[int, float]]
) -> Series:
    steps, means, lows, highs = compute_seed_band(group.runs, draw, band=band)
    series = _make_series(group.label, colour, steps, means, dash=dash)
    return {**series, "low": _round(_thin(lows)), "high": _round(_thin(highs))} if len(group.runs) > 1 else series


def _make_series(name: str, colour: str, x: Sequence[float], y: Sequence[float], *, dash: str = "") -> Series:
    return {"name": name, "colour": colour, "dash": dash, "x": _round(_thin(x)), "y": _round(_thin(y))}


def _make_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    kind: str = "lines",
    notes: Sequence[str] = (),
    bottom: float | None = None,
    top: float | None = None,
) -> Chart:
    return {
        "title": title,
        "unit": unit,
        "kind": kind,
        "notes": list(notes),
        "bottom": bottom,
        "top": top,
        "series": list(series),
    }


def _thin(values: Sequence[float]) -> list[float]:
    """Returns at most POINTS values: means over equal stretches."""
    if len(values) <= POINTS:
        return list(values)
    edges = [index * len(values) // POINTS for index in range(POINTS + 1)]
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]


def _round(values: Sequence[float]) -> list[float]:
    """Returns the values with five significant digits, whole numbers as such."""
    rounded = [float(f"{value:.5g}") for value in values]
    return [int(value) if value == int(value) and abs(value) < 2**31 else value for value in rounded]
