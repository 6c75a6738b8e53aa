"""Draws the paper's figures from runs, each into a PNG file of its own; `figures.py` has the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vaopd.errors import NotFound
from vaopd.report import figures
from vaopd.report.curves import compute_seed_band, list_student_va, smooth_series
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.report.plots import COLOURS, MEAN_VA, RC, choose_colour, choose_styles, draw_band, finish, save
from vaopd.report.rollouts import FULL_COLOUR_NATS, make_run_views
from vaopd.run.records import Run

POINTS = 1000
"""A curve over all tokens is drawn through so many of them."""
LINE_CHARACTERS, MOST_LINES = 88, 12
"""Width of a line of tokens in figure 6, and how many of them are drawn of a long rollout."""
ACCURACY = "held-out accuracy, %"
ERRORS: Any = {"ecolor": "#444444", "capsize": 2}


class Drawn(NamedTuple):
    """A figure of the paper, e.g. "2a"; `path` is None where `why` says what its data take."""

    name: str
    title: str
    path: Path | None
    why: str = ""


def write_figures(runs: Sequence[Run], folder: Path) -> Iterator[Drawn]:
    """Writes the figures that these runs have the data of into `folder`, and yields all of them in order."""
    groups = group_runs(keep_finished(runs))
    for name, (title, draw) in FIGURES.items():
        with matplotlib.rc_context(RC):
            try:
                figure = draw(groups)
            except NotFound as lacking:
                yield Drawn(name, title, None, str(lacking))
                continue
            finish(figure)
            path = folder / f"figure-{name}.png"
            save(figure, path, dpi=110)
        yield Drawn(name, title, path)


def draw_mean_va(groups: Sequence[Group]) -> Figure:
    """Draws the teacher's VA of the rollouts, and beside it the student's own on held-out answers, where measured."""
    taught = figures.keep_measured(groups)
    panels = 1 + any(list_student_va(run) for group in taught for run in group.runs)
    figure = Figure(figsize=(4.8 * panels, 3.4), layout="constrained")
    left, *right = np.atleast_1d(figure.subplots(1, panels))
    left.set(title=MEAN_VA.title)
    for group, style in choose_styles(taught):
        band = compute_seed_band(group.runs, lambda run: smooth_series(run, MEAN_VA.key))
        draw_band(left, band, label=group.legend, linewidth=1.6, **style)
        for axes in right:
            axes.set(title="The student's own VA on held-out answers")
            _draw_student_va(axes, group, style)
    for axes in figure.axes:
        axes.set(xlabel="optimizer step", ylabel="nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    return figure


def _draw_student_va(axes: Axes, group: Group, style: dict[str, Any]) -> None:
    """Draws a group's line, if it was measured; a single run with its standard error."""
    runs = [run for run in group.runs if list_student_va(run)]
    if runs:
        steps, means, lows, highs = compute_seed_band(runs, list_student_va)
        if len(runs) == 1:
            found = [e.student_va for e in runs[0].evaluations if e.student_va is not None]
            lows, highs = [va.mean - va.error for va in found], [va.mean + va.error for va in found]
        legend = dataclasses.replace(group, runs=tuple(runs)).legend
        draw_band(axes, (steps, means, lows, highs), label=legend, marker="o", markersize=3, **style)


def draw_ranks(groups: Sequence[Group]) -> Figure:
    """Draws the share of all VA that the tokens of largest VA carry; the top 10 % are marked."""
    figure, axes = _begin("Share of all VA by token rank")
    axes.axvspan(0, figures.TOP_PERCENT, color="#e07b00", alpha=0.1, linewidth=0)
    axes.axvline(figures.TOP_PERCENT, color="#888888", linewidth=0.8, linestyle=":")
    for curve, style in _style(figures.rank_tokens(groups)):
        tokens = len(curve.xs) - 1
        top = curve.ys[math.ceil(tokens * figures.TOP_PERCENT / 100)]
        shown = np.unique(np.linspace(0, tokens, POINTS).astype(int))
        label = f"{curve.group.label}: the top {figures.TOP_PERCENT} % carry {top:.1f} %"
        axes.plot(np.asarray(curve.xs)[shown], np.asarray(curve.ys)[shown], label=label, **style)
    axes.set(xlabel="tokens, by VA from the largest down, %", ylabel="share of all VA, %", xlim=(0, 100), ylim=(0, 103))
    return figure


