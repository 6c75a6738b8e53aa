"""Draws the paper's figures from runs, each into a PNG file of its own; `figures.py` has the numbers."""

from __future__ import annotations

import itertools
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
from vaopd.report.groups import Group, group_runs, keep_finished
from vaopd.report.plots import COLOURS, MEAN_VA, RC, choose_colour, choose_styles, draw_compared_metric, draw_student_va
from vaopd.report.rollouts import FULL_COLOUR_NATS, make_run_views
from vaopd.run.records import Run

POINTS = 1000
"""A curve over all tokens is drawn through so many of them."""
LINE_CHARACTERS, MOST_LINES = 88, 12
"""Width of a line of tokens in figure 6, and how many of them are drawn of a long rollout."""


class Drawn(NamedTuple):
    """A figure of the paper, e.g. "2a"; `path` is None where `why` says what its data take."""

    name: str
    title: str
    path: Path | None
    why: str = ""


def write_figures(runs: Sequence[Run], folder: Path) -> Iterator[Drawn]:
    """Writes the figures that these runs have the data of into `folder`, and yields all of them in order."""
    groups = group_runs(keep_finished(runs))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, draw) in FIGURES.items():
        with matplotlib.rc_context(RC):
            try:
                figure = draw(groups)
            except NotFound as lacking:
                yield Drawn(name, title, None, str(lacking))
                continue
            path = folder / f"figure-{name}.png"
            figure.savefig(path, dpi=110)
        yield Drawn(name, title, path)


def draw_mean_va(groups: Sequence[Group]) -> Figure:
    """Draws the teacher's VA of the rollouts, and beside it the student's own on held-out answers, where measured."""
    taught, measured = figures.select_measured(groups)
    panels = 2 if measured else 1
    figure = Figure(figsize=(4.8 * panels, 3.4), layout="constrained")
    left, *right = np.atleast_1d(figure.subplots(1, panels))
    draw_compared_metric(left, runs=taught, metric=MEAN_VA, band="range")
    for axes in right:
        draw_student_va(axes, measured)
    return figure


