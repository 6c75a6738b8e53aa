"""Environment and plugins of all tests. Fixtures that several modules use live in the plugins, in tests/support."""

from __future__ import annotations

import os

import pytest

pytest_plugins = [
    "tests.support.leftovers",
    "tests.support.programs",
    "tests.support.servers",
    "tests.support.queue_jobs",
    "tests.support.collectors",
]

# Each process gets one core: two OpenMP threads per process under contention ran up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Their tests are inherited by two modules.
pytest.register_assert_rewrite("tests.support.queue_contract", "tests.support.queue_fault_contract")
