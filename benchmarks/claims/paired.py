"""What both comparisons need: differences that are paired by seed, and their page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "when_va_opd_helps.md"

T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
"""Student's t, two-sided 95 %, by degrees of freedom."""


class Difference(NamedTuple):
    """Mean of paired differences, half of the 95 % interval, seeds above 0 and seeds in all."""

    mean: float
    half: float
    above: int
    seeds: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half) else f" ± {self.half:.3f}"
        return f"{self.mean:+.3f}".replace("-", "−") + f"{interval} ({self.above}/{self.seeds})"


def summarise_differences(values: Sequence[float]) -> Difference:
    """Returns mean and 95 % interval of each seed's difference; no interval for a single seed.

    >>> print(summarise_differences([0.1, 0.2, 0.3]))
    +0.200 ± 0.248 (3/3)
    """
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(statistics.fmean(values), half, sum(value > 0 for value in values), len(values))


def write_tables(tables: str, *, begin: str, end: str) -> None:
    """Replaces what stands between two marks of the page."""
    before, rest = PAGE.read_text().split(begin)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{begin}\n\n{tables.strip()}\n\n{end}{after}")
