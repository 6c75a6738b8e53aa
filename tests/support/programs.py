"""Programs of the operating system that some tests need. As a pytest plugin, counts the tests skipped without them.

With `VAOPD_TESTS_REQUIRE_PROGRAMS=1` (set by `.ci/run`) such a test fails instead.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pytest

MISSING = " is not installed: apt install "


def find_program(*names: str, package: str) -> str:
    """Returns the path of the first of `names` that is installed; without one, skips or fails the test.

    `package`: the Debian package that contains it.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = f"{names[0]}{MISSING}{package}"
        if os.environ.get("VAOPD_TESTS_REQUIRE_PROGRAMS") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests were skipped because a program is missing, and how to install it."""
    skipped: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        _file, _line, reason = report.longrepr
        _, missing, package = reason.rpartition(MISSING)
        if missing:
            skipped[package] += 1
    if skipped:
        counts = ", ".join(f"{count} need {package}" for package, count in sorted(skipped.items()))
        remedy = " ".join(sorted(skipped))
        terminalreporter.write_line(f"{skipped.total()} tests skipped ({counts}). To run them: apt install {remedy}")
