"""Tests that need Chromium or Prometheus on a machine without them: skipped and counted, or failed where required."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TESTS = """
import pytest

from tests.support.prometheus import binary
from tests.support.viewer import chromium

@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running

@pytest.mark.parametrize("page", range(3))
def test_page(browser, page): ...

def test_rules():
    binary("promtool")

def test_alerts():
    binary("prometheus")

def test_of_another_kind():
    pytest.skip("on purpose")

def test_without_programs(): ...
"""


def run_tests(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.programs", "--numprocesses", "1", folder]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": str(folder), "VAOPD_CHROMIUM": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_summary_counts_the_skipped_tests_and_names_the_packages(tmp_path: Path) -> None:
    run = run_tests(tmp_path, VAOPD_TESTS_REQUIRE_PROGRAMS="")

    assert run.returncode == 0, run.stdout
    assert (
        "5 tests skipped (3 need chromium, 2 need prometheus). To run them: apt install chromium prometheus\n"
        in run.stdout
    )
    assert "1 passed, 6 skipped" in run.stdout


def test_where_programs_are_required_the_tests_without_them_fail(tmp_path: Path) -> None:
    run = run_tests(tmp_path, VAOPD_TESTS_REQUIRE_PROGRAMS="1")

    assert run.returncode == 1, run.stdout
    assert "chromium is not installed: apt install chromium" in run.stdout
    assert "promtool is not installed: apt install prometheus" in run.stdout
    assert "tests skipped (" not in run.stdout
    assert "1 passed, 1 skipped" in run.stdout
