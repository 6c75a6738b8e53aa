"""`make claims`: which runs follow from those that are finished, and what its table says of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDERS = [str(Path(__file__).parents[2] / "benchmarks" / "claims" / part) for part in ("system", "")]
MODULES = ("table", "run", "summary", "paired")


@pytest.fixture(scope="module")
def claims() -> Iterator[Any]:
    """The modules, which import each other by their own names, as the laboratory's do."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def make_line(run: Any, p_right: float) -> dict[str, Any]:
    numbers = dict.fromkeys(("greedy_reading", "all_right", "accuracy", "accuracy_greedy", "kl_other"), 0.5)
    measured = {"p_right": p_right, "response_tokens": 88.0, **numbers}
    evaluations = [{"step": 40, "accuracy": 0.5, "student_va": 0.1}]
    return {**vars(run), "validation": measured, "test": measured, "evaluations": evaluations, "minutes": 3.0}


def test_the_first_runs_are_paired_and_chosen_rates_follow_the_tried_ones(claims: Any) -> None:
    table = claims.table
    first = list(table.list_runs({}))

    assert [(run.arm, run.rate, run.seed) for run in first[:16:3]] == [
        *(("standard", 1e-3, seed) for seed in range(5)),
        ("standard", 3e-4, 0),
    ]
    assert len({run.name for run in first}) == len(set(first))
    assert not [run for run in first if run.teacher != table.TEACHERS[0]]  # their rate isn't known yet
    # At 3e-3 all arms read best on validation pictures, so they have their other seeds there, and the other teachers'.
    done = {run: make_line(run, 0.9 if run.rate == 3e-3 else 0.6) for run in first}
    assert table.choose_rate("standard", done) == 3e-3
    after = [run for run in table.list_runs(done) if run not in done]
    assert {(run.arm, run.rate, run.seed) for run in after if run.arm == "view_divergence"} == {
        ("view_divergence", 3e-3, seed) for seed in (2, 3, 4)
    }
    # An arm that was tried with one seed has three at the chosen rate, and where arms differ.
    assert {(run.rate, run.seed) for run in after if run.arm == "mask_top"} == {
        (rate, seed) for rate in (3e-3, 3e-4) for seed in (1, 2)
    }
    assert {run.teacher for run in after if run.arm == "va_opd"} == set(table.TEACHERS)


def test_the_table_pairs_by_seed(claims: Any) -> None:
    """Differences of .1, .2 and .3 have the mean .2 and the interval 4.303·.1/√3; seed 3 has no partner."""
    table = claims.table
    seeds = {"standard": (0.5, 0.5, 0.5, 0.9), "va_opd": (0.6, 0.7, 0.8)}
    runs = [
        make_line(table.Run(arm=arm, rate=table.RATES[0], seed=seed), value)
        for arm, values in seeds.items()
        for seed, value in enumerate(values)
    ]

    report = claims.summary.make_report({"before": {}, "runs": runs})

    assert "7 runs, 21 minutes" in report
    assert "| VA-OPD | 0.001 | +0.200 ± 0.248 (3/3) | +0.000 ± 0.000 (0/3) |" in report
