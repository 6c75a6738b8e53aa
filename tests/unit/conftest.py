"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from tests.support.memory_jobs import MemoryJob


@pytest.fixture
def a_job() -> MemoryJob:
    """A job on the queue in memory; elsewhere the fixture of this name is on a real Valkey."""
    return MemoryJob()