def draw_masks(groups: Sequence[Group]) -> Figure:
    """Draws the final accuracy of Standard OPD, and without the top, bottom or random tokens."""
    before, bars = figures.compare_masks(groups)
    figure, axes = _begin("Standard OPD with tokens masked", width=max(4.8, 1.1 * len(bars)))
    places = range(len(bars))
    edges = [[bar.mean - bar.low for bar in bars], [bar.high - bar.mean for bar in bars]]
    colours = [choose_colour(bar.variant) for bar in bars]
    axes.bar(places, [bar.mean for bar in bars], 0.6, color=colours, yerr=edges, **ERRORS)
    axes.axhline(before, color="#888888", linewidth=0.8, linestyle="--", label="before training")
    axes.set_xticks(places, [f"{textwrap.fill(bar.label, 16)}\n{bar.mean:.1f} %" for bar in bars], fontsize=8)
    highest = max(before, *(bar.high for bar in bars))
    axes.set(ylabel=ACCURACY, ylim=(0, min(100, 1.05 * highest) or 100))
    axes.grid(axis="x", visible=False)
    return figure


def draw_components(groups: Sequence[Group]) -> Figure:
    """Draws the differences from Standard OPD by benchmark, a bar for each component."""
    found = figures.compare_components(groups)
    names = list(dict.fromkeys(name for _, differences in found for name in differences))
    figure, axes = _begin("The components, by benchmark", width=max(4.8, 1.1 * len(names)))
    width = 0.8 / len(found)
    styles = choose_styles([group for group, _ in found])
    for number, ((group, differences), (_, line)) in enumerate(zip(found, styles, strict=True)):
        places = [names.index(name) + (number - (len(found) - 1) / 2) * width for name in differences]
        points, errors = zip(*differences.values(), strict=True)
        hatch = "" if line["linestyle"] == "-" else "//"  # of one objective with other settings
        style: Any = {"color": line["color"], "hatch": hatch, "edgecolor": "white", "label": group.legend, **ERRORS}
        axes.bar(places, points, width * 0.92, yerr=errors, **style)  # an unknown error, NaN, has no bar
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.set(ylabel="points over Standard OPD")
    axes.grid(axis="x", visible=False)
    return figure


def draw_trajectories(groups: Sequence[Group]) -> Figure:
    """Draws each objective's policies in the plane of mean VA and accuracy; arrows follow the training."""
    figure, axes = _begin("Mean VA and accuracy, from the ring on")
    for curve, style in _style(figures.trace_trajectories(groups)):
        points = list(zip(curve.xs, curve.ys, strict=True))
        axes.plot(curve.xs[1:], curve.ys[1:], "o", markersize=3, color=style["color"])
        for before, after in itertools.pairwise(points):
            axes.annotate("", after, before, arrowprops={"arrowstyle": "->", "shrinkA": 2, "shrinkB": 2, **style})
        axes.plot([], [], label=curve.group.legend, **style)
        axes.plot(*points[0], "o", markerfacecolor="none", color=style["color"])
        note = axes.annotate(f"step {curve.steps[-1]}", points[-1], (5, -9), textcoords="offset points", fontsize=7)
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    axes.set(xlabel="mean VA of the rollouts, nats", ylabel=ACCURACY)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(0.12)
    return figure


