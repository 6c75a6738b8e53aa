"""What only rank 0 has: the job's queue and books, the held-out problems, and what tells people how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.trainer.collector import Collector
from services.trainer.monitoring import TrainerMetrics
from services.trainer.records import ProgressLine
from vaopd.ledger import Ledger
from vaopd.queue import LeaseKeeper
from vaopd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    collector: Collector
    ledger: Ledger
    keeper: LeaseKeeper
    validation: Sequence[Prompt]
    progress_line: ProgressLine
    metrics: TrainerMetrics

    def evaluating(self, done: int, total: int) -> None:
        self.metrics.progressed()
        self.progress_line.evaluating(done, total)