def draw_ranks(groups: Sequence[Group]) -> Figure:
    """Draws the share of all VA that the tokens of largest VA carry; the top 10 % are marked."""
    curves = figures.rank_tokens(groups)
    figure, axes = _begin()
    of_group = {id(curve.group): curve for curve in curves}
    axes.axvspan(0, 100 * figures.TOP, color="#e07b00", alpha=0.1, linewidth=0)
    axes.axvline(100 * figures.TOP, color="#888888", linewidth=0.8, linestyle=":")
    for group, style in choose_styles([curve.group for curve in curves]):
        curve = of_group[id(group)]
        shown = np.unique(np.linspace(0, len(curve.ranks) - 1, POINTS).astype(int))
        label = f"{group.label}: the top 10 % carry {100 * curve.top:.1f} %"
        axes.plot(100 * curve.ranks[shown], 100 * curve.shares[shown], label=label, **style)
    axes.set(xlabel="tokens, by VA from the largest down, %", ylabel="share of all VA, %", xlim=(0, 100), ylim=(0, 103))
    axes.set_title("Share of all VA by token rank")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_masks(groups: Sequence[Group]) -> Figure:
    """Draws the final accuracy of Standard OPD, and without the top, bottom or random tokens."""
    before, bars = figures.compare_masks(groups)
    figure, axes = _begin()
    places = range(len(bars))
    edges = [[bar.mean - bar.low for bar in bars], [bar.high - bar.mean for bar in bars]]
    colours = [choose_colour(bar.variant) for bar in bars]
    axes.bar(places, [bar.mean for bar in bars], 0.6, color=colours, yerr=edges, ecolor="#444444", capsize=3)
    for place, bar in enumerate(bars):
        axes.annotate(f"{bar.mean:.1f}", (place, bar.high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(before, color="#888888", linewidth=0.8, linestyle="--", label="before training")
    axes.set_xticks(places, [bar.label.replace(" masked", "\nmasked") for bar in bars], fontsize=8)
    axes.set(xlabel="", ylabel="held-out accuracy, %", title="Standard OPD with tokens masked")
    axes.set_ylim(top=1.25 * max(before, *(bar.high for bar in bars)))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def draw_components(groups: Sequence[Group]) -> Figure:
    """Draws the differences from Standard OPD by benchmark, a bar for each component."""
    found = figures.compare_components(groups)
    names = list(dict.fromkeys(entry.benchmark for entries in found.values() for entry in entries))
    figure = Figure(figsize=(max(4.8, 1.1 * len(names)), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    variants = {group.label: group.variant for group in groups}
    for number, (label, entries) in enumerate(found.items()):
        places = [names.index(entry.benchmark) + (number - (len(found) - 1) / 2) * width for entry in entries]
        errors = [entry.error or 0.0 for entry in entries]  # without an error: no bar of it
        style: Any = {"color": choose_colour(variants[label]), "ecolor": "#444444", "capsize": 2, "label": label}
        axes.bar(places, [entry.points for entry in entries], width * 0.92, yerr=errors, **style)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.set(xlabel="", ylabel="points over Standard OPD", title="The components, by benchmark")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8)
    return figure


def draw_trajectories(groups: Sequence[Group]) -> Figure:
    """Draws each objective's policies in the plane of mean VA and accuracy; arrows follow the training."""
    found = figures.trace_trajectories(groups)
    points = {id(group): path for group, path in found}
    figure, axes = _begin()
    for group, style in choose_styles([group for group, _ in found]):
        path = points[id(group)]
        axes.plot([p.mean_va for p in path], [p.accuracy for p in path], "o", markersize=3, color=style["color"])
        for before, after in itertools.pairwise(path):
            ends = ((after.mean_va, after.accuracy), (before.mean_va, before.accuracy))
            axes.annotate("", *ends, arrowprops={"arrowstyle": "->", "shrinkA": 2, "shrinkB": 2, **style})
        axes.plot([], [], label=group.legend, **style)
        axes.plot(path[0].mean_va, path[0].accuracy, "o", markerfacecolor="none", color=style["color"])
        end = (path[-1].mean_va, path[-1].accuracy)
        axes.annotate(f"step {path[-1].step}", end, (5, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="mean VA of the rollouts, nats", ylabel="held-out accuracy, %")
    axes.set_title("Mean VA and accuracy, from the ring on")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(0.12)
    axes.legend(fontsize=8)
    return figure


def draw_race(groups: Sequence[Group]) -> Figure:
    """Draws accuracy against time, and an arrow from Standard OPD's end to where VA-OPD is as accurate."""
    curves, baseline, reached_s = figures.race(groups)
    longest = max(curve.seconds[-1] for curve in curves)
    unit, name = (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    of_group = {id(curve.group): curve for curve in curves}
    figure, axes = _begin()
    for group, style in choose_styles([curve.group for curve in curves]):
        curve = of_group[id(group)]
        axes.plot([s / unit for s in curve.seconds], curve.accuracies, "o", markersize=3, color=style["color"])
        axes.plot([s / unit for s in curve.seconds], curve.accuracies, label=group.legend, **style)
    end_s, level = baseline.seconds[-1], baseline.accuracies[-1]
    title = "VA-OPD does not reach Standard OPD's final accuracy"
    if level <= baseline.accuracies[0]:
        title = "Standard OPD ends no better than it began"
    if reached_s is not None:
        ends = ((reached_s / unit, level), (end_s / unit, level))
        axes.annotate("", *ends, arrowprops={"arrowstyle": "->", "color": "#444444", "linestyle": "--"})
        share = f"{reached_s / end_s:.2f} × the time" if end_s else "at once"
        title = f"VA-OPD reaches Standard OPD's {level:.1f} % in {share}"
    else:
        axes.axhline(level, color=COLOURS["standard"], linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"{name} of training, without evaluations", ylabel="held-out accuracy, %", title=title)
    axes.legend(fontsize=8)
    return figure


def draw_rollout(groups: Sequence[Group]) -> Figure:
    """Draws one rollout three times, coloured by the VA of each student: its own two views."""
    shared = figures.choose_rollout(groups)
    lines = list(break_lines(shared.tokens))[:MOST_LINES]
    drawn = sum(map(len, lines))
    cut = f", the first {drawn} of {len(shared.tokens)} tokens" if drawn < len(shared.tokens) else ""
    full = max(FULL_COLOUR_NATS, *(max(reading.va) for reading in shared.readings))  # so that students differ in colour
    rows = len(shared.readings) * (len(lines) + 2) + 3
    figure = Figure(figsize=(9.2, max(3.0, 0.2 * rows)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 4))
    pictures, text = halves
    views = make_run_views(shared.image_base64, shared.run)
    seen = ((views.original, "the image"), (views.degraded, "degraded view"))
    for axes, (image, title) in zip(pictures.subplots(2, 1), seen, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
    axes = text.subplots()
    axes.set(xlim=(0, LINE_CHARACTERS), ylim=(rows, 0))
    axes.set_axis_off()
    question = textwrap.shorten(shared.question, LINE_CHARACTERS, placeholder=" …")
    axes.text(0, 0.5, f"{question}  Answer: {shared.answer} (this rollout: {shared.verdict}{cut})", fontsize=8)
    at = 2.0
    for student, va in shared.readings:
        axes.text(0, at, f"{student}: mean VA {np.mean(va):.3f} nats", fontsize=8, weight="bold")
        at += 1.2
        for line in lines:
            _draw_tokens(axes, [(shared.tokens[index], (va[index] / full) ** 0.5) for index in line], at)
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
        shown = text.replace("\n", "↵")
        axes.add_patch(Rectangle((x, y - 0.45), len(shown), 0.9, color=(1.0, 0.55, 0.0, strength), linewidth=0))
        for place, character in enumerate(shown):
            axes.text(x + place + 0.5, y, character, family="monospace", fontsize=8, ha="center", va="center")
        x += len(shown)


def _begin() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    return figure, figure.subplots()


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
