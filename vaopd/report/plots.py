"""Draws curves by matplotlib, for image files; the page draws its own (`charts.py`)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaopd.errors import InvalidInput
from vaopd.files.durable import atomic_file
from vaopd.report.charts import COLOURS, MEAN_VA, choose_colour, describe_band, style_groups
from vaopd.report.curves import Band, seed_band
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.run.records import Run

__all__ = ["COLOURS", "MEAN_VA", "RC", "choose_colour", "choose_styles", "draw_band", "finish"]

RC: Any = {  # matplotlib types the keys one by one
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3.2,  # a whole period of the longest dashes
    "text.parse_math": False,  # questions and answers have unbalanced $ and LaTeX that matplotlib can't read
}
LEGEND_LINE_INCHES = 0.18
LEGEND_CHARACTERS_PER_INCH = 13


def save_comparison(runs: Sequence[Run], path: Path, *, band: str) -> None:
    """Writes the accuracy curves as an image file. Raises InvalidInput for a suffix that names no format."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        draw_comparison(figure.subplots(), runs, band=band)
        finish(figure)
        save(figure, path, dpi=160)


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Writes a figure as an image file. Raises InvalidInput for a suffix that names no format."""
    if (suffix := path.suffix[1:].lower()) not in figure.canvas.get_supported_filetypes():
        raise InvalidInput(f"{path} has no suffix that matplotlib can write; use .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format=suffix, dpi=dpi)


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
            draw_band(axes, seed_band(group.runs, band=band), label=group.legend, marker="o", markersize=3, **style)
            notes.append(f"line: mean; {describe_band(band)}")
    axes.set(xlabel="optimizer step", ylabel="%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Held-out accuracy\n" + "\n".join(dict.fromkeys(notes)), fontsize=9)


def choose_styles(groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Yields each group with its colour and line style, as matplotlib takes them."""
    for group, colour, dash in style_groups(groups):
        yield group, {"color": colour, "linestyle": (0, [float(part) for part in dash.split()]) if dash else "-"}


def draw_band(axes: Axes, band: Band, **style: Any) -> None:
    """Draws the mean as a line and the band around it."""
    steps, means, lows, highs = band
    axes.plot(steps, means, **style)
    axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.2, linewidth=0)


def finish(figure: Figure) -> None:
    """Puts one legend below all axes, where it covers no data, and leaves out ticks that no share can have."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_ylabel().endswith("%"):
            low, high = axes.get_ylim()
            axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= min(high, 100)])
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        width, height = figure.get_size_inches()
        names = [textwrap.fill(name, int(LEGEND_CHARACTERS_PER_INCH * width)) for name in entries]
        figure.set_size_inches(width, height + LEGEND_LINE_INCHES * "\n".join([*names, ""]).count("\n"))
        figure.legend(list(entries.values()), names, loc="outside lower left")
