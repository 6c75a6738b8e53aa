"""A small chaos run with every kind of fault; `make chaos` is the large one. A failure names its seed."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.faults.chaos.driver import Chaos


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")  # shown when the run ends in an exception, too
    result = Chaos(tmp_path / "chaos", seed=seed, groups=800).run()
    assert result.problems == [], f"seed {seed}"
    assert result.weights == result.expected_weights
    assert result.dead == result.expected_dead
