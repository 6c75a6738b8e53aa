"""A short soak; `make soak` takes ten minutes and watches the memory too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import soak


@pytest.mark.slow
def test_descriptors_threads_and_keys_are_as_many_after_a_mixed_load_as_before(tmp_path: Path) -> None:
    result = soak.run(tmp_path, minutes=1 / 3)
    assert result.problems == []
    assert result.groups_trained > 0
    assert sum(result.calls.values()) > 50
