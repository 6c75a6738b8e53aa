"""The packages of each extra, from the installed metadata or from a source tree that is not installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from vaopd.process import extras


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    extras._read_extras.cache_clear()
    yield
    extras._read_extras.cache_clear()


@pytest.mark.usefixtures("not_installed")
def test_a_source_tree_s_extras_are_pyproject_s() -> None:
    assert extras.list_packages("api")[:2] == ("matplotlib", "cachetools")  # `report`, which `api` includes, first
    assert set(extras.list_packages("model")) < set(extras.list_packages("trainer"))
    assert extras.list_packages("unknown") == ()
    extras.require("teacher", "trainer")
    assert extras.explain_missing_module(ModuleNotFoundError(name="uvicorn"), "teacher") == (
        "uvicorn is not installed; pip install 'vaopd[api]'"
    )
