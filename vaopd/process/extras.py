"""The optional dependencies of each role, from the installed package's metadata, or a source tree's pyproject.toml.

`pip install vaopd` brings the client library and the command line. Everything else is an extra of pyproject.toml, and a
command that lacks one says so in one line.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from vaopd.errors import ConfigError

ROLES = ("teacher", "rollout", "trainer", "api")
"""The extras that are a process each; `services` is all of them."""

_ROOT = Path(__file__).parents[2]
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?")
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
_DISTRIBUTIONS = {
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "huggingface_hub": "transformers",  # which brings it
    "multipart": "python-multipart",
    "python_multipart": "python-multipart",
    "starlette": "fastapi",
}
"""Modules that are called otherwise than the distribution to install."""


def list_packages(extra: str) -> tuple[str, ...]:
    """Returns the distributions of an extra, those of the extras that it includes too; empty for an unknown one."""
    return tuple(dict.fromkeys(_collect_packages(extra)))


def find_missing_packages(extra: str) -> tuple[str, ...]:
    """Returns the distributions of an extra that are not installed."""
    return tuple(name for name in list_packages(extra) if find_version(name) is None)


def find_version(distribution: str) -> str | None:
    """Returns the installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def explain_missing_module(error: ImportError, extra: str) -> str | None:
    """Returns the line for a module that an extra brings; None for any other, which is a fault of ours.

    extra: the one that the command needs; if it doesn't have the module, the smallest that has is named.
    """
    module = error.name or ""
    distribution = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    having = [name for name in _read_extras() if distribution in list_packages(name)]
    if not having:  # a module of ours, or missing in the installed version of a package
        return None
    chosen = extra if extra in having else min(having, key=lambda name: len(list_packages(name)))
    return f"{distribution} is not installed; pip install 'vaopd[{chosen}]'"


def require(*extras: str) -> None:
    """Raises ConfigError, naming the distributions and the command that installs them, if any of them is missing."""
    missing = tuple(dict.fromkeys(name for extra in extras for name in find_missing_packages(extra)))
    if missing:
        asked = "services" if set(extras) >= set(ROLES) else ",".join(extras)
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'vaopd[{asked}]'")


def _collect_packages(extra: str) -> Iterator[str]:
    for name, included in _read_extras().get(extra, ()):
        if name != "vaopd":
            yield name
        for other in included:
            yield from _collect_packages(other)


@functools.cache
def _read_extras() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Extra -> its requirements as (distribution, extras of it)."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for extra, line in _list_requirements():
        if requirement := _REQUIREMENT.match(line):
            included = tuple((requirement[2] or "").split(",")) if requirement[1] == "vaopd" else ()
            found.setdefault(extra, []).append((requirement[1].lower(), included))
    return found


def _list_requirements() -> Iterator[tuple[str, str]]:
    """Yields (extra, requirement); those of pyproject.toml where the tree is used without being installed."""
    try:
        lines = importlib.metadata.requires("vaopd") or ()
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
        for extra, requirements in project["optional-dependencies"].items():
            yield from ((extra, line) for line in requirements)
        return
    for line in lines:
        if extra := _EXTRA.search(line):
            yield extra[1], line
