"""Draws the report's curves by matplotlib: inline SVG in the page's light or dark colours, or image files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaopd.errors import InvalidInput
from vaopd.report.curves import compute_seed_band, list_student_va, seed_band, smooth, smooth_series
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.run.records import Run

# A stand-in for currentColor, which matplotlib does not know; it is replaced in the SVG's text.
FOREGROUND = "#010203"
# Distinguishable on white and on black, and with red-green colour blindness.
COLOURS = {
    "va_opd": "#e07b00",
    "standard": "#2f86d6",
    "rollout_weights": "#9a60c8",
    "token_groups": "#1f9e89",
    "masked": "#d04a86",
}
LINES = ("-", "--", ":", "-.")
"""Line styles of groups with one objective, in turn."""
SCORE_COLOURS = {"view_divergence": "#8a7400", "absolute": "#6b7280"}
"""Of objectives whose tokens are ranked by another score than VA."""
RC: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}
TIMES = {
    "wait_s": ("waiting for rollouts", "#2f86d6"),
    "score_s": ("waiting for scores", "#e07b00"),
    "forward_backward_s": ("forward, backward, step", "#1f9e89"),
    "publish_s": ("publishing the policy", "#9a60c8"),
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


def run_svgs(run: Run) -> Iterator[str]:
    """Yields the figures of one run as SVG; metrics that it did not record are left out."""
    if run.evaluations:
        yield _draw_svg(lambda axes: draw_comparison(axes, [run], band="range"), salt=f"{run.name}-accuracy")
    for title, metrics in OF_A_RUN:
        present = [metric for metric in metrics if run.list_series(metric.key)[0]]
        if present:
            draw = partial(_draw_metrics, run=run, metrics=present, title=title)
            yield _draw_svg(draw, salt=f"{run.name}-{title}")
    if list_student_va(run):
        yield _draw_svg(lambda axes: draw_student_va(axes, [run]), salt=f"{run.name}-student")
    if any(run.list_series(key)[0] for key in TIMES):
        yield _draw_svg(lambda axes: _draw_times(axes, run), salt=f"{run.name}-times")


def render_comparison(runs: Sequence[Run], *, band: str) -> Iterator[str]:
    """Yields the figures of a comparison as SVG: accuracy, each metric that all runs recorded, times."""
    runs = keep_finished(runs)
    if any(run.evaluations for run in runs):
        yield _draw_svg(lambda axes: draw_comparison(axes, runs, band=band), salt="comparison")
    for metric in OF_A_COMPARISON:
        if all(run.list_series(metric.key)[0] for run in runs):
            draw = partial(draw_compared_metric, runs=runs, metric=metric, band=band)
            yield _draw_svg(draw, salt=f"comparison-{metric.key}")
    if all(list_student_va(run) for run in runs):
        yield _draw_svg(lambda axes: draw_student_va(axes, runs), salt="comparison-student")
    if all(run.list_series(key)[0] for run in runs for key in TIMES):
        yield _draw_svg(lambda axes: _draw_compared_times(axes, runs), salt="comparison-times")


def save_comparison(runs: Sequence[Run], path: Path, *, band: str) -> None:
    """Writes the accuracy curves as an image file. Raises InvalidInput for a suffix that names no format."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        draw_comparison(figure.subplots(), runs, band=band)
        try:
            figure.savefig(path, dpi=160)
        except ValueError:
            raise InvalidInput(f"{path} has no suffix that matplotlib can write; use .png, .svg or .pdf") from None


def draw_comparison(axes: Axes, runs: Sequence[Run], *, band: str) -> None:
    """Draws held-out accuracy by configuration: one seed with its standard error, several as mean and band.

    Raises InvalidInput when no run has an evaluation.
    """
    groups = group_runs([run for run in keep_finished(runs) if run.evaluations])
    if not groups:
        raise InvalidInput(f"no evaluation in {', '.join(str(run.folder) for run in runs)}; see evaluation.every")
    notes = []
    for group, style in choose_styles(groups):
        if len(group.runs) == 1:
            evaluations = group.runs[0].evaluations
            axes.errorbar(
                [e.step for e in evaluations],
                [100 * e.accuracy for e in evaluations],
                yerr=[100 * e.standard_error for e in evaluations],
                label=group.legend, marker="o", markersize=3, capsize=2, **style,
            )  # fmt: skip
            notes.append("bars: one standard error over problems")
        else:
            steps, means, lows, highs = seed_band(group.runs, band=band)
            axes.plot(steps, means, label=group.legend, marker="o", markersize=3, **style)
            axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
            notes.append(f"line: mean; {_describe_band(band)}")
    axes.set(xlabel="optimizer step", ylabel="%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Held-out accuracy\n" + "\n".join(dict.fromkeys(notes)), fontsize=9)
    axes.legend()


