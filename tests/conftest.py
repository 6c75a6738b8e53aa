"""Environment and plugins of all tests. Fixtures that several modules use live in the plugins, in tests/support."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile

import pytest

from vaopd.vlm.torchvision_compat import ensure_torchvision

pytest_plugins = [
    "tests.support.leftovers",
    "tests.support.programs",
    "tests.support.servers",
    "tests.support.queue_jobs",
    "tests.support.collectors",
]

# Until `pytest_collection_finish`: a sixth of the time in which the tests' modules, torch among them, are imported.
gc.disable()
# Each process gets one core: two OpenMP threads per process under contention ran up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests import transformers, which imports PEFT, which imports what needs torchvision. Some run without torch.
if importlib.util.find_spec("torch") is not None:
    ensure_torchvision()
# What commands measure of their data sets, for this process and those that it starts; emptied when it ends.
_MEASURES = tempfile.TemporaryDirectory(prefix="vaopd-measures-")
os.environ["VAOPD_CACHE"] = _MEASURES.name
# Their tests are inherited by two modules.
pytest.register_assert_rewrite("tests.support.queue_contract", "tests.support.queue_fault_contract")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins a long one when the others have nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.enable()
