"""A rolling restart, with few rounds; `python -m tests.faults.restarts` makes twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import restarts


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_accepted_call(tmp_path: Path) -> None:
    report = restarts.run(tmp_path, rounds=3)
    assert report.problems == []
    assert report.restarts == 6
    assert report.groups > 100
    assert report.calls > 30
