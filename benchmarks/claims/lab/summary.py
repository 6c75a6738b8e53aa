"""Makes the tables and the figure of docs/claims.md from the laboratory's results; nothing in them is typed.

Differences are paired by seed: an objective's student and the baseline's saw the same pictures and random numbers.
The interval is Student's t, 95 %, over seeds. Where an experiment has several learning rates, each objective's own is
the one with the best mean on validation pictures; the numbers are those of the test pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from run import RESULTS, ROOT, STEPS, WINDOW, identify
from table import EXPERIMENTS, MAIN, WORLDS, Experiment, list_runs

PAGE, FIGURE = ROOT / "docs" / "claims.md", ROOT / "docs" / "images" / "claims-lab.png"
BEGIN, END = "<!-- From here to the end mark: written by `make claims-lab`. -->", "<!-- End mark. -->"
NAMES = {
    "standard": "Standard OPD",
    "va_opd": "VA-OPD",
    "token_groups": "token groups alone",
    "token_groups_6_percent": "token groups alone, high fraction 6 %",
    "rollout_weights": "rollout weights alone",
    "rollout_weights_floor": "rollout weights alone, floor 0.02 nats",
    "view_divergence": "groups by view divergence",
    "view_divergence_and_rollouts": "groups by view divergence, and rollout weights",
    "absolute": "groups by absolute difference",
    "expected": "groups by expected VA",
    "mask_top": "without the top 10 % by VA",
    "mask_bottom": "without the bottom 10 %, ties to the earlier",
    "mask_bottom_random_ties": "without the bottom 10 %, ties at random",
    "mask_random": "without a random 10 %",
}
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
"""Student's t, two-sided 95 %, by degrees of freedom."""
MIN_SEEDS = 5
BASE, BASE_RATE = EXPERIMENTS[0], 1e-3
TUNED = [e for e in EXPERIMENTS if len(e.rates) > 1]
"""The experiments with several learning rates, one of each world."""
Runs = dict[int, dict[str, Any]]
"""Seed → the numbers of its run."""
Row = Iterable[object]


class Difference(NamedTuple):
    """Mean of paired differences, half of the 95 % interval, seeds above 0 and seeds in all."""

    mean: float
    half: float
    above: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f}".replace("-", "−") + f" ± {self.half:.3f} ({self.above}/{self.seeds})"


class Results:
    """The runs that there are, by experiment."""

    def __init__(self, runs: Sequence[dict[str, Any]]) -> None:
        self._runs: dict[tuple[Any, ...], Runs] = {}
        for run in runs:
            key = (run["world"], run["prompts"], run["siblings"], run["objective"], run["rate"])
            self._runs.setdefault(key, {})[run["seed"]] = run

    def find(self, e: Experiment, name: str, rate: float) -> Runs:
        """Returns an objective's runs at a rate; empty where there are fewer than five seeds."""
        found = self._runs.get((e.world, e.prompts, e.siblings, name, rate), {})
        return found if len(found) >= MIN_SEEDS else {}

    def tune(self, names: Sequence[str]) -> Iterator[tuple[Experiment, dict[str, tuple[float, Runs]]]]:
        """Yields each world's objectives at the rates with the best mean on validation pictures.

        The first objective has to be among those that there are, and another one.
        """
        for e in TUNED:
            tuned = {}
            for name in names:
                if found := [(rate, runs) for rate in e.rates if (runs := self.find(e, name, rate))]:
                    tuned[name] = max(found, key=lambda pair: mean_of(pair[1], "validation", "p_right"))
            if names[0] in tuned and len(tuned) > 1:
                yield e, tuned


