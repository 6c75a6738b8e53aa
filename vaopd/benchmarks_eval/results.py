"""Averages the runs of each benchmark: the table, summary.json, and the official repository's results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.benchmarks_eval.catalogue import BENCHMARKS, Benchmark


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScore:
    """The official metrics of one run, which has one answer to every question."""

    sample: int
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """A benchmark's runs; none where it was not judged. cut_off: answers that ended at the token limit."""

    benchmark: Benchmark
    runs: Sequence[RunScore]
    questions: int
    cut_off: int = 0

    @property
    def score(self) -> float | None:
        """The mean score of the runs in percent; None if not judged."""
        scores = self._scores()
        return statistics.fmean(scores) if scores else None

    @property
    def standard_error(self) -> float | None:
        """The sample standard deviation of the runs' scores over the root of their number; None for less than two."""
        scores = self._scores()
        return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None

    def _scores(self) -> list[float]:
        return [self.benchmark.score(run.metrics) for run in self.runs]


def average(results: Sequence[BenchmarkResult], area: str) -> float | None:
    """Returns the mean score of an area's benchmarks; None unless all of them have one, as in the paper's table."""
    wanted = [name for name, benchmark in BENCHMARKS.items() if benchmark.area == area]
    scores = {result.benchmark.name: result.score for result in results}
    found = [score for name in wanted if (score := scores.get(name)) is not None]
    return statistics.fmean(found) if len(found) == len(wanted) else None


def format_table(results: Sequence[BenchmarkResult], *, model: str, samples: int) -> str:
    """Formats the table in Markdown: percent, with the standard error over the runs."""
    lines = [
        f"{model}: avg@{samples}, percent ± standard error over the runs",
        "",
        "| benchmark | score | questions | cut off |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(f"| {result.benchmark.name} | {_format(result)} | {result.questions} | {result.cut_off} |")
    for area in ("math", "visual"):
        mean = average(results, area)
        lines.append(f"| {area} average | {'—' if mean is None else f'{mean:.2f}'} | | |")
    return "\n".join(lines) + "\n"


def make_summary(results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """Makes summary.json: scores in percent, None where there is none."""
    return {
        "benchmarks": {
            result.benchmark.name: {
                "score": result.score,
                "standard_error": result.standard_error,
                "runs": len(result.runs),
                "questions": result.questions,
                "cut_off": result.cut_off,
                "status": "scored" if result.runs else "not judged",
            }
            for result in results
        },
        "math_average": average(results, "math"),
        "visual_average": average(results, "visual"),
    }


def make_official(results: Sequence[BenchmarkResult], *, samples: int, judge_model: str | None) -> dict[str, Any]:
    """Makes results.json in the official repository's schema, version 1.

    It has the scored benchmarks only, and names the judge that was used: the official `va_opd.evaluation --results`
    refuses anything but all eight, eight samples and the paper's judge.
    """
    return {
        "schema_version": 1,
        "protocol": {
            "samples_per_prompt": samples,
            "student_temperature": 1.0,
            "aggregation": f"avg@{samples}",
            "prompt_policy": "released",
            "answer_policy": "first_committed",
            "judge_model": judge_model,
            "judge_temperature": 0.0,
            "judge_prompt_policy": "official_verbatim",
        },
        "benchmarks": {
            result.benchmark.name: {
                "split": result.benchmark.split,
                "metric_unit": result.benchmark.unit,
                "runs": [
                    {"sample_index": run.sample, "num_examples": run.num_examples, "metrics": dict(run.metrics)}
                    for run in result.runs
                ],
            }
            for result in results
            if result.runs
        },
    }


def _format(result: BenchmarkResult) -> str:
    if result.score is None:
        return "not judged"
    error = result.standard_error
    return f"{result.score:.2f}" if error is None else f"{result.score:.2f} ± {error:.2f}"
