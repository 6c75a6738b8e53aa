"""What only rank 0 has: the job's queue and books, the held-out problems, and what tells people how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vaopd.queue import LeaseKeeper
from vaopd.run.ledger import Ledger
from vaopd.types import Prompt
from vaopd_trainer.collector import Collector
from vaopd_trainer.metrics import TrainerMetrics
from vaopd_trainer.records import ProgressLine


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
