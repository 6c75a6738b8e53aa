"""Collectors over a queue, with policies 0 to 3 announced, as a pytest plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from vaopd.queue import TrainerEnd
from vaopd.run.ledger import Ledger
from vaopd.types import PolicyVersion
from vaopd_trainer.collector import Collector

MakeCollector = Callable[..., Collector]


def a_policy(version: int, *, sha256: str = "ab" * 32) -> PolicyVersion:
    """By default with the weights that `an_answer` says it was sampled from."""
    return PolicyVersion(version=version, path=f"/run/policy/v{version:06d}", sha256=sha256)


def never() -> None:
    """A check that ends no waiting."""


@pytest.fixture
def make_collector(tmp_path: Path) -> Iterator[MakeCollector]:
    """One ledger for all, tmp_path/ledger.jsonl, as for a trainer and its successors."""
    with ExitStack() as stack:

        def make(queue: TrainerEnd, **options: Any) -> Collector:
            ledger = stack.enter_context(closing(Ledger(tmp_path / "ledger.jsonl", owner=queue.owner, fresh=False)))
            collector = Collector(queue=queue, ledger=ledger, **options)
            for version in range(4):
                collector.publish(a_policy(version), check=never)
            return collector

        yield make
