"""Servers that tests share, as a pytest plugin. Each starts when the first test asks for it.

Imports here are lazy: the plugin is loaded by every run of the tests, also by those that need no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.support.api import Api
    from tests.support.system import System
    from tests.support.teacher import TeacherInProcess
    from vaopd.queue.embedded import EmbeddedRedis


def pytest_sessionfinish() -> None:
    """Ends the process that others were forked from, before tests/support/leftovers.py looks."""
    from tests.support import preloaded

    preloaded.close()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A Valkey for all tests of the queue; each has a `job` of its own there."""
    from vaopd.queue.embedded import EmbeddedRedis

    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A Valkey and a teacher process, shared by the jobs of all tests, as in real use."""
    from tests.support.system import System

    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherInProcess]:
    """The tiny teacher's server, in this process; shared by a module's tests."""
    from tests.support.models import tiny_vlm
    from tests.support.teacher import teacher_in_process

    with teacher_in_process(tiny_vlm()) as running:
        yield running


@pytest.fixture(scope="module")
def api(teacher: TeacherInProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The scoring API in front of the module's `teacher`, a process of its own."""
    from tests.support.api import start_api

    yield from start_api(tmp_path_factory.mktemp("api"), teacher.target)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Not for the whole session: its event loop would be in the way of asynchronous tests."""
    from tests.support.viewer import chromium

    with chromium() as running:
        yield running
