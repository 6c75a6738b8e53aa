"""Averages the runs of each benchmark: the table, summary.json, and the official repository's results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.benchmarks_eval.catalogue import BENCHMARKS, Benchmark


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """A benchmark's official metrics by sample index; none where it was not judged.

    cut_off: answers that ended at the token limit.
    """

    benchmark: Benchmark
    runs: Sequence[Mapping[str, float]]
    questions: int
    cut_off: int = 0

    @property
    def score(self) -> float | None:
        """The mean score of the runs in percent; None if not judged."""
        return statistics.fmean(scores) if (scores := self._list_scores()) else None

    @property
    def standard_error(self) -> float | None:
        """The sample standard deviation of the runs' scores over the root of their number; None for less than two."""
        scores = self._list_scores()
        return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None

    def _list_scores(self) -> list[float]:
        return [self.benchmark.score(run) for run in self.runs]


def average(results: Sequence[BenchmarkResult], area: str) -> float | None:
    """Returns the mean score of an area's benchmarks; None unless all of them have one, as in the paper's table."""
    scores = [r.score for r in results if r.benchmark.area == area and r.score is not None]
    complete = len(scores) == sum(benchmark.area == area for benchmark in BENCHMARKS)
    return statistics.fmean(scores) if complete else None


def format_table(results: Sequence[BenchmarkResult], *, model: str, samples: int) -> str:
    """Formats the table in Markdown: percent, with the standard error over the runs."""
    lines = [
        f"{model}: avg@{samples}, percent ± standard error over the runs",
        "",
        "| benchmark | score | questions | cut off |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.2f}"
        score = "not judged" if result.score is None else f"{result.score:.2f}{error}"
        lines.append(f"| {result.benchmark.name} | {score} | {result.questions} | {result.cut_off} |")
    for area in ("math", "visual"):
        mean = average(results, area)
        lines.append(f"| {area} average | {'—' if mean is None else f'{mean:.2f}'} | | |")
    return "\n".join(lines) + "\n"


def make_summary(results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """Makes summary.json: scores in percent, None where there is none."""
    entries = {
        result.benchmark.name: {
            "score": result.score,
            "standard_error": result.standard_error,
            "runs": len(result.runs),
            "questions": result.questions,
            "cut_off": result.cut_off,
            "status": "scored" if result.runs else "not judged",
        }
        for result in results
    }
    return {
        "benchmarks": entries,
        "math_average": average(results, "math"),
        "visual_average": average(results, "visual"),
    }


def make_official(results: Sequence[BenchmarkResult], *, samples: int, judge_model: str | None) -> dict[str, Any]:
    """Makes results.json in the official repository's schema, version 1.

    It has the scored benchmarks only, and names the judge that was used: the official `va_opd.evaluation --results`
    refuses anything but all eight, eight samples, the paper's judge, and OCRBench's 1000 questions.
    """
    protocol = {
        "samples_per_prompt": samples,
        "student_temperature": 1.0,
        "aggregation": f"avg@{samples}",
        "prompt_policy": "released",
        "answer_policy": "first_committed",
        "judge_model": judge_model,
        "judge_temperature": 0.0,
        "judge_prompt_policy": "official_verbatim",
    }
    benchmarks = {
        result.benchmark.name: {
            "split": result.benchmark.split,
            "metric_unit": result.benchmark.unit,
            "runs": [
                {"sample_index": sample, "num_examples": result.questions, "metrics": dict(run)}
                for sample, run in enumerate(result.runs)
            ],
        }
        for result in results
        if result.runs
    }
    return {"schema_version": 1, "protocol": protocol, "benchmarks": benchmarks}
