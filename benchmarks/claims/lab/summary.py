"""Makes the tables and the figure of docs/when_va_opd_helps.md from the laboratory's results; nothing in them is typed.

Differences are paired by seed: an objective's student and the baseline's saw the same pictures and random numbers.
The interval is Student's t, 95 %, over seeds. Where an experiment has several learning rates, each objective's own is
the one with the best mean on validation pictures; the numbers are those of the test pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from run import EXPERIMENTS, LONG, MAIN, RESULTS, ROOT, STEPS, WINDOW, Experiment, identify, list_runs
from worlds import WORLDS

sys.path.append(str(Path(__file__).parents[1]))
from paired import PAGE, Difference, summarise_differences, write_tables

FIGURE = ROOT / "docs" / "images" / "claims-lab.png"
BEGIN, END = "<!-- From here to the end mark: written by `make claims-lab`. -->", "<!-- End mark. -->"
NAMES = {
    "standard": "Standard OPD",
    "va_opd": "VA-OPD",
    "token_groups": "token groups alone",
    "token_groups_6_percent": "token groups alone, high fraction 6 %",
    "rollout_weights": "rollout weights alone",
    "rollout_weights_floor": "rollout weights alone, floor 0.02 nats",
    "rollout_weights_sum": "rollout weights alone, by the sum of VA",
    "view_divergence": "groups by view divergence",
    "view_divergence_and_rollouts": "groups by view divergence, and rollout weights",
    "absolute": "groups by absolute difference",
    "expected": "groups by expected VA",
    "mask_top": "without the top 10 % by VA",
    "mask_bottom": "without the bottom 10 %, ties to the earlier",
    "mask_bottom_random_ties": "without the bottom 10 %, ties at random",
    "mask_random": "without a random 10 %",
}
MIN_SEEDS = 5
BASE, BASE_RATE = EXPERIMENTS[0], 1e-3
MEASURES = (("p_right", "p(right digit)"), ("answer", "answers"))
Row = Iterable[object]
Runs = dict[int, dict[str, Any]]
"""Seed → the numbers of its run."""


class Results:
    """The runs that there are, by experiment."""

    def __init__(self, runs: Sequence[dict[str, Any]]) -> None:
        self._runs: dict[tuple[Any, ...], Runs] = {}
        for run in runs:
            key = (run["world"], run["prompts"], run["siblings"], run["objective"], run["rate"], identify(run).steps)
            self._runs.setdefault(key, {})[run["seed"]] = run

    def find(self, e: Experiment, name: str, rate: float) -> Runs:
        """Returns an objective's runs at a rate; empty where there are fewer than five seeds."""
        found = self._runs.get((e.world, e.prompts, e.siblings, name, rate, e.steps), {})
        return found if len(found) >= MIN_SEEDS else {}

    def tune(self) -> Iterator[tuple[Experiment, dict[str, tuple[float, Runs]]]]:
        """Yields the main objectives of each world that has the baseline, at the rates best on validation pictures."""
        for e in EXPERIMENTS:
            found = {n: [(rate, runs) for rate in e.rates if (runs := self.find(e, n, rate))] for n in MAIN}
            if len(e.rates) > 1 and found["standard"] and found["va_opd"]:
                tried = {
                    n: max(pairs, key=lambda p: mean_of(p[1], "validation")) for n, pairs in found.items() if pairs
                }
                yield e, tried


