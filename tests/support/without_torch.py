"""A pytest plugin for an environment without torch: a test that needs it, or a library upon it, is skipped.

python -m pytest -p tests.support.without_torch tests/unit
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

NEEDED = re.compile(
    r"(ModuleNotFoundError: No module named '|import_module\(')"
    r"(torch|transformers|safetensors|datasets|huggingface_hub)\b"
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A module that can't be imported is skipped."""
    return _skip((yield), collector)  # type: ignore[func-returns-value]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """So is a test that imports later."""
    return _skip((yield), item)  # type: ignore[func-returns-value]


def _skip(report: Any, node: pytest.Item | pytest.Collector) -> Any:
    if report.failed and NEEDED.search(str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 0, "Skipped: needs torch")
    return report
