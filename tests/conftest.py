"""Fixtures that every test may use. What is heavy is imported by those that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.api import Api
    from tests.support.teacher import TeacherInProcess

pytest_plugins = ["tests.support.programs"]

# Each process gets one core: two OpenMP threads per process under contention ran up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Their tests are inherited by two modules.
pytest.register_assert_rewrite("tests.support.queue_contract", "tests.support.queue_fault_contract")


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherInProcess]:
    """The tiny teacher's server, in this process; shared by a module's tests."""
    from tests.support.models import tiny_vlm
    from tests.support.teacher import teacher_in_process

    with teacher_in_process(tiny_vlm()) as running:
        yield running


@pytest.fixture(scope="module")
def api(teacher: TeacherInProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The scoring API in front of it, a process of its own."""
    from tests.support.api import start_api

    yield from start_api(tmp_path_factory.mktemp("api"), teacher.target)
