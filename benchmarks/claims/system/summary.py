"""Makes the table of `make claims` from its results: every arm minus Standard OPD, paired by seed, on test pictures.

An arm is taken at the rate that validation has chosen, or before that at the table's first one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import RESULTS, identify
from table import ARMS, MAIN, NAMES, PROBLEMS, RATES, SLOW, TEACHERS, VARIED, Run, choose_rate

sys.path.append(str(Path(__file__).parents[1]))
from paired import summarise_differences, write_tables

MEASURES = {
    "p_right": "p(right digit)",
    "greedy_reading": "greedy reading",
    "all_right": "all five right",
    "accuracy": "answers, T = 1",
    "accuracy_greedy": "greedy answers",
    "kl_other": "KL per other token",
    "response_tokens": "tokens",
}
ANSWER_TOKENS, READ_TOKENS = 88, 5
BEGIN, END = "<!-- From here to the next mark: written by `make claims`. -->", "<!-- End of the system's tables. -->"
Lines = dict[Run, dict[str, Any]]


def make_report(results: dict[str, Any]) -> str:
    """Returns the tables as Markdown."""
    lines = {identify(line): line for line in results["runs"]}
    minutes = sum(line["minutes"] for line in lines.values())
    parts = [
        f"{len(lines)} runs, {minutes:.0f} minutes beside other work. Standard OPD's means on test pictures, and each "
        "other arm minus it, paired by seed: mean ± 95 % interval (in how many seeds above 0). Digits and answers are "
        "measured on the student's own answers at temperature 1, but for the greedy ones."
    ]
    if results["before"]:
        before = results["before"][TEACHERS[0]]["test"]
        kl_read, kl_all = READ_TOKENS * before["kl_read"], (ANSWER_TOKENS - READ_TOKENS) * before["kl_other"]
        parts.append(
            f"Before: p(right digit) {before['p_right']:.3f}, greedy reading {before['greedy_reading']:.3f}, answers "
            f"at temperature 1 {before['accuracy']:.3f}, greedy {before['accuracy_greedy']:.3f}; KL "
            f"{before['kl_read']:.2f} nats per read digit and {before['kl_other']:.2f} per other token, so "
            f"{kl_read / (kl_read + kl_all):.1%} of it on read digits."
        )
    head = ["arm", "rate", *MEASURES.values(), "own VA at the end, nats"]
    parts.append(_format(head, _list_arms(lines)))
    if rows := list(_list_steps(lines)):
        parts.append("Answers at temperature 1 during the runs, in the trainer's evaluations of 64 problems:\n\n")
        parts[-1] += _format(["step", *(NAMES[arm] for arm in MAIN)], rows)
    if rows := list(_list_rates(lines)):
        parts.append("By learning rate, seeds that both have:\n\n" + _format(["arm", "rate", *MEASURES.values()], rows))
    if rows := list(_list_varied(lines)):
        parts.append(
            "VA-OPD minus Standard OPD:\n\n" + _format(["teacher, problems", "rate", *MEASURES.values()], rows)
        )
    return "\n\n".join(parts) + "\n"


def _list_arms(lines: Lines) -> Iterator[list[str]]:
    baseline = _find(lines, "standard", choose_rate("standard", lines) or RATES[0])
    if not baseline:
        return
    for arm in ARMS:
        rate = choose_rate(arm, lines) or RATES[0]
        if runs := _find(lines, arm, rate):
            own = statistics.fmean(run["evaluations"][-1]["student_va"] for run in runs.values())
            means = {name: statistics.fmean(run["test"][name] for run in runs.values()) for name in MEASURES}
            cells = [f"{value:.3f}" for value in means.values()] if arm == "standard" else _compare(runs, baseline)
            yield [NAMES[arm], f"{rate:g}", *cells, f"{own:.3f}"]


def _list_steps(lines: Lines) -> Iterator[list[str]]:
    """Yields the mean accuracy of the main arms at each step that all of their runs have evaluated."""
    runs = {arm: _find(lines, arm, choose_rate(arm, lines) or RATES[0]).values() for arm in MAIN}
    found = {arm: [{e["step"]: e["accuracy"] for e in run["evaluations"]} for run in runs[arm]] for arm in MAIN}
    if all(found.values()):
        for step in sorted(set.intersection(*(set(curve) for curves in found.values() for curve in curves))):
            yield [str(step), *(f"{statistics.fmean(curve[step] for curve in found[arm]):.3f}" for arm in MAIN)]


def _list_rates(lines: Lines) -> Iterator[list[str]]:
    for rate in RATES:
        baseline = _find(lines, "standard", rate)
        for arm in ARMS:
            runs = _find(lines, arm, rate)
            if arm != "standard" and runs.keys() & baseline.keys():
                yield [NAMES[arm], f"{rate:g}", *_compare(runs, baseline)]


def _list_varied(lines: Lines) -> Iterator[list[str]]:
    """Yields each arm at its own chosen rate, and both at the slow one."""
    chosen = [choose_rate(arm, lines) or RATES[0] for arm in VARIED]
    for teacher, problems, rates in itertools.product(TEACHERS, PROBLEMS, (chosen, [SLOW] * len(VARIED))):
        found = [
            _find(lines, arm, rate, teacher=teacher, problems=problems) for arm, rate in zip(VARIED, rates, strict=True)
        ]
        if found[0].keys() & found[1].keys():
            yield [
                f"{teacher}, {problems}",
                " / ".join(dict.fromkeys(f"{r:g}" for r in rates)),
                *_compare(*found[::-1]),
            ]


def _find(lines: Lines, arm: str, rate: float, **other: Any) -> dict[int, dict[str, Any]]:
    """Returns seed → the run's line."""
    wanted = {run.seed: line for run, line in lines.items() if run == Run(arm=arm, rate=rate, seed=run.seed, **other)}
    return dict(sorted(wanted.items()))


def _compare(runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> list[str]:
    seeds = runs.keys() & baseline.keys()
    if not seeds:
        return ["–"] * len(MEASURES)
    return [
        str(summarise_differences([runs[seed]["test"][name] - baseline[seed]["test"][name] for seed in sorted(seeds)]))
        for name in MEASURES
    ]


def _format(head: list[str], rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page alone")
    report = make_report(json.loads(RESULTS.read_text()))
    print(report)
    if not parser.parse_args().print:
        write_tables(report, begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