def mean_of(runs: Runs, part: str, name: str) -> float:
    """Returns the mean over seeds; NaN where a number is missing from all."""
    values = [run[part][name] for run in runs.values() if run[part].get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def mean_curve(runs: Runs) -> list[float]:
    """Returns the mean over seeds of p(right digit) in the rollouts, by window of steps."""
    return [statistics.fmean(points) for points in zip(*(run["curve"] for run in runs.values()), strict=True)]


def compare(runs: Runs, baseline: Runs, name: str) -> Difference:
    """Compares a number of the test pictures with the baseline's, seed by seed."""
    found = [runs[seed]["test"][name] - baseline[seed]["test"][name] for seed in sorted(runs.keys() & baseline.keys())]
    half = T_975[len(found) - 1] * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(statistics.fmean(found), half, sum(value > 0 for value in found), len(found))


def make_tables(runs: Sequence[dict[str, Any]]) -> str:
    """Returns all tables as Markdown."""
    results, wanted = Results(runs), set(list_runs())
    there = sum(identify(run) in wanted for run in runs)
    parts = [f"{there} of the table's {len(wanted)} runs are done; rows without five seeds are left out."]
    for title, head, rows in (
        (
            "**The base world, by learning rate.** Differences are VA-OPD minus Standard OPD.",
            "learning rate | p(right digit): before, Standard, VA-OPD | difference | greedy reading | all five right | "
            "answer right | KL per other token | steps of VA-OPD to Standard's last p",
            _list_rates(results),
        ),
        (
            f"**The parts, other scores and the maskings** in the base world at {BASE_RATE:g}, minus Standard OPD.",
            "objective | p(right digit) | answer right | KL per other token | weight of read digits | "
            "siblings that count",
            _list_parts(results),
        ),
        (
            "**What decides**: every world, each objective at its own learning rate, minus Standard OPD.",
            " | ".join(
                ["world", "Standard: p(right digit), answers"]
                + [f"{NAMES[name]}: {what}" for what in ("p(right digit)", "answers") for name in MAIN[1:]]
                + ["rates"]
            ),
            _list_worlds(results),
        ),
        (
            "**Where the divergence lies** in each world, and how much the read digits weigh; means over the run.",
            "world | tokens that are read digits | share of KL on them | on misread ones | on tokens without VA | "
            "on tokens that VA overlooks | VA-OPD's weight of read digits | of misread ones",
            _list_regimes(results),
        ),
        (
            f"**Batches of other sizes** in the base world at {BASE_RATE:g}: VA-OPD minus Standard OPD.",
            "prompts × siblings | p(right digit) | answer right",
            _list_sizes(results),
        ),
    ):
        lines = [f"| {head} |", f"| {' | '.join(['---'] * len(head.split(' | ')))} |"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        parts.append("\n".join([title, "", *lines]))
    return "\n\n".join(parts)


def _list_rates(results: Results) -> Iterator[Row]:
    for rate in BASE.rates:
        baseline, runs = (results.find(BASE, name, rate) for name in ("standard", "va_opd"))
        if baseline and runs:
            levels = [
                mean_of(baseline, "before", "p_right"),
                *(mean_of(r, "test", "p_right") for r in (baseline, runs)),
            ]
            names = ("p_right", "greedy", "all_right", "answer", "kl_other")
            found = [compare(runs, baseline, name) for name in names]
            yield f"{rate:g}", ", ".join(f"{level:.3f}" for level in levels), *found, _say_speed(runs, baseline)


def _say_speed(runs: Runs, baseline: Runs) -> str:
    """Says after how many steps the mean curve has reached the baseline's last point."""
    mine, theirs = mean_curve(runs), mean_curve(baseline)
    reached = next((i for i, value in enumerate(mine) if value >= theirs[-1]), None)
    if reached is None:
        return "not reached"
    if reached == 0:
        return f"under {WINDOW}"
    part = (theirs[-1] - mine[reached - 1]) / (mine[reached] - mine[reached - 1])
    return f"{WINDOW * (reached - 0.5 + part):.0f} of {STEPS - WINDOW / 2:.0f}"


def _list_parts(results: Results) -> Iterator[Row]:
    baseline = results.find(BASE, "standard", BASE_RATE)
    for name in list(NAMES)[1:]:
        if baseline and (runs := results.find(BASE, name, BASE_RATE)):
            found = [compare(runs, baseline, each) for each in ("p_right", "answer", "kl_other")]
            weight, siblings = (mean_of(runs, "during", each) for each in ("weight_read", "effective_siblings"))
            yield NAMES[name], *found, f"{weight:.2f} ×", f"{siblings:.1f} of {BASE.siblings}"


def _list_worlds(results: Results) -> Iterator[Row]:
    measures = ("p_right", "answer")
    for e, tuned in results.tune(MAIN):
        _, baseline = tuned["standard"]
        levels = ", ".join(f"{mean_of(baseline, 'test', measure):.3f}" for measure in measures)
        found = [
            compare(tuned[name][1], baseline, measure) if name in tuned else "–"
            for measure in measures
            for name in MAIN[1:]
        ]
        rates = ", ".join(f"{tuned[name][0]:g}" if name in tuned else "–" for name in MAIN)
        yield f"{e.world}: {WORLDS[e.world].meaning}", levels, *found, rates


def _list_regimes(results: Results) -> Iterator[Row]:
    names = ("tokens_read", *(f"kl_share_{part}" for part in ("read", "misread", "blind", "overlooked")))
    for e, tuned in results.tune(("standard", "va_opd")):
        shares = [mean_of(tuned["standard"][1], "during", name) for name in names]
        weights = [mean_of(tuned["va_opd"][1], "during", name) for name in ("weight_read", "weight_misread")]
        said = ["–" if math.isnan(share) else f"{100 * share:.0f} %" for share in shares]
        yield e.world, *said, *("–" if math.isnan(weight) else f"{weight:.2f} ×" for weight in weights)


def _list_sizes(results: Results) -> Iterator[Row]:
    for e in (BASE, *(e for e in EXPERIMENTS if (e.prompts, e.siblings) != (8, 4))):
        baseline, runs = (results.find(e, name, BASE_RATE) for name in ("standard", "va_opd"))
        if baseline and runs:
            yield f"{e.prompts} × {e.siblings}", *(compare(runs, baseline, each) for each in ("p_right", "answer"))


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the differences of every world, and the base world's curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from vaopd.report.plots import COLOURS, RC

    colours = {"standard": COLOURS["standard"], "va_opd": COLOURS["va_opd"], "view_divergence": COLOURS["token_groups"]}
    results, shown = Results(runs), []
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        for e, tuned in results.tune(MAIN):
            _, standard = tuned["standard"]
            for offset, name in ((-0.14, "va_opd"), (0.14, "view_divergence")):
                if name in tuned:
                    mean, half, *_ = compare(tuned[name][1], standard, "p_right")
                    style: dict[str, Any] = {"fmt": "o", "color": colours[name], "markersize": 4, "capsize": 2}
                    style["label"] = None if shown else NAMES[name]
                    left.errorbar(mean, len(shown) + offset, xerr=half, **style)
            shown.append(f"{e.world}\n{100 * mean_of(standard, 'during', 'kl_share_read'):.0f} % of KL on digits")
        left.axvline(0, color="#888888", linewidth=0.8)
        left.set_yticks(range(len(shown)), shown, fontsize=8)
        left.invert_yaxis()
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
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    draw(runs, FIGURE)
    print(f"{PAGE} and {FIGURE}")


if __name__ == "__main__":
    main()
