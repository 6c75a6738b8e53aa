"""deploy/locks against pyproject.toml and the installed packages' own requirements, without a network."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"cpu": ("cpu", "dev"), "gpu": ("gpu",)}
HOST = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]


def environment(python: str) -> dict[str, str]:
    return HOST | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def locked(profile: str, python: str) -> dict[str, str]:
    """Package -> version that the lock gives on such a host."""
    found = {}
    for line in (ROOT / "deploy" / "locks" / f"{profile}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def asked(extras: tuple[str, ...]) -> Iterator[Requirement]:
    """The requirements of these extras, those that they include too."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    for requirement in map(Requirement, lines):
        if requirement.name == "vaopd":
            yield from asked(tuple(requirement.extras))
        else:
            yield requirement


def test_three_pythons_are_declared() -> None:
    assert PYTHONS == ["3.11", "3.12", "3.13"]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("profile", EXTRAS)
def test_a_lock_meets_every_requirement(profile: str, python: str) -> None:
    versions = locked(profile, python)
    for requirement in asked(EXTRAS[profile]):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, locked at {version}"


@pytest.mark.parametrize("profile", EXTRAS)
def test_the_locked_packages_that_are_installed_agree_with_each_other(profile: str) -> None:
    """The others' metadata are not here; `make locks-check` asks the package index for them."""
    versions = locked(profile, ".".join(platform.python_version_tuple()[:2]))
    compared = 0
    for name, version in versions.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version != version:
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if (found := versions.get(canonicalize_name(requirement.name))) is None:
                continue  # uv reads one wheel's metadata for all platforms; as constraints, the others stay valid
            assert requirement.specifier.contains(found, prereleases=True), f"{name} {version}: {requirement}, {found}"
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("profile", EXTRAS)
def test_a_lock_has_its_date_and_names_no_host(profile: str) -> None:
    text = (ROOT / "deploy" / "locks" / f"{profile}.txt").read_text()
    dated = re.match(r"# \S.*: resolved on (\d{4}-\d\d-\d\d) by deploy/locks/lock\.py\n", text)
    assert dated
    assert date(2026, 1, 1) < date.fromisoformat(dated[1]) <= date.today()
    assert "://" not in text
    assert "@" not in text