def draw_race(groups: Sequence[Group]) -> Figure:
    """Draws accuracy against time, and an arrow from Standard OPD's end to where VA-OPD is as accurate."""
    curves, baseline, leader, reached_s = figures.race(groups)
    longest = max(curve.xs[-1] for curve in curves)
    unit, name = (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    end_s, level = baseline.xs[-1], baseline.ys[-1]
    standard, other = baseline.group.label, leader.group.label
    title = f"{other} does not reach {standard}'s final accuracy"
    if level <= baseline.ys[0]:
        title = f"{standard} ends no better than it began"
    elif reached_s is not None:
        share = f"in {reached_s / end_s:.2f} × the time" if end_s else "at once"
        title = f"{other} reaches {standard}'s {level:.1f} % {share}"
    figure, axes = _begin(title)
    for curve, style in _style(curves):
        axes.plot([s / unit for s in curve.xs], curve.ys, marker="o", markersize=3, label=curve.group.legend, **style)
    if reached_s is not None:
        arrow = {"arrowstyle": "->", "color": "#444444", "linestyle": "--"}
        axes.annotate("", (reached_s / unit, level), (end_s / unit, level), arrowprops=arrow)
    else:
        axes.axhline(level, color=COLOURS["standard"], linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"{name} of training, without evaluations", ylabel=ACCURACY)
    return figure


def draw_rollout(groups: Sequence[Group]) -> Figure:
    """Draws one rollout three times, coloured by the VA of each student: its own two views."""
    run, record, readings = figures.choose_rollout(groups)
    tokens = record["tokens"]
    lines = list(break_lines(tokens))[:MOST_LINES]
    drawn = sum(map(len, lines))
    cut = f", the first {drawn} of {len(tokens)} tokens" if drawn < len(tokens) else ""
    full = max(FULL_COLOUR_NATS, *(max(va) for _, va in readings))  # so that students differ in colour
    rows = len(readings) * (len(lines) + 2) + 3
    figure = Figure(figsize=(9.2, max(3.0, 0.2 * rows)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 4))
    pictures, text = halves
    views = make_run_views(record["image_base64"], run)
    seen = ((views.original, "the image"), (views.degraded, "degraded view"))
    for axes, (image, title) in zip(pictures.subplots(2, 1), seen, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
    axes = text.subplots()
    axes.set(xlim=(0, LINE_CHARACTERS), ylim=(rows, 0))
    axes.set_axis_off()
    question = textwrap.shorten(record["question"], LINE_CHARACTERS, placeholder=" …")
    verdict = f"Answer: {record['answer']} (this rollout: {record['verdict']}{cut})"
    axes.text(0, 0.5, f"{question}  {verdict}", fontsize=8)
    at = 2.0
    for student, va in readings:
        axes.text(0, at, f"{student}: mean VA {np.mean(va):.3f} nats", fontsize=8, weight="bold")
        at += 1.2
        for line in lines:
            _draw_tokens(axes, [(tokens[index], (va[index] / full) ** 0.5) for index in line], at)
            at += 1
        at += 0.8
    axes.text(0, at, f"Full colour: {full:.1f} nats of the student's own VA; colour grows with its root", fontsize=7)
    return figure


def break_lines(tokens: Sequence[str], *, width: int = LINE_CHARACTERS) -> Iterator[list[int]]:
    """Yields the places of the tokens of each line of at most so many characters, one token at least.

    >>> list(break_lines(["ab", "cd", "e"], width=4))
    [[0, 1], [2]]
    """
    line: list[int] = []
    used = 0
    for index, token in enumerate(tokens):
        if line and used + len(token) > width:
            yield line
            line, used = [], 0
        line.append(index)
        used += len(token)
    yield line


def _draw_tokens(axes: Axes, tokens: Sequence[tuple[str, float]], y: float) -> None:
    """Draws one line of tokens, each with its colour from 0 to 1; monospaced, so that widths are known beforehand."""
    x = 0
    for text, strength in tokens:
        shown = text.replace("\n", "↵").replace("\t", "→")
        axes.add_patch(Rectangle((x, y - 0.45), len(shown), 0.9, color=(1.0, 0.55, 0.0, strength), linewidth=0))
        for place, character in enumerate(shown):
            axes.text(x + place + 0.5, y, character, family="monospace", fontsize=8, ha="center", va="center")
        x += len(shown)


def _begin(title: str, *, width: float = 4.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    return figure, figure.subplots(subplot_kw={"title": textwrap.fill(title, int(12 * width))})


def _style(curves: Sequence[figures.Curve]) -> Iterator[tuple[figures.Curve, dict[str, Any]]]:
    """Yields each curve with its colour and line style."""
    styles = choose_styles([curve.group for curve in curves])
    return ((curve, style) for curve, (_, style) in zip(curves, styles, strict=True))


FIGURES: dict[str, tuple[str, Callable[[Sequence[Group]], Any]]] = {
    "1-right": ("mean VA over training", draw_mean_va),
    "2a": ("share of VA by token rank", draw_ranks),
    "2b": ("Standard OPD with tokens masked", draw_masks),
    "4a": ("the components by benchmark", draw_components),
    "4b": ("trajectories in mean VA and accuracy", draw_trajectories),
    "5": ("accuracy against time", draw_race),
    "6": ("one rollout under three students", draw_rollout),
}
"""Name in the paper -> meaning, and the function that draws it."""
