"""The supply chain: locks against pyproject.toml and installed packages, vulnerable versions, base images; offline."""

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
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ROOT / "deploy" / "locks"
LEFT_OUT = {"torchaudio", "torchcodec"}
EXTRAS = {"dev": ("cpu", "dev"), "cpu": ("cpu",), "gpu": ("gpu",)}
# The newest version with a known vulnerability that concerns what is done here; SECURITY.md names them.
VULNERABLE = {
    "h11": "0.15.0",
    "idna": "3.6",
    "jinja2": "3.1.5",
    "pillow": "12.3.0",
    "python-multipart": "0.0.29",
    "setuptools": "78.1.0",
    "starlette": "1.3.0",
    "torch": "2.9.1",
}
HOST = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]


def blocks(profile: str) -> Iterator[tuple[str, list[str]]]:
    """Each requirement of the lock, that of torch too, with its digests."""
    names = [profile] if profile == "gpu" else [profile, "torch-cpu"]
    for text in ((LOCKS / f"{name}.txt").read_text() for name in names):
        for block in re.sub(r"\\\n", "", text).splitlines():
            if not block.startswith("#"):
                yield block.partition(" --hash")[0].strip(), re.findall(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)", block)


def environment(python: str) -> dict[str, str]:
    return HOST | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def locked(profile: str, python: str) -> dict[str, str]:
    """Package -> version that the lock gives on such a host."""
    found = {}
    for line, _ in blocks(profile):
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
def test_every_package_has_digests_but_torch_whose_index_may_be_out_of_reach(profile: str) -> None:
    without = {line for line, digests in blocks(profile) if not digests}
    assert without <= {"torch==2.13.0+cpu"}
    assert profile != "gpu" or not without


@pytest.mark.parametrize("python", PYTHONS)
def test_the_images_hold_what_was_tested(python: str) -> None:
    assert locked("cpu", python).items() <= locked("dev", python).items()


def test_versions_with_known_vulnerabilities_are_excluded() -> None:
    build = [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    ]
    declared = [*build, *asked(tuple(PROJECT["optional-dependencies"]))]
    for name, version in VULNERABLE.items():
        found = [requirement for requirement in declared if canonicalize_name(requirement.name) == name]
        assert found, name
        assert not [str(requirement) for requirement in found if requirement.specifier.contains(version)]
        for profile in EXTRAS:
            assert Version(locked(profile, "3.11")[name]) > Version(version)


def test_images_install_what_has_a_digest_from_bases_with_a_tag() -> None:
    for profile in ("cpu", "gpu"):
        text = (ROOT / "deploy" / f"{profile}.Dockerfile").read_text()
        installs = re.findall(r"pip install .*", text)
        assert [line for line in installs if f"--no-deps --require-hashes -r /locks/{profile}.txt" in line]
        assert all("--no-deps" in line for line in installs)
    files = [*(ROOT / "deploy").rglob("*Dockerfile"), ROOT / "docker-compose.yml"]
    bases = [
        base for path in files for base in re.findall(r"^(?:FROM|\s*image:) (docker\.io\S+)$", path.read_text(), re.M)
    ]
    assert len(bases) == 5
    assert all(re.fullmatch(r"[^:@]+:(?!latest)[^:@]+(@sha256:[0-9a-f]{64})?", base) for base in bases)
    assert len({"@" in base for base in bases}) == 1, "once a base image is pinned, all are: make pin-images"


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
                # uv reads one wheel's metadata for all platforms: see UNSEEN and LEFT_OUT in lock.py.
                assert canonicalize_name(requirement.name) in LEFT_OUT, f"{name} {version}: {requirement} is not locked"
                continue
            assert requirement.specifier.contains(found, prereleases=True), f"{name} {version}: {requirement}, {found}"
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("profile", EXTRAS)
def test_a_lock_has_its_date_and_names_no_host(profile: str) -> None:
    text = (LOCKS / f"{profile}.txt").read_text()
    dated = re.match(r"# \S.*: resolved on (\d{4}-\d\d-\d\d) by deploy/locks/lock\.py\n", text)
    assert dated
    assert date(2026, 1, 1) < date.fromisoformat(dated[1]) <= date.today()
    assert "://" not in text
    assert "@" not in text
