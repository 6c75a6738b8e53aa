"""Unit tests start no process and no server; one that does fails. Their queue is in memory."""

from __future__ import annotations

import multiprocessing.process
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
import pytest

from tests.support.memory_jobs import MemoryJob

# test_layers.py imports modules in a process in which torch can't be imported, and asks git for the tracked files.
MAY_START_PROCESSES = {"test_layers.py"}
STARTERS: list[tuple[Any, str]] = [
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (os, "posix_spawn"),
    (os, "system"),
    (socket.socket, "listen"),
    (grpc, "server"),
    (grpc.aio, "server"),
]
_STARTED = pytest.StashKey[list[str]]()
_PATCH = pytest.StashKey[pytest.MonkeyPatch]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Forbids the calls of `STARTERS` in the test and in every fixture that it is the first to need."""
    started = item.stash[_STARTED] = []
    patch = item.stash[_PATCH] = pytest.MonkeyPatch()
    if item.path.name not in MAY_START_PROCESSES:
        for owner, name in STARTERS:
            patch.setattr(owner, name, _refuse(f"{owner.__name__}.{name}", started))
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fails the test also where the code under test, or another thread, has caught the refusal."""
    try:
        result = yield
    finally:
        item.stash[_PATCH].undo()
    if started := item.stash[_STARTED]:
        pytest.fail(f"called {', '.join(started)}: a test that starts a process or a server belongs in tests/services")
    return result


def _refuse(name: str, started: list[str]) -> Callable[..., NoReturn]:
    def refuse(*_arguments: object, **_options: object) -> NoReturn:
        started.append(name)
        raise AssertionError(f"a unit test calls {name}")

    return refuse


@pytest.fixture
def a_job() -> MemoryJob:
    """A job on the queue in memory; elsewhere the fixture of this name is on a real Valkey."""
    return MemoryJob()
