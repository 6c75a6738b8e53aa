"""A rolling restart, with one round; `python -m tests.faults.restarts` makes twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import restarts


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_accepted_call(tmp_path: Path) -> None:
    report = restarts.run(tmp_path, rounds=1)
    assert report.problems == []
    assert report.restarts == 2
    assert report.groups > 30
    assert report.calls > 10
