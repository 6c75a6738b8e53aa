"""The eight benchmarks of the paper (appendix A.2): their data sets, metrics and units, and the score of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vaopd.errors import InvalidInput, NumericalError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: its names, the metrics that its evaluator reports for one run, and their scale.

    name: ours and the official schema's. dataset, split: the evaluator's. judged: by a language model, not by rules.
    """

    name: str
    dataset: str
    split: str
    area: Literal["math", "visual"]
    judged: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    unit: Literal["percent", "points_1000"] = "percent"

    @property
    def bound(self) -> float:
        """The largest value of each metric."""
        return 1000.0 if self.unit == "points_1000" else 100.0

    def check(self, metrics: Mapping[str, object]) -> dict[str, float]:
        """Returns one run's metrics as numbers. Raises NumericalError for one that is missing or out of bounds."""
        values: dict[str, float] = {}
        for metric in self.metrics:
            value = metrics.get(metric)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= self.bound:
                raise NumericalError(f"{self.name}: {metric} = {value!r} is not a number from 0 to {self.bound:g}")
            values[metric] = float(value)
        return values

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the reported score in percent: the mean of the metrics on a scale of 100.

        WeMath (strict + loose) / 2, HallusionBench (aAcc + fAcc + qAcc) / 3, OCRBench final score / 10, else accuracy.
        """
        return 100.0 * math.fsum(metrics[name] for name in self.metrics) / len(self.metrics) / self.bound


BENCHMARKS = (
    Benchmark("wemath", "WeMath", "testmini", "math", metrics=("strict", "loose")),
    Benchmark("mathvista", "MathVista_MINI", "testmini", "math", judged=True),
    Benchmark("mathverse", "MathVerse_MINI", "testmini", "math"),
    Benchmark("hallusionbench", "HallusionBench", "test", "visual", judged=True, metrics=("aAcc", "fAcc", "qAcc")),
    Benchmark("ai2d", "AI2D_TEST", "test", "visual"),
    Benchmark("mmmu", "MMMU_DEV_VAL", "validation", "visual", judged=True),
    Benchmark("mmstar", "MMStar", "val", "visual", judged=True),
    Benchmark("ocrbench", "OCRBench", "test", "visual", metrics=("final_score",), unit="points_1000"),
)
"""In the order of the paper's table: three of mathematics, five visual ones."""


def find_benchmarks(names: str) -> Sequence[Benchmark]:
    """Returns the benchmarks of a comma-separated list in the table's order; "all" is all of them.

    Raises InvalidInput for an unknown name.
    """
    known = [benchmark.name for benchmark in BENCHMARKS]
    wanted = set(known) if names == "all" else {name.strip().lower() for name in names.split(",")}
    if unknown := sorted(wanted - set(known)):
        raise InvalidInput(f"no benchmark is called {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [benchmark for benchmark in BENCHMARKS if benchmark.name in wanted]