def choose_styles(groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Yields each group with its objective's colour, and a line style by its place among those of the objective."""
    seen: dict[str, int] = {}
    for group in groups:
        number = seen[group.variant] = seen.get(group.variant, -1) + 1
        yield group, {"color": choose_colour(group.variant), "linestyle": LINES[number % len(LINES)]}


def choose_colour(variant: str) -> str:
    """Returns the colour of a `Run.variant`."""
    return SCORE_COLOURS.get(variant.partition(" by ")[2]) or COLOURS.get(variant, "#888888")


def _describe_band(band: str) -> str:
    return "band: lowest to highest seed" if band == "range" else "band: ± one standard error over seeds"


def _draw_metrics(axes: Axes, *, run: Run, metrics: Sequence[Metric], title: str) -> None:
    """Draws each step faintly, and the running mean."""
    for metric in metrics:
        steps, values = run.list_series(metric.key)
        axes.plot(steps, values, color=metric.colour, linewidth=0.8, alpha=0.35)
        label = metric.title.partition(", ")[2] or None
        axes.plot(steps, smooth(values), color=metric.colour, linewidth=1.6, label=label)
    axes.set(xlabel="optimizer step", ylabel=metrics[0].unit, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0, top=metrics[0].top)
    if len(metrics) > 1:
        axes.legend()


def draw_compared_metric(axes: Axes, *, runs: Sequence[Run], metric: Metric, band: str) -> None:
    """Draws a metric's running mean over the steps, one line per configuration, with the band over its seeds."""

    def draw(run: Run) -> dict[int, float]:
        return smooth_series(run, metric.key)

    for group, style in choose_styles(group_runs(runs)):
        steps, means, lows, highs = compute_seed_band(group.runs, draw, band=band)
        axes.plot(steps, means, label=group.label, linewidth=1.6, **style)
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel=metric.unit, title=metric.title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0, top=metric.top)
    axes.legend()


def draw_student_va(axes: Axes, runs: Sequence[Run]) -> None:
    """Draws the student's own VA on held-out answers, one line per configuration; a single run with its error."""
    for group, style in choose_styles(group_runs(runs)):
        steps, means, lows, highs = compute_seed_band(group.runs, list_student_va)
        if len(group.runs) == 1:
            found = [e.student_va for e in group.runs[0].evaluations if e.student_va is not None]
            lows, highs = [va.mean - va.error for va in found], [va.mean + va.error for va in found]
        axes.plot(steps, means, label=group.legend, marker="o", markersize=3, **style)
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="nats", title="The student's own VA on held-out answers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_times(axes: Axes, run: Run) -> None:
    keys = [key for key in TIMES if len(run.list_series(key)[0]) == len(run.train)]
    steps = [line["step"] for line in run.train]
    axes.stackplot(
        steps,
        [smooth(run.list_series(key)[1]) for key in keys],
        labels=[TIMES[key][0] for key in keys],
        colors=[TIMES[key][1] for key in keys],
        alpha=0.85,
    )
    axes.set(xlabel="optimizer step", ylabel="seconds", title="Where a step's time goes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _add_legend_below(axes)


def _draw_compared_times(axes: Axes, runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    left = [0.0] * len(runs)
    for key, (label, colour) in TIMES.items():
        means = [run.compute_mean(key) or 0.0 for run in runs]
        axes.barh(names, means, left=left, label=label, color=colour, alpha=0.85)
        left = [before + mean for before, mean in zip(left, means, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds per step, mean", title="Where a step's time goes")
    _add_legend_below(axes)


def _add_legend_below(axes: Axes) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


def _draw_svg(draw: Callable[[Axes], None], *, salt: str, size: tuple[float, float] = (4.6, 3.1)) -> str:
    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    foreground: Any = dict.fromkeys(coloured, FOREGROUND)
    # A salt of its own keeps the ids of several figures in one page apart.
    with matplotlib.rc_context({**RC, **foreground, "svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        title = axes.get_title(loc="left") or axes.get_title()
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(FOREGROUND, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # all figures have the same ids, and nothing refers to them
    return text.replace("<svg", f'<svg role="img" aria-label="{title.splitlines()[0]}, curves"', 1)
