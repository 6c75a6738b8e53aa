"""The eight benchmarks of the paper (appendix A.2): their data sets, metrics and units, and the score of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vaopd.errors import InvalidInput, NumericalError

SAMPLES = 8
"""Answers per question in the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark: its names, the metrics that its evaluator reports for one run, and their scale.

    name: ours and the official schema's. dataset, split: the evaluator's. judged: by a language model, not by rules.
    metrics: in percent, except OCRBench's final score. divisor: what the metrics' mean is divided by to be percent.
    """

    name: str
    dataset: str
    split: str
    area: Literal["math", "visual"]
    judged: bool
    metrics: tuple[str, ...] = ("accuracy",)
    unit: Literal["percent", "points_1000"] = "percent"
    divisor: float = 1.0

    def check(self, metrics: Mapping[str, object]) -> dict[str, float]:
        """Returns one run's metrics as numbers. Raises NumericalError for one that is missing or out of bounds."""
        bound = 100.0 * self.divisor
        values: dict[str, float] = {}
        for metric in self.metrics:
            value = metrics.get(metric)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not (math.isfinite(value) and 0 <= value <= bound)
            ):
                raise NumericalError(f"{self.name}: {metric} = {value!r} is not a number from 0 to {bound:g}")
            values[metric] = float(value)
        return values

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the reported score in percent: the mean of the metrics on a scale of 100.

        WeMath (strict + loose) / 2, HallusionBench (aAcc + fAcc + qAcc) / 3, OCRBench final score / 10, else accuracy.
        """
        return math.fsum(metrics[name] for name in self.metrics) / len(self.metrics) / self.divisor


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="wemath", dataset="WeMath", split="testmini", area="math", judged=False, metrics=("strict", "loose")
        ),
        Benchmark(name="mathvista", dataset="MathVista_MINI", split="testmini", area="math", judged=True),
        Benchmark(name="mathverse", dataset="MathVerse_MINI", split="testmini", area="math", judged=False),
        Benchmark(
            name="hallusionbench",
            dataset="HallusionBench",
            split="test",
            area="visual",
            judged=True,
            metrics=("aAcc", "fAcc", "qAcc"),
        ),
        Benchmark(name="ai2d", dataset="AI2D_TEST", split="test", area="visual", judged=False),
        Benchmark(name="mmmu", dataset="MMMU_DEV_VAL", split="validation", area="visual", judged=True),
        Benchmark(name="mmstar", dataset="MMStar", split="val", area="visual", judged=True),
        Benchmark(
            name="ocrbench",
            dataset="OCRBench",
            split="test",
            area="visual",
            judged=False,
            metrics=("final_score",),
            unit="points_1000",
            divisor=10.0,
        ),
    )
}
"""In the order of the paper's table: three of mathematics, five visual ones."""


def find_benchmarks(names: str) -> Sequence[Benchmark]:
    """Returns the benchmarks of a comma-separated list in the table's order; "all" is all of them.

    Raises InvalidInput for an unknown name.
    """
    wanted = set(BENCHMARKS) if names == "all" else {name.strip().lower() for name in names.split(",")}
    if unknown := sorted(wanted - set(BENCHMARKS)):
        raise InvalidInput(f"no benchmark is called {', '.join(map(repr, unknown))}; there are {', '.join(BENCHMARKS)}")
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in wanted]
