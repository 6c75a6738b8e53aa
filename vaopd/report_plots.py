"""The report's curves, by matplotlib: inline SVG that follows the page's light or dark colours, or image files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaopd.errors import InvalidInput
from vaopd.report import Run

# matplotlib knows no currentColor: this stands for it until the SVG is text.
FOREGROUND = "#010203"
VARIANT_NAMES = {
    "va_opd": "VA-OPD",
    "standard": "Standard OPD",
    "rollout_weights": "rollout weights only",
    "token_groups": "token groups only",
    "masked": "masked",
}
# Distinguishable on white and on black, and by people who see red and green alike.
COLOURS = {
    "va_opd": "#e07b00",
    "standard": "#2f86d6",
    "rollout_weights": "#9a60c8",
    "token_groups": "#1f9e89",
    "masked": "#d04a86",
}
RC: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}
TIMES = ("wait_s", "score_s", "forward_backward_s", "publish_s")


def run_svgs(run: Run) -> Iterator[str]:
    """One figure for each thing worth a look; what the run didn't record is left out."""
    if run.evaluations:
        yield _svg(lambda axes: draw_comparison(axes, [run], band="range"), salt=f"{run.name}-accuracy")
    plots: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("loss and KL", ("loss", "kl_mean", "kl_high", "kl_low"), "nats"),
        ("mean visual advantage", ("mean_va",), "nats"),
        ("share of the top 10 % of tokens in all VA", ("va_top10_share",), "share"),
    )
    for title, keys, unit in plots:
        present = [key for key in keys if any(_is_number(line.get(key)) for line in run.train)]
        if present:
            draw = partial(_draw_lines, run=run, keys=present, title=title, unit=unit)
            yield _svg(draw, salt=f"{run.name}-{title}")
    if any(_is_number(line.get(key)) for line in run.train for key in TIMES):
        yield _svg(lambda axes: _draw_times(axes, run), salt=f"{run.name}-times")


def comparison_svg(runs: Sequence[Run], *, band: str) -> str:
    return _svg(lambda axes: draw_comparison(axes, runs, band=band), salt="comparison", size=(6.4, 3.8))


def save_comparison(runs: Sequence[Run], path: Path, *, band: str) -> None:
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        draw_comparison(figure.subplots(), runs, band=band)
        try:
            figure.savefig(path, dpi=160)
        except ValueError:
            raise InvalidInput(f"{path} has no suffix that matplotlib can write; use .png, .svg or .pdf") from None


def draw_comparison(axes: Axes, runs: Sequence[Run], *, band: str) -> None:
    """Held-out accuracy by objective. One seed: error bars of its standard error. Several: mean and band."""
    variants: dict[str, list[Run]] = {}
    for run in runs:
        if run.evaluations:
            variants.setdefault(run.variant, []).append(run)
    if not variants:
        raise InvalidInput(f"no evaluation in {', '.join(str(run.folder) for run in runs)}; see evaluation.every")
    notes = []
    for variant, members in variants.items():
        colour = COLOURS.get(variant, "#888888")
        name = VARIANT_NAMES.get(variant, variant)
        if len(members) == 1:
            evaluations = members[0].evaluations
            axes.errorbar(
                [e.step for e in evaluations],
                [100 * e.accuracy for e in evaluations],
                yerr=[100 * e.standard_error for e in evaluations],
                color=colour, label=name, marker="o", markersize=3, capsize=2,
            )  # fmt: skip
            notes.append("bars: one standard error over problems")
        else:
            steps, means, lows, highs = seed_band(members, band=band)
            axes.plot(steps, means, color=colour, label=f"{name}, {len(members)} seeds", marker="o", markersize=3)
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
            what = "lowest to highest seed" if band == "range" else "± one standard error over seeds"
            notes.append(f"line: mean; band: {what}")
    axes.set(xlabel="optimizer step", ylabel="held-out accuracy, %")
    axes.set_title("\n".join(dict.fromkeys(notes)), fontsize=8, loc="left", alpha=0.8)
    axes.legend()


def seed_band(runs: Sequence[Run], *, band: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all seeds have, and at each the mean, the lower and the upper edge of the band, in percent."""
    by_step = [{e.step: 100 * e.accuracy for e in run.evaluations} for run in runs]
    steps = sorted(set.intersection(*(set(accuracies) for accuracies in by_step)))
    means, lows, highs = [], [], []
    for step in steps:
        values = [accuracies[step] for accuracies in by_step]
        mean = sum(values) / len(values)
        if band == "range":
            low, high = min(values), max(values)
        else:
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            error = math.sqrt(variance / len(values))
            low, high = mean - error, mean + error
        means.append(mean)
        lows.append(low)
        highs.append(high)
    return steps, means, lows, highs


def _draw_lines(axes: Axes, *, run: Run, keys: Sequence[str], title: str, unit: str) -> None:
    for key in keys:
        points = [(line["step"], line[key]) for line in run.train if _is_number(line.get(key))]
        axes.plot([step for step, _ in points], [value for _, value in points], label=key, linewidth=1)
    axes.set(xlabel="optimizer step", ylabel=unit, title=title)
    axes.set_ylim(bottom=0, top=1.05 if unit == "share" else None)
    if len(keys) > 1:
        axes.legend()


def _draw_times(axes: Axes, run: Run) -> None:
    keys = [key for key in TIMES if all(_is_number(line.get(key)) for line in run.train)]
    steps = [line["step"] for line in run.train]
    axes.stackplot(steps, [[line[key] for line in run.train] for key in keys], labels=keys, alpha=0.8)
    axes.set(xlabel="optimizer step", ylabel="seconds", title="where a step's time goes")
    axes.legend()


def _svg(draw: Callable[[Axes], None], *, salt: str, size: tuple[float, float] = (4.6, 3.0)) -> str:
    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    foreground: Any = dict.fromkeys(coloured, FOREGROUND)
    # A salt of its own keeps the ids of several figures in one page apart.
    with matplotlib.rc_context({**RC, **foreground, "svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(FOREGROUND, "currentColor")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
