"""docs/reliability.md names tests and commands for what it promises: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
TESTS = sorted(set(re.findall(r"`(\w+/\w+\.py)::(test_\w+)`", PAGE)))
FILES = sorted(set(re.findall(r"`(\w+/test_\w+\.py)`", PAGE)))
MODULES = sorted(set(re.findall(r"python -m (tests(?:\.\w+)+)", PAGE)))
TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+)", PAGE)))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_a_test_that_is_named_is_there(file: str, name: str) -> None:
    assert re.search(rf"^ *(?:async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_files_modules_and_targets_that_are_named_are_there() -> None:
    assert TESTS
    assert MODULES
    assert TARGETS
    assert [file for file in FILES if not (ROOT / "tests" / file).is_file()] == []
    assert [name for name in MODULES if not list(ROOT.glob(name.replace(".", "/") + "*"))] == []
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in TARGETS if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_no_row_promises_without_showing() -> None:
    for fault in rows("Faults"):
        assert len(fault) == 4
        assert "test_" in fault[3] or "make " in fault[3], fault
    for name, status, over_grpc, over_http in rows("Bad input"):
        assert name
        assert status
        assert "test_" in over_grpc + over_http or "the same" in over_grpc, name
