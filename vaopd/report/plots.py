"""Draws curves by matplotlib, for image files; the page draws its own (`charts.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaopd.errors import InvalidInput
from vaopd.report.charts import COLOURS, MEAN_VA, Metric, choose_colour, describe_band, style_groups
from vaopd.report.curves import compute_seed_band, list_student_va, seed_band, smooth_series
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.run.records import Run

__all__ = ["COLOURS", "MEAN_VA", "RC", "choose_colour", "choose_styles", "draw_compared_metric", "draw_student_va"]

RC: Any = {  # matplotlib types the keys one by one
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}


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
            notes.append(f"line: mean; {describe_band(band)}")
    axes.set(xlabel="optimizer step", ylabel="%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Held-out accuracy\n" + "\n".join(dict.fromkeys(notes)), fontsize=9)
    axes.legend()


def choose_styles(groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Yields each group with its colour and line style, as matplotlib takes them."""
    for group, colour, dash in style_groups(groups):
        yield group, {"color": colour, "linestyle": (0, [float(part) for part in dash.split()]) if dash else "-"}


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