def mean_of(runs: Runs, part: str, name: str = "p_right") -> float:
    """Returns the mean over seeds; NaN where a number is missing from all."""
    values = [run[part][name] for run in runs.values() if run[part].get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def mean_curve(runs: Runs) -> list[float]:
    """Returns the mean over seeds of p(right digit) in the rollouts, by window of steps."""
    return [statistics.fmean(points) for points in zip(*(run["curve"] for run in runs.values()), strict=True)]


def compare(runs: Runs, baseline: Runs, name: str) -> Difference:
    """Compares a number of the test pictures with the baseline's, seed by seed."""
    seeds = sorted(runs.keys() & baseline.keys())
    return summarise_differences([runs[seed]["test"][name] - baseline[seed]["test"][name] for seed in seeds])


def say_speed(runs: Runs, baseline: Runs) -> str:
    """Says after how many steps the mean curve has reached the baseline's last point."""
    mine, last = mean_curve(runs), mean_curve(baseline)[-1]
    reached = next((i for i, value in enumerate(mine) if value >= last), None)
    if not reached:
        return "not reached" if reached is None else f"under {WINDOW}"
    part = (last - mine[reached - 1]) / (mine[reached] - mine[reached - 1])
    return f"{WINDOW * (reached - 0.5 + part):.0f} of {STEPS - WINDOW / 2:.0f}"


def make_tables(runs: Sequence[dict[str, Any]]) -> str:
    """Returns all tables as Markdown."""
    results, wanted = Results(runs), set(list_runs())
    there = sum(run in wanted for run in map(identify, runs))
    parts = [f"{there} of the table's {len(wanted)} runs are done; rows without five seeds are left out."]
    for title, head, list_rows in TABLES:
        lines = [head, " | ".join(["---"] * len(head.split(" | ")))]
        lines += [" | ".join(map(str, row)) for row in list_rows(results)]
        parts.append("\n".join([title, "", *(f"| {line} |" for line in lines)]))
    return "\n\n".join(parts)


def _list_rates(results: Results) -> Iterator[Row]:
    for rate in BASE.rates:
        standard, va, divergence = (results.find(BASE, name, rate) for name in MAIN)
        if standard and va:
            p = [mean_of(standard, "before"), mean_of(standard, "test"), mean_of(va, "test")]
            found = [compare(va, standard, name) for name in ("p_right", "greedy", "all_right", "answer", "kl_other")]
            other = compare(divergence, standard, "p_right") if divergence else "–"
            yield f"{rate:g}", ", ".join(f"{value:.3f}" for value in p), *found, say_speed(va, standard), other


def _list_parts(results: Results) -> Iterator[Row]:
    standard = results.find(BASE, "standard", BASE_RATE)
    for name in list(NAMES)[1:]:
        if standard and (runs := results.find(BASE, name, BASE_RATE)):
            found = [compare(runs, standard, measure) for measure in ("p_right", "answer", "kl_other")]
            weight, siblings = (mean_of(runs, "during", each) for each in ("weight_read", "effective_siblings"))
            yield NAMES[name], *found, f"{weight:.2f} ×", f"{siblings:.1f} of {BASE.siblings}"


def _list_worlds(results: Results) -> Iterator[Row]:
    for e, tuned in results.tune():
        standard = tuned["standard"][1]
        levels = ", ".join(f"{mean_of(standard, 'test', measure):.3f}" for measure, _ in MEASURES)
        pairs = [(name, measure) for measure, _ in MEASURES for name in MAIN[1:]]
        found = [compare(tuned[name][1], standard, measure) if name in tuned else "–" for name, measure in pairs]
        rates = ", ".join(f"{tuned[name][0]:g}" if name in tuned else "–" for name in MAIN)
        yield f"{e.world}: {WORLDS[e.world].meaning}", levels, *found, rates


def _list_regimes(results: Results) -> Iterator[Row]:
    names = ("tokens_read", *(f"kl_share_{part}" for part in ("read", "misread", "blind", "overlooked")))
    for e, tuned in results.tune():
        shares = [mean_of(tuned["standard"][1], "during", name) for name in names]
        weights = [mean_of(tuned["va_opd"][1], "during", name) for name in ("weight_read", "weight_misread")]
        said = ["–" if math.isnan(share) else f"{100 * share:.0f} %" for share in shares]
        yield e.world, *said, *(f"{weight:.2f} ×" for weight in weights)


def _list_sizes(results: Results) -> Iterator[Row]:
    for e in (BASE, *(e for e in EXPERIMENTS if (e.prompts, e.siblings) != (8, 4))):
        standard, va = (results.find(e, name, BASE_RATE) for name in MAIN[:2])
        if standard and va:
            yield f"{e.prompts} × {e.siblings}", *(compare(va, standard, measure) for measure, _ in MEASURES)


def _list_lengths(results: Results) -> Iterator[Row]:
    e = EXPERIMENTS[-1]
    standard = results.find(e, "standard", e.rates[0])
    for name in e.objectives:
        if standard and (runs := results.find(e, name, e.rates[0])):
            tokens = f"{mean_of(runs, 'before', 'response_tokens'):.1f}, {mean_of(runs, 'test', 'response_tokens'):.1f}"
            found = [compare(runs, standard, measure) for measure in ("response_tokens", "p_right", "answer")]
            yield NAMES[name], tokens, *(["–"] * 3 if name == "standard" else found)


_COMPARED = " | ".join(f"{NAMES[name]}: {title}" for _, title in MEASURES for name in MAIN[1:])
TABLES: tuple[tuple[str, str, Callable[[Results], Iterator[Row]]], ...] = (
    (
        "**The base world, by learning rate.** Differences are VA-OPD minus Standard OPD.",
        "learning rate | p(right digit): before, Standard, VA-OPD | difference | greedy reading | all five right | "
        "answer right | KL per other token | steps of VA-OPD to Standard's last p | "
        "groups by view divergence: p(right digit)",
        _list_rates,
    ),
    (
        f"**The parts, other scores and the maskings** in the base world at {BASE_RATE:g}, minus Standard OPD.",
        "objective | p(right digit) | answer right | KL per other token | weight of read digits | siblings that count",
        _list_parts,
    ),
    (
        "**What decides**: every world, each objective at its own learning rate, minus Standard OPD.",
        f"world | Standard: p(right digit), answers | {_COMPARED} | rates",
        _list_worlds,
    ),
    (
        "**Where the divergence lies** in each world, and how much read digits weigh; means over the run.",
        "world | tokens that are read digits | share of KL on them | on misread ones | on tokens without VA | "
        "on tokens that VA overlooks | VA-OPD's weight of read digits | of misread ones",
        _list_regimes,
    ),
    (
        f"**Batches of other sizes** in the base world at {BASE_RATE:g}: VA-OPD minus Standard OPD.",
        "prompts × siblings | p(right digit) | answer right",
        _list_sizes,
    ),
    (
        f"**Length**: the world of phrases after {LONG} steps at {BASE_RATE:g}; differences are minus Standard OPD.",
        "objective | tokens of an answer: before, after | tokens | p(right digit) | answer right",
        _list_lengths,
    ),
)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the differences of every world, and the base world's curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from vaopd.report.plots import COLOURS, RC

    colours = dict(zip(MAIN, (COLOURS[name] for name in ("standard", "va_opd", "token_groups")), strict=True))
    results, shown = Results(runs), []
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        for e, tried in results.tune():
            _, standard = tried["standard"]
            for offset, name in ((-0.14, "va_opd"), (0.14, "view_divergence")):
                if name in tried:
                    mean, half, *_ = compare(tried[name][1], standard, "p_right")
                    style: dict[str, Any] = {"fmt": "o", "color": colours[name], "markersize": 4, "capsize": 2}
                    style["label"] = None if shown else NAMES[name]
                    left.errorbar(mean, len(shown) + offset, xerr=half, **style)
            share = mean_of(standard, "during", "kl_share_read")
            shown.append(f"{e.world}\n{100 * share:.0f} % of KL on digits")
        left.axvline(0, color="#888888", linewidth=0.8)
        left.set_yticks(range(len(shown)), shown, fontsize=8)
        left.set_ylim(len(shown) - 0.5, -0.5)
        left.set(xlabel="p(right digit) minus Standard OPD's; 95 % over seeds", title="By world, each at its own rate")
        for name in MAIN:
            if curves := results.find(BASE, name, BASE_RATE):
                steps = [WINDOW * (i + 0.5) for i in range(STEPS // WINDOW)]
                right.plot(steps, mean_curve(curves), color=colours[name], marker=".", label=NAMES[name])
        right.set(xlabel="step", ylabel="p(right digit) in the rollouts", title=f"Base world, rate {BASE_RATE:g}")
        left.legend(fontsize=8)
        right.legend(fontsize=8)
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    runs = json.loads(options.results.read_text())["runs"]
    tables = make_tables(runs)
    if options.print:
        print(tables)
        return
    write_tables(tables, begin=BEGIN, end=END)
    draw(runs, FIGURE)
    print(f"{PAGE} and {FIGURE}")


if __name__ == "__main__":
    main()
